"""Structured output: what ends is valid, at any temperature, and what does not end says so."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import write_model

from smallthinker_edge import GrammarError, MemoryBudgetError, MissingExtra, SmallThinker
from smallthinker_edge.files.gguf import GGUFFile
from smallthinker_edge.text.grammar import Grammars
from smallthinker_edge.text.tokenizer import Tokenizer

pytest.importorskip("llguidance", reason="the extra `structured` is not installed")

MESSAGES = [{"role": "user", "content": "turn on the kitchen light"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "action": {"enum": ["on", "off"]},
        "room": {"type": "string", "maxLength": 12},
        "level": {"type": "integer", "minimum": 0, "maximum": 100},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 3},
    },
    "required": ["action", "room", "level", "tags"],
    "additionalProperties": False,
}
TEMPERATURES = [0.0, 1.0, 10.0, 1e9]


@pytest.fixture(scope="module", params=["trained", "random"])
def model(
    request: pytest.FixtureRequest, demo_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SmallThinker]:
    path = tmp_path_factory.mktemp("structured") / "m.gguf"
    with SmallThinker(
        demo_model if request.param == "trained" else write_model(path, context_length=4096), keep_sessions=2
    ) as model:
        yield model


def keeps_to_schema(document: Any) -> bool:
    return bool(
        list(document) == ["action", "room", "level", "tags"]
        and document["action"] in ("on", "off")
        and len(document["room"]) <= 12
        and isinstance(document["level"], int)
        and 0 <= document["level"] <= 100
        and len(document["tags"]) <= 3
        and all(isinstance(tag, str) and len(tag) <= 5 for tag in document["tags"])
    )


def json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_documents_keep_to_their_schema(model: SmallThinker, temperature: float) -> None:
    for seed in range(4):
        answer = model.create_chat_completion(
            MESSAGES, response_format=json_schema(SCHEMA), temperature=temperature, seed=seed, max_tokens=200
        )
        choice = answer["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert keeps_to_schema(json.loads(choice["message"]["content"] or ""))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_objects_are_objects_or_say_that_they_were_cut(model: SmallThinker, temperature: float) -> None:
    for seed in range(4):
        for length in (1, 5, 40):
            choice = model.create_chat_completion(
                MESSAGES, response_format={"type": "json_object"}, temperature=temperature, seed=seed, max_tokens=length
            )["choices"][0]
            text = choice["message"]["content"] or ""
            assert text.startswith("{")
            if choice["finish_reason"] == "stop":
                assert isinstance(json.loads(text), dict)
            else:
                assert choice["finish_reason"] == "length"


def test_streams_and_completions_keep_to_it_too(model: SmallThinker) -> None:
    chunks = model.create_completion(
        "turn on", stream=True, response_format=json_schema(SCHEMA), temperature=5.0, seed=1, max_tokens=200
    )
    assert keeps_to_schema(json.loads("".join(chunk["choices"][0]["text"] for chunk in chunks)))


def test_every_choice_has_its_own_document(model: SmallThinker) -> None:
    answer = model.create_chat_completion(
        MESSAGES, response_format=json_schema(SCHEMA), temperature=5.0, seed=1, n=3, max_tokens=200
    )
    texts = [choice["message"]["content"] or "" for choice in answer["choices"]]
    assert all(keeps_to_schema(json.loads(text)) for text in texts)
    assert len(set(texts)) > 1


@pytest.mark.parametrize("pattern", ["yes|no", r"[a-f]{3,6}-[0-9]{2}", r"é+世?"])
def test_a_regex_matches_the_whole_text(model: SmallThinker, pattern: str) -> None:
    for seed in range(5):
        choice = model.create_completion(
            "turn", response_format={"type": "regex", "pattern": pattern}, temperature=3.0, seed=seed, max_tokens=40
        )["choices"][0]
        if choice["finish_reason"] == "stop":
            assert re.fullmatch(pattern, choice["text"])


def test_a_grammar_of_ones_own(model: SmallThinker) -> None:
    lark = 'start: item ("," item){0,3}\nitem: "a" | "b" "!"'
    for seed in range(5):
        result = model.generate("x", constraint=model.grammars().lark(lark), temperature=3.0, seed=seed)
        assert re.fullmatch(r"(a|b!)(,(a|b!)){0,3}", result.text)
        assert result.finish_reason == "stop"


TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("light", 'na"me', "heizung_ä")
]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", ["light", 'na"me', "heizung_ä"])
def test_a_call_that_is_demanded_is_made(model: SmallThinker, temperature: float, name: str) -> None:
    choice = model.create_chat_completion(
        MESSAGES, tools=TOOLS, tool_choice={"type": "function", "function": {"name": name}}, temperature=temperature,
        seed=2, max_tokens=300,
    )["choices"][0]  # fmt: skip
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == name
    assert keeps_to_schema(json.loads(call["function"]["arguments"]))


def test_some_call_is_made_where_one_is_required(model: SmallThinker) -> None:
    for seed in range(4):
        choice = model.create_chat_completion(
            MESSAGES, tools=TOOLS, tool_choice="required", temperature=1.0, seed=seed, max_tokens=300
        )["choices"][0]
        calls = choice["message"].get("tool_calls", [])
        assert calls
        assert all(keeps_to_schema(json.loads(call["function"]["arguments"])) for call in calls)


def test_a_call_that_begins_in_text_ends_as_one(model: SmallThinker) -> None:
    mark = [*model.tokenize("so <tool_call>", parse_special=False)]

    def begin(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        made = len(ids) - prompt
        if made < len(mark):
            logits[:] = -np.inf
            logits[mark[made]] = 0
        return logits

    prompt = model.create_chat_completion(MESSAGES, tools=TOOLS, max_tokens=1)["usage"]["prompt_tokens"]
    for seed in range(4):
        choice = model.create_chat_completion(
            MESSAGES, tools=TOOLS, logits_processors=begin, temperature=3.0, seed=seed, max_tokens=300
        )["choices"][0]
        message = choice["message"]
        assert (message["content"] or "").startswith("so")
        assert keeps_to_schema(json.loads(message["tool_calls"][0]["function"]["arguments"]))


def test_json_or_calls(model: SmallThinker) -> None:
    for seed in range(6):
        message = model.create_chat_completion(
            MESSAGES, tools=TOOLS, response_format=json_schema(SCHEMA), temperature=2.0, seed=seed, max_tokens=400
        )["choices"][0]["message"]
        if not message.get("tool_calls"):
            assert keeps_to_schema(json.loads(message["content"] or ""))


def test_forced_runs_give_the_bytes_that_single_tokens_give(model: SmallThinker) -> None:
    """A grammar with one text: all of it is forced, or chosen token by token among what is allowed."""
    text = '{"action":"on","device":"light"}'
    grammar = f"start: {json.dumps(text)}"
    forced = model.generate("x", constraint=model.grammars().lark(grammar))

    class Unhurried:
        def __init__(self) -> None:
            self.grammar = model.grammars().lark(grammar)
            self.allowed, self.accept = self.grammar.allowed, self.grammar.accept

        def forced(self) -> list[int]:
            return []

    slow = model.generate("x", constraint=Unhurried())
    assert forced.text == slow.text == text
    assert forced.finish_reason == slow.finish_reason == "stop"


@pytest.mark.parametrize(
    "response_format",
    [
        json_schema({"type": "nonsense"}), json_schema({"$ref": "#/nowhere"}), {"type": "regex", "pattern": "(" },
        {"type": "grammar", "grammar": "start: nothing"}, {"type": "grammar", "grammar": ""},
        json_schema({"type": "object", "properties": {"a": {"not": {"type": "null"}}}, "required": ["a"]}),
    ],
)  # fmt: skip
def test_what_cannot_be_enforced_is_refused(model: SmallThinker, response_format: dict[str, Any]) -> None:
    with pytest.raises(GrammarError):
        model.create_chat_completion(MESSAGES, response_format=response_format)


UNKNOWN: list[dict[str, Any]] = [  # what llguidance knows nothing of
    {"type": "string", "format": "password"}, {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
    {"oneOf": [{"type": "string"}, {"type": "string", "minLength": 2}]}, {"not": {"type": "null"}},
]  # fmt: skip
BROKEN: list[dict[str, Any]] = [{"type": "string", "pattern": "^(?!x)"}, {"$ref": "#/nowhere"}, {"type": "any"}]


def tool_with(value: dict[str, Any], **more: Any) -> list[Any]:
    parameters = {"type": "object", "properties": {"on": {"type": "boolean"}, "value": value}, "required": ["on"]}
    return [{"type": "function", "function": {"name": "set", "parameters": parameters, **more}}]


@pytest.mark.parametrize("value", UNKNOWN)
def test_what_of_a_tools_schema_can_be_enforced_is(model: SmallThinker, value: dict[str, Any]) -> None:
    assert model.create_chat_completion(MESSAGES, tools=tool_with(value), max_tokens=3)["choices"]
    for seed in range(3):
        message = model.create_chat_completion(
            MESSAGES, tools=tool_with(value), tool_choice="required", temperature=1.0, seed=seed, max_tokens=60
        )["choices"][0]["message"]
        calls = [call["function"]["arguments"] for call in message.get("tool_calls", [])]
        assert re.search(r'\{"on": ?(true|false)', "".join([message["content"] or "", *calls]))
    with pytest.raises(GrammarError):
        model.create_chat_completion(MESSAGES, tools=tool_with(value, strict=True))


@pytest.mark.parametrize("value", BROKEN)
def test_a_tool_that_need_not_be_called_may_have_a_broken_schema(model: SmallThinker, value: dict[str, Any]) -> None:
    assert model.create_chat_completion(MESSAGES, tools=tool_with(value), max_tokens=3)["choices"]
    with pytest.raises(GrammarError):
        model.create_chat_completion(MESSAGES, tools=tool_with(value), tool_choice="required")
    with pytest.raises(GrammarError):
        model.create_chat_completion(MESSAGES, tools=tool_with(value, strict=True))


def test_a_budget_must_know_of_it(demo_model: Path) -> None:
    with SmallThinker(demo_model, memory="2GiB") as model:
        with pytest.raises(MemoryBudgetError, match="structured=True"):
            model.create_chat_completion(MESSAGES, response_format={"type": "json_object"})
        assert model.create_chat_completion(MESSAGES, tools=TOOLS, max_tokens=3)["choices"]
    with SmallThinker(demo_model, memory="2GiB", structured=True) as model:
        text = model.create_chat_completion(MESSAGES, response_format=json_schema(SCHEMA))["choices"][0]["message"]
        assert keeps_to_schema(json.loads(text["content"] or ""))


def test_without_the_extra_the_error_names_it(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with SmallThinker(demo_model) as model:
        with pytest.raises(MissingExtra, match=r"smallthinker_edge\[structured\]"):
            model.create_chat_completion(MESSAGES, response_format={"type": "json_object"})
        with pytest.raises(MissingExtra, match="structured"):
            model.create_chat_completion(MESSAGES, tools=TOOLS, tool_choice="required")
        assert model.create_chat_completion(MESSAGES, tools=TOOLS, max_tokens=3)["choices"]
    with pytest.raises(MissingExtra):
        SmallThinker(demo_model, structured=True)


def test_qwens_vocabulary(shared_vocab: Path) -> None:
    with GGUFFile(shared_vocab) as file:
        tokenizer = Tokenizer.from_gguf_metadata(file.metadata)
    grammar = Grammars(tokenizer).json_schema(SCHEMA)
    text = '{"action":"off","room":"Küche","level":70,"tags":["世界"]}'
    made: list[int] = []
    while (tokens := grammar.forced()) or tokenizer.decode(made) != text:
        rest = text.encode()[len(tokenizer.decode_bytes(made)) :]
        for token in tokens or tokenizer.encode(rest, add_bos=False)[:1]:
            assert grammar.allowed()[token // 32] >> token % 32 & 1
            grammar.accept(token)
            made.append(token)
    allowed = np.unpackbits(grammar.allowed().view(np.uint8), bitorder="little")
    assert set(np.flatnonzero(allowed).tolist()) == set(tokenizer.eos_ids)
