"""What chooses tokens beside the sampler: processors, probabilities, constraints; and what a generation tells."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import write_model

from smallthinker_edge import SmallThinker

FREE: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0, "seed": 5}


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> SmallThinker:
    return SmallThinker(tiny_model, threads=1)


class Dictated:
    """A constraint that lets one text through and forces the stretches named."""

    def __init__(self, tokens: Sequence[int], vocab_size: int, forced: Sequence[tuple[int, int]] = ()) -> None:
        self.tokens, self.at, self.stretches = list(tokens), 0, dict(forced)
        self.words = (vocab_size + 31) // 32

    def allowed(self) -> np.ndarray:
        words = np.zeros(self.words, np.uint32)
        words[self.tokens[self.at] // 32] = 1 << self.tokens[self.at] % 32
        return words

    def accept(self, token: int) -> None:
        assert token == self.tokens[self.at]
        self.at += 1

    def forced(self) -> list[int]:
        return self.tokens[self.at : self.at + self.stretches.get(self.at, 0)]


@pytest.mark.parametrize("forced", [[], [(0, 3)], [(2, 5), (8, 1)], [(0, 11)], [(4, 100)]])
def test_a_constraint_decides_and_the_session_holds_its_text(
    model: SmallThinker, forced: list[tuple[int, int]]
) -> None:
    text = [int(i) for i in np.random.default_rng(1).integers(0, 256, 12)]
    constraint = Dictated(text, model.config.vocab_size, forced)
    result = model.generate("hello", max_tokens=12, constraint=constraint, speculate=8, temperature=5.0, logprobs=1)
    assert (result.tokens, result.finish_reason) == (text, "length")
    assert result.logprobs is not None
    assert [entry.token for entry in result.logprobs] == text
    # What follows is computed from the kept session, and as if it had all been a prompt.
    prompt = [*model.tokenize("hello"), *text]
    again = model.generate(prompt, max_tokens=3)
    assert again.timings.reused_tokens > len(model.tokenize("hello"))
    session = model.session()
    assert again.tokens[0] == int(session.decode(prompt).argmax())


def test_an_end_that_is_forced_ends(model: SmallThinker) -> None:
    end = min(model.tokenizer.eos_ids)
    constraint = Dictated([65, 66, end, 67], model.config.vocab_size, [(1, 3)])
    result = model.generate("hello", constraint=constraint)
    assert (result.text, result.tokens, result.finish_reason) == ("AB", [65, 66, end], "stop")


def test_logprobs_are_those_of_the_models_own_logits(model: SmallThinker) -> None:
    result = model.generate("hello", logprobs=4, presence_penalty=1.0, logit_bias={3: 2.0}, **FREE)
    assert result.logprobs is not None
    session, logits = model.session(), None
    ids = model.tokenize("hello")
    for token, noted in zip(result.tokens, result.logprobs, strict=True):
        logits = session.decode(ids).astype(np.float64)
        probable = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        assert noted.token == token
        assert noted.logprob == pytest.approx(probable[token], abs=1e-6)
        order = np.argsort(-probable, kind="stable")[:4]
        assert [entry[0] for entry in noted.top] == order.tolist()
        assert [entry[1] for entry in noted.top] == pytest.approx(probable[order], abs=1e-6)
        ids = [token]


def test_logprobs_are_the_same_when_tokens_are_guessed(model: SmallThinker) -> None:
    prompt = [65, 66, 67, 68] * 20
    plain, guessed = (model.generate(prompt, max_tokens=30, logprobs=2, speculate=n) for n in (0, 8))
    assert plain.tokens == guessed.tokens
    assert plain.logprobs == guessed.logprobs


def test_processors_change_logits_in_turn(model: SmallThinker) -> None:
    seen: list[list[int]] = []

    def only_a(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        seen.append(ids.tolist())
        return np.where(np.arange(logits.size) == 65, logits, -np.inf)

    def a_to_b(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        logits[[65, 66]] = logits[[66, 65]]
        return logits

    prompt = model.tokenize("hello")
    assert model.generate(prompt, max_tokens=3, logits_processors=[only_a, a_to_b]).tokens == [66] * 3
    assert seen == [prompt, [*prompt, 66], [*prompt, 66, 66]]
    assert model.generate(prompt, max_tokens=2, logits_processors=only_a).tokens == [65] * 2


@pytest.mark.parametrize("returned", [None, np.zeros(3, np.float32), np.zeros(2, np.int64)])
def test_a_processor_must_return_logits(model: SmallThinker, returned: object) -> None:
    broken: Any = lambda ids, logits: returned  # noqa: E731
    with pytest.raises(ValueError, match="processor"):
        model.generate("hello", logits_processors=broken)
    assert model.generate("hello", max_tokens=2).tokens


def test_a_sampler_that_is_wrong_is_refused(model: SmallThinker) -> None:
    class Wrong:
        def sample(self, logits: object, history: object) -> int:
            return 10**6

    with pytest.raises(ValueError, match="outside the vocabulary"):
        model.generate("hello", sampler=Wrong())


def test_control_tokens_are_no_text_and_user_defined_ones_are(model: SmallThinker) -> None:
    hidden = model.tokenizer.special_id("<|im_start|>")
    assert hidden is not None
    dictated = Dictated([72, hidden, 105, model.config.vocab_size - 1], model.config.vocab_size)
    result = model.generate("hello", max_tokens=4, constraint=dictated)
    assert len(result.tokens) == 4
    assert result.text == model.detokenize([72, 105])


def test_a_generation_that_takes_too_long_ends(model: SmallThinker) -> None:
    result = model.generate("hello", max_tokens=10**6, timeout=0.02, on_text=lambda piece: time.sleep(0.03))
    assert result.finish_reason == "timeout"
    assert model.generate("hello", timeout=0.02, logit_bias={min(model.tokenizer.eos_ids): 1e4}).finish_reason == "stop"


def test_callbacks_are_told_of_prompt_and_text(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", context_length=2048)
    prompt, told, pieces = [65, 66, 67] * 400, list[tuple[int, int]](), list[str]()
    with SmallThinker(path, context=2048) as model:
        plain = model.generate(prompt, max_tokens=8)
    with SmallThinker(path, context=2048) as model:
        tell: dict[str, Any] = {"on_prompt": lambda *x: told.append(x), "on_text": pieces.append}
        result = model.generate(prompt, max_tokens=8, **tell)
        assert told == [(512, 1200), (1024, 1200), (1200, 1200)]
        assert "".join(pieces) == result.text
        assert result.tokens == plain.tokens
        told.clear()
        model.generate([*prompt, 70], max_tokens=2, **tell)
        assert told == [(1201, 1201)]
