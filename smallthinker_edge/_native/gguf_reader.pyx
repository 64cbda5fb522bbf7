# cython: language_level=3, boundscheck=False, wraparound=False
"""Reads the header of one GGUF file: metadata and tensor table.

Called by files/gguf.py. Never interprets a weight, never writes, and trusts no number in the file before checking it.
"""

import operator
from collections.abc import Sequence

import numpy as np

from smallthinker_edge._native.layouts import OTHER_TYPES, TYPES
from smallthinker_edge.errors import ModelFormatError, OutOfMemoryError

from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from smallthinker_edge._native.source cimport SourceFile


# Numbers of the GGUF specification (gguf.md of the ggml project).
cdef enum:
    V_U8 = 0
    V_I8 = 1
    V_U16 = 2
    V_I16 = 3
    V_U32 = 4
    V_I32 = 5
    V_F32 = 6
    V_BOOL = 7
    V_STRING = 8
    V_ARRAY = 9
    V_U64 = 10
    V_I64 = 11
    V_F64 = 12
    MAX_DIMS = 4

DEF_ALIGNMENT = 32
cdef uint64_t MAX_ALIGNMENT = 1 << 20
cdef uint64_t MAX_NAME = 65535            # the specification's limit for a key
# What a file may make us keep in memory, whatever its own size: 10 times the largest vocabularies in use.
cdef uint64_t MAX_HEADER = 64 << 20       # bytes before the tensors
cdef uint64_t MAX_ELEMENTS = 1 << 22      # of all arrays together
cdef uint64_t MAX_KEYS = 1 << 16
cdef uint64_t MAX_TENSORS = 1 << 17
cdef uint64_t FIRST_READ = 1 << 16
cdef uint64_t MIN_KEY = 8 + 4 + 1         # bytes of the smallest key-value pair
cdef uint64_t MIN_TENSOR = 8 + 4 + 8 + 4 + 8

ARRAY_DTYPES = {
    V_U8: "<u1", V_I8: "<i1", V_U16: "<u2", V_I16: "<i2", V_U32: "<u4", V_I32: "<i4",
    V_F32: "<f4", V_BOOL: "<u1", V_U64: "<u8", V_I64: "<i8", V_F64: "<f8",
}

# GGUF number -> (name, weights in a block, bytes of a block)
SUPPORTED_TYPES = {info.number: (name, info.columns, info.bytes) for name, info in TYPES.items()}
SUPPORTED_NAMES = ", ".join(TYPES)

cdef class StringArray:
    """A read-only sequence of str that keeps its text as bytes and decodes an item when it is asked for.

    Used for string arrays of the metadata: 152k tokens take 2.2 MB this way, 11 MB as a list of str. It owns
    a copy of its bytes, so it outlives the file. Bytes that are not UTF-8 become lone surrogates
    ("surrogateescape"). May be read from several threads at once.
    """

    cdef char *text
    cdef uint64_t *starts
    cdef Py_ssize_t length

    def __cinit__(self):
        self.text = NULL
        self.starts = NULL
        self.length = 0

    def __dealloc__(self):
        free(self.text)
        free(self.starts)

    def __init__(self):
        raise TypeError("StringArray is made by GGUFFile only")

    cdef str item(self, Py_ssize_t index):
        cdef uint64_t start = self.starts[index]
        return PyUnicode_DecodeUTF8(
            self.text + start, <Py_ssize_t>(self.starts[index + 1] - start), "surrogateescape"
        )

    cdef Py_ssize_t position(self, object index) except -1:
        cdef object number = operator.index(index)
        if number < 0:
            number += self.length
        if number < 0 or number >= self.length:
            raise IndexError("StringArray index out of range")
        return number

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        """The item at an index as str, or the list of str of a slice."""
        if isinstance(index, slice):
            return [self.item(i) for i in range(*index.indices(self.length))]
        return self.item(self.position(index))

    def __iter__(self):
        cdef Py_ssize_t i
        for i in range(self.length):
            yield self.item(i)

    def __reversed__(self):
        cdef Py_ssize_t i
        for i in range(self.length - 1, -1, -1):
            yield self.item(i)

    def __contains__(self, value):
        return any(item == value for item in self)

    def __eq__(self, other):
        if not isinstance(other, (StringArray, list, tuple)):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))

    def __repr__(self):
        return f"<StringArray of {self.length} strings>"

    __hash__ = None

    def __reduce__(self):
        return list, (list(self),)

    def index(self, value, start=0, stop=None):
        """First index of `value` in [start, stop); ValueError when it is not there."""
        for i in range(*slice(start, stop).indices(self.length)):
            if self.item(i) == value:
                return i
        raise ValueError(f"{value!r} is not in the array")

    def count(self, value):
        """How many items equal `value`."""
        return sum(item == value for item in self)

    def raw(self, index):
        """The bytes of one item, exactly as in the file."""
        cdef Py_ssize_t i = self.position(index)
        cdef uint64_t start = self.starts[i]
        return (self.text + start)[:<Py_ssize_t>(self.starts[i + 1] - start)]


Sequence.register(StringArray)


cdef int measure_strings(
    const uint8_t *data, uint64_t loaded, uint64_t *position, uint64_t *count, uint64_t *text_bytes
) noexcept nogil:
    """Walks `count` length-prefixed strings from data[*position]: 0, or -1 where data ends, with *position at the
    string that goes on and *count of them left."""
    cdef uint64_t pos = position[0], length
    while count[0]:
        if loaded - pos < 8:
            break
        memcpy(&length, data + pos, 8)
        if length > loaded - pos - 8:
            break
        pos += 8 + length
        text_bytes[0] += length
        count[0] -= 1
    position[0] = pos
    return -1 if count[0] else 0


cdef void copy_strings(
    const uint8_t *data, uint64_t pos, uint64_t count, char *text, uint64_t *starts
) noexcept nogil:
    """Packs the strings that measure_strings has walked: text without prefixes, count + 1 starts."""
    cdef uint64_t length, used = 0, i
    for i in range(count):
        memcpy(&length, data + pos, 8)
        memcpy(text + used, data + pos + 8, length)
        starts[i] = used
        used += length
        pos += 8 + length
    starts[count] = used


cdef class Cursor:
    """Bounds-checked reads from the beginning of one file, of which it holds as much as was asked for up to now."""

    cdef SourceFile file
    cdef uint8_t *data
    cdef uint64_t loaded  # bytes in data, from the file's first on
    cdef uint64_t size    # of the file
    cdef uint64_t pos
    cdef uint64_t elements
    cdef readonly str path
    cdef public str field

    def __cinit__(self, SourceFile file not None):
        self.file, self.path, self.size = file, file.path, file.size

    def __dealloc__(self):
        free(self.data)

    cdef int load(self, uint64_t end) except -1:
        """Has data hold the file's first `end` bytes; end <= size."""
        cdef uint8_t *more
        cdef uint64_t wanted = min(self.size, max(end, 2 * self.loaded, FIRST_READ))
        if end <= self.loaded:
            return 0
        if end > MAX_HEADER:
            raise self.error(f"goes on beyond the {MAX_HEADER} bytes that a header may have")
        wanted = min(wanted, MAX_HEADER)
        more = <uint8_t *>malloc(wanted)
        if more == NULL:
            raise OutOfMemoryError(f"no memory for the header of {self.path}")
        if self.loaded:
            memcpy(more, self.data, self.loaded)
        free(self.data)
        self.data = more
        self.file.read_into(self.loaded, wanted - self.loaded, self.data + self.loaded, self.field)
        self.loaded = wanted
        return 0

    cdef object error(self, str message, object offset=None):
        return ModelFormatError(
            message, path=self.path, field=self.field, offset=self.pos if offset is None else offset
        )

    cdef int need(self, uint64_t count) except -1:
        if count > self.size - self.pos:
            raise self.error(f"the file ends here: {count} bytes wanted, {self.size - self.pos} left")
        return self.load(self.pos + count)

    cdef uint32_t u32(self) except? 0xFFFFFFFF:
        cdef uint32_t value
        self.need(4)
        memcpy(&value, self.data + self.pos, 4)
        self.pos += 4
        return value

    cdef uint64_t u64(self) except? 0xFFFFFFFFFFFFFFFF:
        cdef uint64_t value
        self.need(8)
        memcpy(&value, self.data + self.pos, 8)
        self.pos += 8
        return value

    cdef str text(self, const char *errors):
        """A length-prefixed string; `errors` as in str.decode, or NULL for strict."""
        cdef uint64_t start = self.pos, length = self.u64()
        if length > self.size - self.pos:
            raise self.error(
                f"a string of {length} bytes does not fit in the {self.size - self.pos} that are left", start
            )
        self.load(self.pos + length)
        text = PyUnicode_DecodeUTF8(<const char *>self.data + self.pos, <Py_ssize_t>length, errors)
        self.pos += length
        return text

    cdef str name(self, str what):
        """A key or tensor name: at most 65535 bytes of UTF-8, not empty."""
        cdef uint64_t start = self.pos, length = self.u64()
        if length == 0 or length > MAX_NAME:
            raise self.error(f"the {what} has {length} bytes; 1 to {MAX_NAME} are allowed", start)
        self.pos = start
        try:
            return self.text(NULL)
        except UnicodeDecodeError:
            raise self.error(f"the {what} is not UTF-8", start) from None

    cdef object value(self, uint32_t kind):
        """One metadata value of GGUF type `kind` as a Python object."""
        if kind == V_STRING:
            return self.text("surrogateescape")
        if kind == V_ARRAY:
            return self.array()
        return self.scalar(kind)

    cdef object scalar(self, uint32_t kind):
        cdef const uint8_t *at
        cdef int16_t i16
        cdef uint16_t u16
        cdef int32_t i32
        cdef uint32_t u32
        cdef int64_t i64
        cdef uint64_t u64
        cdef float f32
        cdef double f64
        cdef uint64_t width = scalar_width(kind)
        if width == 0:
            raise self.error(f"unknown value type {kind}", self.pos - 4)
        self.need(width)
        at = self.data + self.pos
        self.pos += width
        if kind == V_U8:
            return at[0]
        if kind == V_I8:
            return <int8_t>at[0]
        if kind == V_BOOL:
            if at[0] > 1:
                raise self.error(f"a bool must be 0 or 1, not {at[0]}", self.pos - 1)
            return at[0] == 1
        if kind == V_U16:
            memcpy(&u16, at, 2)
            return u16
        if kind == V_I16:
            memcpy(&i16, at, 2)
            return i16
        if kind == V_U32:
            memcpy(&u32, at, 4)
            return u32
        if kind == V_I32:
            memcpy(&i32, at, 4)
            return i32
        if kind == V_F32:
            memcpy(&f32, at, 4)
            return f32
        if kind == V_U64:
            memcpy(&u64, at, 8)
            return u64
        if kind == V_I64:
            memcpy(&i64, at, 8)
            return i64
        memcpy(&f64, at, 8)
        return f64

    cdef object array(self):
        """An array value: StringArray for strings, list of int, float or bool for the rest."""
        cdef uint64_t start = self.pos
        cdef uint32_t kind = self.u32()
        cdef uint64_t count = self.u64()
        cdef uint64_t width = 8 if kind == V_STRING else scalar_width(kind)
        if kind == V_ARRAY:
            raise self.error("arrays of arrays are not supported", start)
        if width == 0:
            raise self.error(f"unknown type {kind} of array elements", start)
        if count > (self.size - self.pos) // width:
            raise self.error(f"an array of {count} elements is larger than the file", start + 4)
        if count > MAX_ELEMENTS - self.elements:
            message = f"{count} elements more in arrays; at most {MAX_ELEMENTS} are read of a file"
            raise self.error(message, start + 4)
        self.elements += count
        if kind == V_STRING:
            return self.strings(count)
        self.load(self.pos + count * width)
        cdef const uint8_t *at = self.data + self.pos
        numbers = np.frombuffer(
            (<const char *>at)[:<Py_ssize_t>(count * width)], dtype=ARRAY_DTYPES[kind]
        )
        if kind == V_BOOL:
            if count and numbers.max() > 1:
                bad = int(np.argmax(numbers > 1))
                raise self.error(f"element {bad} of a bool array is neither 0 nor 1", self.pos + bad)
            numbers = numbers.astype(bool)
        self.pos += count * width
        return numbers.tolist()

    cdef StringArray strings(self, uint64_t count):
        cdef StringArray result = StringArray.__new__(StringArray)
        cdef uint64_t start = self.pos, end = self.pos, left = count, text_bytes = 0, length = 0
        cdef int status = -1
        while status < 0:
            with nogil:
                status = measure_strings(self.data, self.loaded, &end, &left, &text_bytes)
            if status < 0:
                self.pos = end
                length = self.u64()
                if length > self.size - self.pos:
                    raise self.error("a string of this array does not fit in the file", end)
                self.load(self.pos + length)
        self.pos = start
        result.text = <char *>malloc(text_bytes + 1)
        result.starts = <uint64_t *>malloc((count + 1) * sizeof(uint64_t))
        if result.text == NULL or result.starts == NULL:
            raise OutOfMemoryError(f"no memory for the strings of {self.field}")
        with nogil:
            copy_strings(self.data, start, count, result.text, result.starts)
        result.length = <Py_ssize_t>count
        self.pos = end
        return result


cdef uint64_t scalar_width(uint32_t kind) noexcept nogil:
    """Bytes of a scalar of GGUF type `kind`; 0 when there is no such scalar."""
    if kind == V_U8 or kind == V_I8 or kind == V_BOOL:
        return 1
    if kind == V_U16 or kind == V_I16:
        return 2
    if kind == V_U32 or kind == V_I32 or kind == V_F32:
        return 4
    if kind == V_U64 or kind == V_I64 or kind == V_F64:
        return 8
    return 0


cdef class Part:
    """One file of a model: the file, opened, its metadata and tensors, as (name, type, shape, offset, bytes) in order.

    See files/gguf.py for what is what and what is raised.
    """

    cdef readonly str path
    cdef readonly SourceFile file
    cdef readonly dict metadata
    cdef readonly list tensors
    cdef readonly int version
    cdef readonly int index
    cdef readonly object alignment
    cdef readonly dict key_ranges
    cdef readonly object header_end
    cdef dict types
    cdef Cursor cursor

    def __init__(self, path, index=0, more_types=None):
        self.path = path
        self.index = index
        self.types = SUPPORTED_TYPES if more_types is None else more_types | SUPPORTED_TYPES
        self.metadata = {}
        self.tensors = []
        self.key_ranges = {}
        self.file = SourceFile(path)
        if self.file.size < 24:
            raise ModelFormatError(
                f"a GGUF file has at least 24 bytes, this one {self.file.size}",
                path=path, field="header", offset=self.file.size,
            )
        self.cursor = Cursor(self.file)
        try:
            self.read()
        except BaseException:
            self.file.close()
            raise
        finally:
            self.cursor = None

    cdef int read(self) except -1:
        cdef Cursor cursor = self.cursor
        cdef uint64_t i, n_tensors, n_keys, data_start
        self.read_magic()
        cursor.field = "tensor count"
        n_tensors = cursor.u64()
        cursor.field = "metadata count"
        n_keys = cursor.u64()
        if n_keys > min(MAX_KEYS, cursor.size // MIN_KEY):
            raise cursor.error(f"{n_keys} metadata keys are more than the file could hold, or than {MAX_KEYS}", 16)
        cursor.field = "tensor count"
        if n_tensors > min(MAX_TENSORS, cursor.size // MIN_TENSOR):
            raise cursor.error(f"{n_tensors} tensors are more than the file could hold, or than {MAX_TENSORS}", 8)
        for i in range(n_keys):
            self.read_key(i)
        self.read_alignment()
        infos = []
        seen = set()
        for i in range(n_tensors):
            infos.append(self.read_tensor(i, seen))
        self.header_end = cursor.pos
        data_start = (cursor.pos + self.alignment - 1) & ~(<uint64_t>self.alignment - 1)
        self.place_tensors(infos, data_start)
        return 0

    cdef int read_magic(self) except -1:
        cdef Cursor cursor = self.cursor
        cursor.field = "magic"
        cursor.need(24)
        if (<const char *>cursor.data)[:4] != b"GGUF":
            found = (<const char *>cursor.data)[:4]
            raise cursor.error(f"not a GGUF file: it starts with {found!r} instead of b'GGUF'")
        cursor.pos = 4
        cursor.field = "version"
        cdef uint32_t version = cursor.u32()
        if version != 0 and version & 0xFFFF == 0:
            raise cursor.error("this is a big-endian GGUF; only little-endian files are read", 4)
        if version != 2 and version != 3:
            raise cursor.error(f"GGUF version {version}; versions 2 and 3 are read", 4)
        self.version = version
        return 0

    cdef int read_key(self, uint64_t number) except -1:
        cdef Cursor cursor = self.cursor
        cdef uint64_t start
        cursor.field = f"metadata key {number}"
        start = cursor.pos
        key = cursor.name("key")
        cursor.field = key
        if key in self.metadata:
            raise cursor.error("the key occurs twice", start)
        self.metadata[key] = cursor.value(cursor.u32())
        self.key_ranges[key] = (start, cursor.pos)
        return 0

    cdef int read_alignment(self) except -1:
        cdef Cursor cursor = self.cursor
        cursor.field = "general.alignment"
        value = self.metadata.get("general.alignment", DEF_ALIGNMENT)
        if type(value) is not int or value < 8 or value > MAX_ALIGNMENT or value & (value - 1):
            raise ModelFormatError(
                f"the alignment must be a power of two from 8 to {MAX_ALIGNMENT}, not {value!r}",
                path=self.path, field="general.alignment",
            )
        self.alignment = value
        return 0

    cdef tuple read_tensor(self, uint64_t number, set seen):
        """(name, type, shape, relative offset, nbytes, where the entry stands)."""
        cdef Cursor cursor = self.cursor
        cdef uint64_t dims[MAX_DIMS]
        cdef uint64_t start, elements = 1, block, block_bytes, offset, n_bytes
        cdef uint32_t n_dims, kind, i
        cursor.field = f"tensor {number}"
        start = cursor.pos
        name = cursor.name("tensor name")
        cursor.field = name
        if name in seen:
            raise cursor.error("two tensors have this name", start)
        seen.add(name)
        n_dims = cursor.u32()
        if n_dims < 1 or n_dims > MAX_DIMS:
            raise cursor.error(f"{n_dims} dimensions; 1 to {MAX_DIMS} are allowed", cursor.pos - 4)
        for i in range(n_dims):
            dims[i] = cursor.u64()
            if dims[i] == 0:
                raise cursor.error(f"dimension {i} is zero", cursor.pos - 8)
            if dims[i] > (<uint64_t>1 << 62) // elements:
                raise cursor.error("the dimensions overflow", cursor.pos - 8)
            elements *= dims[i]
        kind = cursor.u32()
        if kind not in self.types:
            found = OTHER_TYPES.get(kind, "unknown")
            raise cursor.error(
                f"tensor type {found} (number {kind}) is not supported; supported are {SUPPORTED_NAMES}",
                cursor.pos - 4,
            )
        type_name, block, block_bytes = self.types[kind]
        if dims[0] % block:
            raise cursor.error(
                f"rows of {dims[0]} elements are not whole {type_name} blocks of {block}", start
            )
        if elements // block > (<uint64_t>1 << 62) // block_bytes:
            raise cursor.error("the dimensions overflow", start)
        n_bytes = elements // block * block_bytes
        offset = cursor.u64()
        if offset % <uint64_t>self.alignment:
            raise cursor.error(f"data offset {offset} is not a multiple of {self.alignment}", cursor.pos - 8)
        shape = tuple([dims[i] for i in range(n_dims)])
        return name, type_name, shape, offset, n_bytes, cursor.pos - 8

    cdef int place_tensors(self, list infos, uint64_t data_start) except -1:
        """Turns relative offsets into absolute ones; refuses data past the end and overlaps."""
        cdef Cursor cursor = self.cursor
        cdef uint64_t room = cursor.size - data_start if data_start <= cursor.size else 0
        for name, type_name, shape, offset, nbytes, entry in infos:
            cursor.field = name
            if offset > room or nbytes > room - offset:
                raise cursor.error(
                    f"its {nbytes} bytes at {data_start + offset} do not fit in a file of {cursor.size}"
                    " bytes: the file is cut short or damaged",
                    entry,
                )
            self.tensors.append((name, type_name, shape, data_start + offset, nbytes))
        end, previous = 0, None
        for name, _, _, start, nbytes in sorted(self.tensors, key=operator.itemgetter(3)):
            if start < end:
                cursor.field = name
                raise cursor.error(f"its data overlaps that of {previous}", start)
            end, previous = start + nbytes, name
        return 0
