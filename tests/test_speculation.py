"""Prompt-lookup speculation: the same tokens as without, with any sampler, and it stops where it loses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gguf_files import write_model
from test_engine import SHAPE, tokens

from smallthinker_edge import SmallThinker
from smallthinker_edge.speculation import PAUSE, TRIALS, Governor, PromptLookup


@pytest.fixture(scope="module", params=["f16", "q8_0"])
def model(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[SmallThinker]:
    path = write_model(tmp_path_factory.mktemp("speculation") / "model.gguf", **SHAPE | {"window": 64})
    with SmallThinker(path, kv=request.param, context=1024, keep_sessions=0) as model:
        yield model


@pytest.fixture(autouse=True)
def always_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of a tiny model mean nothing: guess at every step."""
    monkeypatch.setattr("smallthinker_edge.generation.Governor.wants_draft", property(lambda self: True))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "repetition_penalty": 0.7, "seed": 4},
]


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


def test_drafts_are_accepted_where_the_text_repeats(model: SmallThinker) -> None:
    timings = model.generate(tokens(50).tolist(), max_tokens=50, speculate=6, logit_bias={7: 100.0}).timings
    assert timings.accepted_tokens > 25


def test_speculation_ends_where_plain_decoding_does(model: SmallThinker) -> None:
    prompt = tokens(1000).tolist()
    for options in ({"max_tokens": 500}, {"max_tokens": 5}, {"max_tokens": 100, "stop": "a"}):
        plain = model.generate(prompt, logit_bias={7: 3.0}, **options)
        guessed = model.generate(prompt, logit_bias={7: 3.0}, speculate=8, **options)
        assert (guessed.tokens, guessed.text) == (plain.tokens, plain.text)
    with pytest.raises(ValueError, match="speculate"):
        model.generate(prompt, speculate=-1)


def test_lookup_finds_the_newest_continuation() -> None:
    lookup = PromptLookup([1, 2, 3, 9, 9, 1, 2, 4, 5, 6, 1, 2], 3)
    assert lookup.draft() == [4, 5, 6]
    lookup.extend([3])
    assert lookup.draft() == [9, 9, 1]  # a longer match wins
    lookup.extend([77])
    assert lookup.draft() == []
    assert PromptLookup([1], 3).draft() == []
    assert PromptLookup([4, 5, 4, 5], 5).draft() == [4, 5, 4, 5, 4]


def test_drafts_grow_with_success_and_shrink_with_failure() -> None:
    lookup = PromptLookup([1, 2] * 20, 8)
    lookup.accepted(0, 8)
    assert len(lookup.draft()) == 1
    lookup.accepted(1, 1)
    assert len(lookup.draft()) == 2
    lookup.accepted(2, 2)
    assert len(lookup.draft()) == 4


def governed(batch_seconds: float, accepted: float, steps: int) -> float:
    """Share of steps that guess, where a single token takes one second."""
    governor, guesses = Governor(), 0
    wants = Governor.__dict__["wants_draft"].fget
    for _ in range(steps):
        if wants(governor):
            guesses += 1
            governor.batch(batch_seconds, int(accepted) + 1)
        else:
            governor.single(1.0)
    return guesses / steps


def test_the_governor_measures_what_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert governed(1.5, 2, 200) > 0.95  # three tokens in one and a half: wins
    assert governed(1.5, 0, 400) < 0.1  # one token in one and a half: loses
    assert governed(4.0, 2, 400) < 0.1  # experts of a wide batch cost more than they give
    assert governed(1.5, 0, PAUSE + 2 + TRIALS) * (PAUSE + 2 + TRIALS) == TRIALS
    assert np.isclose(governed(1.0, 1, 100), 0.98)
