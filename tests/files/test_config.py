"""ModelConfig.from_gguf: options are read by the documented rules, and a file that breaks them is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import write_model, write_split_model

from smallthinker_edge.errors import ModelFormatError
from smallthinker_edge.files.config import ModelConfig, tensor_name
from smallthinker_edge.files.gguf import GGUFFile


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """Writes a model with the given options and reads its configuration."""

    def read_model(**options: Any) -> ModelConfig:
        with GGUFFile(write_model(tmp_path / "model.gguf", **options)) as model:
            return ModelConfig.from_gguf(model)

    return read_model


@pytest.fixture
def refuse(tmp_path: Path) -> Any:
    """Writes a bad model; the error must name the file and the given field."""

    def refuse_model(field: str, match: str | None = None, **options: Any) -> None:
        path = write_model(tmp_path / "model.gguf", **options)
        with GGUFFile(path) as model, pytest.raises(ModelFormatError, match=match) as caught:
            ModelConfig.from_gguf(model)
        assert caught.value.field == field
        assert caught.value.path == path

    return refuse_model


def key(name: str, value: object) -> dict[str, Any]:
    return {"metadata": {f"smallthinker.{name}": value}}


def test_sizes_come_from_the_file(read: Any) -> None:
    config = read(
        n_layers=3, d_model=96, n_heads=6, n_kv_heads=3, head_dim=32, n_experts=5, n_experts_used=3, d_ffn=64,
        vocab_size=300, context_length=777, rms_eps=1e-5, rope_theta=1.5e6,
    )  # fmt: skip
    assert (config.n_layers, config.d_model, config.n_heads, config.n_kv_heads) == (3, 96, 6, 3)
    assert (config.head_dim, config.n_experts, config.n_experts_used, config.d_ffn) == (32, 5, 3, 64)
    assert (config.vocab_size, config.context_length, config.rope_theta) == (300, 777, 1.5e6)
    assert config.rms_eps == pytest.approx(1e-5)
    assert (config.query_width, config.kv_width, config.name) == (192, 96, "random test model")


def test_split_file_gives_the_same_config(read: Any, tmp_path: Path) -> None:
    parts = write_split_model(tmp_path / "split.gguf", window=8)
    assert ModelConfig.from_gguf(GGUFFile(parts[1])) == read(window=8)


def test_without_a_window_every_layer_is_full_attention_with_rope(read: Any) -> None:
    config = read(n_layers=5)
    assert (config.window, config.window_layout, config.rope_layout) == (0, (False,) * 5, (True,) * 5)


def test_with_a_window_every_fourth_layer_is_full_without_rope(read: Any) -> None:
    config = read(n_layers=6, window=100)
    expected = (False, True, True, True, False, True)
    assert (config.window, config.window_layout, config.rope_layout) == (100, expected, expected)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [(2, (False, True, False, True, False)), (1, (False,) * 5), ([True, True, False, False, True],) * 2],
)
def test_window_pattern_moves_windows_and_leaves_rope(read: Any, pattern: Any, expected: Any) -> None:
    config = read(n_layers=5, window=16, window_pattern=pattern)
    assert config.window_layout == tuple(expected)
    assert config.rope_layout == (False, True, True, True, False)
    assert config.window == (16 if any(expected) else 0)


def test_rope_layout_key_overrides_the_rule(read: Any) -> None:
    config = read(window=16, rope_layout=[True, False, False, True])
    assert config.rope_layout == (True, False, False, True)
    assert config.window_layout == (False, True, True, True)
    assert read(rope_layout=[True, False, True, True]).rope_layout == (True, False, True, True)


@pytest.mark.parametrize(("written", "gating"), [("sigmoid", "sigmoid"), ("softmax", "softmax"), (None, "sigmoid")])
def test_gating_and_its_default(read: Any, written: str | None, gating: str) -> None:
    assert read(gating=written).gating == gating


def test_head_is_tied_when_output_is_absent(read: Any) -> None:
    tied, untied = read(tied=True), read(tied=False)
    assert (tied.tied, tied.head_tensor) == (True, "token_embd.weight")
    assert (untied.tied, untied.head_tensor) == (False, "output.weight")


def test_transposed_down_is_recognised_by_its_shape(read: Any) -> None:
    assert read(down_transposed=True).down_transposed
    assert not read().down_transposed
    assert not read(d_model=64, d_ffn=64, down_transposed=True).down_transposed


def test_rope_options_and_their_defaults(read: Any) -> None:
    config = read(rope_theta=5000.0)
    assert (config.rope_dim, config.rope_theta_swa) == (16, 5000.0)
    config = read(rope_dim=8, rope_theta_swa=250.0, window=8)
    assert (config.rope_dim, config.rope_theta, config.rope_theta_swa) == (8, 10000.0, 250.0)


def test_fused_qkv_and_mixed_types_are_accepted(read: Any) -> None:
    assert read(fused_qkv=True).n_heads == 4
    assert read(types={"default": "Q4_0", "down": "Q4_1", "attn": "Q8_0"}, head_type="F16").tied


def test_predictor_size_comes_from_its_element_count(read: Any) -> None:
    assert read().lm_head_predictor_size == 0
    assert read(lm_head_profiler=64).lm_head_predictor_size == 64


def test_one_expert_one_layer_is_accepted(read: Any) -> None:
    """Writers may drop trailing dimensions of one."""
    assert read(n_experts=1, n_experts_used=1, n_layers=1).n_experts == 1


@pytest.mark.parametrize("tied", [True, False])
def test_canonical_names_are_those_of_the_file(tmp_path: Path, tied: bool) -> None:
    model = GGUFFile(write_model(tmp_path / "model.gguf", tied=tied))
    config = ModelConfig.from_gguf(model)
    names = list(config.tensor_names())
    assert len(names) == len(set(names))
    assert set(names) == set(model.tensors)
    assert tensor_name("attn_q", 3) == config.tensor_name("attn_q", 3) == "blk.3.attn_q.weight"


# --- refused ---


def test_other_architectures_are_refused(refuse: Any) -> None:
    refuse("general.architecture", "llama", architecture="llama")


REQUIRED = [
    "block_count", "context_length", "embedding_length", "expert_count", "expert_used_count",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "rope.freq_base",
]  # fmt: skip


@pytest.mark.parametrize("name", REQUIRED)
def test_missing_keys_are_refused(refuse: Any, name: str) -> None:
    refuse(f"smallthinker.{name}", "missing", **key(name, None))


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("value", [0, "4", True, -1, 1 << 31 | 1, [1, 2]])
def test_values_out_of_range_or_of_the_wrong_type_are_refused(refuse: Any, name: str, value: Any) -> None:
    if name in ("attention.layer_norm_rms_epsilon", "rope.freq_base") and value == 1 << 31 | 1:
        value = float("nan")
    refuse(f"smallthinker.{name}", **key(name, value))


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("attention.head_count_kv", 3, "do not divide"),
        ("attention.key_length", 20, "multiple of 8"),
        ("attention.value_length", 32, "equal"),
        ("expert_used_count", 9, "from 1 to 8"),
        ("embedding_length", 48, "multiple of 32"),
        ("feed_forward_length", 128, "must be equal"),
        ("rope.dimension_count", 18, "from 2 to 16"),
        ("rope.dimension_count", 7, "even"),
        ("rope.freq_base", float("inf"), "finite"),
        ("rope.freq_base_swa", -1.0, "positive"),
        ("rope.scaling.type", "yarn", "yarn"),
        ("expert_gating_func", 3, "sigmoid"),
        ("expert_gating_func", True, "sigmoid"),
        ("vocab_size", 319, "320"),
        ("rope_layout", [True, False], "2 entries for 4 layers"),
        ("rope_layout", [1, 2, 0, 1], "booleans"),
        ("attention.sliding_window", "wide", "whole number"),
    ],
)
def test_inconsistent_values_are_refused(refuse: Any, name: str, value: Any, match: str) -> None:
    field = "expert_feed_forward_length" if name == "feed_forward_length" else name
    refuse(f"smallthinker.{field}", match, **key(name, value))


@pytest.mark.parametrize("pattern", [[True], [2, 0, 0, 0], 0, "all"])
def test_bad_window_patterns_are_refused(refuse: Any, pattern: Any) -> None:
    refuse(
        "smallthinker.attention.sliding_window_pattern",
        window=8,
        **key("attention.sliding_window_pattern", pattern),
    )


def test_more_or_fewer_tokens_than_embedding_rows_are_refused(refuse: Any) -> None:
    refuse("tokenizer.ggml.tokens", "2 tokens", metadata={"tokenizer.ggml.tokens": ["a", "b"]})
    refuse("tokenizer.ggml.tokens", "strings", metadata={"tokenizer.ggml.tokens": 3})


ALL_TENSORS = [
    "token_embd.weight", "output_norm.weight",
    *(tensor_name(role, 2) for role in (
        "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate_inp", "ffn_gate_exps",
        "ffn_up_exps", "ffn_down_exps",
    )),
]  # fmt: skip


@pytest.mark.parametrize("name", ALL_TENSORS)
def test_missing_tensors_are_refused(refuse: Any, name: str) -> None:
    refuse(name, "missing", drop_tensors=[name])


@pytest.mark.parametrize("name", ALL_TENSORS)
def test_tensors_of_the_wrong_shape_are_refused(refuse: Any, name: str) -> None:
    refuse(name, "shape", replace_tensors={name: (np.zeros((7, 32), np.float32), "F32")})


@pytest.mark.parametrize("name", ["output_norm.weight", "blk.1.attn_norm.weight", "blk.1.ffn_norm.weight"])
def test_norms_must_be_f32(refuse: Any, name: str) -> None:
    refuse(name, "type F16", replace_tensors={name: (np.ones(64, np.float32), "F16")})


def test_router_must_be_f32(refuse: Any) -> None:
    refuse("blk.0.ffn_gate_inp.weight", "type Q8_0", types={"default": "Q4_0", "router": "Q8_0"})


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias.weight", "blk.4.attn_q.weight", "rope_freqs.weight"])
def test_tensors_that_would_be_ignored_are_refused(refuse: Any, name: str) -> None:
    refuse(name, "not a tensor", replace_tensors={name: (np.ones(64, np.float32), "F32")})


def test_fused_and_separate_qkv_together_are_refused(refuse: Any) -> None:
    extra = {"blk.0.attn_q.weight": (np.zeros((64, 64), np.float32), "F32")}
    refuse("blk.0.attn_q.weight", "not a tensor", fused_qkv=True, replace_tensors=extra)


def test_layers_that_disagree_on_transposed_down_are_refused(refuse: Any) -> None:
    other = {"blk.3.ffn_down_exps.weight": (np.zeros((8, 64, 96), np.float32), "F32")}
    refuse("blk.3.ffn_down_exps.weight", "shape", down_transposed=True, replace_tensors=other)


@pytest.mark.parametrize("shape", [(64 + 321,), (320 + 64, 32), (8 * (64 + 320),)])
def test_odd_predictors_are_refused(refuse: Any, shape: tuple[int, ...]) -> None:
    extra = {"lm_head_profiler.weight": (np.zeros(shape, np.float32), "F32")}
    refuse("lm_head_profiler.weight", replace_tensors=extra)
