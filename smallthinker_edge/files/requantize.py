"""A GGUF file with tensors of any type to one that runs: `smallthinker-edge convert model.gguf`.

Called by convert.py. Metadata is copied as it is; matrices get the type that was asked for, by way of float32 where
they have another, and what has it already is copied. Streams as the conversion of a checkpoint does.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from smallthinker_edge._native.layouts import TYPES
from smallthinker_edge._native.quantize import quantize
from smallthinker_edge.errors import ModelFormatError, SmallThinkerError
from smallthinker_edge.files.atomic import PartialFile, atomic_file
from smallthinker_edge.files.config import PREDICTOR_TYPES, ModelConfig, tensor_name
from smallthinker_edge.files.convert import Progress, write_tensors
from smallthinker_edge.files.expert_bundle import BundledModel
from smallthinker_edge.files.gguf import GGUFFile, TensorInfo
from smallthinker_edge.files.gguf_entries import aligned, tensor_entry, u32_entry
from smallthinker_edge.files.imatrix import ImportanceMatrix
from smallthinker_edge.files.pack import DROPPED_KEYS
from smallthinker_edge.files.packed import is_packed

SLICE = 1 << 20  # weights at a time, whole blocks of every type; NumPy takes some 20 bytes for each on the way
ROW = 1 << 12  # the package works on 16 rows at once, which then stay in the cache
FILE_TYPES = {"F16": 1, "Q4_0": 2, "Q8_0": 7}
PREDICTOR = tensor_name("lm_head_profiler")
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Target:
    """What becomes of a source's tensor."""

    source: TensorInfo
    type: str
    bytes: int


class _Converted:
    """A file as it will be, for ModelConfig to check before anything is written."""

    def __init__(self, source: GGUFFile | BundledModel, tensors: Mapping[str, TensorInfo]) -> None:
        self.paths, self.metadata, self.tensors = source.paths, source.metadata, tensors


class Requantizer:
    """One conversion of an open file. imatrix: of the model, for Q4_0; or None."""

    def __init__(
        self, gguf: Any, source: GGUFFile | BundledModel, type_: str, imatrix: ImportanceMatrix | None = None
    ) -> None:
        self.gguf, self.source = gguf, source
        self.numbers = {kind.name: int(kind) for kind in gguf.GGMLQuantizationType}
        self.targets = [self._target(info, self._type(info, type_)) for info in source.tensors.values()]
        after = {target.source.name: replace(target.source, type=target.type) for target in self.targets}
        self.config = ModelConfig.from_gguf(_Converted(source, after))
        self.type, self.imatrix = type_, imatrix
        for target in self.targets:
            if imatrix is not None and self._weighted(target):
                columns, matrices = target.source.shape[0], math.prod(target.source.shape[2:])
                imatrix.check(target.source.name, matrices, columns, self.config.tied)

    def _weighted(self, target: Target) -> bool:
        """Whether its columns have importance: of a transposed down the rows would."""
        if self.imatrix is None or target.type != "Q4_0" or target.source.type == "Q4_0":
            return False
        transposed = self.config.down_transposed and "ffn_down_exps" in target.source.name
        return len(target.source.shape) > 1 and not transposed and target.source.name != PREDICTOR

    def _type(self, info: TensorInfo, type_: str) -> str:
        """Norms and routers are float32 always, as llama.cpp wants them; the predictor stays what can run."""
        if info.name == PREDICTOR:
            return info.type if info.type in PREDICTOR_TYPES else "Q4_0"
        return "F32" if "norm" in info.name or "ffn_gate_inp" in info.name else type_

    def _target(self, info: TensorInfo, type_: str) -> Target:
        block, size = self.gguf.GGML_QUANT_SIZES[self.gguf.GGMLQuantizationType[type_]]
        if info.shape[0] % block:
            message = f"rows of {info.shape[0]} are not whole {type_} blocks of {block}"
            raise ModelFormatError(message, path=self.source.paths[info.part], field=info.name)
        elements = int(np.prod(info.shape, dtype=object))
        return Target(info, type_, elements // block * size)

    def write(self, path: str, progress: Progress) -> None:
        starts = list(itertools.accumulate((aligned(target.bytes) for target in self.targets), initial=0))
        first = self.source.file().read(0, self.source.header_end).tobytes()
        dropped = {*DROPPED_KEYS, "general.file_type"}
        entries = [first[a:b] for key, (a, b) in self.source.key_ranges.items() if key not in dropped]
        entries.append(u32_entry("general.file_type", FILE_TYPES[self.type]))
        infos = [
            tensor_entry(target.source.name, TYPES[target.type].number, target.source.shape, start)
            for target, start in zip(self.targets, starts, strict=False)
        ]
        header = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(entries)) + b"".join(entries) + b"".join(infos)
        with atomic_file(path) as file:
            file.write(0, header.ljust(aligned(len(header)), b"\0"))
            tensors = [(target, target.source.name, target.bytes) for target in self.targets]
            write_tensors(file, path, tensors, functools.partial(self._pieces, file), progress)

    def _pieces(self, file: PartialFile, target: Target, at: int) -> Iterator[Callable[[], None]]:
        """What writes a tensor whose data begins at byte `at`, piece by piece."""
        block, size = self.gguf.GGML_QUANT_SIZES[self.gguf.GGMLQuantizationType[target.source.type]]
        elements = target.source.nbytes // size * block
        part, step = elements, SLICE
        if self._weighted(target):  # whole rows of a matrix
            columns, rows = target.source.shape[:2]
            part, step = columns * rows, max(1, SLICE // columns) * columns
        for matrix, begin in enumerate(range(0, elements, part)):
            for first in range(begin, begin + part, step):
                count = min(step, begin + part - first)
                start, stop = (n // block * size for n in (first, first + count))
                to = at + first * target.bytes // elements
                yield functools.partial(self._write_piece, file, target, matrix, start, stop - start, to)

    def _write_piece(self, file: PartialFile, target: Target, matrix: int, start: int, count: int, at: int) -> None:
        info = target.source
        path = self.source.paths[info.part]
        raw = self.source.stored(info.name)[start : start + count]
        if info.type == target.type:
            file.write(at, raw)
            return
        try:
            if target.type == "F32":
                values = self._floats(info.type, raw)
                if not np.isfinite(values).all():
                    raise OverflowError("holds values that are not finite")
                file.write(at, values.view(np.uint8))
            else:
                values = raw.view(np.uint16) if info.type == "BF16" else self._floats(info.type, raw)
                file.write(at, self._quantized(target, matrix, values))
        except OverflowError as problem:
            raise ModelFormatError(str(problem), path=path, field=info.name) from None

    def _quantized(self, target: Target, matrix: int, values: Any) -> npt.NDArray[np.uint8]:
        if self.imatrix is None or not self._weighted(target):
            return quantize(target.type, values)
        name, columns = target.source.name, target.source.shape[0]
        return self.imatrix.quantized(name, matrix, columns, values, self.config.tied)

    def _floats(self, type_: str, raw: np.ndarray[Any, np.dtype[np.uint8]]) -> Any:
        if type_ == "F32":
            return raw.view(np.float32)
        if type_ == "F16":
            return raw.view(np.float16).astype(np.float32)
        kind = self.gguf.GGMLQuantizationType[type_]
        block, size = self.gguf.GGML_QUANT_SIZES[kind]
        row = ROW // block * size
        rows = raw.reshape(-1, row) if raw.size % row == 0 else raw.reshape(1, -1)
        with np.errstate(invalid="ignore", over="ignore"):
            return self.gguf.quants.dequantize(rows, kind).reshape(-1).astype(np.float32, copy=False)


def _readable(gguf: Any) -> Iterator[Any]:
    """The types that the package can turn into floats, told by trying each on one block of zeros."""
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        with suppress(NotImplementedError):
            gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
            if SLICE % block == 0:
                yield kind


def requantize(
    source: str,
    target: str,
    type_: str,
    progress: Progress,
    bundle: str | None = None,
    imatrix: ImportanceMatrix | None = None,
) -> None:
    """Writes a GGUF file's model with all matrices as Q4_0, Q8_0 or F16; arguments and errors as in convert.convert."""
    try:
        import gguf
    except ImportError:
        raise SmallThinkerError("converting needs: pip install 'smallthinker_edge[convert]'") from None
    readable = {int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in _readable(gguf)}
    with ExitStack() as stack:
        file: GGUFFile = stack.enter_context(GGUFFile(source, readable))
        if is_packed(file):
            raise ModelFormatError("is a packed file; unpack it first", path=source, field="stpk.layout")
        paths = file.paths if bundle is None else [*file.paths, bundle]
        if os.path.exists(target) and any(os.path.samefile(target, path) for path in paths):
            raise ValueError("the target is the file that is converted")
        whole = file if bundle is None else stack.enter_context(BundledModel(file, bundle, progress))
        Requantizer(gguf, whole, type_, imatrix).write(target, progress)
