"""Calls of tools: told to the model, found in its text however it comes in pieces."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_model

from smallthinker_edge import MissingExtra, SmallThinker
from smallthinker_edge.completions.tool_calls import CallFinder, told_in_text

NAMES = frozenset({"light", "time"})
CALL = '<tool_call>\n{"name": "light", "arguments": {"on": true}}\n</tool_call>'
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "light",
            "description": "Switches",
            "parameters": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]},
        },
    }
]
MESSAGES = [{"role": "user", "content": "turn on the kitchen light"}]


@pytest.fixture(scope="module")
def model(demo_model: Path) -> Iterator[SmallThinker]:
    with SmallThinker(demo_model) as model:
        yield model


class Typist:
    """A sampler that types a text."""

    def __init__(self, model: SmallThinker, text: str) -> None:
        self.ids = [*model.tokenize(text, parse_special=False), min(model.tokenizer.eos_ids)]

    def sample(self, logits: object, history: object) -> int:
        return self.ids.pop(0)


def found(text: str, cuts: list[int]) -> tuple[str, list[str]]:
    """(content, "name(arguments)" of each call) of a text that comes cut at these places."""
    finder, parts = CallFinder(NAMES), list[Any]()
    for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True):
        parts += finder.push(text[a:b])
    parts += finder.flush()
    content = "".join(part for part in parts if isinstance(part, str))
    calls = [part["function"] for part in parts if not isinstance(part, str)]
    return content, [f"{call['name']}({call['arguments']})" for call in calls]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("plain text", "plain text", 0),
        ("  kept \n", "  kept \n", 0),
        ("a < b <tool", "a < b <tool", 0),
        (CALL, "", 1),
        (f"Now:\n\n{CALL}\n{CALL}", "Now:", 2),
        (f"{CALL}\n\nDone.\n", "Done.", 1),
        (CALL.removesuffix("\n</tool_call>"), "", 1),
        ("<tool_call>{broken</tool_call> x", "<tool_call>{broken</tool_call> x", 0),
        ('<tool_call>{"name": "no", "arguments": {}}</tool_call>', None, 0),
        ('<tool_call>{"name": "light"', '<tool_call>{"name": "light"', 0),
        ('<tool_call>{"name": "light", "arguments": [1]}</tool_call>', None, 0),
        ('<tool_call>{"name": "light", "arguments": "{\\"on\\": true}"}</tool_call>', "", 1),
        ('<tool_call>{"name": "light", "parameters": {"on": true}}</tool_call>', "", 1),
        ("<tool_call>" + "[" * 100000 + "</tool_call>", None, 0),
    ],
)  # fmt: skip
def test_calls_are_found_however_the_text_is_cut(text: str, content: str | None, calls: int) -> None:
    expected = (text if content is None else content, ['light({"on": true})'] * calls)
    assert found(text, []) == expected
    rng = random.Random(3)
    for _ in range(30 if len(text) < 1000 else 2):
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(12)))
        assert found(text, cuts) == expected
    if len(text) < 1000:
        assert found(text, list(range(1, len(text)))) == expected


def test_a_call_of_no_arguments_has_an_empty_object() -> None:
    assert found('<tool_call>{"name": "time"}</tool_call>', []) == ("", ["time({})"])


def test_text_that_can_be_no_call_is_shown_at_once() -> None:
    finder = CallFinder(NAMES)
    assert finder.push("Hello <b>") == ["Hello <b>"]
    assert finder.push(" x ") == [" x"]
    assert finder.push("y<tool_") == [" y"]
    assert finder.push("x") == ["<tool_x"]


def test_a_model_without_a_place_for_tools_is_told_in_text(model: SmallThinker) -> None:
    assert not model.takes_tools
    history = [
        {"role": "system", "content": "Be brief."},
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "light", "arguments": '{"on": true}'}}]},
        {"role": "tool", "tool_call_id": "1", "content": "done"},
    ]  # fmt: skip
    told = told_in_text(history, TOOLS)
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
    assert told[0]["content"].startswith("Be brief.\n\n")
    assert json.dumps(TOOLS[0]) in told[0]["content"]
    assert told[2]["content"] == CALL
    assert told[3]["content"] == "<tool_response>\ndone\n</tool_response>"
    prompt = model.create_chat_completion(history, tools=TOOLS, max_tokens=1)["usage"]["prompt_tokens"]
    assert prompt == len(model.encode_chat(told))
    without = model.create_chat_completion(history, tools=TOOLS, tool_choice="none", max_tokens=1)
    assert without["usage"]["prompt_tokens"] == len(model.encode_chat(told_in_text(history, [])))


def test_a_conversation_without_tools_reaches_its_template_as_it_is(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}:{{ m.name }}:{{ m.content }};{% endfor %}"
    path = write_model(tmp_path / "m.gguf", metadata={"tokenizer.chat_template": template})
    messages = [{"role": "user", "name": "ann", "content": "hello"}]
    with SmallThinker(path) as model:
        usage = model.create_chat_completion(messages, max_tokens=1)["usage"]
        assert model.detokenize(model.encode_chat(messages)) == "user:ann:hello;"
        assert usage["prompt_tokens"] == len(model.encode_chat(messages))


def test_a_template_that_takes_tools_gets_them(tmp_path: Path) -> None:
    template = (Path(__file__).resolve().parents[1] / "fixtures/chat/tools_and_calls.jinja").read_text()
    path = write_model(tmp_path / "m.gguf", metadata={"tokenizer.chat_template": template})
    with SmallThinker(path) as model:
        assert model.takes_tools
        usage = model.create_chat_completion(MESSAGES, tools=TOOLS, max_tokens=1)["usage"]
        assert usage["prompt_tokens"] == len(model.encode_chat(MESSAGES, tools=TOOLS))
        assert json.dumps(TOOLS[0]) in model.detokenize(model.encode_chat(MESSAGES, tools=TOOLS))


@pytest.fixture
def free(model: SmallThinker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are not constrained, as where the extra is not installed."""

    def missing() -> None:
        raise MissingExtra("not installed")

    monkeypatch.setattr(model, "grammars", missing)


@pytest.mark.usefixtures("free")
def test_calls_of_an_answer(model: SmallThinker) -> None:
    text = f"Wait.\n{CALL}\n{CALL}"
    choice = model.create_chat_completion(MESSAGES, tools=TOOLS, sampler=Typist(model, text))["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Wait."
    calls = choice["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [{"name": "light", "arguments": '{"on": true}'}] * 2
    assert calls[0]["id"] != calls[1]["id"]
    alone = model.create_chat_completion(MESSAGES, tools=TOOLS, sampler=Typist(model, CALL))["choices"][0]
    assert alone["message"]["content"] is None
    free = model.create_chat_completion(MESSAGES, sampler=Typist(model, CALL))["choices"][0]
    assert (free["message"], free["finish_reason"]) == ({"role": "assistant", "content": CALL}, "stop")


@pytest.mark.usefixtures("free")
def test_calls_of_a_stream(model: SmallThinker) -> None:
    text = f"Wait.\n{CALL}\n{CALL}"
    chunks = list(model.create_chat_completion(MESSAGES, tools=TOOLS, stream=True, sampler=Typist(model, text)))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == "Wait."
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [(call["index"], call["function"]["arguments"]) for call in calls] == [
        (0, '{"on": true}'),
        (1, '{"on": true}'),
    ]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
