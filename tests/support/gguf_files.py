"""Writes small random SmallThinker GGUF files for tests, and damages them on purpose.

Called by the tests (and by recording scripts in tools/); uses the `gguf` package, so that the library's own
reader is tested against files that it did not write. Never used by the package itself.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = (
    ("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e"),
    ("i", "n"), ("e", "r"), ("o", "n"), ("Ġ", "a"), ("o", "r"), ("Ġ", "w"), ("Ġw", "or"), ("l", "d"),
    ("Ġwor", "ld"),
)  # fmt: skip
TOKEN_NORMAL, TOKEN_CONTROL, TOKEN_UNUSED = 1, 3, 5


def byte_alphabet() -> list[str]:
    """The 256 printable characters that stand for bytes 0..255 in a GPT-2 byte-level vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + len(table) - len(printable))
    return [table[byte] for byte in range(256)]


def tiny_vocabulary(vocab_size: int) -> tuple[list[str], list[int], list[str]]:
    """(tokens, token types, merges): 256 bytes, the results of MERGES, three specials, then padding."""
    tokens = byte_alphabet() + [left + right for left, right in MERGES] + list(SPECIAL_TOKENS)
    types = [TOKEN_NORMAL] * (256 + len(MERGES)) + [TOKEN_CONTROL] * len(SPECIAL_TOKENS)
    if vocab_size < len(tokens):
        raise ValueError(f"a vocabulary with a tokenizer needs at least {len(tokens)} tokens")
    padding = vocab_size - len(tokens)
    tokens += [f"[PAD{i}]" for i in range(padding)]
    types += [TOKEN_UNUSED] * padding
    return tokens, types, [f"{left} {right}" for left, right in MERGES]


def quantize_q6_k(values: np.ndarray) -> np.ndarray:
    """Plain round-to-nearest Q6_K: rows of 256 weights to blocks of 210 bytes (no error minimisation)."""
    groups = values.astype(np.float32).reshape(-1, 16, 16)
    blocks = groups.shape[0]
    group_scale = np.abs(groups).max(axis=2) / 31.0
    super_scale = (group_scale.max(axis=1, keepdims=True) / 127.0).astype(np.float16)
    d = super_scale.astype(np.float32)
    safe_d = np.where(d == 0, 1.0, d)
    scales = np.clip(np.rint(group_scale / safe_d), -128, 127).astype(np.int8)
    step = d[:, :, None] * scales[:, :, None].astype(np.float32)
    quants = np.rint(np.divide(groups, step, out=np.zeros_like(groups), where=step != 0))
    q = (np.clip(quants, -32, 31) + 32).astype(np.uint8).reshape(blocks, 2, 4, 32)
    low, high = q & 15, q >> 4
    ql = np.stack([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], axis=2)
    qh = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    parts = (
        ql.reshape(blocks, 128),
        qh.reshape(blocks, 64),
        scales.view(np.uint8),
        super_scale.view(np.uint8),
    )
    packed = np.concatenate(parts, axis=1)
    return packed.reshape(*values.shape[:-1], values.shape[-1] // 256 * 210)


# Where a block's fp16 scales stand; every other byte may be anything.
SCALES = {
    "Q4_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,),
    "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,), "Q8_0": (0,),
}  # fmt: skip


def random_blocks(kind: GGMLQuantizationType, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Blocks of any bytes, with scales between 0.001 and 0.01: [..., bytes of a row]."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, size), np.uint8)
    for at in SCALES[kind.name]:
        scales = rng.uniform(0.001, 0.01, data.shape[:-1]).astype(np.float16)
        data[..., at : at + 2] = scales[..., None].view(np.uint8)
    return data.reshape(*shape[:-1], -1)


def random_like(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Random blocks of a type that no quantiser is at hand for, whose weights spread as `values` do."""
    rng = np.random.default_rng(values.size + int(1e6 * abs(float(values.flat[0]))))
    blocks = random_blocks(kind, values.shape, rng).reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])

    def scale(at: int, factor: float, source: int) -> None:
        scales = np.ascontiguousarray(blocks[:, source : source + 2]).view(np.float16).astype(np.float32)
        blocks[:, at : at + 2] = (scales * factor).astype(np.float16).view(np.uint8)

    if len(SCALES[kind.name]) > 1:  # minima in the middle: as many weights above zero as below
        first, second = SCALES[kind.name]
        scale(second, {"Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5, "Q4_1": -7.5, "Q5_1": -15.5}[kind.name], first)
    ratio = float(values.std() / gguf.quants.dequantize(blocks, kind).std())
    for at in SCALES[kind.name]:
        scale(at, ratio, at)
    return blocks.reshape(*values.shape[:-1], -1)


def encode(values: np.ndarray, type_name: str) -> tuple[np.ndarray, GGMLQuantizationType | None]:
    """(array to hand to GGUFWriter.add_tensor, raw dtype) for float32 `values` [..., columns]."""
    kind = GGMLQuantizationType[type_name]
    if type_name == "F32":
        return values.astype(np.float32), None
    if type_name == "F16":
        return values.astype(np.float16), None
    if type_name == "Q6_K":
        return quantize_q6_k(values), kind
    if type_name.endswith("_K") or type_name.startswith("IQ"):
        return random_like(values, kind), kind
    return gguf.quants.quantize(values.astype(np.float32), kind), kind


def _add_metadata(writer: gguf.GGUFWriter, values: Mapping[str, Any]) -> None:
    """Writes keys by Python type: bool, int as uint32, float as float32, str, and lists of those."""
    for key, value in values.items():
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_key_value(key, value, GGUFValueType.UINT32 if value >= 0 else GGUFValueType.INT32)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, list(value))


def _tokenizer_metadata(vocab_size: int) -> dict[str, Any]:
    tokens, types, merges = tiny_vocabulary(vocab_size)
    first_special = 256 + len(MERGES)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": first_special,
        "tokenizer.ggml.eos_token_id": first_special + 2,
        "tokenizer.ggml.padding_token_id": first_special,
        "tokenizer.ggml.add_bos_token": False,
    }


def _fill_writer(
    writer: gguf.GGUFWriter,
    *,
    n_layers: int = 4,
    d_model: int = 64,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    head_dim: int = 16,
    n_experts: int = 8,
    n_experts_used: int = 2,
    d_ffn: int = 96,
    vocab_size: int = 320,
    types: str | Mapping[str, str] = "Q4_0",
    head_type: str | None = None,
    gating: str | None = "sigmoid",
    tied: bool = True,
    window: int = 0,
    window_pattern: int | Sequence[bool] | None = None,
    rope_layout: Sequence[bool] | None = None,
    rope_theta: float = 10000.0,
    rope_theta_swa: float | None = None,
    rope_dim: int | None = None,
    rms_eps: float = 1e-6,
    fused_qkv: bool = False,
    down_transposed: bool = False,
    lm_head_profiler: int = 0,
    context_length: int = 512,
    seed: int = 0,
    with_tokenizer: bool = True,
    metadata: Mapping[str, Any] | None = None,
    drop_tensors: Iterable[str] = (),
    replace_tensors: Mapping[str, tuple[np.ndarray, str]] | None = None,
) -> None:
    rng = np.random.default_rng(seed)
    roles = {"default": types} if isinstance(types, str) else dict(types)
    default = roles.get("default", "Q4_0")
    dropped = set(drop_tensors)
    replaced = dict(replace_tensors or {})

    keys: dict[str, Any] = {
        "general.name": "random test model",
        "smallthinker.block_count": n_layers,
        "smallthinker.context_length": context_length,
        "smallthinker.embedding_length": d_model,
        "smallthinker.feed_forward_length": d_ffn,
        "smallthinker.expert_feed_forward_length": d_ffn,
        "smallthinker.expert_count": n_experts,
        "smallthinker.expert_used_count": n_experts_used,
        "smallthinker.attention.head_count": n_heads,
        "smallthinker.attention.head_count_kv": n_kv_heads,
        "smallthinker.attention.key_length": head_dim,
        "smallthinker.attention.value_length": head_dim,
        "smallthinker.attention.layer_norm_rms_epsilon": float(rms_eps),
        "smallthinker.rope.freq_base": float(rope_theta),
        "smallthinker.rope.freq_base_swa": rope_theta_swa,
        "smallthinker.rope.dimension_count": rope_dim,
        "smallthinker.expert_gating_func": {"softmax": 1, "sigmoid": 2, None: None}[gating],
        "smallthinker.attention.sliding_window": window or None,
        "smallthinker.attention.sliding_window_pattern": window_pattern,
        "smallthinker.rope_layout": None if rope_layout is None else [bool(flag) for flag in rope_layout],
    }
    if with_tokenizer:
        keys.update(_tokenizer_metadata(vocab_size))
    keys.update(metadata or {})
    _add_metadata(writer, keys)

    def add(name: str, values: np.ndarray, type_name: str) -> None:
        full_name = name + ".weight"
        if full_name in dropped:
            return
        values, type_name = replaced.pop(full_name, (values, type_name))
        array, raw_dtype = encode(values, type_name)
        writer.add_tensor(full_name, array, raw_dtype=raw_dtype)

    def matrix(*shape: int, fan_in: int | None = None, gain: float = 1.0) -> np.ndarray:
        scale = gain / np.sqrt(shape[-1] if fan_in is None else fan_in)
        return (rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)).astype(np.float32)

    def norm() -> np.ndarray:
        return (1.0 + 0.1 * rng.standard_normal(d_model)).astype(np.float32)

    head = head_type or roles.get("head", default)
    embedding = roles.get("embedding", default)
    add("token_embd", matrix(vocab_size, d_model, gain=2.0), head if tied else embedding)
    add("output_norm", norm(), "F32")
    if not tied:
        add("output", matrix(vocab_size, d_model, gain=2.0), head)
    if lm_head_profiler:
        flat = matrix(1, lm_head_profiler * (d_model + vocab_size), fan_in=d_model)
        add("lm_head_profiler", flat[0], roles.get("profiler", default))

    attention = roles.get("attn", default)
    query_width, kv_width = n_heads * head_dim, n_kv_heads * head_dim
    for layer in range(n_layers):
        blk = f"blk.{layer}."
        add(blk + "attn_norm", norm(), "F32")
        add(blk + "ffn_norm", norm(), "F32")
        add(blk + "ffn_gate_inp", matrix(n_experts, d_model, gain=2.0), roles.get("router", "F32"))
        qkv = [matrix(width, d_model) for width in (query_width, kv_width, kv_width)]
        if fused_qkv:
            add(blk + "attn_qkv", np.concatenate(qkv), attention)
        else:
            for name, values in zip(("attn_q", "attn_k", "attn_v"), qkv, strict=True):
                add(blk + name, values, attention)
        add(blk + "attn_output", matrix(d_model, query_width, gain=0.7), attention)
        add(blk + "ffn_gate_exps", matrix(n_experts, d_ffn, d_model), roles.get("gate", default))
        add(blk + "ffn_up_exps", matrix(n_experts, d_ffn, d_model), roles.get("up", default))
        down = matrix(n_experts, d_model, d_ffn, gain=1.5)
        if down_transposed:
            down = np.ascontiguousarray(down.transpose(0, 2, 1))
        add(blk + "ffn_down_exps", down, roles.get("down", default))
    for full_name, (values, type_name) in list(replaced.items()):
        add(full_name.removesuffix(".weight"), values, type_name)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model(path: str | os.PathLike[str], **options: Any) -> str:
    """Writes one random SmallThinker model and returns its path.

    Options and defaults (all keyword):
        n_layers=4, d_model=64, n_heads=4, n_kv_heads=2, head_dim=16, n_experts=8, n_experts_used=2, d_ffn=96,
        vocab_size=320, context_length=512, rms_eps=1e-6, rope_theta=1e4, rope_theta_swa=None, rope_dim=None,
        seed=0, architecture="smallthinker", alignment=None (no key: 32).
        types="Q4_0": a type (K types: rows of 256), or a dict by role: "default",
            "attn", "gate", "up", "down", "embedding", "head", "router" (F32 unless named), "profiler".
        head_type=None: type of `output`, or of `token_embd` when tied; overrides types["head"].
        gating="sigmoid" | "softmax" | None (key absent). tied=True.
        window=0 (no key), window_pattern=None | int | bools per layer, rope_layout=None | bools per layer
            (True = RoPE; written as the extra key smallthinker.rope_layout).
        fused_qkv=False, down_transposed=False, lm_head_profiler=0 (its K; a multiple of 32).
        with_tokenizer=True: a tiny byte-level BPE, padded to vocab_size (at least 275).
        metadata: keys to add or replace; a None value removes a key.
        drop_tensors: full names to leave out.
        replace_tensors: full name -> (float32 values in NumPy order, type); a new name adds a tensor.
    The same options and seed give the same bytes.
    """
    writer = gguf.GGUFWriter(Path(path), options.pop("architecture", "smallthinker"))
    alignment = options.pop("alignment", None)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    _fill_writer(writer, **options)
    _finish(writer)
    return os.fspath(path)


def write_split_model(
    path: str | os.PathLike[str], *, tensors_per_part: int = 12, small_first: bool = False, **options: Any
) -> list[str]:
    """Writes write_model's file as `STEM-00001-of-0000N.gguf` parts next to `path`; returns them in order. small_first:
    the first part holds no tensors."""
    target = Path(path)
    writer = gguf.GGUFWriter(target, "smallthinker", split_max_tensors=tensors_per_part, small_first_shard=small_first)
    _fill_writer(writer, **options)
    _finish(writer)
    parts = sorted(target.parent.glob(target.stem + "-*-of-*.gguf"))
    return [os.fspath(part) for part in parts]


class RawGGUF:
    """Builds GGUF bytes field by field, for files that no honest writer would produce.

    Values are given already encoded: see `string`, `u32`, `array`. Counts default to what was added.
    """

    def __init__(self, *, magic: bytes = b"GGUF", version: int = 3, alignment: int = 32) -> None:
        self.magic, self.version, self.alignment = magic, version, alignment
        self.keys: list[bytes] = []
        self.infos: list[bytes] = []
        self.data = b""
        self.n_keys: int | None = None
        self.n_tensors: int | None = None

    @staticmethod
    def string(text: str | bytes, length: int | None = None) -> bytes:
        raw = text.encode() if isinstance(text, str) else text
        return struct.pack("<Q", len(raw) if length is None else length) + raw

    @staticmethod
    def array(item_type: int, items: Sequence[bytes], count: int | None = None) -> bytes:
        return struct.pack("<IQ", item_type, len(items) if count is None else count) + b"".join(items)

    def key(self, name: str | bytes, value_type: int, value: bytes) -> RawGGUF:
        self.keys.append(self.string(name) + struct.pack("<I", value_type) + value)
        return self

    def u32(self, name: str, value: int) -> RawGGUF:
        return self.key(name, 4, struct.pack("<I", value))

    def tensor(
        self, name: str, shape: Sequence[int], kind: int = 0, offset: int = 0, *, n_dims: int | None = None
    ) -> RawGGUF:
        dims = b"".join(struct.pack("<Q", size) for size in shape)
        count = len(shape) if n_dims is None else n_dims
        self.infos.append(self.string(name) + struct.pack("<I", count) + dims + struct.pack("<IQ", kind, offset))
        return self

    def to_bytes(self) -> bytes:
        n_tensors = len(self.infos) if self.n_tensors is None else self.n_tensors
        n_keys = len(self.keys) if self.n_keys is None else self.n_keys
        head = self.magic + struct.pack("<IQQ", self.version, n_tensors, n_keys)
        head += b"".join(self.keys) + b"".join(self.infos)
        padding = -len(head) % self.alignment
        return head + bytes(padding) + self.data

    def write(self, path: str | os.PathLike[str]) -> str:
        Path(path).write_bytes(self.to_bytes())
        return os.fspath(path)


def truncate(path: str | os.PathLike[str], size: int, target: str | os.PathLike[str]) -> str:
    """Copies the first `size` bytes of `path` to `target`."""
    Path(target).write_bytes(Path(path).read_bytes()[:size])
    return os.fspath(target)


def overwrite(path: str | os.PathLike[str], offset: int, replacement: bytes, target: str | os.PathLike[str]) -> str:
    """Copies `path` to `target` with `replacement` written over the bytes at `offset`."""
    content = bytearray(Path(path).read_bytes())
    content[offset : offset + len(replacement)] = replacement
    Path(target).write_bytes(content)
    return os.fspath(target)


def flip_bytes(
    path: str | os.PathLike[str],
    count: int,
    seed: int,
    target: str | os.PathLike[str],
    *,
    limit: int | None = None,
) -> str:
    """Copies `path` to `target` with `count` random bytes (among the first `limit`) replaced."""
    rng = np.random.default_rng(seed)
    content = bytearray(Path(path).read_bytes())
    for position in rng.integers(0, min(limit or len(content), len(content)), size=count):
        content[position] = int(rng.integers(0, 256))
    Path(target).write_bytes(content)
    return os.fspath(target)
