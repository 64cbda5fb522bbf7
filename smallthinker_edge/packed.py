"""The packed model file (.stpk): a GGUF container whose experts are laid out for reading one at a time.

Called by model.py to open one, and by `smallthinker-edge pack|verify|unpack`. It is a valid GGUF: the source's own
metadata entries, copied as they are; its dense tensors, unchanged; and per layer one tensor `blk.N.experts.weight`,
F32 in name only, of one 4096-aligned blob per expert (gate, up, down in the kernels' order: see packed.h). Keys
`stpk.*` hold the layout's name, the source's tensor table and checksums. So one reader and one set of checks serve
both kinds of file, and other GGUF tools can list it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from smallthinker_edge._native import kernels
from smallthinker_edge._native.gguf import GGUFFile, TensorInfo
from smallthinker_edge.config import ModelConfig, tensor_name
from smallthinker_edge.errors import ModelFormatError
from smallthinker_edge.loader import TYPE_NUMBER

# By whether down is transposed: the experts of such files kept their GGUF rows in "tile16-2".
LAYOUTS = {False: "tile16-2", True: "tile16-3"}
ALIGN = 4096
EXPERT_ROLES = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
# Bytes and weights of a block of each type (FORMATS of GGUF).
BLOCKS = {"F32": (4, 1), "F16": (2, 1), "BF16": (2, 1), "Q4_0": (18, 32), "Q4_1": (20, 32), "Q8_0": (34, 32),
          "Q6_K": (210, 256)}  # fmt: skip
U32, STRING, ARRAY, F32_TYPE = 4, 8, 9, 0
Bytes = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]


def is_packed(gguf: GGUFFile) -> bool:
    """Whether an opened file is a packed one."""
    return "stpk.layout" in gguf.metadata


@dataclass(frozen=True)
class ExpertLayout:
    """How one layer's experts stand in their blobs. types: GGUF names of gate, up and down."""

    d_model: int
    d_ffn: int
    types: tuple[str, str, str]
    interleaved: bool
    transposed: bool
    sizes: tuple[int, int, int]

    @classmethod
    def of(cls, config: ModelConfig, infos: tuple[TensorInfo, TensorInfo, TensorInfo]) -> ExpertLayout:
        gate, up, down = infos
        types = (gate.type, up.type, down.type)
        # The rule of Engine.expert_layout: everything else stays in GGUF rows.
        interleaved = set(types) == {"Q4_0"} and config.d_ffn % 32 == 0
        sizes = (gate.nbytes // config.n_experts, up.nbytes // config.n_experts, down.nbytes // config.n_experts)
        return cls(config.d_model, config.d_ffn, types, interleaved, config.down_transposed, sizes)

    @property
    def ends(self) -> tuple[int, int, int]:
        """Where gate, up and down end in a blob."""
        if not self.interleaved:
            gate, up, down = np.cumsum(self.sizes).tolist()
            return gate, up, down
        gate = -(-self.d_ffn // 16) * 16 * self.d_model // 32 * 18
        up = gate + self.sizes[1]
        return gate, up, up + -(-self.d_model // 128) * (self.d_ffn // 32 * 256 + self.d_ffn * 64)

    def pack(self, gate: Bytes, up: Bytes, down: Bytes) -> Bytes:
        """GGUF rows of one expert to its blob, without padding."""
        if not self.interleaved:
            return np.concatenate([gate, up, down])
        return np.concatenate(
            [
                kernels.pack_tile16(TYPE_NUMBER["Q4_0"], gate, self.d_ffn, self.d_model),
                kernels.pack_rows(up, self.d_ffn, self.d_model),
                kernels.pack_down(down, self.d_model, self.d_ffn, self.transposed),
            ]
        )

    def unpack(self, blob: Bytes) -> tuple[Bytes, Bytes, Bytes]:
        """The GGUF rows of gate, up and down that a blob was made of."""
        gate_end, up_end, down_end = self.ends
        if not self.interleaved:
            return blob[:gate_end], blob[gate_end:up_end], blob[up_end:down_end]
        q4_0 = TYPE_NUMBER["Q4_0"]
        return (
            kernels.unpack_tile16(q4_0, np.ascontiguousarray(blob[:gate_end]), self.d_ffn, self.d_model),
            kernels.pack_rows(np.ascontiguousarray(blob[gate_end:up_end]), self.d_ffn, self.d_model, True),
            kernels.unpack_down(np.ascontiguousarray(blob[up_end:down_end]), self.d_model, self.d_ffn, self.transposed),
        )


def expert_infos(gguf: GGUFFile | PackedFile, layer: int) -> tuple[TensorInfo, TensorInfo, TensorInfo]:
    """The tensor entries of a layer's gate, up and down."""
    gate, up, down = (gguf.tensors[tensor_name(role, layer)] for role in EXPERT_ROLES)
    return gate, up, down


class PackedFile:
    """A packed file seen as the model it was made of: what ModelConfig and the loader need.

    Attributes: metadata, tensors (the source's entries), paths and path as in GGUFFile; container: the file itself.
    Raises ModelFormatError where the `stpk.*` keys or blobs are not what pack() writes.
    """

    def __init__(self, gguf: GGUFFile) -> None:
        self.container = gguf
        self.path, self.paths = gguf.path, gguf.paths
        if gguf.metadata["stpk.layout"] not in LAYOUTS.values():
            raise self._layout_error(" or ".join(map(repr, LAYOUTS.values())))
        self.metadata = {key: value for key, value in gguf.metadata.items() if not key.startswith("stpk.")}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            for name, kind, shape, offset, nbytes in json.loads(str(gguf.metadata["stpk.source_tensors"])):
                known = (
                    isinstance(name, str) and kind in TYPE_NUMBER and all(isinstance(n, int) and n > 0 for n in shape)
                )
                size, weights = BLOCKS.get(kind, (0, 1))
                if not known or not isinstance(offset, int) or nbytes != math.prod(shape) // weights * size:
                    raise ValueError(name)
                self.tensors[name] = TensorInfo(name, kind, tuple(shape), offset, nbytes, 0)
        except (KeyError, TypeError, ValueError) as problem:
            raise self._error("stpk.source_tensors", f"is damaged: {problem}") from None
        self._check_dense()

    def _error(self, field: str, message: str) -> ModelFormatError:
        return ModelFormatError(message, path=self.path, field=field)

    def _layout_error(self, known: str) -> ModelFormatError:
        found = self.container.metadata["stpk.layout"]
        return self._error("stpk.layout", f"is {found!r}, this version reads {known}: pack the model again")

    def _check_dense(self) -> None:
        for name, info in self.tensors.items():
            if name.split(".")[-2] in EXPERT_ROLES:
                continue
            own = self.container.tensors.get(name)
            if own is None or (own.type, own.shape) != (info.type, info.shape):
                raise self._error(name, "is missing or differs from the source's entry")

    def data(self, name: str) -> Bytes:
        """Bytes of a dense tensor; see GGUFFile.data."""
        return self.container.data(name)

    def release(self, name: str, cache: bool = False) -> None:
        """See GGUFFile.release."""
        if name in self.container.tensors:
            self.container.release(name, cache)

    def expect_rows(self, name: str) -> None:
        """See GGUFFile.expect_rows."""
        if name in self.container.tensors:
            self.container.expect_rows(name)

    def close(self) -> None:
        """See GGUFFile.close."""
        self.container.close()

    def drop_cache(self) -> None:
        """Takes the file's pages out of the system's cache, which counts towards a memory limit; a hint."""
        self.container.release()
        if hasattr(os, "posix_fadvise"):
            with open(self.path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    @property
    def dense(self) -> list[TensorInfo]:
        """The source's entries of all tensors but experts, in file order."""
        return [info for name, info in self.tensors.items() if name.split(".")[-2] not in EXPERT_ROLES]

    def checksums(self, experts: int) -> npt.NDArray[np.uint32]:
        """CRC-32 of every dense tensor, then of every expert's blob. ModelFormatError where they are not all there."""
        sums = self.container.metadata.get("stpk.crc32")
        if not isinstance(sums, list) or len(sums) != len(self.dense) + experts:
            raise self._error("stpk.crc32", "does not hold a checksum for every part")
        return np.array(sums, np.uint32)

    def check_dense(self, sums: npt.NDArray[np.uint32]) -> None:
        """Raises ModelFormatError naming the first dense tensor that is damaged."""
        for info, expected in zip(self.dense, sums, strict=False):
            if zlib.crc32(self.data(info.name).data) != expected:
                raise self._error(info.name, "is damaged: its checksum does not match")

    def experts(self, config: ModelConfig) -> tuple[npt.NDArray[np.int64], int]:
        """(offset of every expert's blob [L * E], bytes of one blob); checks that all are there and aligned."""
        offsets, size = [], 0
        if self.container.metadata["stpk.layout"] != LAYOUTS[config.down_transposed]:
            kind = "transposed" if config.down_transposed else "ordinary"
            raise self._layout_error(f"{LAYOUTS[config.down_transposed]!r} for a model with {kind} down")
        for layer in range(config.n_layers):
            name = blob_name(layer)
            info = self.container.tensors.get(name)
            needed = ExpertLayout.of(config, expert_infos(self, layer))
            if info is None or len(info.shape) != 2 or info.shape[1] != config.n_experts:
                raise self._error(name, "is missing or does not hold one blob per expert")
            bytes_ = info.shape[0] * 4
            if bytes_ != (size or bytes_) or bytes_ % ALIGN or info.offset % ALIGN or bytes_ < needed.ends[2]:
                raise self._error(name, f"has blobs of {bytes_} bytes at {info.offset}: not aligned, or too small")
            size = bytes_
            offsets += [info.offset + e * size for e in range(config.n_experts)]
        return np.array(offsets, np.int64), size


def blob_name(layer: int) -> str:
    return f"blk.{layer}.experts.weight"


def blob_bytes(gguf: GGUFFile, config: ModelConfig) -> int:
    """Bytes of the largest layer's blob, padded: every expert of the file takes as many."""
    layers = range(config.n_layers)
    largest = max(ExpertLayout.of(config, expert_infos(gguf, layer)).ends[2] for layer in layers)
    return -(-largest // ALIGN) * ALIGN


# Writing


def _text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _string_entry(key: str, value: str) -> bytes:
    return _text(key) + struct.pack("<I", STRING) + _text(value)


def _u32_array_entry(key: str, values: npt.NDArray[np.uint32]) -> bytes:
    return _text(key) + struct.pack("<IIQ", ARRAY, U32, values.size) + values.astype("<u4").tobytes()


def tensor_entry(name: str, type_number: int, shape: tuple[int, ...], offset: int) -> bytes:
    head = _text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
    return head + struct.pack("<IQ", type_number, offset)


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def pack(source: str | os.PathLike[str], target: str | os.PathLike[str], progress: Progress | None = None) -> None:
    """Writes the packed file of a GGUF model.

    Streams: never more than one expert in memory. The file appears under its name only when it is whole and on disk
    (temporary file, fsync, rename); a run that was killed is started again and overwrites its temporary file.

    Args:
        source: any GGUF that this library reads (all parts of a split one). target: the file to write.
        progress: called with (experts done, all experts).

    Raises ModelFormatError for a bad source or one that is packed already, OSError such as a full disk.
    """
    with GGUFFile(source) as gguf:
        if is_packed(gguf):
            raise ModelFormatError("is a packed file already", path=gguf.path, field="stpk.layout")
        config = ModelConfig.from_gguf(gguf)
        with atomic_file(target) as fd:
            _write(fd, gguf, config, progress or (lambda done, total: None))


@contextmanager
def atomic_file(target: str | os.PathLike[str]) -> Iterator[int]:
    """A descriptor of `target`.part, which takes the target's name when the block ends well and goes when it fails.

    Raises OSError where another process is writing the same file, or the disk is full.
    """
    temporary = f"{os.fspath(target)}.part"
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _claim(descriptor, temporary)
        try:
            yield descriptor
            os.fsync(descriptor)
            os.replace(temporary, target)
            folder = os.open(os.path.dirname(os.path.abspath(target)), os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except BaseException:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise
    finally:
        os.close(descriptor)


def _claim(descriptor: int, path: str) -> None:
    """Locks the file for this process and empties it; what a killed process left has no lock.

    It may have been renamed between opening and locking: then it is somebody's finished file and stays as it is.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        ours = False
    if not ours:
        raise OSError(errno.EBUSY, "is being written by another process", path)
    os.ftruncate(descriptor, 0)


def _reserve(fd: int, size: int) -> None:
    """Claims the space of the whole file at once, so that a full disk shows before minutes of work."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as problem:  # file systems that cannot reserve refuse in other ways
        if problem.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise


def _write(fd: int, gguf: GGUFFile, config: ModelConfig, progress: Progress) -> None:
    dense = [info for name, info in gguf.tensors.items() if name.split(".")[-2] not in EXPERT_ROLES]
    blob = blob_bytes(gguf, config)
    total = config.n_layers * config.n_experts
    sums = np.zeros(len(dense) + total, np.uint32)
    source = _source_layout(gguf)
    header, places = _header(gguf, config, dense, blob, sums, source)
    _reserve(fd, places[len(dense)] + total * blob)
    for i, info in enumerate(dense):
        data = gguf.data(info.name)
        sums[i] = zlib.crc32(data.data)
        write_at(fd, places[i], data)
        gguf.release(info.name)
    for i, data in enumerate(_blobs(gguf, config, blob)):
        sums[len(dense) + i] = zlib.crc32(data.data)
        write_at(fd, places[len(dense)] + i * blob, data)
        progress(i + 1, total)
    header, _ = _header(gguf, config, dense, blob, sums, source)
    write_at(fd, 0, np.frombuffer(header, np.uint8))


def _blobs(gguf: GGUFFile, config: ModelConfig, blob: int) -> Iterator[Bytes]:
    """Every expert's padded blob, layer by layer."""
    for layer in range(config.n_layers):
        infos = expert_infos(gguf, layer)
        layout = ExpertLayout.of(config, infos)
        stacks = [gguf.data(info.name).reshape(config.n_experts, -1) for info in infos]
        for e in range(config.n_experts):
            padded = np.zeros(blob, np.uint8)
            packed = layout.pack(*(np.ascontiguousarray(stack[e]) for stack in stacks))
            padded[: packed.size] = packed
            yield padded
        for info in infos:
            gguf.release(info.name)


DROPPED_KEYS = ("general.alignment", "split.no", "split.count", "split.tensors.count")


def _source_layout(gguf: GGUFFile) -> str:
    """JSON of what unpack() needs beyond the copied entries: those that were dropped, the tensor table, the hash; of a
    split model's further parts everything before their tensors, and which part every tensor is in."""
    with open(gguf.paths[0], "rb") as file:
        first = file.read(gguf.header_end)
        digest, size = _hash(file.fileno())
    keys = list(gguf.key_ranges)
    dropped = {keys.index(key): first[slice(*gguf.key_ranges[key])].hex() for key in keys if key in DROPPED_KEYS}
    table = first[max((end for _, end in gguf.key_ranges.values()), default=24) :]
    layout = {"dropped": dropped, "start": first[:24].hex(), "table": table.hex(), "sha256": digest, "size": size}
    if len(gguf.paths) == 1:
        return json.dumps(layout)
    parts = [layout]
    for part, path in enumerate(gguf.paths[1:], 1):
        with open(path, "rb") as file:
            digest, size = _hash(file.fileno())
            header = file.read(min((i.offset for i in gguf.tensors.values() if i.part == part), default=size))
        parts.append({"header": header.hex(), "sha256": digest, "size": size})
    return json.dumps({"parts": parts, "part_of": [info.part for info in gguf.tensors.values()]})


def _hash(fd: int) -> tuple[str, int]:
    """(SHA-256 of a whole file, its size); takes its pages out of the system's cache."""
    digest, at = hashlib.sha256(), 0
    while chunk := os.pread(fd, 1 << 20, at):
        digest.update(chunk)
        at += len(chunk)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest(), at


def _header(
    gguf: GGUFFile, config: ModelConfig, dense: list[TensorInfo], blob: int, sums: npt.NDArray[np.uint32], source: str
) -> tuple[bytes, list[int]]:
    """(the file's first bytes, absolute offsets of the dense tensors and of the first blob)."""
    with open(gguf.paths[0], "rb") as file:
        first = file.read(gguf.header_end)
    entries = [first[a:b] for key, (a, b) in gguf.key_ranges.items() if key not in DROPPED_KEYS]
    table = [[i.name, i.type, list(i.shape), i.offset, i.nbytes] for i in gguf.tensors.values()]
    entries += [
        _text("general.alignment") + struct.pack("<II", U32, ALIGN),
        _string_entry("stpk.layout", LAYOUTS[config.down_transposed]),
        _string_entry("stpk.source_tensors", json.dumps(table, separators=(",", ":"))),
        _string_entry("stpk.source_layout", source),
        _u32_array_entry("stpk.crc32", sums),
    ]
    sizes = [info.nbytes for info in dense] + [blob * config.n_experts] * config.n_layers
    starts = np.cumsum([0, *map(_aligned, sizes)]).tolist()
    infos = [tensor_entry(d.name, TYPE_NUMBER[d.type], d.shape, at) for d, at in zip(dense, starts, strict=False)]
    layers = enumerate(starts[len(dense) : len(dense) + config.n_layers])
    infos += [tensor_entry(blob_name(n), F32_TYPE, (blob // 4, config.n_experts), at) for n, at in layers]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(entries)) + b"".join(entries) + b"".join(infos)
    data = _aligned(len(head))
    return head.ljust(data, b"\0"), [data + at for at in starts]


def write_at(fd: int, offset: int, data: Bytes) -> None:
    """Writes all of an array's bytes at an offset; threads may share the descriptor."""
    view = np.ascontiguousarray(data).data.cast("B")
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


# Checking


def verify(path: str | os.PathLike[str], progress: Progress | None = None) -> int:
    """Checks every checksum of a packed file; returns how many parts it has.

    Raises ModelFormatError naming the first tensor or expert that is damaged.
    """
    with GGUFFile(path) as gguf:
        if not is_packed(gguf):
            raise ModelFormatError("is not a packed file", path=gguf.path, field="stpk.layout")
        packed = PackedFile(gguf)
        config = ModelConfig.from_gguf(packed)
        offsets, size = packed.experts(config)
        sums = packed.checksums(len(offsets))
        packed.check_dense(sums)
        for i in range(len(offsets)):
            layer, e = divmod(i, config.n_experts)
            if (
                zlib.crc32(gguf.data(blob_name(layer))[e * size : (e + 1) * size].data)
                != sums[len(sums) - len(offsets) + i]
            ):
                raise ModelFormatError(
                    "is damaged: its checksum does not match", path=gguf.path, field=f"expert {e} of layer {layer}"
                )
            if progress:
                progress(i + 1, len(offsets))
        return len(sums)


def unpack(path: str | os.PathLike[str], target: str | os.PathLike[str], progress: Progress | None = None) -> list[str]:
    """Writes the GGUF that a packed file was made of, the same bytes, and checks them against its hash.

    Args:
        path: a packed file.
        target: the GGUF to write, atomically as pack() does. What was packed from a split model gives the same parts,
            NAME-00001-of-0000N.gguf and so on for a target NAME.gguf, or for the first part's name; none of them
            appears before all are whole.
        progress: called with (experts done, all experts).

    Returns the names of the files written. Raises ModelFormatError where the file is damaged or not packed, OSError
    such as a full disk.
    """
    with GGUFFile(path) as gguf, ExitStack() as stack:
        if not is_packed(gguf):
            raise ModelFormatError("is not a packed file", path=gguf.path, field="stpk.layout")
        packed = PackedFile(gguf)
        config = ModelConfig.from_gguf(packed)
        parts, part_of = _source_parts(gguf, len(packed.tensors))
        places = dict(zip(packed.tensors, part_of, strict=True))
        for name, info in packed.tensors.items():
            part = parts[places[name]]
            if not len(part.header) <= info.offset <= part.size - info.nbytes:
                raise ModelFormatError("has tensors outside the file", path=gguf.path, field="stpk.source_tensors")
        targets = _part_names(os.fspath(target), len(parts))
        fds = [stack.enter_context(atomic_file(name)) for name in targets]
        for fd, part in zip(fds, parts, strict=True):
            _reserve(fd, part.size)
            write_at(fd, 0, np.frombuffer(part.header, np.uint8))
        files = {name: fds[part] for name, part in places.items()}
        for name, info in packed.tensors.items():
            if name.split(".")[-2] not in EXPERT_ROLES:
                write_at(files[name], info.offset, packed.data(name))
                packed.release(name)
        _write_experts(files, packed, config, progress or (lambda done, total: None))
        for fd, part in zip(fds, parts, strict=True):
            if _hash(fd) != (part.sha256, part.size):
                raise ModelFormatError("does not give its source back: damaged, see verify", path=gguf.path)
        return targets


@dataclass(frozen=True)
class SourcePart:
    """One file of the source. header: its bytes before the tensors."""

    header: bytes
    sha256: str
    size: int


def _part_names(target: str, count: int) -> list[str]:
    if count == 1:
        return [target]
    stem = target.removesuffix(".gguf").removesuffix(f"-00001-of-{count:05d}")
    return [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


def _source_parts(gguf: GGUFFile, tensors: int) -> tuple[list[SourcePart], list[int]]:
    """(the source's files, which of them each tensor is in)."""
    try:
        layout = json.loads(str(gguf.metadata["stpk.source_layout"]))
        entries, part_of = layout.get("parts", [layout]), layout.get("part_of", [0] * tensors)
        headers = [_first_header(gguf, entries[0]), *(bytes.fromhex(entry["header"]) for entry in entries[1:])]
        parts = [
            SourcePart(header, str(entry["sha256"]), int(entry["size"]))
            for header, entry in zip(headers, entries, strict=True)
        ]
        if not all(0 < len(part.header) <= part.size for part in parts):
            raise ValueError("size")
        if len(part_of) != tensors or not all(type(part) is int and 0 <= part < len(parts) for part in part_of):
            raise ValueError("part_of")
        return parts, part_of
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as problem:
        raise ModelFormatError(
            f"is missing or damaged: {problem}", path=gguf.path, field="stpk.source_layout"
        ) from None


def _first_header(gguf: GGUFFile, layout: dict[str, Any]) -> bytes:
    """The bytes before the tensors of the source's first file: those that pack() dropped between the copied ones."""
    with open(gguf.path, "rb") as file:
        first = file.read(gguf.header_end)
    keys = [key for key in gguf.key_ranges if not key.startswith("stpk.") and key not in DROPPED_KEYS]
    entries = [first[slice(*gguf.key_ranges[key])] for key in keys]
    for at, entry in sorted((int(at), bytes.fromhex(entry)) for at, entry in layout["dropped"].items()):
        entries.insert(at, entry)
    return bytes.fromhex(layout["start"]) + b"".join(entries) + bytes.fromhex(layout["table"])


def _write_experts(files: dict[str, int], packed: PackedFile, config: ModelConfig, progress: Progress) -> None:
    """files: the descriptor that each tensor is written to."""
    _, blob = packed.experts(config)
    for layer in range(config.n_layers):
        infos = expert_infos(packed, layer)
        layout = ExpertLayout.of(config, infos)
        stack = packed.container.data(blob_name(layer)).reshape(config.n_experts, blob)
        for e in range(config.n_experts):
            for info, part in zip(infos, layout.unpack(stack[e]), strict=True):
                write_at(files[info.name], info.offset + e * part.size, part)
            progress(layer * config.n_experts + e + 1, config.n_layers * config.n_experts)
        packed.container.release(blob_name(layer))


def unpack_layer(path: str | os.PathLike[str], layer: int) -> tuple[Bytes, Bytes, Bytes]:
    """The stacked gate, up and down tensors of a layer as they stood in the source GGUF."""
    with GGUFFile(path) as gguf:
        packed = PackedFile(gguf)
        config = ModelConfig.from_gguf(packed)
        layout = ExpertLayout.of(config, expert_infos(packed, layer))
        _, size = packed.experts(config)
        blobs = gguf.data(blob_name(layer)).reshape(config.n_experts, size)
        parts = [layout.unpack(blob) for blob in blobs]
        gate, up, down = (np.concatenate([part[i] for part in parts]) for i in range(3))
        return gate, up, down
