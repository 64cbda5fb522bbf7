"""The converter: a checkpoint written here comes out as the GGUF that FORMATS describes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoint_files import (
    ABSENT,
    EXPERTS,
    FFN,
    FIXTURES,
    HEAD_DIM,
    HEADS,
    KV,
    LAYERS,
    VOCAB,
    D,
    tensors,
    write_checkpoint,
)
from reference import Params, Reference, relative_error

from smallthinker_edge import ModelFormatError, SmallThinker
from smallthinker_edge.cli import main
from smallthinker_edge.files.convert import convert


@pytest.mark.parametrize(("type_", "tied", "shards"), [("q4_0", True, 1), ("q8_0", False, 3), ("f16", True, 2)])
def test_tensors_and_keys_are_those_of_the_checkpoint(tmp_path: Path, type_: str, tied: bool, shards: int) -> None:
    values = write_checkpoint(tmp_path / "hf", tied=tied, shards=shards)
    target = tmp_path / "model.gguf"
    convert(tmp_path / "hf", target, type_)
    reader = gguf.GGUFReader(target)
    found = {tensor.name: tensor for tensor in reader.tensors}
    kind = gguf.GGMLQuantizationType[type_.upper()]
    assert ("output.weight" in found) is not tied
    for name, source in (("token_embd", "model.embed_tokens"), ("blk.3.attn_k", "model.layers.3.self_attn.k_proj")):
        expected = gguf.quants.quantize(values[source + ".weight"], kind)
        assert found[name + ".weight"].data.tobytes() == expected.tobytes()
    stack = np.stack([values[f"model.layers.2.block_sparse_moe.experts.{e}.down.weight"] for e in range(EXPERTS)])
    assert found["blk.2.ffn_down_exps.weight"].data.tobytes() == gguf.quants.quantize(stack, kind).tobytes()
    router = found["blk.1.ffn_gate_inp.weight"]
    assert router.tensor_type == gguf.GGMLQuantizationType.F32
    assert np.array_equal(router.data, values["model.layers.1.block_sparse_moe.primary_router.weight"])
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["smallthinker.expert_gating_func"] == 2
    assert keys["smallthinker.attention.sliding_window"] == 4096
    assert "smallthinker.rope_layout" not in keys
    assert (keys["tokenizer.ggml.eos_token_id"], keys["tokenizer.ggml.eot_token_id"]) == (300, 302)
    with SmallThinker(target) as model:
        assert model.config.rope_layout == (False, True, True, True, False)
        assert model.tokenizer.eos_ids == {300, 302}
        assert model.detokenize(model.tokenize("hello wörld")) == "hello wörld"
        assert len(model.generate("hello", max_tokens=3).tokens) >= 1


def test_what_llama_cpp_cannot_express_is_kept_and_told(tmp_path: Path) -> None:
    layout = [1, 1, 0, 1, 0]
    write_checkpoint(tmp_path / "hf", changes={"rope_layout": layout, "sliding_window_size": 128})
    with pytest.warns(UserWarning, match=r"llama\.cpp"):
        convert(tmp_path / "hf", tmp_path / "m.gguf")
    with SmallThinker(tmp_path / "m.gguf") as model:
        assert model.config.rope_layout == tuple(map(bool, layout))
        assert model.config.window == 128


def test_the_user_is_told_that_llama_cpp_misreads_four_layers(tmp_path: Path) -> None:
    four = [0, 1, 1, 1]
    changes = {"num_hidden_layers": 4, "rope_layout": four, "sliding_window_layout": four}
    write_checkpoint(tmp_path / "hf", changes=changes, layers=4)
    with pytest.warns(UserWarning, match=r"exactly 4 layers"):
        convert(tmp_path / "hf", tmp_path / "m.gguf")
    with SmallThinker(tmp_path / "m.gguf") as model:
        assert model.config.rope_layout == (False, True, True, True)


def shrunk(released: str) -> dict[str, Any]:
    """A released config.json, key for key, with the sizes of this file's checkpoint."""
    config = json.loads((FIXTURES / released).read_text())
    sizes = {
        "num_hidden_layers": LAYERS, "hidden_size": D, "num_attention_heads": HEADS, "num_key_value_heads": KV,
        "head_dim": HEAD_DIM, "moe_num_primary_experts": EXPERTS, "moe_num_active_primary_experts": 2,
        "moe_ffn_hidden_size": FFN, "vocab_size": VOCAB, "max_position_embeddings": 256,
        "rope_layout": config["rope_layout"][:LAYERS],
        "sliding_window_layout": config["sliding_window_layout"][:LAYERS],
        "bos_token_id": 300, "eos_token_id": [300, 302],
    }  # fmt: skip
    assert sizes.keys() <= config.keys()
    return config | sizes


def reference_of(values: dict[str, np.ndarray], *, softmax: bool, hybrid: bool) -> Reference:
    """The model as FORMATS describes it, from the checkpoint's own tensors: nothing of the converter is in it."""
    layout = tuple(hybrid and layer % 4 != 0 for layer in range(LAYERS))
    params = Params(
        n_layers=LAYERS, n_heads=HEADS, n_kv_heads=KV, head_dim=HEAD_DIM, n_experts_used=2, rms_eps=1e-6,
        rope_theta=1.5e6, rope_theta_swa=1.5e6, rope_dim=HEAD_DIM, gating="softmax" if softmax else "sigmoid",
        window=4096, window_layout=layout, rope_layout=layout if hybrid else (True,) * LAYERS,
    )  # fmt: skip
    weights = {"token_embd": values["model.embed_tokens.weight"], "output_norm": values["model.norm.weight"]}
    if "lm_head.weight" in values:
        weights["output"] = values["lm_head.weight"]
    for layer in range(LAYERS):
        b, p = f"blk.{layer}.", f"model.layers.{layer}."
        names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
                 "ffn_gate_inp": "block_sparse_moe.primary_router", "attn_output": "self_attn.o_proj",
                 "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}  # fmt: skip
        weights |= {b + ours: values[f"{p}{theirs}.weight"] for ours, theirs in names.items()}
        for m in ("gate", "up", "down"):
            experts = [values[f"{p}block_sparse_moe.experts.{e}.{m}.weight"] for e in range(EXPERTS)]
            weights[f"{b}ffn_{m}_exps"] = np.stack(experts)
    return Reference(params, {name + ".weight": value for name, value in weights.items()})


@pytest.mark.parametrize("released", ["config-4b.json", "config-21b.json"])
def test_a_released_config_converts_to_the_model_it_describes(tmp_path: Path, released: str) -> None:
    large = "21b" in released
    values = write_checkpoint(tmp_path / "hf", config=shrunk(released), tied=not large, shards=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(tmp_path / "hf", tmp_path / "m.gguf", "f16")
    tokens = [5, 77, 210, 3, 199, 42, 260, 11]
    expected = reference_of(values, softmax=large, hybrid=large).logits(tokens)
    with SmallThinker(tmp_path / "m.gguf") as model, model.session() as session:
        assert model.config.gating == ("softmax" if large else "sigmoid")
        assert model.config.tied is not large
        assert relative_error(expected, session.decode(tokens, all_logits=True)) < 2e-3
    other = reference_of(values, softmax=not large, hybrid=large).logits(tokens)
    assert relative_error(expected, other) > 0.02, "the routers' weights must matter here"


def test_keys_left_out_have_the_defaults_of_the_authors_class(tmp_path: Path) -> None:
    keys = ("tie_word_embeddings", "moe_primary_router_apply_softmax", "rope_layout", "sliding_window_layout")
    write_checkpoint(tmp_path / "hf", changes=dict.fromkeys(keys, ABSENT))
    convert(tmp_path / "hf", tmp_path / "m.gguf")
    with SmallThinker(tmp_path / "m.gguf") as model:
        config = model.config
        assert (config.tied, config.gating, config.window) == (True, "sigmoid", 0)
        assert config.rope_layout == (True,) * LAYERS
        assert config.window_layout == (False,) * LAYERS


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": ABSENT},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": 5e5},
        {"rope_scaling": {"rope_type": "default"}, "rope_theta": 5e5},
        {"rope_scaling": {"type": "default", "factor": 1.0}, "rope_theta": 500000},
    ],
)
def test_rope_theta_is_found_wherever_it_is_saved(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_checkpoint(tmp_path / "hf", changes=changes)
    convert(tmp_path / "hf", tmp_path / "m.gguf")
    with SmallThinker(tmp_path / "m.gguf") as model:
        assert model.config.rope_theta == 5e5


def test_unknown_keys_pass_with_a_note(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", changes={"mood": "good", "quiet": None, "use_qk_norm": False, "rotary_pct": 1.0})
    with pytest.warns(UserWarning, match=r"config\.json: .*ignored: mood$"):
        convert(tmp_path / "hf", tmp_path / "m.gguf")


def test_leftover_tensors_that_change_nothing_pass_with_a_note(tmp_path: Path) -> None:
    head = tensors(True)["model.embed_tokens.weight"]
    rope = "model.layers.0.self_attn.rotary_emb.inv_freq"
    write_checkpoint(tmp_path / "hf", extra={"lm_head.weight": head, rope: np.ones(HEAD_DIM // 2, np.float32)})
    with pytest.warns(UserWarning, match="left out|used instead") as notes:
        convert(tmp_path / "hf", tmp_path / "m.gguf")
    assert {str(note.message).partition(":")[0] for note in notes} == {"lm_head.weight", rope}
    with SmallThinker(tmp_path / "m.gguf") as model:
        assert model.config.tied


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.self_attn.q_proj.bias",
                                  "model.layers.1.self_attn.q_norm.weight", "model.layers.9.input_layernorm.weight",
                                  "model.layers.0.block_sparse_moe.shared_expert.up.weight"])  # fmt: skip
def test_a_tensor_that_nothing_reads_is_refused(tmp_path: Path, name: str) -> None:
    other = np.ones((VOCAB, D), np.float32)
    write_checkpoint(tmp_path / "hf", extra={name: other})
    with pytest.raises(ModelFormatError) as caught:
        convert(tmp_path / "hf", tmp_path / "m.gguf")
    assert caught.value.field == name
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    "changes",
    [
        {"use_qk_norm": True}, {"moe_enable_early_router": False}, {"moe_layer_layout": [0, 1, 1, 1, 1]},
        {"moe_shared_primary_experts": 1}, {"moe_enable_secondary_experts": True}, {"moe_num_secondary_experts": 2},
        {"attention_bias": True}, {"hidden_act": "silu"}, {"partial_rotary_factor": 0.5}, {"norm_topk_prob": False},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4}}, {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3"}}, {"rope_parameters": {"full": {}}},
        {"rope_parameters": {"rope_theta": 2e4}}, {"rope_scaling": {"type": "default", "factor": 2.0}},
        {"rope_scaling": "yarn"}, {"rope_theta": ABSENT}, {"rope_theta": float("nan")}, {"rms_norm_eps": 0},
        {"final_logit_softcapping": 30.0}, {"quantization_config": {"bits": 4}}, {"layer_types": ["full_attention"]},
        {"tie_word_embeddings": None}, {"num_hidden_layers": 10**9}, {"hidden_size": -64}, {"head_dim": 33},
        {"moe_num_active_primary_experts": 5}, {"num_key_value_heads": 3}, {"vocab_size": True},
        {"architectures": ["SmallThinkerForSequenceClassification"]}, {"model_type": ABSENT},
    ],
    ids=str,
)  # fmt: skip
def test_a_key_that_would_change_the_computation_is_refused_by_name(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_checkpoint(tmp_path / "hf", changes=changes)
    with pytest.raises(ModelFormatError) as caught:
        convert(tmp_path / "hf", tmp_path / "m.gguf")
    assert caught.value.field == next(iter(changes))
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_type": "llama"}, "model_type"), ({"hidden_size": "64"}, "hidden_size"),
        ({"rope_layout": [1, 0]}, "rope_layout"), ({"hidden_size": 96}, "model.embed_tokens.weight"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"), ({"num_hidden_layers": 6}, "sliding_window_layout"),
        ({"tie_word_embeddings": False}, "lm_head.weight"), ({"vocab_size": 200}, "model.vocab"),
    ],
)  # fmt: skip
def test_a_bad_checkpoint_is_refused_and_leaves_nothing(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    write_checkpoint(tmp_path / "hf", changes=changes)
    with pytest.raises(ModelFormatError) as caught:
        convert(tmp_path / "hf", tmp_path / "m.gguf")
    assert caught.value.field == field
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_damaged_safetensors_file_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    whole = file.read_bytes()
    for cut in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(ModelFormatError, match=r"model\.safetensors"):
            convert(tmp_path / "hf", tmp_path / "m.gguf")


def test_the_command_converts_packs_verifies_and_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "hf", changes={"mood": "good"})
    config = tmp_path / "hf" / "config.json"
    model, packed = str(tmp_path / "m.gguf"), str(tmp_path / "m.stpk")
    assert main(["convert", str(tmp_path / "hf"), "-o", model, "--type", "q8_0"]) == 0
    assert capsys.readouterr().err == f"note: {config}: unknown keys were ignored: mood\n"
    assert main(["pack", model, "-o", packed]) == 0
    assert main(["verify", packed]) == 0
    assert "checksum" in capsys.readouterr().out
    assert main(["plan", packed, "--memory", "1GiB", "--context", "128"]) == 0
    assert f"{LAYERS * EXPERTS} expert slots" in capsys.readouterr().out
    assert main(["plan", packed, "--memory", "1GiB", "--context", "128", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["limit"] == 2**30
    parts = ("process", "weights", "kv_cache", "logits", "buffers", "margin", "page_tables")
    assert figures["total"] == sum(figures[name] for name in parts) + LAYERS * EXPERTS * figures["slot_bytes"]
    assert main(["plan", packed, "--memory", "1MiB"]) == 1
    assert "needs" in capsys.readouterr().err
