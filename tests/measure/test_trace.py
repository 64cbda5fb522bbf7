"""Routing traces, and the cache policies that tools/paging/replay.py runs them through."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import replay
from gguf_files import write_model
from reference import Reference

from smallthinker_edge import ModelFormatError, SmallThinker
from smallthinker_edge.measure.trace import Trace, draw_heatmap, record


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    shape = {"n_layers": 3, "n_experts": 16, "n_experts_used": 4, "context_length": 512}
    return write_model(tmp_path_factory.mktemp("trace") / "model.gguf", **shape)


def test_a_trace_holds_what_the_reference_model_chooses(path: str, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 300, 60).tolist()
    with SmallThinker(path) as model:
        trace = record(model, tokens)
    assert trace.routing.shape == (60, 3, 4)
    expected = Reference.from_gguf(path).run(tokens).chosen[0]
    # The first layer's router sees the embedding itself, so that nothing is rounded before it.
    assert np.array_equal(np.sort(trace.routing[:, 0]), np.sort(expected))
    trace.save(tmp_path / "t.npz")
    loaded = Trace.load(tmp_path / "t.npz")
    assert loaded.experts == 16
    assert np.array_equal(loaded.routing, trace.routing)
    assert np.allclose(loaded.use().sum(1), 4)


def test_generated_tokens_are_recorded_too(path: str) -> None:
    with SmallThinker(path) as model:
        alone, longer = record(model, [1, 2, 3]), record(model, [1, 2, 3], max_tokens=3)
        assert len(alone.routing) == 3
        assert np.array_equal(longer.routing[:3], alone.routing)
        assert len(longer.routing) > 3
        model.generate([1, 2], max_tokens=2)  # nothing is recorded any more


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.npz").write_bytes(b"no archive")
    with pytest.raises(ModelFormatError):
        Trace.load(tmp_path / "t.npz")
    np.savez(tmp_path / "u.npz", routing=np.full((2, 1, 1), 9, np.uint16), experts=np.array(4))
    with pytest.raises(ModelFormatError):
        Trace.load(tmp_path / "u.npz")


def one_at_a_time(ids: str) -> Trace:
    """A trace of one layer and one expert a token, as letters."""
    return Trace(np.array([ord(c) - ord("a") for c in ids], np.uint16).reshape(-1, 1, 1), 26)


@pytest.mark.parametrize(
    ("policy", "ids", "slots", "hits"),
    [
        ("lru", "abcabc", 2, 0),  # the textbook case: a cycle longer than the cache never hits
        ("belady", "abcabc", 2, 2),  # keeping one of the cycle does
        ("lru", "abacab", 2, 2),
        ("pinned", "abacab", 2, 5),  # a and b are known beforehand
        ("frequency", "aaabcbca", 2, 3),  # a stays for its three uses: a, a, and the last a
        ("2q", "abab", 4, 2),
        ("s3-fifo", "abab", 4, 2),
    ],
)
def test_policies_hit_as_computed_by_hand(policy: str, ids: str, slots: int, hits: int) -> None:
    assert replay.hit_rate(policy, one_at_a_time(ids), slots) == pytest.approx(hits / len(ids))


def skewed(tokens: int) -> Trace:
    """A quarter of the experts takes three quarters of the uses, as FORMATS of the real models say; L = 8, K = 4."""
    rng = np.random.default_rng(0)
    score = rng.gumbel(size=(tokens, 8, 32)) + np.where(np.arange(32) < 8, 2.2, 0.0)
    return Trace(np.argsort(-score, axis=2)[:, :, :4].astype(np.uint16), 32)


def test_frequency_is_near_the_best_static_set_and_not_below_lru() -> None:
    trace = skewed(600)
    rates = {policy: replay.hit_rate(policy, trace, 84, skip=0.25) for policy in replay.POLICIES}
    assert rates["frequency"] > rates["pinned"] - 0.03
    assert max(rates.values()) == rates["belady"]
    shifted = replay.shifted(trace)
    assert len(shifted.routing) == 1200
    assert replay.hit_rate("frequency", shifted, 84) > replay.hit_rate("lru", shifted, 84)


@pytest.mark.parametrize(("layers", "experts"), [(3, 8), (52, 64)])
def test_a_heatmap_shows_where_the_used_experts_are(tmp_path: Path, layers: int, experts: int) -> None:
    image, colours = pytest.importorskip("matplotlib.image"), pytest.importorskip("matplotlib").colormaps["viridis"]
    centres = []
    for used in (0, experts - 1):  # all tokens use the first expert of every layer, or the last
        draw_heatmap(Trace(np.full((5, layers, 1), used, np.uint16), experts), tmp_path / "heat.png")
        pixels = image.imread(tmp_path / "heat.png")[:, :, :3]
        centres.append(np.nonzero((np.abs(pixels - colours(1.0)[:3]) < 0.02).all(axis=2))[1].mean())
    # In the left half they move across; in the right one, the most used first, they stay: on average half of a half.
    assert centres[1] - centres[0] > 0.15 * pixels.shape[1]
