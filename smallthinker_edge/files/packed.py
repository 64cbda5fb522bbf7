"""The packed model file (.stpk): a GGUF container whose experts are laid out for reading one at a time.

Called by opening.py to open one and by `smallthinker-edge verify`; pack.py writes them. It is a valid GGUF: the
source's own metadata entries, copied as they are; its dense tensors, unchanged; and per layer one tensor
`blk.N.experts.weight`, F32 in name only, of one 4096-aligned blob per expert (gate, up, down in the kernels' order:
see expert.h). Keys `stpk.*` hold the layout's name, the source's tensor table and checksums. So one reader and one set
of checks serve both kinds of file, and other GGUF tools can list it.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from smallthinker_edge._native.layouts import TYPES, Expert
from smallthinker_edge.errors import ModelFormatError
from smallthinker_edge.files.config import ModelConfig, ModelFile, tensor_name
from smallthinker_edge.files.gguf import GGUFFile, StoredBytes, TensorInfo, slices

# Of the blobs. It changes whenever experts of any type come to stand otherwise: files of earlier layouts are refused.
LAYOUT = "tile16-6"
ALIGN = 4096
EXPERT_ROLES = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
Bytes = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]
Progress = Callable[[int, int], None]


def is_expert(name: str) -> bool:
    """Whether a tensor of that name holds a layer's gates, ups or downs."""
    return name.split(".")[-2:-1] in ([role] for role in EXPERT_ROLES)


def is_packed(gguf: GGUFFile) -> bool:
    """Whether an opened file is a packed one."""
    return "stpk.layout" in gguf.metadata


def as_model(gguf: GGUFFile) -> ModelFile:
    """The model in an opened file, whether that is packed or not."""
    return PackedFile(gguf) if is_packed(gguf) else gguf


class ExpertLayout:
    """How one layer's experts stand in their blobs: what expert.h says, over arrays."""

    def __init__(self, expert: Expert) -> None:
        self.expert = expert

    @classmethod
    def of(cls, config: ModelConfig, infos: tuple[TensorInfo, TensorInfo, TensorInfo]) -> ExpertLayout:
        types = [TYPES[info.type].number for info in infos]
        return cls(Expert(config.d_model, config.d_ffn, types, config.down_transposed))

    @property
    def bytes(self) -> int:
        """Bytes of a blob, without padding."""
        return self.expert.bytes

    def pack(self, gate: Bytes, up: Bytes, down: Bytes) -> Bytes:
        """GGUF rows of one expert to its blob, without padding."""
        blob = np.empty(self.expert.bytes, np.uint8)
        self.expert.pack(gate, up, down, blob)
        return blob

    def unpack(self, blob: Bytes) -> tuple[Bytes, Bytes, Bytes]:
        """The GGUF rows of gate, up and down that a blob was made of."""
        gate, up, down = (np.empty(size, np.uint8) for size in self.expert.sizes)
        self.expert.unpack(np.ascontiguousarray(blob), gate, up, down)
        return gate, up, down


def expert_infos(file: ModelFile, layer: int) -> tuple[TensorInfo, TensorInfo, TensorInfo]:
    """The tensor entries of a layer's gate, up and down."""
    gate, up, down = (file.tensors[tensor_name(role, layer)] for role in EXPERT_ROLES)
    return gate, up, down


class PackedFile:
    """A packed file seen as the model it was made of: what ModelConfig and the Loader need.

    Attributes: metadata, tensors (the source's entries), paths and path as in GGUFFile; container: the file itself.
    Raises ModelFormatError where the `stpk.*` keys or blobs are not what pack() writes.
    """

    def __init__(self, gguf: GGUFFile) -> None:
        self.container = gguf
        self.path, self.paths = gguf.path, gguf.paths
        if not is_packed(gguf):
            raise self._error("stpk.layout", "is not a packed file")
        if (found := gguf.metadata["stpk.layout"]) != LAYOUT:
            raise self._error("stpk.layout", f"is {found!r}, this version reads {LAYOUT!r}: pack the model again")
        self.metadata = {key: value for key, value in gguf.metadata.items() if not key.startswith("stpk.")}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            for name, kind, shape, offset, nbytes in json.loads(str(gguf.metadata["stpk.source_tensors"])):
                known = isinstance(name, str) and kind in TYPES and all(isinstance(n, int) and n > 0 for n in shape)
                if not known or not isinstance(offset, int) or shape[0] % TYPES[kind].columns:
                    raise ValueError(name)
                if nbytes != math.prod(shape) // TYPES[kind].columns * TYPES[kind].bytes:
                    raise ValueError(name)
                self.tensors[name] = TensorInfo(name, kind, tuple(shape), offset, nbytes, 0)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError, RecursionError) as problem:
            raise self._error("stpk.source_tensors", f"is damaged: {problem}") from None
        self._check_dense()

    def _error(self, field: str, message: str) -> ModelFormatError:
        return ModelFormatError(message, path=self.path, field=field)

    def _check_dense(self) -> None:
        for name, info in self.tensors.items():
            if is_expert(name):
                continue
            own = self.container.tensors.get(name)
            if own is None or (own.type, own.shape) != (info.type, info.shape):
                raise self._error(name, "is missing or differs from the source's entry")

    def stored(self, name: str) -> StoredBytes:
        """Bytes of a dense tensor; see GGUFFile.stored."""
        return self.container.stored(name)

    def data(self, name: str) -> Bytes:
        """See GGUFFile.data."""
        return self.container.data(name)

    def forget(self, name: str | None = None) -> None:
        """See GGUFFile.forget; without a name, of the experts too."""
        if name is None or name in self.container.tensors:
            self.container.forget(name)

    def expect_rows(self, name: str) -> None:
        """See GGUFFile.expect_rows."""
        if name in self.container.tensors:
            self.container.expect_rows(name)

    def close(self) -> None:
        """See GGUFFile.close."""
        self.container.close()

    @property
    def dense(self) -> list[TensorInfo]:
        """The source's entries of all tensors but experts, in file order."""
        return [info for name, info in self.tensors.items() if not is_expert(name)]

    def absent(self, config: ModelConfig) -> Flags:
        """Which experts the file was packed without: bool [L, E]."""
        absent = np.zeros(config.n_layers * config.n_experts, np.bool_)
        ids = self.container.metadata.get("stpk.absent", [])
        if not isinstance(ids, list) or any(type(i) is not int or not 0 <= i < absent.size for i in ids):
            raise self._error("stpk.absent", "does not hold numbers of experts")
        absent[ids] = True
        flags = absent.reshape(config.n_layers, config.n_experts)
        if ((~flags).sum(1) < config.n_experts_used).any():
            raise self._error("stpk.absent", "leaves a layer fewer experts than a token uses")
        return flags

    def checksums(self, config: ModelConfig) -> npt.NDArray[np.uint32]:
        """CRC-32 of every dense tensor, then of every expert's blob [L * E], 0 of an absent one.

        ModelFormatError where they are not all there.
        """
        there, dense = ~self.absent(config).ravel(), len(self.dense)
        found = self.container.metadata.get("stpk.crc32")
        right = isinstance(found, list) and all(type(n) is int and 0 <= n < 1 << 32 for n in found)
        if not isinstance(found, list) or not right or len(found) != dense + there.sum():
            raise self._error("stpk.crc32", "does not hold a checksum for every part")
        sums = np.zeros(dense + there.size, np.uint32)
        sums[:dense], sums[dense:][there] = found[:dense], found[dense:]
        return sums

    def check_dense(self, sums: npt.NDArray[np.uint32]) -> None:
        """Raises ModelFormatError naming the first dense tensor that is damaged."""
        for info, expected in zip(self.dense, sums, strict=False):
            if checksum(self.stored(info.name)) != expected:
                raise self._error(info.name, "is damaged: its checksum does not match")

    def check_complete(self, config: ModelConfig) -> None:
        """Raises ModelFormatError where experts are absent, so that the source cannot be had back."""
        if count := int(self.absent(config).sum()):
            raise self._error("stpk.absent", f"{count} experts were dropped when this file was packed")

    def experts(self, config: ModelConfig) -> tuple[npt.NDArray[np.int64], int]:
        """(offset of every expert's blob [L * E], bytes of one blob); checks that all are there and aligned.

        That of an absent expert is the layer's first.
        """
        size, absent = 0, self.absent(config)
        offsets: list[int] = []
        for layer in range(config.n_layers):
            name = blob_name(layer)
            info = self.container.tensors.get(name)
            needed = ExpertLayout.of(config, expert_infos(self, layer))
            places = np.cumsum(~absent[layer]) - 1
            if info is None or info.type != "F32" or len(info.shape) != 2 or info.shape[1] != places[-1] + 1:
                raise self._error(name, "is missing or does not hold one blob per expert")
            bytes_ = info.shape[0] * 4
            if bytes_ != (size or bytes_) or bytes_ % ALIGN or info.offset % ALIGN or bytes_ < needed.bytes:
                raise self._error(name, f"has blobs of {bytes_} bytes at {info.offset}: not aligned, or too small")
            size = bytes_
            offsets += (info.offset + np.where(absent[layer], 0, places * size)).tolist()
        return np.array(offsets, np.int64), size


def checksum(data: StoredBytes) -> int:
    """CRC-32 of a tensor's bytes."""
    total = 0
    for part in slices(data):
        total = zlib.crc32(part.data, total)
    return total


def blob_name(layer: int) -> str:
    return f"blk.{layer}.experts.weight"


def verify(path: str | os.PathLike[str], progress: Progress | None = None) -> int:
    """Checks every checksum of a packed file; returns how many parts it has.

    Raises ModelFormatError naming the first tensor or expert that is damaged.
    """
    with GGUFFile(path) as gguf:
        packed = PackedFile(gguf)
        config = ModelConfig.from_gguf(packed)
        offsets, size = packed.experts(config)
        sums = packed.checksums(config)
        packed.check_dense(sums)
        there = np.flatnonzero(~packed.absent(config))
        for done, i in enumerate(there, 1):
            layer, e = divmod(int(i), config.n_experts)
            at = int(offsets[i]) - gguf.tensors[blob_name(layer)].offset
            if zlib.crc32(gguf.stored(blob_name(layer))[at : at + size].data) != sums[len(sums) - len(offsets) + i]:
                raise ModelFormatError(
                    "is damaged: its checksum does not match", path=gguf.path, field=f"expert {e} of layer {layer}"
                )
            if progress:
                progress(done, len(there))
        return len(packed.dense) + len(there)


def unpack_layer(path: str | os.PathLike[str], layer: int) -> tuple[Bytes, Bytes, Bytes]:
    """The stacked gate, up and down tensors of a layer as they stood in the source GGUF."""
    with GGUFFile(path) as gguf:
        packed = PackedFile(gguf)
        config = ModelConfig.from_gguf(packed)
        packed.check_complete(config)
        layout = ExpertLayout.of(config, expert_infos(packed, layer))
        _, size = packed.experts(config)
        blobs = gguf.stored(blob_name(layer))
        parts = [layout.unpack(blobs[e * size : (e + 1) * size]) for e in range(config.n_experts)]
        gate, up, down = (np.concatenate([part[i] for part in parts]) for i in range(3))
        return gate, up, down
