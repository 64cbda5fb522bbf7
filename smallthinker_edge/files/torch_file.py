"""Where the tensors of a file by torch.save lie, without torch and without running what its pickle says.

Called by convert.py for the authors' predictor of the LM head. The pickle may name only what rebuilds plain tensors:
every other global is refused by name before anything is called. Weights are not read here: a zip archive by torch
stores them uncompressed, so each is a place in the file.
"""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from smallthinker_edge.errors import ModelFormatError
from smallthinker_edge.files.checkpoint import Place

STORAGES = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"}
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
MAX_PICKLE = 1 << 20  # bytes; two matrices need a few hundred
MAX_ENTRIES = 1000
MAX_DEPTH = 8
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of the zip format: the lengths of name and extra field are at its end


class Storage(NamedTuple):
    """A run of numbers in the archive: where it begins in the file, and how many there are."""

    dtype: str
    offset: int
    size: int


class StorageType(NamedTuple):
    """What a pickle gets for a name such as torch.HalfStorage."""

    dtype: str


class Call:
    """What a pickle gets for a function: callable, and without attributes that it could set."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


class TensorUnpickler(pickle.Unpickler):
    """Knows tensors, their storages and ordered dictionaries; ModelFormatError for any other global."""

    def __init__(self, path: str, archive: zipfile.ZipFile, prefix: str) -> None:
        self.path, self.archive, self.prefix = path, archive, prefix
        super().__init__(archive.open(prefix + "data.pkl"))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return StorageType(STORAGES[name])
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return Call(self.tensor)
        if module == "torch._utils" and name == "_rebuild_parameter":
            return Call(lambda data, requires_grad, hooks: data)
        message = f"{module}.{name} is not allowed: only float32, float16 and bfloat16 tensors are read, never code"
        raise ModelFormatError(message, path=self.path, field=f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Storage:
        kind, storage, key, _, size = pid
        if kind != "storage" or not isinstance(storage, StorageType) or not isinstance(key, str):
            raise ValueError(f"unknown reference {pid!r:.80}")
        entry = self.archive.getinfo(f"{self.prefix}data/{key}")
        if type(size) is not int or size * ITEM_BYTES[storage.dtype] != entry.file_size:
            raise ValueError(f"storage {key} has {entry.file_size} bytes, which are not {size!r:.40} numbers")
        return Storage(storage.dtype, _data_offset(self.path, entry), size)

    def tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Place:
        if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
            raise ValueError("a tensor without storage, shape and stride")
        if any(type(n) is not int or not 0 <= n < 1 << 48 for n in (offset, *shape, *stride)) or len(shape) > 8:
            raise ValueError(f"a tensor of shape {shape!r:.80}")
        size = 1
        for n, step in zip(reversed(shape), reversed(stride), strict=True):
            if n != 1 and step != size:
                raise ValueError(f"a tensor of shape {shape!r:.80} that is not contiguous")
            size *= n
        if offset + size > storage.size:
            raise ValueError(f"a tensor of shape {shape!r:.80} beyond its storage")
        return Place(self.path, storage.dtype, shape, storage.offset + offset * ITEM_BYTES[storage.dtype])


def read_tensors(path: str) -> dict[str, Place]:
    """The tensors of a file by torch.save: a tensor, or dictionaries and lists of some, with dotted names.

    Raises ModelFormatError for any other content, naming a global that is not allowed; for the older format that is
    not a zip archive; and for a damaged file, whose checksums are compared.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            prefix = _prefix(path, archive)
            found = TensorUnpickler(path, archive, prefix).load()
        return dict(_flatten(path, found, "", 0))
    except ModelFormatError:
        raise
    except zipfile.BadZipFile as problem:
        raise ModelFormatError(
            f"is not a zip archive of torch 1.6 or later ({problem}): save an older file again by torch.save",
            path=path,
        ) from None
    except OSError:
        raise
    except Exception as problem:  # pickles can fail in any way, and each means the same
        raise ModelFormatError(f"is damaged, or holds more than tensors: {problem}", path=path) from None


def _prefix(path: str, archive: zipfile.ZipFile) -> str:
    """The archive's folder, once everything about its entries is as torch writes them."""
    entries = archive.infolist()
    if len(entries) > MAX_ENTRIES or len({entry.filename for entry in entries}) != len(entries):
        raise ModelFormatError("has too many entries, or one twice", path=path)
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ModelFormatError("is compressed, which torch.save never does", path=path, field=entry.filename)
    if sum(entry.file_size for entry in entries) > os.path.getsize(path):
        raise ModelFormatError("has entries that overlap", path=path)
    pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl") and entry.filename.count("/") == 1]
    if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE:
        raise ModelFormatError("has no data.pkl of a reasonable size", path=path, field="data.pkl")
    prefix = pickles[0].filename.removesuffix("data.pkl")
    if prefix + "byteorder" in archive.namelist() and archive.read(prefix + "byteorder") != b"little":
        raise ModelFormatError("is not little", path=path, field="byteorder")
    damaged = archive.testzip()
    if damaged is not None:
        raise ModelFormatError("is damaged: its checksum does not match", path=path, field=damaged)
    return prefix


def _data_offset(path: str, entry: zipfile.ZipInfo) -> int:
    """Where an uncompressed entry's bytes begin; testzip() has read it, so the local header is there."""
    with open(path, "rb") as file:
        file.seek(entry.header_offset)
        _, name, extra = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    return int(entry.header_offset + LOCAL_HEADER.size + name + extra)


def _flatten(path: str, value: Any, name: str, depth: int) -> Iterator[tuple[str, Place]]:
    if isinstance(value, Place):
        yield name, value
        return
    if depth == MAX_DEPTH or not isinstance(value, dict | list | tuple):
        raise ModelFormatError(f"holds {type(value).__name__} where a tensor should be", path=path, field=name or None)
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        if not isinstance(key, str | int):
            raise ModelFormatError(f"has a key {key!r:.40}", path=path, field=name or None)
        yield from _flatten(path, item, f"{name}.{key}".lstrip("."), depth + 1)
