"""Importance matrices: what the columns of a model's matrices are multiplied with, as llama.cpp's llama-imatrix has it.

convert.py and requantize.py quantise by them, measure/imatrix.py measures and writes them. Both of llama.cpp's forms
are read: the binary one (.dat) and the GGUF one, which is the one written. Ours may also have, in tensors that
llama.cpp passes over, the sums of products of all pairs of columns: with these other columns make up for an error.
"""

from __future__ import annotations

import math
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from smallthinker_edge._native.layouts import TYPES
from smallthinker_edge._native.quantize import quantize_rows
from smallthinker_edge.errors import ModelFormatError
from smallthinker_edge.files.atomic import PartialFile, atomic_file
from smallthinker_edge.files.config import tensor_name
from smallthinker_edge.files.gguf import GGUFFile
from smallthinker_edge.files.gguf_entries import aligned, string_array_entry, string_entry, tensor_entry, u32_entry

Floats = npt.NDArray[np.float32]

SQUARES, COUNTS, PRODUCTS = ".in_sum2", ".counts", ".in_products"
# Matrices with the same input: the products stand at the first one only.
SAME_INPUT = {"attn_k": "attn_q", "attn_v": "attn_q", "attn_qkv": "attn_q", "ffn_up_exps": "ffn_gate_exps"}
HEAD = tensor_name("output")
EMBEDDING = tensor_name("token_embd")
# Least importance of a column, of the mean one: a text says little of what other texts need.
FLOOR = 0.01
# Added to the mean squares before products are inverted, of their mean, as GPTQ does (arXiv:2210.17323, section 3.3).
DAMPING = 0.05
# What an error of a tied embedding's column counts where it is looked up, of the mean where it is the head.
LOOKED_UP = 1.0
KEPT = 2  # factors of products: those of gate and up, or q, k and v, follow one another
MOST_ENTRIES, LONGEST_NAME = 1 << 17, 65535


def first_with_input(name: str) -> str:
    """The first of a layer's tensors that are multiplied with the same as this one."""
    stem, _, role = name.removesuffix(".weight").rpartition(".")
    return f"{stem}.{SAME_INPUT[role]}.weight" if role in SAME_INPUT else name


@dataclass(frozen=True)
class Entry:
    """squares: float32 [matrices, columns], mean squares of inputs; counts: float64 [matrices], tokens."""

    squares: Floats
    counts: npt.NDArray[np.float64]


class ImportanceMatrix:
    """An imatrix file, opened: `entries` by the name of a tensor, and, where it has them, products of columns.

    Raises ModelFormatError for a file that is damaged or no imatrix, OSError. A context manager. Methods may be called
    by several threads at once.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._file: GGUFFile | None = None
        self._lock = threading.Lock()
        self._factors: dict[tuple[str, int], tuple[Floats, Floats]] = {}
        with open(self.path, "rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        if is_gguf:
            self._file = GGUFFile(self.path)
            try:
                self.entries = dict(self._gguf_entries(self._file))
            except BaseException:
                self._file.close()
                raise
        else:
            self.entries = dict(self._binary_entries())
        if not self.entries:
            self._refuse("holds no importance of any tensor")

    def __enter__(self) -> ImportanceMatrix:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _refuse(self, message: str, field: str | None = None, offset: int | None = None) -> NoReturn:
        raise ModelFormatError(message, path=self.path, field=field, offset=offset)

    def _entry(self, name: str, sums: Floats, counts: npt.NDArray[np.floating]) -> Entry:
        """sums [matrices, columns] over counts [matrices] tokens."""
        if not (np.isfinite(sums).all() and np.isfinite(counts).all() and (sums >= 0).all() and (counts >= 0).all()):
            self._refuse("has sums or counts that are negative or not finite", name)
        seen = counts.astype(np.float64)
        means = np.where(seen[:, None] > 0, sums / np.where(seen > 0, seen, 1)[:, None], 0)
        if means.size and means.max() > np.finfo(np.float32).max:
            self._refuse("has sums too large for its counts", name)
        return Entry(means.astype(np.float32), seen)

    def _gguf_entries(self, file: GGUFFile) -> Iterator[tuple[str, Entry]]:
        for name in file.tensors:
            if not name.endswith(SQUARES):
                continue
            of = name.removesuffix(SQUARES)
            sums = self._matrices(file, name, 2)
            if of + COUNTS not in file.tensors:
                self._refuse(f"has {name}, but not how many tokens that is of", of + COUNTS)
            counts = self._matrices(file, of + COUNTS, 2)
            if counts.shape != (len(sums), 1):
                self._refuse(f"has shape {list(counts.shape)} for {len(sums)} matrices", of + COUNTS)
            yield of, self._entry(of, sums, counts[:, 0])

    def _matrices(self, file: GGUFFile, name: str, dimensions: int, only: int | None = None) -> Floats:
        """A float32 tensor, in NumPy's order with that many dimensions, or number `only` of its outermost."""
        info = file.tensors[name]
        shape = (*info.shape, *[1] * (dimensions - len(info.shape)))
        if info.type != "F32" or len(info.shape) > dimensions:
            self._refuse(f"is {info.type} with {len(info.shape)} dimensions, not F32 with {dimensions}", name)
        if only is None:
            return file.data(name).view(np.float32).reshape(shape[::-1])
        size = 4 * math.prod(shape[:-1])
        return file.stored(name)[only * size : (only + 1) * size].view(np.float32).reshape(shape[-2::-1])

    def _binary_entries(self) -> Iterator[tuple[str, Entry]]:
        """Of the form before GGUF: count; of each its name, calls n, size, n * mean squares. The rest is no data."""
        size = os.path.getsize(self.path)
        with open(self.path, "rb") as file:

            def take(count: int, what: str) -> bytes:
                at = file.tell()
                if not 0 <= count <= size - at:
                    self._refuse(f"is no imatrix, or cut off: {what} of {count} bytes", offset=at)
                return file.read(count)

            def integer(what: str, most: int) -> int:
                at = file.tell()
                (value,) = struct.unpack("<i", take(4, what))
                if not 0 <= value <= most:
                    self._refuse(f"is no imatrix: {what} is {value}", offset=at)
                return int(value)

            for _ in range(integer("the number of entries", MOST_ENTRIES)):
                name = take(integer("the length of a name", LONGEST_NAME), "a name").decode(errors="replace")
                calls, count = integer("a number of calls", 1 << 31), integer("a number of values", size // 4)
                values = np.frombuffer(take(4 * count, f"the values of {name}"), "<f4")
                yield name, self._entry(name, values[None, :], np.array([calls], np.float64))

    def check(self, name: str, matrices: int, columns: int, tied: bool = False) -> None:
        """Raises ModelFormatError where the file has nothing for a tensor of the model, or something of another shape.

        Only an embedding or head may be missing, which llama-imatrix leaves out. tied: as of quantized().
        """
        self._check_products(self._products(name, tied), matrices, columns)
        entry = self._entry_of(name)
        if entry is None:
            if name not in (HEAD, EMBEDDING):
                self._refuse("lacks a tensor of the model", name)
            return
        if entry.squares.size != matrices * columns or len(entry.squares) not in (1, matrices):
            found, asked = list(entry.squares.shape), [matrices, columns]
            self._refuse(f"has importance of shape {found}, the tensor wants {asked}: of another model?", name)

    def _check_products(self, products: str | None, matrices: int, columns: int) -> None:
        if products is not None:
            shape = self._open().tensors[products].shape
            if shape not in ((columns, columns), (columns, columns, 1), (columns, columns, matrices)):
                self._refuse(f"has products of shape {list(shape)} for {matrices} times {columns} columns", products)

    def quantized(
        self, name: str, matrix: int, columns: int, values: npt.NDArray[Any], tied: bool = False
    ) -> npt.NDArray[np.uint8]:
        """Q4_0 of rows of a matrix, whose outputs err less than with quantize(): uint8 [bytes].

        Args:
            name: of a tensor that check() has seen. matrix: which of its matrices, as an expert's number.
            columns: of a row. values: float32, or uint16 that are bits of bfloat16; whole rows.
            tied: the model's embedding is its head too.

        Least squares by mean squares of inputs, without any where no token has reached it; with the products of columns
        by GPTQ. Raises as quantize_rows(); ModelFormatError where products are no such sums.
        """
        products = self._products(name, tied)
        more = LOOKED_UP if tied and name == EMBEDDING else 0.0
        factors = None if products is None else self._feedback(products, matrix, more)
        if factors is not None:
            return quantize_rows(values, *factors)
        return quantize_rows(values, self._weight(name, matrix, columns))

    def _weight(self, name: str, matrix: int, columns: int) -> Floats:
        """float32 [columns], the mean being 1. An embedding's rows are looked up, so its columns count alike."""
        entry = None if name == EMBEDDING else self._entry_of(name)
        weight = np.ones(columns, np.float32) if entry is None else entry.squares.reshape(-1, columns)[matrix]
        mean = float(weight.mean(dtype=np.float64))
        if not mean > 0:
            return np.ones(columns, np.float32)
        return np.asarray(weight.astype(np.float64) / mean + FLOOR, np.float32)

    def _entry_of(self, name: str) -> Entry | None:
        return self.entries.get(name) or self.entries.get(first_with_input(name))

    def _open(self) -> GGUFFile:
        assert self._file is not None  # products are in GGUF files only
        return self._file

    def _products(self, name: str, tied: bool) -> str | None:
        """The tensor that has the products of a matrix's columns: of a tied embedding, the head's."""
        if self._file is None:
            return None
        if tied and name == EMBEDDING:
            name = HEAD
        found = first_with_input(name) + PRODUCTS
        return found if found in self._file.tensors else None

    def _feedback(self, products: str, matrix: int, more: float) -> tuple[Floats, Floats] | None:
        """(weight [columns], feedback [columns, columns]) for quantize_rows(); None where no token has been seen."""
        shared = self._open().tensors[products].shape[2:] in ((), (1,))
        key = products, 0 if shared else matrix
        with self._lock:
            if key not in self._factors:
                sums = self._matrices(self._open(), products, 3, key[1])
                while len(self._factors) >= KEPT:
                    del self._factors[next(iter(self._factors))]
                self._factors[key] = self._factored(products, sums, more)
            weight, feedback = self._factors[key]
        return (weight, feedback) if weight.size else None

    def _factored(self, products: str, sums: Floats, more: float) -> tuple[Floats, Floats]:
        """Of sums of products H, with inverse(H) = U' U: 1 / U[j][j]^2, which is what is left of a column's mean square
        where later ones make up for it, and U[j][k] / U[j][j]."""
        moments = sums.astype(np.float64)
        mean = float(np.trace(moments)) / len(moments)
        if not (mean >= 0 and np.abs(moments - moments.T).max() <= 1e-3 * np.abs(np.diagonal(moments)).max()):
            self._refuse("are no sums of products", products)
        if mean == 0:
            return np.empty(0, np.float32), np.empty((0, 0), np.float32)
        moments[np.diag_indices_from(moments)] += (DAMPING + more) * mean
        try:
            upper = np.linalg.cholesky(np.linalg.inv(moments / mean)).T
        except np.linalg.LinAlgError:
            self._refuse("are no sums of products", products)
        diagonal = np.diagonal(upper)
        weight, feedback = (diagonal**-2).astype(np.float32), (upper / diagonal[:, None]).astype(np.float32)
        if not (np.isfinite(weight).all() and np.isfinite(feedback).all()):
            self._refuse("are no sums of products", products)
        return weight, np.ascontiguousarray(feedback)


@dataclass(frozen=True)
class Tensor:
    """One of an imatrix that is written: shape in NumPy order, float32."""

    name: str
    shape: tuple[int, ...]


class ImportanceWriter:
    """Writes the GGUF form, tensor by tensor, in any order, into a file that appears when it is whole.

    with ImportanceWriter.to(path, tensors, ...) as writer: writer.write(name, values)
    """

    def __init__(self, file: PartialFile, tensors: Sequence[Tensor], datasets: Sequence[str], windows: int, size: int):
        self._file = file
        self._starts: dict[str, int] = {}
        entries = [
            string_entry("general.type", "imatrix"),
            string_array_entry("imatrix.datasets", datasets),
            u32_entry("imatrix.chunk_count", windows),
            u32_entry("imatrix.chunk_size", size),
        ]
        starts = list(accumulate((aligned(4 * math.prod(t.shape)) for t in tensors), initial=0))
        infos = [
            tensor_entry(tensor.name, TYPES["F32"].number, tensor.shape[::-1], start)
            for tensor, start in zip(tensors, starts, strict=False)
        ]
        header = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(entries)) + b"".join(entries) + b"".join(infos)
        file.write(0, header.ljust(aligned(len(header)), b"\0"))
        for tensor, start in zip(tensors, starts, strict=False):
            self._starts[tensor.name] = aligned(len(header)) + start
        file.reserve(aligned(len(header)) + starts[-1])

    @classmethod
    @contextmanager
    def to(
        cls, path: str | os.PathLike[str], tensors: Sequence[Tensor], datasets: Sequence[str], windows: int, size: int
    ) -> Iterator[ImportanceWriter]:
        """datasets: names of the texts. windows: how many were run, of `size` tokens. Raises OSError."""
        with atomic_file(path) as file:
            yield cls(file, tensors, datasets, windows, size)

    def write(self, name: str, values: npt.NDArray[np.floating]) -> None:
        """All of a tensor's values. Raises OSError."""
        self._file.write(self._starts[name], np.ascontiguousarray(values, "<f4").reshape(-1).view(np.uint8))
