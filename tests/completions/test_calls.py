"""create_completion() and create_chat_completion(): OpenAI's shapes, and arguments that are never swallowed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from smallthinker_edge import ChatTemplateError, ContextFull, SmallThinker
from smallthinker_edge.completions.arguments import CHAT_ARGUMENTS, TEXT_ARGUMENTS

MESSAGES = [{"role": "user", "content": "turn on the kitchen light"}]
ANSWER = '{"action":"on","device":"light","area":"kitchen"}'  # of the embedded model, which was trained for this


@pytest.fixture(scope="module")
def model(demo_model: Path) -> Iterator[SmallThinker]:
    with SmallThinker(demo_model) as model:
        yield model


def test_a_chat_has_openais_shape(model: SmallThinker) -> None:
    answer: dict[str, Any] = dict(model.create_chat_completion(MESSAGES))
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > 1.7e9
    usage = answer.pop("usage")
    assert answer == {
        "object": "chat.completion",
        "model": "demo",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": ANSWER},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
    }
    result = model.chat(MESSAGES)
    prompt, made = result.timings.prompt_tokens, len(result.tokens) - 1  # the ending token is no text
    assert {**usage, "prompt_tokens_details": None} == {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": None,
    }


def test_the_chunks_of_a_chat_make_the_answer(model: SmallThinker) -> None:
    whole = model.create_chat_completion(MESSAGES, logprobs=True, top_logprobs=2)
    chunks = list(
        model.create_chat_completion(
            MESSAGES, stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=2
        )
    )
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == ANSWER
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1]["choices"] == []
    usage = chunks[-1].get("usage")
    assert usage is not None
    assert usage["total_tokens"] == whole["usage"]["total_tokens"]
    assert all(c.get("usage", "absent") is None for c in chunks[:-1])
    assert {c["id"] for c in chunks} == {chunks[0]["id"]}
    noted = [entry for c in chunks[:-1] for entry in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
    logprobs = whole["choices"][0]["logprobs"]
    assert logprobs is not None
    assert noted == logprobs["content"]
    assert "usage" not in next(iter(model.create_chat_completion(MESSAGES, stream=True)))


def test_an_answer_that_was_cut_is_continued(model: SmallThinker) -> None:
    entries = model.create_chat_completion(MESSAGES, logprobs=True)["choices"][0]["logprobs"]
    assert entries is not None
    for cut in (1, 3, len(entries["content"]) - 1):
        started = b"".join(bytes(entry["bytes"]) for entry in entries["content"][:cut]).decode()
        messages = [*MESSAGES, {"role": "assistant", "content": started}]
        (choice,) = model.create_chat_completion(messages)["choices"]
        assert started + (choice["message"]["content"] or "") == ANSWER
        chunks = list(model.create_chat_completion(messages, stream=True, continue_final_message=True))
        assert started + "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == ANSWER


def test_an_answer_is_begun_anew_where_that_is_asked_for(model: SmallThinker) -> None:
    ended = [*MESSAGES, {"role": "assistant", "content": ANSWER[:10]}]
    anew = model.create_chat_completion(ended, continue_final_message=False)
    assert anew["usage"]["prompt_tokens"] > model.create_chat_completion(ended)["usage"]["prompt_tokens"]
    with pytest.raises(ValueError, match="continue_final_message cannot stand beside"):
        model.create_chat_completion(ended, continue_final_message=True, response_format={"type": "json_object"})
    with pytest.raises(ChatTemplateError, match="no text that could be continued"):
        model.create_chat_completion([{"role": "assistant", "content": ""}], continue_final_message=True)
    with pytest.raises(TypeError, match="continue_final_message"):
        model.create_chat_completion(ended, continue_final_message="yes")  # type: ignore[call-overload]


def test_logprobs_of_a_chat_spell_the_answer(model: SmallThinker) -> None:
    logprobs = model.create_chat_completion(MESSAGES, logprobs=True, top_logprobs=3)["choices"][0]["logprobs"]
    assert logprobs is not None
    assert b"".join(bytes(entry["bytes"]) for entry in logprobs["content"]).decode() == ANSWER
    for entry in logprobs["content"]:
        assert entry["logprob"] <= 0
        assert entry["top_logprobs"][0]["token"] == entry["token"]  # greedy
        assert len(entry["top_logprobs"]) == 3


def test_a_completion_has_openais_shape(model: SmallThinker) -> None:
    answer: dict[str, Any] = dict(model.create_completion("turn on", logprobs=1, echo=True, max_tokens=4))
    choice = answer["choices"][0]
    plain = model.generate("turn on", max_tokens=4)
    assert (answer["object"], choice["text"], choice["finish_reason"]) == (
        "text_completion",
        "turn on" + plain.text,
        "length",
    )
    assert choice["logprobs"]["text_offset"][0] == len("turn on")
    assert "".join(choice["logprobs"]["tokens"]) == plain.text
    assert answer["usage"]["completion_tokens"] == 4
    assert model("turn on", max_tokens=4)["choices"][0]["text"] == plain.text
    assert model.create_completion("turn on")["usage"]["completion_tokens"] == 16


def test_the_chunks_of_a_completion_make_the_answer(model: SmallThinker) -> None:
    options: dict[str, Any] = {"echo": True, "max_tokens": 8, "logprobs": 2, "n": 2, "temperature": 2.0, "seed": 4}
    whole = model.create_completion(["turn on", "add"], **options)
    chunks = list(model.create_completion(["turn on", "add"], stream=True, **options))
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        assert choice["logprobs"] is not None
        tokens = [t for c in mine if c["logprobs"] for t in c["logprobs"]["tokens"]]
        assert tokens == choice["logprobs"]["tokens"]
        assert [o for c in mine if c["logprobs"] for o in c["logprobs"]["text_offset"]] == choice["logprobs"][
            "text_offset"
        ]
    assert len(whole["choices"]) == 4
    assert whole["choices"][0]["text"] != whole["choices"][1]["text"]
    single = model.create_completion("turn on", **{**options, "n": 1, "seed": 5})
    assert single["choices"][0]["text"] == whole["choices"][1]["text"]


def test_every_argument_may_be_null(model: SmallThinker) -> None:
    nothing: Any = dict.fromkeys(CHAT_ARGUMENTS)
    assert model.create_chat_completion(MESSAGES, stream=None, **nothing)["choices"][0]["message"]["content"] == ANSWER
    nothing = dict.fromkeys(TEXT_ARGUMENTS)
    plain = model.create_completion("turn on")["choices"]
    assert model.create_completion("turn on", stream=None, **nothing)["choices"] == plain


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"max_token": 3}, TypeError), ({"functions": []}, TypeError), ({"n": 0}, ValueError), ({"n": 99}, ValueError),
        ({"logprobs": 2}, TypeError), ({"top_logprobs": 2}, ValueError), ({"stream_options": 3}, TypeError),
        ({"tools": [3]}, TypeError), ({"tools": [{"type": "function"}]}, ValueError), ({"tools": "x"}, TypeError),
        ({"tool_choice": "required"}, ValueError), ({"tool_choice": "sometimes"}, ValueError),
        ({"tool_choice": 3}, ValueError),
        ({"response_format": {"type": "xml"}}, ValueError), ({"response_format": "json"}, TypeError),
        ({"response_format": {"type": "json_schema"}}, ValueError),
        ({"response_format": {"type": "regex"}}, ValueError),
        ({"seed": -1}, ValueError), ({"seed": "x"}, TypeError), ({"temperature": "hot"}, TypeError),
        ({"model": 3}, TypeError),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_at_once(
    model: SmallThinker, arguments: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        model.create_chat_completion(MESSAGES, stream=True, **arguments)


@pytest.mark.parametrize("prompt", [3, None, [], [[]], b"x", {"a": 1}, [1.5], [[True]], ["a", 3], [10**6]])
def test_a_prompt_that_is_none_is_refused(model: SmallThinker, prompt: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        model.create_completion(prompt)


def test_a_prompt_may_be_ids(model: SmallThinker) -> None:
    ids = model.tokenize("turn on")
    expected = model.create_completion("turn on")["choices"][0]["text"]
    assert [c["text"] for c in model.create_completion([ids, ids])["choices"]] == [expected] * 2
    assert model.create_completion(ids)["choices"][0]["text"] == expected


def test_max_tokens_beyond_the_context_is_clipped(demo_model: Path) -> None:
    with SmallThinker(demo_model, context=40) as model:
        ends = dict.fromkeys(model.tokenizer.eos_ids, -100)
        for more in ({"max_tokens": 10**9}, {}, {"max_completion_tokens": 10**9}):
            answer = model.create_chat_completion(MESSAGES, logit_bias=ends, **more)
            assert answer["choices"][0]["finish_reason"] == "length"
            assert answer["usage"]["total_tokens"] == 41  # the last token needs no position
        with pytest.raises(ContextFull):
            model.create_chat_completion([{"role": "user", "content": "light " * 60}])


def test_the_name_and_callbacks_are_the_callers(model: SmallThinker) -> None:
    pieces: list[str] = []
    answer = model.create_chat_completion(MESSAGES, model="mine", on_text=pieces.append, stop=["area"])
    assert answer["model"] == "mine"
    assert "".join(pieces) == answer["choices"][0]["message"]["content"] == ANSWER[: ANSWER.index("area")]


SAMPLE = """\
from smallthinker_edge import SmallThinker

async def main(model: SmallThinker) -> None:
    answer = model.create_chat_completion([{"role": "user", "content": "a"}])
    text: str | None = answer["choices"][0]["message"]["content"]
    for chunk in model.create_chat_completion([], stream=True, tools=None, max_tokens=3):
        text = chunk["choices"][0]["delta"].get("content")
    total: int = (await model.acreate_chat_completion([], n=2))["usage"]["total_tokens"]
    async for piece in await model.acreate_completion("a", stream=True, logprobs=3):
        text = piece["choices"][0]["text"]
    model.create_chat_completion([], max_token=3)
    model.create_completion("a", logprobs="many")
    model.create_completion("a")["choices"][0]["message"]
"""


def test_types_tell_what_calls_accept_and_return(tmp_path: Path) -> None:
    mypy = pytest.importorskip("mypy.api")
    (tmp_path / "sample.py").write_text(SAMPLE)
    settings = Path(__file__).resolve().parents[2] / "pyproject.toml"
    told, _, _ = mypy.run(["--config-file", str(settings), "--cache-dir", str(tmp_path), str(tmp_path / "sample.py")])
    faults = [line for line in told.splitlines() if "error:" in line]
    assert {int(line.split(":")[1]) for line in faults} == {11, 12, 13}, told
