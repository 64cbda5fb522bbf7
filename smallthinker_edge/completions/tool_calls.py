"""Calls of tools: how a model is told of its tools where its template cannot, and how its calls are found in a text.

The form is that of Hermes and Qwen: <tool_call>{"name": ..., "arguments": {...}}</tool_call>. Knows no model.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from smallthinker_edge.completions.shapes import ToolCall
from smallthinker_edge.text.chat import plain_messages

OPEN, CLOSE = "<tool_call>", "</tool_call>"
INSTRUCTIONS = """# Tools

These functions can be called:
<tools>
{tools}
</tools>

To call one, write only this, with its name and arguments as JSON:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>"""


@dataclass(frozen=True)
class Tools:
    """The tools of a request.

    Attributes:
        listed: as they were given, for the template. callable: {name: JSON schema of its arguments}, of those that
            may be called. strict: names of those whose schemas must hold to the letter; of the others' what cannot be
            enforced is left out. required: at least one must be called. single: only one may be.
    """

    listed: Sequence[Mapping[str, Any]] = ()
    callable: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    strict: frozenset[str] = frozenset()
    required: bool = False
    single: bool = False


def read_tools(tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any]) -> Tools:
    """The arguments `tools` and `tool_choice`. Raises ValueError for what OpenAI's API does not know."""
    schemas: dict[str, Mapping[str, Any]] = {}
    strict: set[str] = set()
    for i, tool in enumerate(tools):
        function = tool.get("function")
        if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
            raise ValueError(f"tools: tool {i} must be {{'type': 'function', 'function': {{...}}}}, not {tool!r:.80}")
        name, parameters = function.get("name"), function.get("parameters") or {"type": "object"}
        if not isinstance(name, str) or not name or not isinstance(parameters, Mapping):
            raise ValueError(f"tools: the function of tool {i} must have a name, and parameters that are an object")
        schemas[name] = parameters
        if function.get("strict") is True:
            strict.add(name)
    if isinstance(choice, str) and choice in ("auto", "none", "required"):
        if choice == "required" and not schemas:
            raise ValueError("tool_choice is 'required', but there are no tools")
        return Tools() if choice == "none" else Tools(tools, schemas, frozenset(strict), choice == "required")
    named = choice.get("function") if isinstance(choice, Mapping) else None
    name = named.get("name") if isinstance(named, Mapping) else None
    if name not in schemas:
        raise ValueError(f"tool_choice must be auto, none, required or a function among the tools, not {choice!r:.80}")
    return Tools(tools, {name: schemas[name]}, frozenset(strict & {name}), required=True, single=True)


def speaks_of_tools(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a conversation holds calls of tools or their answers. Raises ChatTemplateError as plain_messages()."""
    return any(message["role"] == "tool" or message.get("tool_calls") for message in plain_messages(messages))


def told_in_text(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation for a template that knows nothing of tools: they, calls and answers become text of messages."""
    told = [_as_text(message) for message in plain_messages(messages)]
    text = INSTRUCTIONS.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)) if tools else ""
    if text and told[0]["role"] == "system":
        told[0]["content"] = f"{told[0]['content']}\n\n{text}"
    elif text:
        told.insert(0, {"role": "system", "content": text})
    return told


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    parts = [content] if content else []
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        said = {"name": function["name"], "arguments": function.get("arguments") or {}}
        parts.append(f"{OPEN}\n{json.dumps(said, ensure_ascii=False)}\n{CLOSE}")
    return {"role": message["role"], "content": "\n".join(parts)}


def read_call(text: str, names: frozenset[str]) -> ToolCall | None:
    """The call that a text between the marks holds; None where it is no JSON, or of no function that there is."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):  # some models write JSON as a string
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict | None):
        return None
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": str(value["name"]), "arguments": json.dumps(arguments or {}, ensure_ascii=False)},
    }


class CallFinder:
    """Parts a text that comes in pieces into content and calls.

    What may be the beginning of a mark waits, and so does white space, which is dropped around calls. A call that
    cannot be read is content, as it was written.

    Args:
        names: of the functions that there are.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._held = ""
        self._inside = False
        self._after_call = False
        self.found = 0

    def push(self, text: str) -> list[str | ToolCall]:
        """What is certain after another piece: content and calls, in order."""
        self._held += text
        parts: list[str | ToolCall] = []
        while True:
            mark = CLOSE if self._inside else OPEN
            at = self._held.find(mark)
            if at < 0:
                break
            before, self._held = self._held[:at], self._held[at + len(mark) :]
            parts += self._call(before, mark) if self._inside else self._content(before.rstrip())
            self._inside = not self._inside
        if not self._inside:
            content = self._held[: len(self._held) - _waiting(self._held)]
            self._held = self._held[len(content) :]
            parts += self._content(content)
        return parts

    def flush(self) -> list[str | ToolCall]:
        """What is left at the end of the text; a call whose closing mark is missing counts if it can be read."""
        held, self._held = self._held, ""
        if self._inside:
            return self._call(held, "")
        return self._content(held.rstrip() if self.found else held)

    def _content(self, text: str) -> list[str | ToolCall]:
        if self._after_call:
            text = text.lstrip()
        if not text:
            return []
        self._after_call = False
        return [text]

    def _call(self, text: str, mark: str) -> list[str | ToolCall]:
        call = read_call(text, self._names)
        if call is None:
            return self._content(OPEN + text + mark)
        self._after_call = True
        self.found += 1
        return [call]


def _waiting(text: str) -> int:
    """How many characters at the end of a text may belong to a mark, or are white space before one."""
    size = next((n for n in range(min(len(OPEN) - 1, len(text)), 0, -1) if OPEN.startswith(text[-n:])), 0)
    kept = text[: len(text) - size]
    return size + len(kept) - len(kept.rstrip())
