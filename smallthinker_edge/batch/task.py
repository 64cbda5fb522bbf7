"""What is asked about each line: a request with places for the line's fields. Knows no model and no files but its own.

A line becomes the request that create_chat_completion() or create_completion() takes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from smallthinker_edge.completions.arguments import CHAT_ARGUMENTS, LOCAL, TEXT_ARGUMENTS, checked_arguments
from smallthinker_edge.options import OPTIONS
from smallthinker_edge.text.chat import plain_messages

LONGEST_LINE = 16 << 20  # bytes
PLACE = re.compile(r"\{\{([^\W\d][\w.-]*)\}\}|\{([^\W\d][\w.-]*)\}")
# What a task decides by itself: a line has one answer, and it is whole.
NOT_FOR_TASKS = LOCAL | {"n", "model", "stream", "stream_options", "echo"}
LineKind = Literal["json", "text"]


def digest_of(data: bytes) -> str:
    """16 hex digits that differ where data does."""
    return hashlib.sha256(data).hexdigest()[:16]


@dataclass(frozen=True)
class Line:
    """A line of the input: its number, from 1, and its bytes without the line end."""

    number: int
    data: bytes


@dataclass(frozen=True)
class Task:
    """What is asked about each line.

    Attributes:
        request: {"messages": [...]} or {"prompt": ...}, in whose texts {name} stands for a field of the line, and
            arguments of create_chat_completion() or create_completion().
        lines: "json": a line is a JSON object, and its fields are what it holds; "text": it is the field `text`.
        id_field: the field that names a line in its answer, where it has one.

    Raises ValueError and TypeError, as the calls, for a request that they would not take or without any place.
    """

    request: Mapping[str, Any]
    lines: LineKind
    id_field: str = "id"

    def __post_init__(self) -> None:
        if ("messages" in self.request) == ("prompt" in self.request):
            raise ValueError("a task must have either 'messages' or 'prompt'")
        if self.is_chat:
            plain_messages(self.request["messages"])
        elif not isinstance(self.request["prompt"], str):
            raise TypeError("the prompt of a task must be text")
        if not any(match.group(2) for match in PLACE.finditer(json.dumps(self._asked, ensure_ascii=False))):
            raise ValueError("the task has no place for a field of a line, such as {text}")
        if unknown := sorted(self.arguments.keys() & NOT_FOR_TASKS):
            raise TypeError(f"a task cannot have {', '.join(unknown)}")
        _, options = checked_arguments(self.arguments, CHAT_ARGUMENTS if self.is_chat else TEXT_ARGUMENTS)
        for name, value in options.items():
            OPTIONS[name].checked(name, value)

    @property
    def is_chat(self) -> bool:
        return "messages" in self.request

    @property
    def _asked(self) -> Any:
        return self.request["messages" if self.is_chat else "prompt"]

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the call, besides what is asked."""
        return {name: value for name, value in self.request.items() if name not in ("messages", "prompt")}

    @property
    def is_structured(self) -> bool:
        """Whether answers are bound to a grammar."""
        form = self.request.get("response_format")
        return (form is not None and form.get("type") != "text") or bool(self.request.get("tools"))

    def fields(self, line: Line) -> Mapping[str, Any]:
        """What the line holds. Raises ValueError for one that is no UTF-8, no JSON object or too long."""
        if len(line.data) > LONGEST_LINE:
            raise ValueError(f"the line has more than {LONGEST_LINE} bytes")
        try:
            text = line.data.decode("utf-8-sig" if line.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"the line is no UTF-8: {error}") from None
        if self.lines == "text":
            return {"text": text}
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the line is no JSON: {error}") from None
        if not isinstance(found, dict):
            raise ValueError("the line is no JSON object")
        return found

    def asked(self, fields: Mapping[str, Any]) -> Any:
        """The messages or the prompt for a line. Raises ValueError for a field that it does not have."""
        return _filled(self._asked, fields)

    def digest(self, settings: Mapping[str, Any]) -> str:
        """16 hex digits that differ where the task or the settings do, which JSON must be able to hold."""
        whole = [self.request, self.lines, self.id_field, settings]
        return digest_of(json.dumps(whole, sort_keys=True).encode())


def read_task(
    path: str | os.PathLike[str], lines: LineKind, arguments: Mapping[str, Any], id_field: str = "id"
) -> Task:
    """A task from a file: `.json` holds the request, or only its messages; any other one is a user's message.

    Args:
        arguments: of the calls, which go before those of the file.

    Raises OSError, and as Task.
    """
    text = Path(path).read_text(encoding="utf-8")
    request: Any = {"messages": [{"role": "user", "content": text.removesuffix("\n")}]}
    if Path(path).suffix == ".json":
        try:
            request = json.loads(text)
        except RecursionError as error:
            raise ValueError(f"{path}: {error}") from None
        request = {"messages": request} if isinstance(request, list) else request
        if not isinstance(request, dict):
            raise ValueError(f"{path} must hold an object with 'messages' or 'prompt', or a list of messages")
    return Task({**request, **arguments}, lines, id_field)


def _filled(asked: Any, fields: Mapping[str, Any]) -> Any:
    if isinstance(asked, str):
        return PLACE.sub(lambda match: _place(match, fields), asked)
    if isinstance(asked, list):
        return [_filled(item, fields) for item in asked]
    if isinstance(asked, dict):
        return {name: _filled(item, fields) for name, item in asked.items()}
    return asked


def _place(match: re.Match[str], fields: Mapping[str, Any]) -> str:
    if match.group(1):
        return "{" + match.group(1) + "}"
    name = match.group(2)
    value: Any = fields
    for key in [name] if name in fields else name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(f"the line has no field {name!r:.80}")
        value = value[key]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
