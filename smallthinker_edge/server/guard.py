"""Who may ask, and how much at once: API key, names of the host, origins. An ASGI layer around the routes."""

from __future__ import annotations

import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from smallthinker_edge.server.errors import RequestError, error_response
from smallthinker_edge.server.settings import Settings

OPEN_PATHS = frozenset({"/", "/healthz"})  # they tell nothing and cost nothing


class Guard:
    """Answers what must not reach a route."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._hosts = app, settings.hosts
        self._key = None if settings.api_key is None else _digest(settings.api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope["path"], Headers(scope=scope))
            except RequestError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, path: str, headers: Headers) -> None:
        host = headers.get("host", "")
        if "*" not in self._hosts and _name(host) not in self._hosts:
            raise RequestError(403, "this server is not known by that name; `serve --allow-host` adds one")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise RequestError(403, "pages of other origins may not use this server")
        if self._key is None or path in OPEN_PATHS:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        # Digests are compared, so that the time tells neither the key nor its length.
        if not hmac.compare_digest(_digest(token.strip()), self._key) or scheme.lower() != "bearer":
            raise RequestError(401, "the API key is missing or wrong", {"WWW-Authenticate": "Bearer"})


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _name(host: str) -> str:
    """A Host header without its port: "[::1]:80" is "[::1]"."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() and not (name.count(":") and not name.endswith("]")) else host
