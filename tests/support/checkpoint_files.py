"""Writes small SmallThinker checkpoints as Hugging Face folders, for tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

D, HEADS, KV, HEAD_DIM, EXPERTS, FFN, LAYERS, VOCAB = 64, 2, 1, 32, 4, 32, 5, 320
# As Qwen2's tokenizer.json has it.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FIXTURES = Path(__file__).parents[1] / "fixtures"
ABSENT = object()  # as a changed value: the key is left out


def tensors(tied: bool, layers: int = LAYERS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, D), "model.norm.weight": (D,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, D)
    for layer in range(layers):
        p = f"model.layers.{layer}."
        shapes |= {p + "input_layernorm.weight": (D,), p + "post_attention_layernorm.weight": (D,)}
        shapes |= {
            p + "self_attn.q_proj.weight": (HEADS * HEAD_DIM, D),
            p + "self_attn.o_proj.weight": (D, HEADS * HEAD_DIM),
        }
        shapes |= {p + f"self_attn.{name}_proj.weight": (KV * HEAD_DIM, D) for name in "kv"}
        shapes[p + "block_sparse_moe.primary_router.weight"] = (EXPERTS, D)
        for e in range(EXPERTS):
            q = f"{p}block_sparse_moe.experts.{e}."
            shapes |= {q + "gate.weight": (FFN, D), q + "up.weight": (FFN, D), q + "down.weight": (D, FFN)}

    def scale(name: str) -> float:
        """Routers and experts are strong enough for logits to show how their weights were computed."""
        return 4.0 if "router" in name else 0.5 if "experts" in name else 0.125

    return {name: (rng.standard_normal(shape) * scale(name)).astype(np.float32) for name, shape in shapes.items()}


def to_bf16_bits(values: np.ndarray) -> np.ndarray:
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def write_bf16(path: Path, values: dict[str, np.ndarray]) -> None:
    """safetensors for NumPy knows no BF16: written as U16, then renamed in the header (the same length plus one)."""
    save_file({name: to_bf16_bits(value) for name, value in values.items()}, path)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].replace(b'"U16"', b'"BF16"')
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


def write_checkpoint(
    folder: Path,
    *,
    tied: bool = True,
    changes: dict[str, Any] | None = None,
    shards: int = 1,
    layers: int = LAYERS,
    config: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """A checkpoint folder; `config` replaces config.json, `changes` adds to it (ABSENT removes a key), `extra` adds
    tensors. Returns the tensors as float32, with the precision they have in the file."""
    folder.mkdir()
    values = tensors(tied, layers) | (extra or {})
    names = list(values)
    files = {}
    for i in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        write_bf16(folder / file, {name: values[name] for name in names[i::shards]})
        files |= dict.fromkeys(names[i::shards], file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    layout = [int(layer % 4 != 0) for layer in range(layers)]
    config = config or {
        "model_type": "smallthinker", "num_hidden_layers": layers, "hidden_size": D, "num_attention_heads": HEADS,
        "num_key_value_heads": KV, "head_dim": HEAD_DIM, "moe_num_primary_experts": EXPERTS,
        "moe_num_active_primary_experts": 2, "moe_ffn_hidden_size": FFN, "moe_primary_router_apply_softmax": False,
        "rope_layout": layout, "sliding_window_layout": layout, "sliding_window_size": 4096, "rope_theta": 1e4,
        "rope_scaling": None, "rms_norm_eps": 1e-6, "vocab_size": VOCAB, "tie_word_embeddings": tied,
        "max_position_embeddings": 256, "bos_token_id": 300, "eos_token_id": [300, 302],
    }  # fmt: skip
    config = {key: value for key, value in (config | (changes or {})).items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["hello world hello there"] * 9,
        trainers.BpeTrainer(vocab_size=262, initial_alphabet=alphabet, show_progress=False),
    )
    data = json.loads(tokenizer.to_str())
    specials = {300: "<|endoftext|>", 301: "<|im_start|>", 302: "<|im_end|>"}
    data["added_tokens"] = [{"id": i, "content": s, "special": True, "single_word": False, "lstrip": False,
                             "rstrip": False, "normalized": False} for i, s in specials.items()]  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"add_bos_token": False, "chat_template": "{{ messages }}"})
    )
    return {name: (to_bf16_bits(v).astype(np.uint32) << 16).view(np.float32) for name, v in values.items()}
