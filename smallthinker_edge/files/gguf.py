"""GGUF models on disk: one file or all parts of a split one, their metadata, tensor entries and bytes.

Called by config.py (what model is this), the loader and packer (tensor bytes), the tokenizer (vocabulary) and `info`.
_native/gguf_reader.pyx reads and checks the header of each file. It never writes.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from smallthinker_edge._native.gguf_reader import Part
from smallthinker_edge._native.source import SourceFile
from smallthinker_edge.errors import ModelFormatError
from smallthinker_edge.files.atomic import forget

MoreTypes = dict[int, tuple[str, int, int]]
SLICE = 1 << 20  # bytes of one read
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


class StoredBytes:
    """Bytes of a tensor in its file: a slice of them is read when it is asked for, uint8, a copy.

    Attributes: size: bytes. file, offset: where they are. name: of the tensor.
    """

    def __init__(self, file: SourceFile, offset: int, size: int, name: str) -> None:
        self.file, self.offset, self.size, self.name = file, offset, size, name

    def part(self, start: int, stop: int) -> StoredBytes:
        """Those from one place to another, 0 <= start <= stop <= size, which are not read yet."""
        return StoredBytes(self.file, self.offset + start, stop - start, self.name)

    def __getitem__(self, part: slice) -> npt.NDArray[np.uint8]:
        """As SourceFile.read(). ValueError for a step."""
        start, stop, step = part.indices(self.size)
        if step != 1:
            raise ValueError("bytes of a file are read one after the other")
        return self.file.read(self.offset + start, max(0, stop - start), self.name)


def slices(data: StoredBytes) -> Iterator[npt.NDArray[np.uint8]]:
    """All of a tensor's bytes, in pieces of SLICE."""
    return (data[at : at + SLICE] for at in range(0, data.size, SLICE))


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
    at the same time is not. Nothing is mapped: what cannot be read, or was cut off meanwhile, is an exception.
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
        self._files = [part.file for part in parts]

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<GGUFFile {self.path!r}: {len(self.metadata)} keys, {len(self.tensors)} tensors>"

    @property
    def closed(self) -> bool:
        """True after close()."""
        return self._files[0].closed

    def close(self) -> None:
        """Lets go of the files. What data() gave stays valid."""
        for file in self._files:
            file.close()

    def file(self, part: int = 0) -> SourceFile:
        """A part's file, for those who read what is no tensor."""
        return self._files[part]

    def stored(self, name: str) -> StoredBytes:
        """The bytes of tensor `name`, read as far as they are asked for. Raises KeyError for a name that is not in
        `tensors`, ValueError after close(); reading raises as data() does."""
        info = self.tensors[name]
        file = self._files[info.part]
        file.fileno()  # is it open?
        return StoredBytes(file, info.offset, info.nbytes, info.name)

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """All bytes of tensor `name`: uint8 [nbytes], a copy.

        Raises KeyError for a name that is not in `tensors`, ValueError after close(), ModelFormatError where the file
        was cut short meanwhile, OSError where it cannot be read, OutOfMemoryError.
        """
        return self.stored(name)[:]

    def forget(self, name: str | None = None) -> None:
        """Takes the pages of tensor `name`, or of all files, out of the system's cache, which counts towards a memory
        limit; a hint. Raises KeyError for a name that is not in `tensors`, ValueError after close()."""
        if name is None:
            places = [(file, 0, 0) for file in self._files]
        else:
            info = self.tensors[name]
            places = [(self._files[info.part], info.offset, info.nbytes)]
        for file, offset, size in places:
            forget(file.fileno(), offset, size)

    def expect_rows(self, name: str) -> None:
        """Tells the system that from now on single rows of tensor `name` will be read here and there, so that it reads
        nothing around them: what it reads counts towards a memory limit. A hint, for the tensor's whole file.

        Raises KeyError for a name that is not in `tensors`, ValueError after close().
        """
        file = self._files[self.tensors[name].part].fileno()
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
