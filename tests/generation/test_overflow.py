"""The end of the context: turns are dropped in order, the system prompt stays, and the rest is as if freshly begun."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_files import write_model

from smallthinker_edge import ContextFull, SmallThinker
from smallthinker_edge.generation.overflow import TurnDropper, shift_limit
from smallthinker_edge.text.chat import encode_chat


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("overflow") / "m.gguf", context_length=256)


def conversation(turns: int, system: str | None = "be kind") -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for i in range(turns):
        messages += [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"}]
    return [*messages, {"role": "user", "content": "the newest"}]


def test_the_oldest_turns_go_first_and_the_system_prompt_stays(path: str) -> None:
    with SmallThinker(path) as model:
        drop = TurnDropper(model.tokenizer)
        whole = encode_chat(model.tokenizer, conversation(5))
        messages = conversation(5)
        expected = [encode_chat(model.tokenizer, [messages[0], *messages[1 + 2 * n :]]) for n in range(6)]
        for ids, longer in zip(expected, [None, *expected[:-1]], strict=True):
            assert drop(whole, len(ids)) == ids
            assert longer is None or drop(whole, len(longer) - 1) == ids
        assert drop(whole, len(expected[-1]) - 1) is None


def test_a_chat_without_system_prompt_and_plain_text(path: str) -> None:
    with SmallThinker(path) as model:
        drop = TurnDropper(model.tokenizer)
        whole = encode_chat(model.tokenizer, conversation(3, None))
        assert drop(whole, len(whole) - 1) == encode_chat(model.tokenizer, conversation(3, None)[2:])
        assert drop(list(range(100)), 30) == list(range(70, 100))
        bos = model.tokenizer.bos_id
        assert drop([bos, *range(100)], 30) == [bos, *range(71, 100)]
        assert drop([1, 2], 30) == [1, 2]


def test_an_answer_that_meets_the_end_goes_on_as_in_a_fresh_session(path: str) -> None:
    with SmallThinker(path, context=128) as model:
        prompt = encode_chat(model.tokenizer, conversation(2))
        ban = dict.fromkeys(model.tokenizer.eos_ids, -float("inf"))
        plain = model.generate(prompt, max_tokens=400, logit_bias=ban)
        assert plain.finish_reason == "length"
        assert len(plain.tokens) == 128 - len(prompt) + 1
        result = model.generate(prompt, max_tokens=160, logit_bias=ban, overflow="shift")
        assert len(result.tokens) == 160 or result.finish_reason == "length"
        assert result.tokens[: len(plain.tokens)] == plain.tokens
        assert len(result.tokens) > len(plain.tokens)
        drop = TurnDropper(model.tokenizer)
        shorter = drop(prompt + plain.tokens, shift_limit(128))
        assert shorter is not None
        fresh = model.generate(shorter, max_tokens=5, logit_bias=ban)
        assert result.tokens[len(plain.tokens) :][:5] == fresh.tokens


def test_a_prompt_that_is_too_long_is_an_error_or_shortened(path: str) -> None:
    with SmallThinker(path, context=100) as model:
        messages = conversation(6)
        with pytest.raises(ContextFull, match="100"):
            model.chat(messages, max_tokens=3)
        shorter = [[messages[0], *messages[1 + 2 * n :]] for n in range(7)]
        short = next(m for m in shorter if len(encode_chat(model.tokenizer, m)) <= 75)  # three quarters of the context
        assert short[0]["role"] == "system"
        shifted = model.chat(messages, max_tokens=3, overflow="shift")
        assert shifted.tokens == model.chat(short, max_tokens=3).tokens
        assert shifted.timings.prompt_tokens <= shift_limit(100)
        with pytest.raises(ContextFull):
            model.chat([{"role": "user", "content": "x" * 200}], overflow="shift")
        with pytest.raises(ValueError, match="overflow"):
            model.generate("hello", overflow="wrap")


def test_plain_text_flows_through_a_small_context(demo_model: Path) -> None:
    with SmallThinker(demo_model, context=64) as model:
        ban = dict.fromkeys(model.tokenizer.eos_ids, -float("inf"))
        result = model.generate("turn on the lamp", max_tokens=300, overflow="shift", logit_bias=ban)
        assert (len(result.tokens), result.finish_reason) == (300, "length")
