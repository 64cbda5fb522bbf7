"""GGUF models on disk: one file or all parts of a split one, their metadata, tensor entries and bytes.

Called by config.py (what model is this), the loader and packer (tensor bytes), the tokenizer (vocabulary) and `info`.
_native/gguf_reader.pyx reads and checks the header of each file. It never writes.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from smallthinker_edge._native.gguf_reader import Part
from smallthinker_edge.errors import ModelFormatError

MoreTypes = dict[int, tuple[str, int, int]]
SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class TensorInfo:
    """One row of the tensor table.

    Attributes:
        name: as in the file, `.weight` included.
        type: a name of _native.layouts.TYPES.
        shape: in elements, GGUF order: the first dimension is the contiguous one.
        offset: byte offset of the data from the start of its file (not of the data section).
        nbytes: length of the data in bytes.
        part: index of its file in GGUFFile.paths.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    part: int


def split_integer(part: Part, key: str) -> int | None:
    """A split.* key of one part as an int, or None when absent."""
    value = part.metadata.get(key)
    if value is not None and (type(value) is not int or value < 0):
        raise ModelFormatError(f"must be a whole number, not {value!r}", path=part.path, field=key)
    return value


def open_parts(path: str, more_types: MoreTypes | None = None) -> list[Part]:
    """Every part of the model that `path` belongs to, in order; one for an ordinary file."""
    first = Part(path, 0, more_types)
    count = split_integer(first, "split.count")
    if count is None or count <= 1:
        return [first]
    folder, base = os.path.split(path)
    match = SPLIT_NAME.fullmatch(base)
    if match is None or int(match["count"]) != count:
        raise ModelFormatError(
            f"this is one of {count} parts; it must keep its name NAME-0000N-of-{count:05d}.gguf",
            path=path,
            field="split.count",
        )
    parts = []
    for number in range(1, count + 1):
        part_path = os.path.join(folder, f"{match['stem']}-{number:05d}-of-{count:05d}.gguf")
        try:
            parts.append(Part(part_path, number - 1, more_types))
        except FileNotFoundError:
            raise ModelFormatError(
                f"part {number} of {count} is missing: put all parts in one folder",
                path=part_path,
                field="split.count",
            ) from None
    check_parts(parts)
    return parts


def check_parts(parts: list[Part]) -> None:
    """Refuses parts of different splits, in the wrong order, or that do not add up."""
    for part in parts:
        if split_integer(part, "split.count") != len(parts):
            raise ModelFormatError(
                f"says {part.metadata.get('split.count')!r} parts where the first part says {len(parts)}",
                path=part.path,
                field="split.count",
            )
        number = split_integer(part, "split.no")
        if number != part.index:
            raise ModelFormatError(
                f"the name says part {part.index + 1} but the file says split.no {number!r} (counted from 0):"
                " the parts are in the wrong order",
                path=part.path,
                field="split.no",
            )
    expected = split_integer(parts[0], "split.tensors.count")
    found = sum(len(part.tensors) for part in parts)
    if expected is not None and expected != found:
        raise ModelFormatError(
            f"the parts hold {found} tensors, {expected} were announced",
            path=parts[0].path,
            field="split.tensors.count",
        )


class GGUFFile:
    """A GGUF model opened for reading: one file, or all parts of a split one.

    Args:
        path: any GGUF file of version 2 or 3, little-endian. For a split model any one of its parts
            (`NAME-00001-of-00003.gguf`): the others are found next to it by name.
        more_types: tensor types to accept besides those that run: {number: (name, weights of a block, its bytes)}.

    Attributes:
        path: the path given; paths: all parts in order (one for an ordinary file).
        version, alignment: of the first part.
        metadata: key -> int, float, bool, str, list of int, float or bool, or StringArray (a Sequence of
            str). A split model's metadata is that of its first part. Bytes that are not UTF-8 become lone
            surrogates.
        tensors: name -> TensorInfo, in file order.
        key_ranges: key -> (first byte, end) of its whole entry, and header_end: the first byte after the tensor
            table, both in the first part; for the packer, which copies entries as they are.

    Raises:
        ModelFormatError: anything malformed or unsupported, with path, field and offset; opening checks every
            number that later reads depend on.
        OSError: as open() raises it (FileNotFoundError, IsADirectoryError, PermissionError, ...).

    A context manager; close() may be called twice. Reading from several threads at once is allowed, closing
    at the same time is not. A file that another process cuts short while open cannot be guarded against:
    the operating system then kills the reader (SIGBUS), as for every memory mapping.
    """

    def __init__(self, path: str | os.PathLike[str], more_types: MoreTypes | None = None) -> None:
        if sys.byteorder != "little":
            raise ModelFormatError("GGUF files are read on little-endian machines only", path=os.fspath(path))
        self.path = os.fsdecode(path)
        parts = open_parts(self.path, more_types)
        self.paths = [part.path for part in parts]
        self.version = parts[0].version
        self.alignment = parts[0].alignment
        self.metadata = parts[0].metadata
        self.key_ranges = parts[0].key_ranges
        self.header_end = parts[0].header_end
        self.tensors: dict[str, TensorInfo] = {}
        for part in parts:
            for info in (TensorInfo(*entry, part.index) for entry in part.tensors):
                if info.name in self.tensors:
                    raise ModelFormatError(
                        f"the tensor is also in {self.paths[self.tensors[info.name].part]}",
                        path=part.path,
                        field=info.name,
                        offset=info.offset,
                    )
                self.tensors[info.name] = info
        self._mappings: list[mmap.mmap] | None = [part.mapping for part in parts]
        self.release()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<GGUFFile {self.path!r}: {len(self.metadata)} keys, {len(self.tensors)} tensors>"

    @property
    def closed(self) -> bool:
        """True after close()."""
        return self._mappings is None

    def close(self) -> None:
        """Lets go of the files. Arrays that data() gave stay valid and keep their mapping until freed."""
        self._mappings = None

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of tensor `name`: uint8 [nbytes], a read-only view of the mapping (no copy).

        Raises KeyError for a name that is not in `tensors`, ValueError after close().
        """
        info = self.tensors[name]
        return np.frombuffer(self._mapping(info.part), np.uint8, info.nbytes, info.offset)

    def release(self, name: str | None = None, cache: bool = False) -> None:
        """Drops the resident pages of tensor `name`, or of everything that was read, from this process.

        They stay in the operating system's page cache and come back when touched: views stay valid. Lets a
        loader stream through a file with little resident memory. Does nothing where there is no madvise.
        cache: of a named tensor, drops them from the page cache too, which counts towards a memory limit; a hint.
        Raises KeyError for a name that is not in `tensors`, ValueError after close().
        """
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        if name is None:
            for part in range(len(self.paths)):
                mapping = self._mapping(part)
                self._advise(mapping, mmap.MADV_DONTNEED, 0, len(mapping))
        else:
            info = self.tensors[name]
            self._advise(self._mapping(info.part), mmap.MADV_DONTNEED, info.offset, info.nbytes)
            if cache and hasattr(os, "posix_fadvise"):
                with suppress(OSError), open(self.paths[info.part], "rb") as file:
                    os.posix_fadvise(file.fileno(), info.offset, info.nbytes, os.POSIX_FADV_DONTNEED)

    def expect_rows(self, name: str) -> None:
        """Tells the system that single rows of tensor `name` will be read here and there, so that it reads nothing
        around them: what it reads counts towards a memory limit. A hint.

        Raises KeyError for a name that is not in `tensors`, ValueError after close().
        """
        if hasattr(mmap, "MADV_RANDOM"):
            info = self.tensors[name]
            self._advise(self._mapping(info.part), mmap.MADV_RANDOM, info.offset, info.nbytes)

    def _mapping(self, part: int) -> mmap.mmap:
        if self._mappings is None:
            raise ValueError(f"{self.path} is closed")
        return self._mappings[part]

    @staticmethod
    def _advise(mapping: mmap.mmap, advice: int, offset: int, nbytes: int) -> None:
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            mapping.madvise(advice, start, offset + nbytes - start)
        except OSError as problem:
            # Only advice: a kernel or file system that does not take it changes nothing but memory use.
            if problem.errno not in (errno.EINVAL, errno.ENOSYS):
                raise
