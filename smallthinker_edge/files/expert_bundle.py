"""The expert bundle of the model authors' engine, and the GGUF file without experts beside it, read as one model.

Called by requantize.py. A bundle is matrices and nothing else, so what they are is checked: the file's size, and every
block, against what the quantiser leaves. Where that fits no known layout, or more than one, nothing is read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from smallthinker_edge._native.layouts import TYPES
from smallthinker_edge._native.source import SourceFile
from smallthinker_edge.errors import ModelFormatError
from smallthinker_edge.files.config import expert_sizes, tensor_name
from smallthinker_edge.files.gguf import GGUFFile, StoredBytes, TensorInfo
from smallthinker_edge.files.packed import is_expert

Bytes = npt.NDArray[np.uint8]
Progress = Callable[[int, int, str], None]
MATRICES = ("up", "gate", "down")  # of an expert, in the file's order; down is stored transposed
GATE = MATRICES.index("gate")
PAGE = 4096  # the authors' engine reads whole pages: other matrices it cannot have
TYPE = "Q4_0"
COLUMNS, BLOCK = TYPES[TYPE].columns, TYPES[TYPE].bytes
SCALE = 2  # bytes
ROWS = RUN = 4  # the ARM layout: blocks of so many rows stand together, their weights in turns of so many bytes
SIGNS = 0x88  # what it flips in each byte: a weight's four bits become signed
EACH = np.uint64(0x1111111111111111)
TOPS = np.uint64(0x8888888888888888)
INFINITE = 0x7C00


def plain_rows(raw: Bytes, blocks: int) -> Bytes:
    """Rows of Q4_0 in their usual order, of bytes that stand as the authors' engine repacks them on ARM: for every four
    rows and block the four scales, then 64 bytes that are four of each row in turn, each with both top bits flipped.

    raw: whole groups of four rows. blocks: of a row.
    """
    groups = raw.reshape(-1, blocks, ROWS * BLOCK)
    scales = groups[:, :, : ROWS * SCALE].reshape(-1, blocks, ROWS, SCALE)
    weights = groups[:, :, ROWS * SCALE :].reshape(-1, blocks, (BLOCK - SCALE) // RUN, ROWS, RUN)
    rows = np.empty((len(groups), ROWS, blocks, BLOCK), np.uint8)
    rows[..., :SCALE] = scales.transpose(0, 2, 1, 3)
    rows[..., SCALE:] = (weights ^ SIGNS).transpose(0, 3, 1, 2, 4).reshape(*rows.shape[:3], -1)
    return rows.reshape(-1)


def looks_quantised(raw: Bytes) -> bool:
    """Whether Q4_0 blocks are as quantising leaves them: the scale is a number, and unless it is zero, the weight of
    largest magnitude, which it was made of, is -8 scales, four zero bits."""
    blocks = raw.reshape(-1, BLOCK)
    scales = np.ascontiguousarray(blocks[:, :SCALE]).view(np.uint16).reshape(-1)
    weights = np.ascontiguousarray(blocks[:, SCALE:]).view(np.uint64)
    has_lowest = ((weights - EACH) & ~weights & TOPS).any(1)
    finite = scales & INFINITE != INFINITE
    return bool((finite & (has_lowest | (scales & 0x7FFF == 0))).all())


class ExpertBundle:
    """An opened bundle, all of whose matrices were checked.

    Attributes: repacked: the gates stand as the engine repacks them on ARM. bytes: of one matrix.

    Raises ModelFormatError for a file that is no bundle of these sizes, OSError where it cannot be read.
    """

    def __init__(
        self, path: str, layers: int, experts: int, d_model: int, d_ffn: int, progress: Progress | None = None
    ) -> None:
        self.path, self.layers, self.experts = path, layers, experts
        self.blocks = d_model // COLUMNS
        self.bytes = self.blocks * BLOCK * d_ffn
        if d_model == d_ffn:
            message = f"with {d_ffn} neurons and as many channels a transposed down could not be told from another"
            raise ModelFormatError(message, path=path)
        if self.bytes % PAGE:
            message = f"matrices of {self.bytes} bytes are not whole pages of {PAGE}: no bundle has them"
            raise ModelFormatError(message, path=path)
        self.file = SourceFile(path)
        try:
            size = layers * experts * len(MATRICES) * self.bytes
            if self.file.size != size:
                message = (
                    f"has {self.file.size} bytes; a bundle of {layers} layers of {experts} experts of"
                    f" {len(MATRICES)} matrices of {self.bytes} bytes has {size}"
                )
                raise ModelFormatError(message, path=path)
            self.repacked = self._is_repacked(progress)
        except BaseException:
            self.file.close()
            raise

    def place(self, layer: int, expert: int, matrix: int) -> int:
        """Where a matrix begins."""
        return self.bytes * (matrix + len(MATRICES) * (expert + self.experts * layer))

    def read(self, layer: int, expert: int, matrix: int, start: int, stop: int) -> Bytes:
        """Bytes [start, stop) of a matrix whose rows stand in their usual order."""
        at = self.place(layer, expert, matrix)
        if matrix != GATE or not self.repacked:
            return self.file.read(at + start, stop - start)
        group = ROWS * self.blocks * BLOCK
        first, last = start // group * group, -(-stop // group) * group
        return plain_rows(self.file.read(at + first, last - first), self.blocks)[start - first : stop - first]

    def _is_repacked(self, progress: Progress | None) -> bool:
        """How the gates stand. Both ways are tried on every gate: exactly one must fit them all."""
        wrong: dict[bool, int] = {}  # by way, where it does not fit
        for layer in range(self.layers):
            if progress is not None:
                progress(layer, self.layers, f"checking layer {layer} of the bundle")
            for expert in range(self.experts):
                for matrix, role in enumerate(MATRICES):
                    at = self.place(layer, expert, matrix)
                    raw = self.file.read(at, self.bytes)
                    if matrix != GATE and not looks_quantised(raw):
                        message = f"the {role} matrix of layer {layer}, expert {expert} is not quantised as {TYPE}"
                        raise ModelFormatError(message, path=self.path, offset=at)
                    if matrix == GATE and False not in wrong and not looks_quantised(raw):
                        wrong[False] = at
                    if matrix == GATE and True not in wrong and not looks_quantised(plain_rows(raw, self.blocks)):
                        wrong[True] = at
                    if len(wrong) == 2:
                        message = (
                            f"no layout fits every gate matrix: the one at byte {wrong[False]} is not {TYPE} in rows,"
                            f" the one at byte {wrong[True]} not as the authors' engine repacks it on ARM"
                        )
                        raise ModelFormatError(message, path=self.path, offset=at)
        if not wrong:
            message = "the gate matrices fit both layouts, in rows and repacked for ARM: which it is cannot be told"
            raise ModelFormatError(message, path=self.path, offset=self.place(0, 0, GATE))
        return False in wrong


class StackedBytes:
    """One role's matrices of a layer, expert after expert, as a GGUF tensor has them; read as they are asked for."""

    def __init__(self, bundle: ExpertBundle, layer: int, matrix: int) -> None:
        self.bundle, self.layer, self.matrix = bundle, layer, matrix
        self.size = bundle.experts * bundle.bytes

    def __getitem__(self, part: slice) -> Bytes:
        """As SourceFile.read(). ValueError for a step."""
        start, stop, step = part.indices(self.size)
        if step != 1:
            raise ValueError("bytes of a file are read one after the other")
        pieces = [np.empty(0, np.uint8)]
        while start < stop:
            expert, at = divmod(start, self.bundle.bytes)
            end = min(self.bundle.bytes, at + stop - start)
            pieces.append(self.bundle.read(self.layer, expert, self.matrix, at, end))
            start += end - at
        return np.concatenate(pieces)


class BundledModel:
    """A GGUF file that lacks its experts, with those of a bundle: what GGUFFile offers to who copies a model.

    The bundle cannot be asked which model it is of: sizes and quantisation are all that is checked. Closing closes the
    bundle, not the GGUF file.

    Raises ModelFormatError for a GGUF file that has experts, and as ExpertBundle.
    """

    def __init__(self, gguf: GGUFFile, bundle: str | os.PathLike[str], progress: Progress | None = None) -> None:
        self.gguf, self.path = gguf, gguf.path
        self.metadata, self.key_ranges, self.header_end = gguf.metadata, gguf.key_ranges, gguf.header_end
        for name, info in gguf.tensors.items():
            if is_expert(name):
                message = "the file has experts; a bundle goes with one that has none"
                raise ModelFormatError(message, path=gguf.paths[info.part], field=name)
        layers, experts, d_model, d_ffn = expert_sizes(gguf)
        path = os.fsdecode(bundle)
        self.paths = [*gguf.paths, path]
        self.bundle = ExpertBundle(path, layers, experts, d_model, d_ffn, progress)
        self.tensors = dict(gguf.tensors)
        self.places: dict[str, tuple[int, int]] = {}
        shape = (d_model, d_ffn, experts)
        size = math.prod(shape) // COLUMNS * BLOCK
        for layer in range(layers):
            for matrix, role in enumerate(MATRICES):
                name = tensor_name(f"ffn_{role}_exps", layer)
                at = self.bundle.place(layer, 0, matrix)
                self.tensors[name] = TensorInfo(name, TYPE, shape, at, size, len(gguf.paths))
                self.places[name] = layer, matrix

    def __enter__(self) -> BundledModel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self.bundle.file.close()

    def file(self, part: int = 0) -> SourceFile:
        return self.gguf.file(part)

    def stored(self, name: str) -> StoredBytes | StackedBytes:
        return StackedBytes(self.bundle, *self.places[name]) if name in self.places else self.gguf.stored(name)
