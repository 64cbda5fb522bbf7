"""Writes a Hugging Face checkpoint of the 21B's shapes with random weights, to measure `convert` at full size.

Run by people who measure; needs NumPy only. One expert is 12 MB, so a few layers show the speed of all 52:

    python tools/models/synthetic_checkpoint.py build/checkpoint --layers 5
    python tools/models/synthetic_checkpoint.py build/checkpoint --measure    # converts it, prints MB/s and peak memory
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

D, HEADS, KV, HEAD_DIM, EXPERTS, FFN, VOCAB = 2560, 28, 4, 128, 64, 768, 151936
SHARD = 5 << 30  # bytes, as transformers cuts them
POOL = 1 << 25  # random numbers, of which tensors take stretches
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tensors(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCAB, D)
    for layer in range(layers):
        p = f"model.layers.{layer}."
        yield p + "input_layernorm.weight", (D,)
        yield p + "post_attention_layernorm.weight", (D,)
        yield p + "self_attn.q_proj.weight", (HEADS * HEAD_DIM, D)
        yield p + "self_attn.k_proj.weight", (KV * HEAD_DIM, D)
        yield p + "self_attn.v_proj.weight", (KV * HEAD_DIM, D)
        yield p + "self_attn.o_proj.weight", (D, HEADS * HEAD_DIM)
        yield p + "block_sparse_moe.primary_router.weight", (EXPERTS, D)
        for e in range(EXPERTS):
            for name, shape in (("gate", (FFN, D)), ("up", (FFN, D)), ("down", (D, FFN))):
                yield f"{p}block_sparse_moe.experts.{e}.{name}.weight", shape
    yield "model.norm.weight", (D,)
    yield "lm_head.weight", (VOCAB, D)


def config(layers: int) -> dict[str, object]:
    layout = [int(layer % 4 != 0) for layer in range(layers)]
    return {
        "architectures": ["SmallThinkerForCausalLM"], "num_hidden_layers": layers, "hidden_size": D,
        "num_attention_heads": HEADS, "num_key_value_heads": KV, "head_dim": HEAD_DIM,
        "moe_num_primary_experts": EXPERTS, "moe_num_active_primary_experts": 6, "moe_ffn_hidden_size": FFN,
        "moe_primary_router_apply_softmax": True, "rope_layout": layout, "sliding_window_layout": layout,
        "sliding_window_size": 4096, "rope_theta": 1.5e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 16384,
        "vocab_size": VOCAB, "tie_word_embeddings": False, "bos_token_id": 256, "eos_token_id": [256, 258],
    }  # fmt: skip


def tokenizer() -> dict[str, object]:
    """Single bytes, one merge and the marks of ChatML; the converter pads it to the vocabulary."""
    from smallthinker_edge.text.tokenizer import CHARACTER_OF

    added = [{"id": 256 + i, "content": text, "special": True} for i, text in enumerate(SPECIAL)]
    vocab = {CHARACTER_OF[byte]: byte for byte in range(256)} | {"he": 256 + len(SPECIAL)}
    return {"model": {"type": "BPE", "vocab": vocab, "merges": ["h e"]}, "added_tokens": added}


def write(folder: Path, layers: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(layers)))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()))
    random = np.random.default_rng(0)
    pool = (random.standard_normal(POOL, dtype=np.float32) * np.float32(0.02)).view(np.uint32)
    pool = (pool >> 16).astype(np.uint16)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in tensors(layers):
        size = 2 * math.prod(shape)
        if filled + size > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += size
    places = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        places |= dict.fromkeys((name for name, _ in shard), file)
        write_shard(folder / file, shard, pool, random)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def write_shard(
    path: Path, shard: list[tuple[str, tuple[int, ...]]], pool: np.ndarray, random: np.random.Generator
) -> None:
    header, at = {}, 0
    for name, shape in shard:
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, shape in shard:
            left = math.prod(shape)
            while left:
                start = int(random.integers(0, POOL // 2))
                part = pool[start : start + min(left, POOL // 2)]
                file.write(part.data)
                left -= part.size


def measure(folder: Path, target: Path, kind: str) -> None:
    from smallthinker_edge.files.convert import convert

    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    start = time.perf_counter()
    convert(folder, target, kind)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{kind}: {size / 1e9:.2f} GB of checkpoint in {seconds:.1f} s, {size / seconds / 1e6:.0f} MB/s; "
          f"peak of memory {peak / 1e6:.0f} MB; {target.stat().st_size / 1e9:.2f} GB written")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=5, help="of the 21B's 52 (default: 5, a checkpoint of 5.5 GB)")
    parser.add_argument("--measure", action="store_true", help="convert the folder instead of writing it")
    parser.add_argument("--type", default="q4_0")
    arguments = parser.parse_args()
    if not arguments.measure:
        write(arguments.folder, arguments.layers)
        return
    target = arguments.folder.with_suffix(".gguf")
    try:
        measure(arguments.folder, target, arguments.type)
    finally:
        if target.exists():
            os.unlink(target)


if __name__ == "__main__":
    main()
