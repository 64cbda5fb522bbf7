"""Entries of a GGUF header as bytes, for those who write such files: requantize.py, pack.py, imatrix.py."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

U32, STRING, ARRAY = 4, 8, 9  # types of values
ALIGNMENT = 32  # of tensors, where a file says nothing


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def u32_entry(key: str, value: int) -> bytes:
    return text(key) + struct.pack("<II", U32, value)


def string_entry(key: str, value: str) -> bytes:
    return text(key) + struct.pack("<I", STRING) + text(value)


def u32_array_entry(key: str, values: npt.NDArray[np.uint32]) -> bytes:
    return text(key) + struct.pack("<IIQ", ARRAY, U32, values.size) + values.astype("<u4").tobytes()


def string_array_entry(key: str, values: Sequence[str]) -> bytes:
    return text(key) + struct.pack("<IIQ", ARRAY, STRING, len(values)) + b"".join(map(text, values))


def tensor_entry(name: str, type_number: int, shape: tuple[int, ...], offset: int) -> bytes:
    """shape in GGUF order; offset from where the tensors begin."""
    head = text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
    return head + struct.pack("<IQ", type_number, offset)
