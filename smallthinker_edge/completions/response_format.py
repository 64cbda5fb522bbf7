"""What a request wants its answer to look like, as a grammar: response_format and tools. Knows no tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from smallthinker_edge.completions.tool_calls import CLOSE, OPEN, Tools
from smallthinker_edge.options import Constraint
from smallthinker_edge.text.grammar import JSON_STYLE, Grammars

# What llguidance does not know of a schema does not count: formats, "not", "uniqueItems"; of "oneOf", any one will do.
LENIENT = {"lenient": True, "coerce_one_of": True}
# Text in which no call begins; a call ends it as soon as its mark is there.
TEXT = r"/(.|\n)*/"


def is_free(response_format: Mapping[str, Any] | None, tools: Tools) -> bool:
    """Whether any text will do, where calls of tools need not be in order. Raises as make_constraint()."""
    return _kind(response_format) == "text" and not tools.required


def make_constraint(grammars: Grammars, response_format: Mapping[str, Any] | None, tools: Tools) -> Constraint | None:
    """A constraint for one answer; None where any text will do.

    Where tools may be called, calls are valid, and what is beside them keeps to response_format. Raises ValueError
    for a response_format that is none, GrammarError for one that cannot be enforced.
    """
    kind = _kind(response_format)
    if tools.callable:
        if kind in ("regex", "grammar"):
            raise ValueError(f"response_format {kind!r} cannot stand beside tools; tool_choice='none' leaves them out")
        return grammars.lark(_call_grammar(None if kind == "text" else _schema(kind, response_format or {}), tools))
    if response_format is None or kind == "text":
        return None
    if kind == "regex":
        return grammars.regex(_string(response_format, "pattern"))
    if kind == "grammar":
        return grammars.lark(_string(response_format, "grammar"))
    return grammars.json_schema(_schema(kind, response_format))


def _kind(response_format: Mapping[str, Any] | None) -> str:
    kind = "text" if response_format is None else response_format.get("type")
    if kind not in ("text", "json_object", "json_schema", "regex", "grammar"):
        raise ValueError(
            f"response_format: type must be text, json_object, json_schema, regex or grammar, not {kind!r:.80}"
        )
    return str(kind)


def _schema(kind: str, response_format: Mapping[str, Any]) -> Mapping[str, Any]:
    if kind == "json_object":  # llama-cpp-python takes a schema here
        schema = response_format.get("schema")
        schema = {"type": "object"} if schema is None else schema
    else:
        described = response_format.get("json_schema")
        schema = described.get("schema") if isinstance(described, Mapping) else None
    if not isinstance(schema, Mapping):
        raise ValueError("response_format: the schema must be an object, in json_schema.schema")
    return schema


def _string(response_format: Mapping[str, Any], key: str) -> str:
    text = response_format.get(key)
    if not isinstance(text, str):
        raise ValueError(f"response_format: {key!r} must be a string, not {text!r:.80}")
    return text


def _call_grammar(schema: Mapping[str, Any] | None, tools: Tools) -> str:
    """Calls, and besides, unless one is required, text or JSON by a schema."""
    call, lines = f"call: {json.dumps(OPEN)} body", list[str]()
    if tools.required:
        lines += ["start: call" if tools.single else r'start: call ("\n" call)*', call]
    elif schema is not None:
        lines += [
            r'start: call ("\n" call)* | document',
            f"call: {json.dumps(OPEN)} body",
            f"document: {_json(schema)}",
        ]
    else:
        lines += ["start: called* TEXT", "called: mark body", f"mark[lazy]: TEXT {json.dumps(OPEN)}", f"TEXT: {TEXT}"]
    functions = list(tools.callable.items())
    lines.append(rf'body: "\n" ({" | ".join(f"f{i}" for i in range(len(functions)))}) {json.dumps(chr(10) + CLOSE)}')
    for i, (name, parameters) in enumerate(functions):
        begin = '{"name": ' + json.dumps(name, ensure_ascii=False) + ', "arguments": '
        written = _json(parameters, None if name in tools.strict else LENIENT)
        lines.append(f'f{i}: {json.dumps(begin, ensure_ascii=False)} {written} "}}"')
    return "\n".join(lines)


def _json(schema: Mapping[str, Any], style: Mapping[str, Any] | None = None) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': {**JSON_STYLE, **(style or {})}})}"
