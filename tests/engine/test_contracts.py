"""What kernels.h asks of shapes: odd ones that keep to it compute right on every table, others are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import write_model
from reference import Reference
from small_model import SHAPE, divergence, open_session

from smallthinker_edge import ModelFormatError, SmallThinker
from smallthinker_edge._native import kernels

ODD: dict[str, dict[str, Any]] = {
    "heads of 8": {"n_heads": 4, "n_kv_heads": 1, "head_dim": 8},
    "heads of 24": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 24},
    "heads of 40": {"n_heads": 4, "n_kv_heads": 4, "head_dim": 40},
    "heads of 72, seven to one": {"n_heads": 28, "n_kv_heads": 4, "head_dim": 72},
    "heads of 136, three to one": {"n_heads": 12, "n_kv_heads": 4, "head_dim": 136},
    "one head": {"n_heads": 1, "n_kv_heads": 1, "head_dim": 32},
    "two dimensions turned": {"rope_dim": 2},
    "14 dimensions turned": {"rope_dim": 14},
    "width 32": {"d_model": 32},
    "width 160": {"d_model": 160},
    "width 288": {"d_model": 288},
    "one expert": {"n_experts": 1},
    "five experts": {"n_experts": 5},
    "33 experts": {"n_experts": 33},
    "32 neurons": {"d_ffn": 32},
    "224 neurons": {"d_ffn": 224},
    "275 tokens": {"vocab_size": 275},
    "289 tokens, untied": {"vocab_size": 289, "tied": False},
    "a window of one": {"window": 1},
    "width 160, transposed": {"d_model": 160, "down_transposed": True},
    "224 neurons, transposed": {"d_ffn": 224, "down_transposed": True},
    "33 experts, transposed": {"n_experts": 33, "down_transposed": True},
}


@pytest.mark.parametrize("table", kernels.tables())
@pytest.mark.parametrize("shape", ODD)
def test_odd_shapes_agree_with_the_reference(shape: str, table: str, tmp_path: Path) -> None:
    """All experts are used, as in test_engine.py: what is compared is the arithmetic and not near-ties of routers."""
    options = SHAPE | {"n_layers": 2} | ODD[shape]
    path = write_model(tmp_path / "model.gguf", **options | {"n_experts_used": options["n_experts"]})
    ids = np.random.default_rng(0).integers(0, options["vocab_size"], 24)
    reference = Reference.from_gguf(path)
    expected = reference.logits(ids.tolist())
    rounded = reference.logits(ids.tolist(), kv="f16", rounding=True)
    got = open_session(path, table=table).decode(ids, all_logits=True)
    assert np.isfinite(got).all()
    assert divergence(expected, got).mean() < 2 * divergence(expected, rounded).mean() + 1e-5
    one_by_one = open_session(path, table=table, threads=2)
    np.testing.assert_array_equal(np.array([one_by_one.decode([token]) for token in ids]), got)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"smallthinker.attention.key_length": 20}, "key_length"),
        ({"smallthinker.attention.key_length": 0}, "key_length"),
        ({"smallthinker.attention.value_length": 8}, "value_length"),
        ({"smallthinker.attention.head_count_kv": 3}, "head_count_kv"),
        ({"smallthinker.rope.dimension_count": 7}, "dimension_count"),
        ({"smallthinker.rope.dimension_count": 66}, "dimension_count"),
        ({"smallthinker.expert_used_count": 9}, "expert_used_count"),
        ({"smallthinker.expert_used_count": 0}, "expert_used_count"),
        ({"smallthinker.embedding_length": 250}, "embedding_length"),
        ({"smallthinker.feed_forward_length": 100, "smallthinker.expert_feed_forward_length": 100}, "feed_forward"),
    ],
    ids=str,
)
def test_shapes_that_no_kernel_takes_are_refused_by_name(change: dict[str, int], field: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", **SHAPE | {"metadata": change})
    with pytest.raises(ModelFormatError, match=field):
        SmallThinker(path)


def test_heads_that_q8_pages_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", **SHAPE | ODD["heads of 40"])
    with pytest.raises(ValueError, match="no multiple of 32"):
        SmallThinker(path, kv="q8_0")
