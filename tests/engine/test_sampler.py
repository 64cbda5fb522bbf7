"""The sampler against the distributions that its options define."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from smallthinker_edge import Sampler

LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -2.0, 1.5, -np.inf], np.float32)
DRAWS = 20000


def expected(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """The distribution by definition, in float64."""
    p = np.exp(LOGITS.astype(np.float64) / temperature)
    if top_k:
        p[np.argsort(-p, kind="stable")[top_k:]] = 0
    p /= p.sum()
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        keep = np.searchsorted(np.cumsum(p[order]), top_p) + 1
        p[order[keep:]] = 0
    p[p < min_p * p.max()] = 0
    return np.asarray(p / p.sum())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 3},
        {"top_p": 0.7},
        {"top_p": 0.999},
        {"min_p": 0.3},
        {"temperature": 2.0, "top_k": 5, "top_p": 0.8, "min_p": 0.1},
    ],
)
def test_draws_follow_the_distribution(options: dict[str, Any]) -> None:
    sampler = Sampler(**{"temperature": 1.0, "seed": 7} | options)
    counts = np.bincount([sampler.sample(LOGITS) for _ in range(DRAWS)], minlength=len(LOGITS))
    p = expected(**options)
    assert not counts[p == 0].any()
    kept = p > 0
    chi_squared = ((counts[kept] - DRAWS * p[kept]) ** 2 / (DRAWS * p[kept])).sum()
    assert chi_squared < 30  # 7 degrees of freedom at most: above 30 with a probability below 1e-4


def test_greedy_takes_the_lowest_of_equal_logits() -> None:
    assert Sampler().sample(np.array([0, 3, 3, 1], np.float32)) == 1


def test_same_seed_same_draws_and_reset_repeats_them() -> None:
    first, second, other = (Sampler(temperature=2.0, seed=seed) for seed in (5, 5, 6))
    draws = [first.sample(LOGITS) for _ in range(200)]
    assert [second.sample(LOGITS) for _ in range(200)] == draws
    assert [other.sample(LOGITS) for _ in range(200)] != draws
    first.reset()
    assert [first.sample(LOGITS) for _ in range(200)] == draws


def test_draws_of_a_seed_stay_what_they_were() -> None:
    sampler = Sampler(temperature=1.0, seed=0)
    assert [sampler.sample(np.zeros(1000, np.float32)) for _ in range(4)] == _splitmix_draws(4)


def _splitmix_draws(count: int) -> list[int]:
    """SplitMix64 from its definition in plain integers, 53 bits to [0, 1), a uniform choice of 1000."""
    state, draws, mask = 0, [], (1 << 64) - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        draws.append(int(((z ^ z >> 31) >> 11) / 2**53 * 1000))
    return draws


def test_logit_bias_forbids_and_forces() -> None:
    assert Sampler(logit_bias={0: -np.inf}).sample(LOGITS) == 6
    assert Sampler(logit_bias={5: 100.0}).sample(LOGITS) == 5
    with pytest.raises(ValueError, match="vocabulary"):
        Sampler(logit_bias={99: 1.0}).sample(LOGITS)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    sampler = Sampler(repetition_penalty=4.0)
    assert sampler.sample(LOGITS, [0]) == 6
    negative = np.array([-1.0, -1.5], np.float32)
    assert sampler.sample(negative, [0]) == 1
    assert Sampler(repetition_penalty=4.0, repetition_window=1).sample(LOGITS, [0, 3]) == 0


def test_presence_and_frequency_penalties_count_what_was_sampled() -> None:
    """OpenAI's definition: logit - count * frequency_penalty - (count > 0) * presence_penalty."""
    rng = np.random.default_rng(3)
    logits, history = rng.normal(size=40).astype(np.float32), rng.integers(0, 40, 60).tolist()
    for presence, frequency in ((0.7, 0.0), (0.0, 0.3), (1.5, -0.4)):
        counts = np.array([history[10:].count(token) for token in range(40)])
        expected = logits - counts * frequency - (counts > 0) * presence
        sampler = Sampler(presence_penalty=presence, frequency_penalty=frequency, prompt_tokens=10)
        assert sampler.sample(logits, history) == expected.argmax()
    assert Sampler(presence_penalty=9, prompt_tokens=60).sample(logits, history) == logits.argmax()


def dry_penalties(history: list[int], breakers: set[int], multiplier: float, base: float, allowed: int) -> np.ndarray:
    """DRY as its author describes it, comparing at every place of the history (vocabulary of 6)."""
    longest = np.zeros(6, np.int64)
    for at in range(len(history) - 1):
        length = 0
        while length <= at and history[at - length] == history[-1 - length] and history[at - length] not in breakers:
            length += 1
        if history[at + 1] not in breakers:
            longest[history[at + 1]] = max(longest[history[at + 1]], length)
    return np.where(longest >= max(1, allowed), multiplier * base ** (longest - allowed), 0)


@pytest.mark.parametrize("breakers", [set(), {2}, {0, 5}])
def test_dry_penalises_what_would_go_on_repeating(breakers: set[int]) -> None:
    rng = np.random.default_rng(len(breakers))
    chosen = set()
    for _ in range(300):
        history = rng.integers(0, 6, rng.integers(0, 40)).tolist() if rng.random() < 0.5 else [1, 3, 4, 2] * 5
        logits = rng.normal(size=6).astype(np.float32)
        sampler = Sampler(dry_multiplier=0.8, dry_base=1.5, dry_allowed_length=2, breaker_tokens=breakers)
        expected = logits - dry_penalties(history, breakers, 0.8, 1.5, 2)
        assert sampler.sample(logits, history) == expected.argmax()
        chosen.add(expected.argmax() == logits.argmax())
    assert chosen == {True, False}


def test_dry_looks_at_its_window_and_never_overflows() -> None:
    logits = np.array([0.0, 1.0], np.float32)
    history = [0, 1] * 3000 + [0]
    assert Sampler(dry_multiplier=1e15, dry_base=1e15).sample(logits, history) == 0
    assert Sampler(dry_multiplier=1.0, dry_window=2).sample(logits, history) == 1
    assert Sampler(dry_multiplier=1.0, dry_window=0).sample(logits, history) == 1


def test_the_callers_logits_are_not_changed() -> None:
    logits = LOGITS.copy()
    Sampler(repetition_penalty=2.0, logit_bias={1: 5.0}, temperature=1.0).sample(logits, [0, 1])
    assert np.array_equal(logits, LOGITS)


@pytest.mark.parametrize("bad", [[np.nan, 1.0], [np.inf, 1.0], [-np.inf, -np.inf], [], [[1.0]]])
def test_bad_logits_are_refused(bad: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"logit|token is possible"):
        Sampler(temperature=1.0).sample(np.array(bad, np.float32))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0}, {"temperature": np.nan}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -0.1},
        {"repetition_penalty": 0.0}, {"repetition_window": -1}, {"seed": -1}, {"logit_bias": {0: np.inf}},
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampler(**options)


def test_a_temperature_near_zero_is_greedy() -> None:
    logits = np.array([1.0, 3.0, 2.9999], np.float32)
    for temperature in (1e-6, 1e-30, 5e-324):
        assert Sampler(temperature=temperature, seed=1).sample(logits) == 1
