"""Prompt-lookup speculation: the same tokens as without, with any sampler, and it stops where it loses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gguf_files import write_model
from small_model import SHAPE, tokens

from smallthinker_edge import SmallThinker
from smallthinker_edge.generation.speculation import BatchCosts, PromptLookup


@pytest.fixture(scope="module", params=["f16", "q8_0"])
def model(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[SmallThinker]:
    path = write_model(tmp_path_factory.mktemp("speculation") / "model.gguf", **SHAPE | {"window": 64})
    with SmallThinker(path, kv=request.param, context=1024, keep_sessions=0) as model:
        yield model


@pytest.fixture
def always_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of a tiny model mean nothing: let a batch take as long as a token, so that every guess is worth trying."""
    monkeypatch.setattr(BatchCosts, "worthwhile", True)
    monkeypatch.setattr(BatchCosts, "seconds", lambda self, tokens: 1.0)
    monkeypatch.setattr("smallthinker_edge.generation.speculation.WORTH", 0.0)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "repetition_penalty": 0.7, "seed": 4},
]


@pytest.mark.usefixtures("always_guess")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("most", [1, 6])
def test_speculation_changes_no_token(model: SmallThinker, options: dict[str, Any], most: int) -> None:
    prompt = [*tokens(40).tolist(), *tokens(40).tolist(), *tokens(10).tolist()]
    # A bias makes the random model repeat itself, so that drafts are both accepted and refused.
    options = {"max_tokens": 60, "logit_bias": {7: 4.0, 8: 3.5}, **options}
    plain = model.generate(prompt, **options)
    guessed = model.generate(prompt, speculate=most, **options)
    assert guessed.tokens == plain.tokens
    assert guessed.finish_reason == plain.finish_reason
    assert guessed.timings.drafted_tokens > 0


@pytest.mark.usefixtures("always_guess")
def test_drafts_are_accepted_where_the_text_repeats(model: SmallThinker) -> None:
    timings = model.generate(tokens(50).tolist(), max_tokens=50, speculate=6, logit_bias={7: 100.0}).timings
    assert timings.accepted_tokens > 25


@pytest.mark.usefixtures("always_guess")
def test_speculation_ends_where_plain_decoding_does(model: SmallThinker) -> None:
    prompt = tokens(1000).tolist()
    for options in ({"max_tokens": 500}, {"max_tokens": 5}, {"max_tokens": 100, "stop": "a"}):
        plain = model.generate(prompt, logit_bias={7: 3.0}, **options)
        guessed = model.generate(prompt, logit_bias={7: 3.0}, speculate=8, **options)
        assert (guessed.tokens, guessed.text) == (plain.tokens, plain.text)
    with pytest.raises(ValueError, match="speculate"):
        model.generate(prompt, speculate=-1)


def free(tokens: int) -> float:
    """The cost of a batch where it takes as long as a token."""
    return 1.0


def test_lookup_finds_the_newest_continuation() -> None:
    lookup = PromptLookup([1, 2, 3, 9, 9, 1, 2, 4, 5, 6, 1, 2], 3)
    assert lookup.draft(free, 9) == [4, 5, 6]
    lookup.extend([3])
    assert lookup.draft(free, 9) == [9, 9, 1]  # a longer match wins
    assert lookup.draft(free, 2) == [9, 9]
    assert lookup.draft(free, 0) == []
    lookup.extend([77])
    assert lookup.draft(free, 9) == []
    assert PromptLookup([1], 3).draft(free, 9) == []
    assert PromptLookup([4, 5, 4, 5], 5).draft(free, 9) == [4, 5, 4, 5, 4]


def test_drafts_are_as_long_as_the_text_has_repeated_itself() -> None:
    def costly(tokens: int) -> float:
        return 1 + 0.4 * (tokens - 1)

    assert len(PromptLookup([1, 2, 3, 4, 5, 6] * 20, 8).draft(costly, 9)) == 8
    # After "1 2" comes something else every time: the text has shown that a guess is not worth 0.4 of a token.
    assert PromptLookup([token for i in range(60) for token in (1, 2, 100 + i)] + [1, 2], 8).draft(costly, 9) == []


def speed_up(text: list[int], cost: float, most: int = 8) -> float:
    """Of saying the text's second half with guesses, by a clock that counts 1 + cost * (n - 1) for a batch of n."""
    lookup, costs = PromptLookup(text[: len(text) // 2], most), BatchCosts()
    at, clock = len(text) // 2, 0.0
    while at < len(text):
        draft = lookup.draft(costs.seconds, len(text) - at - 1) if costs.worthwhile else []
        right = next((i for i, token in enumerate(draft) if token != text[at + i]), len(draft))
        seconds = 1 + cost * len(draft)
        costs.measured(1 + len(draft), seconds)
        lookup.extend(text[at : at + right + 1])
        at, clock = at + right + 1, clock + seconds
    return (len(text) - len(text) // 2) / clock


def test_it_guesses_where_that_pays_and_stops_where_it_loses() -> None:
    rng = np.random.default_rng(0)
    repeated = list(range(20)) * 50
    noise = rng.integers(0, 8, 2000).tolist()  # short matches everywhere, and one guess in eight is right
    mixed = [token for i in range(100) for token in (1, 2, 3, 4, 5, 6, int(rng.integers(100, 200)), i % 7 + 300)]
    assert speed_up(repeated, 0.3) > 2.2
    assert speed_up(mixed, 0.3) > 1.3
    assert speed_up(repeated, 1.5) > 0.95  # the experts of a wide batch cost more than it gives
    assert speed_up(noise, 0.3) > 0.97
    assert speed_up(noise, 1.5) > 0.95


def test_what_a_batch_costs_is_learnt_and_fades() -> None:
    costs = BatchCosts()
    assert not costs.worthwhile
    costs.measured(1, 1.0)
    assert costs.worthwhile
    prior, pair = costs.seconds(4), costs.seconds(2)
    for _ in range(5):
        costs.measured(4, 7.0)
    assert 5.5 < costs.seconds(4) <= 7
    assert costs.seconds(8) > 10  # larger ones are thought as dear until they are measured
    assert costs.seconds(2) == pair  # smaller ones are not
    for _ in range(500):
        costs.measured(1, 1.0)
    assert costs.seconds(4) == pytest.approx(prior, rel=0.1)
    costs.measured(1, 1000.0)  # the machine was busy for a moment
    assert costs.seconds(1) < 1.5


def test_tokens_that_take_no_time_are_not_guessed() -> None:
    costs = BatchCosts()
    costs.measured(1, 5e-5)
    assert not costs.worthwhile
