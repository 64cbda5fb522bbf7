"""Writes packed files (see packed.py) from GGUF models, and gives the source back.

Called by `smallthinker-edge pack|unpack`. It streams: never more than one expert is in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from smallthinker_edge._native.layouts import TYPES
from smallthinker_edge.errors import ModelFormatError
from smallthinker_edge.files.atomic import PartialFile, atomic_file, forget
from smallthinker_edge.files.config import ModelConfig
from smallthinker_edge.files.gguf import SLICE, GGUFFile, TensorInfo, slices
from smallthinker_edge.files.gguf_entries import string_entry, tensor_entry, u32_array_entry, u32_entry
from smallthinker_edge.files.packed import (
    ALIGN,
    LAYOUT,
    Bytes,
    ExpertLayout,
    Flags,
    PackedFile,
    Progress,
    blob_name,
    expert_infos,
    is_expert,
    is_packed,
)

LONGEST_PADDING = 1 << 20  # bytes behind the last tensor: the largest alignment


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def pack(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    progress: Progress | None = None,
    *,
    drop: Flags | None = None,
) -> None:
    """Writes the packed file of a GGUF model.

    Streams: never more than one expert in memory. The file appears under its name only when it is whole and on disk
    (temporary file, fsync, rename); a run that was killed is started again and overwrites its temporary file.

    Args:
        source: any GGUF that this library reads (all parts of a split one). target: the file to write.
        progress: called with (experts done, all experts).
        drop: bool [L, E], experts to leave out: the model then never chooses them, and cannot be unpacked.

    Raises ModelFormatError for a bad source or one that is packed already, OSError such as a full disk, ValueError
    where `drop` has another shape or leaves a layer fewer experts than a token uses.
    """
    with GGUFFile(source) as gguf:
        if is_packed(gguf):
            raise ModelFormatError("is a packed file already", path=gguf.path, field="stpk.layout")
        config = ModelConfig.from_gguf(gguf)
        absent = np.zeros((config.n_layers, config.n_experts), np.bool_) if drop is None else np.asarray(drop, np.bool_)
        if absent.shape != (config.n_layers, config.n_experts):
            raise ValueError(f"drop must be bool [{config.n_layers}, {config.n_experts}]")
        if ((~absent).sum(1) < config.n_experts_used).any():
            raise ValueError(f"every layer must keep at least {config.n_experts_used} experts")
        with atomic_file(target) as file:
            _write(file, gguf, config, absent, progress or (lambda done, total: None))


def _write(file: PartialFile, gguf: GGUFFile, config: ModelConfig, absent: Flags, progress: Progress) -> None:
    dense = [info for name, info in gguf.tensors.items() if not is_expert(name)]
    blob = blob_bytes(gguf, config)
    total = int((~absent).sum())
    sums = np.zeros(len(dense) + total, np.uint32)
    source = _source_layout(gguf)
    header, places = _header(gguf, absent, dense, blob, sums, source)
    file.reserve(places[len(dense)] + total * blob)
    for i, info in enumerate(dense):
        at, total_sum = places[i], 0
        for piece in slices(gguf.stored(info.name)):
            total_sum = zlib.crc32(piece.data, total_sum)
            file.write(at, piece)
            at += piece.size
        sums[i] = total_sum
    for i, data in enumerate(_blobs(gguf, config, absent, blob)):
        sums[len(dense) + i] = zlib.crc32(data.data)
        file.write(places[len(dense)] + i * blob, data)
        progress(i + 1, total)
    header, _ = _header(gguf, absent, dense, blob, sums, source)
    file.write(0, header)


def blob_bytes(gguf: GGUFFile, config: ModelConfig) -> int:
    """Bytes of the largest layer's blob, padded: every expert of the file takes as many."""
    layers = range(config.n_layers)
    largest = max(ExpertLayout.of(config, expert_infos(gguf, layer)).bytes for layer in layers)
    return -(-largest // ALIGN) * ALIGN


def _blobs(gguf: GGUFFile, config: ModelConfig, absent: Flags, blob: int) -> Iterator[Bytes]:
    """Every expert's padded blob, layer by layer, without the absent ones."""
    for layer in range(config.n_layers):
        infos = expert_infos(gguf, layer)
        layout = ExpertLayout.of(config, infos)
        stacks = [gguf.stored(info.name) for info in infos]
        for e in np.flatnonzero(~absent[layer]).tolist():
            padded = np.zeros(blob, np.uint8)
            gate, up, down = (stack[e * (n := stack.size // config.n_experts) : (e + 1) * n] for stack in stacks)
            packed = layout.pack(gate, up, down)
            padded[: packed.size] = packed
            yield padded


DROPPED_KEYS = ("general.alignment", "split.no", "split.count", "split.tensors.count")


def _source_layout(gguf: GGUFFile) -> str:
    """JSON of what unpack() needs beyond the copied entries: those that were dropped, the tensor table, the hash; of a
    split model's further parts everything before their tensors, and which part every tensor is in."""
    first = _first_bytes(gguf)
    hashes = [_hash(file.fileno(), file.size, file.path) for file in map(gguf.file, range(len(gguf.paths)))]
    keys = list(gguf.key_ranges)
    dropped = {keys.index(key): first[slice(*gguf.key_ranges[key])].hex() for key in keys if key in DROPPED_KEYS}
    table = first[max((end for _, end in gguf.key_ranges.values()), default=24) :]
    layout = {
        "dropped": dropped,
        "start": first[:24].hex(),
        "table": table.hex(),
        "sha256": hashes[0],
        "size": gguf.file().size,
    }
    if len(gguf.paths) == 1:
        return json.dumps(layout)
    parts = [layout]
    for part in range(1, len(gguf.paths)):
        file = gguf.file(part)
        header = file.read(0, min((i.offset for i in gguf.tensors.values() if i.part == part), default=file.size))
        parts.append({"header": header.tobytes().hex(), "sha256": hashes[part], "size": file.size})
    return json.dumps({"parts": parts, "part_of": [info.part for info in gguf.tensors.values()]})


def _first_bytes(gguf: GGUFFile) -> bytes:
    """What stands before the tensors of a file, or of its first part."""
    return gguf.file().read(0, gguf.header_end).tobytes()


def _hash(fd: int, size: int, path: str) -> str:
    """SHA-256 of a file of so many bytes; takes its pages out of the system's cache."""
    digest, at = hashlib.sha256(), 0
    while at < size:
        chunk = os.pread(fd, min(SLICE, size - at), at)
        if not chunk:
            raise ModelFormatError("the file was cut short", path=path, offset=at)
        digest.update(chunk)
        at += len(chunk)
    forget(fd)
    return digest.hexdigest()


def _header(
    gguf: GGUFFile,
    absent: Flags,
    dense: list[TensorInfo],
    blob: int,
    sums: npt.NDArray[np.uint32],
    source: str,
) -> tuple[bytes, list[int]]:
    """(the file's first bytes, absolute offsets of the dense tensors and of the first blob)."""
    first = _first_bytes(gguf)
    entries = [first[a:b] for key, (a, b) in gguf.key_ranges.items() if key not in DROPPED_KEYS]
    table = [[i.name, i.type, list(i.shape), i.offset, i.nbytes] for i in gguf.tensors.values()]
    entries += [
        u32_entry("general.alignment", ALIGN),
        string_entry("stpk.layout", LAYOUT),
        string_entry("stpk.source_tensors", json.dumps(table, separators=(",", ":"))),
        string_entry("stpk.source_layout", source),
        u32_array_entry("stpk.crc32", sums),
    ]
    if absent.any():
        entries.append(u32_array_entry("stpk.absent", np.flatnonzero(absent).astype(np.uint32)))
    kept = (~absent).sum(1).tolist()
    sizes = [info.nbytes for info in dense] + [blob * count for count in kept]
    starts = np.cumsum([0, *map(_aligned, sizes)]).tolist()
    infos = [tensor_entry(d.name, TYPES[d.type].number, d.shape, at) for d, at in zip(dense, starts, strict=False)]
    layers = enumerate(zip(kept, starts[len(dense) :], strict=False))
    infos += [tensor_entry(blob_name(n), TYPES["F32"].number, (blob // 4, count), at) for n, (count, at) in layers]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(entries)) + b"".join(entries) + b"".join(infos)
    data = _aligned(len(head))
    return head.ljust(data, b"\0"), [data + at for at in starts]


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
        packed = PackedFile(gguf)
        config = ModelConfig.from_gguf(packed)
        packed.check_complete(config)
        parts, part_of = _source_parts(gguf, len(packed.tensors))
        places = dict(zip(packed.tensors, part_of, strict=True))
        ends = [len(part.header) for part in parts]
        for name, info in packed.tensors.items():
            part = parts[places[name]]
            if not len(part.header) <= info.offset <= part.size - info.nbytes:
                raise ModelFormatError("has tensors outside the file", path=gguf.path, field="stpk.source_tensors")
            ends[places[name]] = max(ends[places[name]], info.offset + info.nbytes)
        if any(part.size > end + LONGEST_PADDING for part, end in zip(parts, ends, strict=True)):
            raise ModelFormatError("has sizes beyond the tensors", path=gguf.path, field="stpk.source_layout")
        targets = _part_names(os.fspath(target), len(parts))
        written = [stack.enter_context(atomic_file(name)) for name in targets]
        for file, part in zip(written, parts, strict=True):
            file.reserve(part.size)
            file.write(0, part.header)
        files = {name: written[part] for name, part in places.items()}
        for name, info in packed.tensors.items():
            if not is_expert(name):
                at = info.offset
                for piece in slices(packed.stored(name)):
                    files[name].write(at, piece)
                    at += piece.size
        _write_experts(files, packed, config, progress or (lambda done, total: None))
        for file, part in zip(written, parts, strict=True):
            if _hash(file.descriptor, part.size, file.path) != part.sha256:
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
        if len(parts) > 1 + tensors or not all(0 < len(part.header) <= part.size < 1 << 62 for part in parts):
            raise ValueError("size")
        if len(part_of) != tensors or not all(type(part) is int and 0 <= part < len(parts) for part in part_of):
            raise ValueError("part_of")
        return parts, part_of
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError) as problem:
        raise ModelFormatError(
            f"is missing or damaged: {problem}", path=gguf.path, field="stpk.source_layout"
        ) from None


def _first_header(gguf: GGUFFile, layout: dict[str, Any]) -> bytes:
    """The bytes before the tensors of the source's first file: those that pack() dropped between the copied ones."""
    first = _first_bytes(gguf)
    keys = [key for key in gguf.key_ranges if not key.startswith("stpk.") and key not in DROPPED_KEYS]
    entries = [first[slice(*gguf.key_ranges[key])] for key in keys]
    for at, entry in sorted((int(at), bytes.fromhex(entry)) for at, entry in layout["dropped"].items()):
        entries.insert(at, entry)
    return bytes.fromhex(layout["start"]) + b"".join(entries) + bytes.fromhex(layout["table"])


def _write_experts(files: dict[str, PartialFile], packed: PackedFile, config: ModelConfig, progress: Progress) -> None:
    """files: what each tensor is written to."""
    _, blob = packed.experts(config)
    for layer in range(config.n_layers):
        infos = expert_infos(packed, layer)
        layout = ExpertLayout.of(config, infos)
        stack = packed.container.stored(blob_name(layer))
        for e in range(config.n_experts):
            for info, part in zip(infos, layout.unpack(stack[e * blob : (e + 1) * blob]), strict=True):
                files[info.name].write(info.offset + e * part.size, part)
            progress(layer * config.n_experts + e + 1, config.n_layers * config.n_experts)
