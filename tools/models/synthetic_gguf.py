"""Writing GGUF files in one pass, copying a tokenizer from one to another, and drawing random quantised weights.

Called by make_synthetic.py; needs NumPy only. It knows the formats and nothing about the model.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, BinaryIO

import numpy as np

BLOCK = 32  # weights that share a Q4_0 scale
SUPER = 256  # weights of a Q6_K block
ALIGNMENT = 32
TYPE_IDS = {"F32": 0, "Q4_0": 2, "Q6_K": 14}

# --- file writing -------------------------------------------------------------------------------------------


def gguf_string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def gguf_entry(key: str, value: Any) -> bytes:
    """One metadata entry: bool, int (uint32), float (float32), str, list of int (int32) or list of str."""
    head = gguf_string(key)
    if isinstance(value, bool):
        return head + struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return head + struct.pack("<II", 4, value)
    if isinstance(value, float):
        return head + struct.pack("<If", 6, value)
    if isinstance(value, str):
        return head + struct.pack("<I", 8) + gguf_string(value)
    if isinstance(value[0], int):
        return head + struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)
    return head + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(gguf_string(item) for item in value)


@dataclass(frozen=True)
class Tensor:
    """One entry of the tensor table; `shape` in GGUF order (first dimension contiguous)."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        elements = math.prod(self.shape)
        return {"F32": elements * 4, "Q4_0": elements // 32 * 18, "Q6_K": elements // 256 * 210}[self.type]


class GGUFStream:
    """Writes the header at once and then the tensors' data in table order, chunk by chunk."""

    def __init__(self, file: BinaryIO, entries: list[bytes], tensors: list[Tensor]) -> None:
        self.file, self.tensors = file, tensors
        table, offset = [], 0
        self.offsets: dict[str, int] = {}
        for tensor in tensors:
            dims = struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape)
            table.append(gguf_string(tensor.name) + struct.pack("<I", len(tensor.shape)) + dims)
            table.append(struct.pack("<IQ", TYPE_IDS[tensor.type], offset))
            self.offsets[tensor.name] = offset
            offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries)))
        file.write(b"".join(entries) + b"".join(table))
        self._pad()
        self.data_start = file.tell()
        self.total = self.data_start + offset
        self._next = 0

    def _pad(self) -> None:
        self.file.write(b"\0" * (-self.file.tell() % ALIGNMENT))

    def write(self, name: str, chunks: Iterator[np.ndarray] | np.ndarray) -> None:
        """Writes the next tensor of the table; raises ValueError if it is another or has another size."""
        tensor = self.tensors[self._next]
        start = self.file.tell()
        if name != tensor.name:
            raise ValueError(f"tensor {name} written where {tensor.name} comes next")
        for chunk in [chunks] if isinstance(chunks, np.ndarray) else chunks:
            self.file.write(np.ascontiguousarray(chunk).data)
        if self.file.tell() - start != tensor.nbytes:
            raise ValueError(f"{name}: {self.file.tell() - start} bytes written, {tensor.nbytes} expected")
        self._pad()
        self._next += 1


# --- vocabulary ---------------------------------------------------------------------------------------------

_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def _value_end(data: memoryview, at: int, kind: int) -> int:
    """Offset behind the metadata value of type `kind` at `at`."""
    if kind in _SCALAR_BYTES:
        return at + _SCALAR_BYTES[kind]
    if kind == 8:
        return at + 8 + int(struct.unpack_from("<Q", data, at)[0])
    if kind != 9:
        raise ValueError(f"metadata value of unknown type {kind} at offset {at}")
    item, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if item in _SCALAR_BYTES:
        return at + _SCALAR_BYTES[item] * int(count)
    for _ in range(count):
        at = _value_end(data, at, item)
    return at


def vocabulary_entries(path: Path) -> tuple[int, list[bytes]]:
    """(number of tokens, raw `tokenizer.*` metadata entries) of a GGUF file."""
    data = memoryview(path.read_bytes())
    if bytes(data[:4]) != b"GGUF":
        raise ValueError(f"{path}: not a GGUF file")
    at, entries, tokens = 24, [], 0
    for _ in range(struct.unpack_from("<Q", data, 16)[0]):
        start = at
        at = _value_end(data, at, 8)
        key = bytes(data[start + 8 : at])
        kind = struct.unpack_from("<I", data, at)[0]
        if key == b"tokenizer.ggml.tokens":
            tokens = struct.unpack_from("<Q", data, at + 8)[0]
        at = _value_end(data, at + 4, kind)
        if key.startswith(b"tokenizer."):
            entries.append(bytes(data[start:at]))
    return tokens, entries


def byte_level_entries(vocab_size: int) -> list[bytes]:
    """A byte-level vocabulary: 256 bytes, one merge, three special tokens, padding to `vocab_size`."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    tokens = [names[byte] for byte in range(256)] + ["he", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    if vocab_size < len(tokens):
        raise ValueError(f"--vocab-size must be at least {len(tokens)}")
    padding = vocab_size - len(tokens)
    return [
        gguf_entry("tokenizer.ggml.model", "gpt2"),
        gguf_entry("tokenizer.ggml.pre", "qwen2"),
        gguf_entry("tokenizer.ggml.tokens", tokens + [f"[PAD{i}]" for i in range(padding)]),
        gguf_entry("tokenizer.ggml.token_type", [1] * 257 + [3] * 3 + [5] * padding),
        gguf_entry("tokenizer.ggml.merges", ["h e"]),
        gguf_entry("tokenizer.ggml.bos_token_id", 257),
        gguf_entry("tokenizer.ggml.eos_token_id", 259),
        gguf_entry("tokenizer.ggml.padding_token_id", 257),
        gguf_entry("tokenizer.ggml.add_bos_token", False),
    ]


# --- random weights -----------------------------------------------------------------------------------------


def _normal_bins(levels: range, sd: float) -> np.ndarray:
    """Probabilities of the integers `levels` for a rounded normal of standard deviation `sd`, ends clipped."""
    edges = np.array([NormalDist(0, sd).cdf(level - 0.5) for level in levels[1:]])
    return np.diff(np.concatenate(([0.0], edges, [1.0])))


class WeightSource:
    """Draws quantised weights directly, without quantising real numbers: fast enough for 20 GB files.

    Quants follow a rounded normal as wide as real Q4_0 blocks have it; block scales vary and take both signs.
    """

    def __init__(self, seed: int) -> None:
        self.bits = np.random.SFC64(seed)
        self.rng = np.random.Generator(np.random.SFC64(seed + 1_000_003))
        nibbles = _normal_bins(range(-8, 8), 8 / 2.2)
        table = np.searchsorted(np.cumsum(nibbles)[:-1], (np.arange(256) + 0.5) / 256).astype(np.uint8)
        self.pairs = (table[:, None] << 4 | table[None, :]).reshape(-1)
        spread = np.exp(0.15 * np.array([NormalDist().inv_cdf((i + 0.5) / 128) for i in range(128)]))
        self.scales = np.concatenate((spread, -spread))
        quants = table.astype(np.float64) - 8
        self.scale_of_sd = 1 / math.sqrt(np.mean(quants**2) * np.mean(self.scales**2))
        six = _normal_bins(range(-32, 32), 10)
        self.six = np.searchsorted(np.cumsum(six)[:-1], (np.arange(65536) + 0.5) / 65536).astype(np.uint8)
        self.scale_of_sd_six = 1 / math.sqrt(np.mean((self.six.astype(np.float64) - 32) ** 2))

    def _raw(self, nbytes: int) -> np.ndarray:
        return self.bits.random_raw(-(-nbytes // 8)).view(np.uint8)[:nbytes]

    def q4_0(self, rows: int, columns: int, sd: float) -> np.ndarray:
        """uint8 [rows, columns/32, 18]: Q4_0 blocks of weights with standard deviation `sd`."""
        count = rows * columns // BLOCK
        out = np.empty((count, 18), np.uint8)
        scales = (self.scales * (sd * self.scale_of_sd)).astype("<f2").view(np.uint8).reshape(256, 2)
        out[:, :2] = scales[self._raw(count)]
        out[:, 2:] = self.pairs[self._raw(count * 32).view("<u2")].reshape(count, 16)
        return out.reshape(rows, columns // BLOCK, 18)

    def q6_k(self, rows: int, columns: int, sd: float) -> np.ndarray:
        """uint8 [rows, columns/256, 210]: Q6_K blocks of weights with standard deviation `sd`."""
        count = rows * columns // SUPER
        q = self.six[self._raw(count * SUPER * 2).view("<u2")].reshape(count, 2, 4, 32)
        out = np.empty((count, 210), np.uint8)
        scales = 96 + (self._raw(count * 16) & 31).reshape(count, 16)
        pack_q6_k(out, q, scales, sd * self.scale_of_sd_six / 111.9)
        return out.reshape(rows, columns // SUPER, 210)


def pack_q6_k(out: np.ndarray, q: np.ndarray, scales: np.ndarray, step: float) -> None:
    """Fills blocks [n, 210] from quants 0..63 [n, 2, 4, 32], scales [n, 16] and the common super-scale."""
    low, high = q & 15, q >> 4
    out[:, :128].reshape(-1, 2, 2, 32)[:] = low[:, :, :2] | low[:, :, 2:] << 4
    out[:, 128:192].reshape(-1, 2, 32)[:] = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    out[:, 192:208] = scales
    out[:, 208:] = np.array([step], "<f2").view(np.uint8)


def set_constant_q4_0(blocks: np.ndarray, value: float) -> float:
    """Makes Q4_0 blocks [..., 18] hold one value in all 32 weights; returns it as rounded by fp16."""
    scale = np.array([value / -8], "<f2")
    blocks[..., :2] = scale.view(np.uint8)
    blocks[..., 2:] = 0 if value else 0x88
    return float(scale[0]) * -8


def set_constant_q6_k(blocks: np.ndarray, value: float) -> float:
    """Makes the first 32 weights of Q6_K blocks [n, 210] hold about `value`; returns the value they hold."""
    step = float(blocks[0, 208:].view("<f2")[0])
    scale = round(value / 31 / step)
    if not 1 <= scale <= 127:
        raise ValueError("the constant cannot be expressed with this Q6_K scale")
    blocks[:, :32] = blocks[:, :32] & 0xF0 | 15  # quant 63 = 31 + 32: low bits 15, high bits 3
    blocks[:, 128:160] |= 3
    blocks[:, 192:194] = scale
    return step * scale * 31


def dequantize_q4_0(blocks: np.ndarray) -> np.ndarray:
    """float32 [rows, columns] of Q4_0 blocks [rows, columns/32, 18]."""
    out = np.empty((*blocks.shape[:-1], 32), np.float32)
    quants = blocks[..., 2:]
    out[..., :16] = quants & 15
    out[..., 16:] = quants >> 4
    out -= 8
    out *= np.ascontiguousarray(blocks[..., :2]).view("<f2").astype(np.float32)
    return out.reshape(blocks.shape[0], -1)


def dequantize_q6_k(blocks: np.ndarray) -> np.ndarray:
    """float32 [rows, columns] of Q6_K blocks [rows, columns/256, 210]."""
    flat = blocks.reshape(-1, 210)
    low, high = flat[:, :128].reshape(-1, 2, 2, 32), flat[:, 128:192].reshape(-1, 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    q = np.concatenate((low & 15, low >> 4), axis=2) | (high >> shifts & 3) << 4
    steps = np.ascontiguousarray(flat[:, 208:]).view("<f2").astype(np.float32)
    values = (q.reshape(-1, 16, 16).astype(np.float32) - 32) * flat[:, 192:208].view(np.int8)[:, :, None]
    return (values * steps[:, :, None]).reshape(blocks.shape[0], -1)
