"""Where the tensors of a file by torch.save lie, without torch and without running what its pickle says.

Called by convert.py for the authors' predictor of the LM head. The pickle may name only what rebuilds plain tensors:
every other global is refused by name before anything is called. Weights are not read here: a zip archive by torch
stores them uncompressed, so each is a place in the file.
"""

from __future__ import annotations

import errno
import itertools
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from smallthinker_edge.errors import ModelFormatError
from smallthinker_edge.files.checkpoint import Place

T = TypeVar("T")
STORAGES = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"}
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
MAX_PICKLE = 1 << 20  # bytes; two matrices need a few hundred
MAX_ENTRIES = 1000
MAX_DEPTH = 8
MAX_VALUES, MAX_NAME = 10000, 1000
# Operations of a pickle (pickletools): those that push their argument, a constant, or a tuple of the values before.
PUSHES = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINFLOAT"})
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_DICT": dict, "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}  # fmt: skip
TUPLES = {"TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
CALLED = {
    ("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")
}  # fmt: skip
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of the zip format: the lengths of name and extra field are at its end


class Storage(NamedTuple):
    """A run of numbers in the archive: where it begins in the file, and how many there are."""

    dtype: str
    offset: int
    size: int


class StorageType(NamedTuple):
    """What a pickle gets for a name such as torch.HalfStorage."""

    dtype: str


class Name(NamedTuple):
    """A global that a pickle refers to, and may only call: never a function or class of Python's."""

    module: str
    name: str


class TensorReader:
    """Makes plain values of a pickle: numbers, texts, tuples, lists, dictionaries, and places of tensors.

    Only what torch.save writes for these is read. Python's own unpickler would fill memory for an index that a pickle
    may name, and spend for ever on the hash of a tuple of tuples of tuples.
    """

    def __init__(self, path: str, archive: zipfile.ZipFile, prefix: str) -> None:
        self.path, self.archive, self.prefix = path, archive, prefix
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def read(self) -> Any:
        """The value. Raises ModelFormatError for a global that is not known, ValueError and others for the rest."""
        for operation, argument, _ in pickletools.genops(self.archive.read(self.prefix + "data.pkl")):
            if operation.name == "STOP":
                return self.stack.pop()
            self.step(operation.name, argument)
        raise ValueError("the pickle does not stop")

    def step(self, operation: str, argument: Any) -> None:
        stack = self.stack
        if operation in PUSHES:
            stack.append(argument)
        elif operation in CONSTANTS:
            stack.append(CONSTANTS[operation]())
        elif operation == "MARK":
            self.marks.append(len(stack))
        elif operation in TUPLES:
            items = self.taken(TUPLES[operation])
            stack.append(tuple(items))
        elif operation in ("APPEND", "APPENDS"):
            items = self.taken(1 if operation == "APPEND" else None)
            self.last(list).extend(items)
        elif operation in ("SETITEM", "SETITEMS"):
            items = self.taken(2 if operation == "SETITEM" else None)
            target = self.last(dict)
            for key, value in zip(items[::2], items[1::2], strict=True):
                if not isinstance(key, str | int):
                    raise ValueError(f"a key that is {type(key).__name__}")
                target[key] = value
        elif operation in ("GLOBAL", "STACK_GLOBAL"):
            module, name = argument.split(" ", 1) if operation == "GLOBAL" else self.taken(2)
            stack.append(self.known(module, name))
        elif operation == "REDUCE":
            function, arguments = self.taken(2)
            stack.append(self.call(function, arguments))
        elif operation == "BINPERSID":
            stack.append(self.persistent_load(stack.pop()))
        elif operation == "BUILD":  # attributes of an ordered dictionary, which nothing needs
            self.taken(1)
            self.last(dict)
        elif operation in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if operation == "MEMOIZE" else argument] = stack[-1]
        elif operation in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif operation not in ("PROTO", "FRAME"):
            raise ValueError(f"operation {operation}")

    def taken(self, count: int | None) -> list[Any]:
        """The last values of the stack, off it: so many, or all since the last mark."""
        at = self.marks.pop() if count is None else len(self.stack) - count
        if at < (self.marks[-1] if self.marks else 0):
            raise ValueError("too few values")
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def last(self, kind: type[T]) -> T:
        value = self.stack[-1]
        if not isinstance(value, kind):
            raise ValueError(f"{type(value).__name__} where a {kind.__name__} should be")
        return value

    def known(self, module: object, name: object) -> Name | StorageType:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is no text")
        if module == "torch" and name in STORAGES:
            return StorageType(STORAGES[name])
        if (module, name) in CALLED:
            return Name(module, name)
        field = f"{module:.80}.{name:.80}"
        message = f"{field} is not allowed: only float32, float16 and bfloat16 tensors are read, never code"
        raise ModelFormatError(message, path=self.path, field=field)

    def call(self, function: object, arguments: object) -> Any:
        if not isinstance(function, Name) or type(arguments) is not tuple:
            raise ValueError("a call of what is no function")
        if function.name == "_rebuild_tensor_v2":
            return self.tensor(*arguments)
        if function.name == "_rebuild_parameter":
            return arguments[0]
        if arguments:
            raise ValueError("a dictionary made of something")
        return {}

    def persistent_load(self, pid: Any) -> Storage:
        kind, storage, key, _, size = pid
        if kind != "storage" or not isinstance(storage, StorageType) or not isinstance(key, str):
            raise ValueError("an unknown reference")
        entry = self.archive.getinfo(f"{self.prefix}data/{key}")
        if type(size) is not int or size * ITEM_BYTES[storage.dtype] != entry.file_size:
            raise ValueError(f"storage {key:.40} has {entry.file_size} bytes, which are not as many numbers as it says")
        return Storage(storage.dtype, _data_offset(self.path, entry), size)

    def tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Place:
        if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
            raise ValueError("a tensor without storage, shape and stride")
        if any(type(n) is not int or not 0 <= n < 1 << 48 for n in (offset, *shape, *stride)) or len(shape) > 8:
            raise ValueError("a tensor whose shape is no shape")
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
            found = TensorReader(path, archive, prefix).read()
        return dict(_flatten(path, found, "", 0, itertools.count(1)))
    except ModelFormatError:
        raise
    except zipfile.BadZipFile as problem:
        raise ModelFormatError(
            f"is not a zip archive of torch 1.6 or later ({problem}): save an older file again by torch.save",
            path=path,
        ) from None
    except OSError as problem:
        if problem.errno not in (None, errno.EINVAL):  # else the archive names a place before its beginning
            raise
        raise ModelFormatError(f"is damaged: {problem}", path=path) from None
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


def _flatten(path: str, value: Any, name: str, depth: int, seen: Iterator[int]) -> Iterator[tuple[str, Place]]:
    """seen: counts; what refers to the same things again and again may not go on for ever."""
    if next(seen) > MAX_VALUES:
        raise ModelFormatError(f"holds more than {MAX_VALUES} tensors, lists and dictionaries", path=path)
    if isinstance(value, Place):
        yield name, value
        return
    if depth == MAX_DEPTH or not isinstance(value, dict | list | tuple):
        raise ModelFormatError(f"holds {type(value).__name__} where a tensor should be", path=path, field=name or None)
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield from _flatten(path, item, f"{name}.{key}".lstrip(".")[:MAX_NAME], depth + 1, seen)
