"""Reads a request's body within bounds, and takes from it what the library knows."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from smallthinker_edge.completions.arguments import LOCAL
from smallthinker_edge.options import Option
from smallthinker_edge.server.errors import RequestError
from smallthinker_edge.server.settings import Settings

logger = logging.getLogger(__name__)
BODIES_HELD = 4  # largest bodies that are held at once
LINGER = 8  # largest bodies that are read of one that is too large
LEAST_TOP_P = 1e-6  # keeps the likeliest token only


class BodyReader:
    """Reads bodies, so many bytes at once of all of them together, whatever clients send."""

    def __init__(self, settings: Settings) -> None:
        self._most, self._seconds = settings.most_body, settings.body_seconds
        self._held = 0

    async def read_object(self, request: Request) -> dict[str, Any]:
        """The JSON object that a request holds. Raises RequestError 400, 408, 413 or 503."""
        data = bytearray()
        try:
            await asyncio.wait_for(self._read(request, data), self._seconds)
            value = json.loads(data)
        except asyncio.TimeoutError:
            raise RequestError(408, f"the body took longer than {self._seconds:g} s") from None
        except (ValueError, RecursionError) as error:
            raise RequestError(400, f"the body is not JSON: {error}") from None
        finally:
            self._held -= len(data)
        if not isinstance(value, dict):
            raise RequestError(400, "the body must be a JSON object")
        return value

    async def _read(self, request: Request, data: bytearray) -> None:
        size = 0
        refusal: RequestError | None = None
        async for part in request.stream():
            size += len(part)
            if size > self._most:
                refusal = RequestError(413, f"the body is larger than {self._most} bytes", {"Connection": "close"})
            elif self._held + len(part) > BODIES_HELD * self._most:
                refusal = RequestError(503, "too many large requests at once", {"Retry-After": "1"})
            if refusal is None:
                data.extend(part)
                self._held += len(part)
            elif size > LINGER * self._most:
                break
        if refusal is not None:  # told when all is read: a client that still sends would not see it
            raise refusal


def known_arguments(
    body: Mapping[str, Any], known: Mapping[str, Option], own: frozenset[str], settings: Settings, context: int
) -> dict[str, Any]:
    """The call's arguments in a body: others are left out, which the log says; lengths are clipped, defaults filled in.

    Args:
        known: what the library takes. own: keys that the route reads itself. context: positions of the model.
    """
    usable = known.keys() - LOCAL
    ignored = sorted(body.keys() - usable - own)
    if ignored:
        logger.info("ignored arguments: %s", ", ".join(repr(name[:60]) for name in ignored[:20]))
    arguments = {name: _meant(name, body[name], known[name]) for name in usable & body.keys() if body[name] is not None}
    most = context if settings.most_tokens is None else min(context, settings.most_tokens)
    for name in ("max_tokens", "max_completion_tokens"):
        if _is_whole(arguments.get(name)):
            arguments[name] = most if arguments[name] < 0 else min(arguments[name], most)
    defaults = {name: value for name, value in settings.defaults.items() if name in usable}
    if "max_completion_tokens" in arguments:
        defaults.pop("max_tokens", None)
    elif settings.most_tokens is not None:
        defaults.setdefault("max_tokens", most)
    return {**defaults, **arguments}


def _meant(name: str, value: Any, option: Option) -> Any:
    """The value that is meant by one that clients let people choose and the library refuses."""
    if option.kind == "int" and isinstance(value, float) and math.isfinite(value):
        value = int(value)
    if name == "seed" and _is_whole(value):  # any, -1 for example
        return value % 2**64
    if name == "top_p" and value == 0 and not isinstance(value, bool):
        return LEAST_TOP_P
    if name == "stop" and isinstance(value, str | list):  # a list that was typed with a comma too many
        return [text for text in ([value] if isinstance(value, str) else value) if text != ""]
    return value


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
