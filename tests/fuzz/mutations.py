"""Changes to valid files that get far into a reader: bytes anywhere, values of JSON, keys and tensors of GGUF headers.

Called by run.py, by itself and for atheris. Each function takes a random.Random and gives changed bytes.
"""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

Mutation = Callable[[Random, bytes], bytes]
U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
PACKING = {
    U8: "<B", I8: "<b", U16: "<H", I16: "<h", U32: "<I", I32: "<i", F32: "<f", BOOL: "<B", U64: "<Q", I64: "<q",
    F64: "<d",
}  # fmt: skip
NUMBERS = (
    0, 1, 2, 3, 7, 31, 32, 33, 64, 127, 128, 255, 256, 4096, 65535, 65536, 1 << 24, (1 << 31) - 1, 1 << 31, 1 << 32,
    (1 << 53) + 1, (1 << 62), (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
)  # fmt: skip
FLOATS = (0.0, -0.0, 1e-45, 1e-6, 1.0, 1e4, 3e38, 1e300, float("inf"), float("-inf"), float("nan"), -1.0)
TEXTS = (
    "", "a", "\0", "\x1b[2J", "é", "\ud800", "{{", "{% for x in y %}", "<|im_end|>", "gpt2", "smallthinker", "../x",
    "a b", " ", "x" * 70000, "[" * 3000, "1" * 5000, "token_embd.weight", "blk.0.attn_q.weight", "Q4_0", "F32",
)  # fmt: skip


def number(draw: Random) -> int:
    value = draw.choice(NUMBERS)
    return draw.choice((value, -value, value + 1, value - 1))


def change_bytes(draw: Random, data: bytes) -> bytes:
    """A few of the oldest tricks: bits, numbers, and pieces that go, come twice, or come from elsewhere."""
    content = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at = draw.randrange(len(content) + 1) if draw.random() < 0.5 else draw.randrange(min(len(content), 256) + 1)
        size = draw.choice((1, 2, 4, 8, 32, 1000))
        kind = draw.randrange(7)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            content[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 2:
            value = number(draw) & ((1 << 64) - 1)
            width = draw.choice((1, 2, 4, 8))
            content[at : at + width] = value.to_bytes(8, "little")[:width]
        elif kind == 3:
            del content[at : at + size]
        elif kind == 4:
            content[at:at] = content[at : at + size]
        elif kind == 5:
            other = draw.randrange(len(content) + 1)
            content[at : at + size] = content[other : other + size]
        elif draw.random() < 0.2:
            del content[at:]
    return bytes(content)


def json_value(draw: Random) -> Any:
    kind = draw.randrange(8)
    if kind == 0:
        return draw.choice((None, True, False))
    if kind == 1:
        return number(draw)
    if kind == 2:
        return draw.choice(FLOATS)
    if kind == 3:
        return draw.choice(TEXTS)
    if kind == 4:
        return draw.choice(([], {}, [[]], [{}], {"": None}))
    if kind == 5:
        return [json_value(draw) for _ in range(draw.randrange(3))]
    if kind == 6:
        return {draw.choice(TEXTS[:8]): json_value(draw) for _ in range(draw.randrange(3))}
    return 10 ** draw.choice((20, 400, 4000))


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [(value, key) for key, _ in items]
    for _, inner in list(
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        found += places(inner)
    return found


def change_json(draw: Random, data: bytes) -> bytes:
    """A value replaced, left out, moved or nested; else bytes."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return change_bytes(draw, data)
    for _ in range(draw.choice((1, 1, 2, 3))):
        found = places(value)
        if not found:
            value = json_value(draw)
            continue
        owner, key = draw.choice(found)
        kind = draw.randrange(7)
        if kind == 0:
            del owner[key]
        elif kind == 1:
            source, other = draw.choice(found)
            try:
                owner[key] = json.loads(json.dumps(source[other]))
            except (KeyError, IndexError, RecursionError):
                continue
        elif kind == 2 and isinstance(owner, list):
            owner[key:key] = owner[: draw.choice((1, 2, 1000))]
        elif kind == 3 and isinstance(owner, dict):
            owner[draw.choice(TEXTS)] = owner.pop(key)
        elif kind == 4:
            owner[key] = [owner[key]] if draw.random() < 0.5 else {"a": owner[key]}
        else:
            owner[key] = json_value(draw)
    text = json.dumps(value)
    if draw.random() < 0.02:
        text = text.replace("null", "[" * draw.choice((50, 100000)), 1)
    return text.encode("utf-8", "surrogatepass")


# ---- GGUF


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def take_text(data: bytes, at: int) -> tuple[bytes, int]:
    (size,) = struct.unpack_from("<Q", data, at)
    if size > len(data) - at - 8:
        raise ValueError("cut")
    return data[at + 8 : at + 8 + size], at + 8 + size


def value_end(data: bytes, at: int, kind: int) -> int:
    if kind == STRING:
        return take_text(data, at)[1]
    if kind == ARRAY:
        inner, count = struct.unpack_from("<IQ", data, at)
        at += 12
        if inner in PACKING:
            return int(at + count * struct.calcsize(PACKING[inner]))
        for _ in range(min(count, len(data))):
            at = value_end(data, at, inner)
        return at
    return at + struct.calcsize(PACKING[kind])


class Header:
    """A GGUF file taken apart: keys [name, type, value], tensors [name, dimensions, type, offset], and the rest."""

    def __init__(self, data: bytes) -> None:
        self.start, count, n_keys = struct.unpack_from("<8sQQ", data)
        at = 24
        self.keys: list[list[Any]] = []
        for _ in range(min(n_keys, len(data))):
            name, at = take_text(data, at)
            (kind,) = struct.unpack_from("<I", data, at)
            end = value_end(data, at + 4, kind)
            self.keys.append([name, kind, data[at + 4 : end]])
            at = end
        self.tensors: list[list[Any]] = []
        for _ in range(min(count, len(data))):
            name, at = take_text(data, at)
            (n,) = struct.unpack_from("<I", data, at)
            dims = list(struct.unpack_from(f"<{n}Q", data, at + 4))
            kind, offset = struct.unpack_from("<IQ", data, at + 4 + 8 * n)
            at += 4 + 8 * n + 12
            self.tensors.append([name, dims, kind, offset])
        align = next((struct.unpack("<I", v)[0] for k, t, v in self.keys if k == b"general.alignment" and t == U32), 32)
        self.align = align if 0 < align <= 4096 else 32
        self.rest = data[-(-at // self.align) * self.align :]

    def to_bytes(self) -> bytes:
        def dims(sizes: list[int]) -> bytes:
            return struct.pack("<I", len(sizes)) + b"".join(struct.pack("<Q", n & ((1 << 64) - 1)) for n in sizes)

        head = struct.pack("<8sQQ", self.start, len(self.tensors), len(self.keys))
        head += b"".join(text(name) + struct.pack("<I", kind) + value for name, kind, value in self.keys)
        head += b"".join(
            text(name) + dims(sizes) + struct.pack("<IQ", kind & 0xFFFFFFFF, offset & ((1 << 64) - 1))
            for name, sizes, kind, offset in self.tensors
        )
        return head + bytes(-len(head) % self.align) + self.rest


def scalar(draw: Random, kind: int) -> bytes:
    if kind == STRING:
        return text(draw.choice(TEXTS).encode("utf-8", "surrogatepass"))
    if kind in (F32, F64):
        value = draw.choice(FLOATS)
        return struct.pack(PACKING[kind], value if kind == F64 or abs(value) < 3.4e38 else 1e38)
    size = struct.calcsize(PACKING[kind])
    return (number(draw) & ((1 << (8 * size)) - 1)).to_bytes(size, "little")


def gguf_value(draw: Random) -> tuple[int, bytes]:
    kind = draw.choice((U8, I8, U32, I32, F32, BOOL, STRING, U64, I64, F64, ARRAY, ARRAY))
    if kind != ARRAY:
        return kind, b"\x01" if kind == BOOL else scalar(draw, kind)
    inner = draw.choice((U32, I32, F32, STRING, U64, U8, BOOL))
    items = [b"\0" if inner == BOOL else scalar(draw, inner) for _ in range(draw.choice((0, 1, 4, 8, 300)))]
    return ARRAY, struct.pack("<IQ", inner, len(items)) + b"".join(items)


def changed_value(draw: Random, kind: int, value: bytes) -> bytes:
    """Another value of the same type: one of an array's, JSON within a string, or the whole."""
    if kind == STRING:
        inner = take_text(value, 0)[0]
        return text((change_json if inner[:1] in b"[{" and inner else change_bytes)(draw, inner))
    if kind == ARRAY:
        inner, count = struct.unpack_from("<IQ", value)
        if inner in PACKING and count:
            size = struct.calcsize(PACKING[inner])
            items = [value[12 + i * size : 12 + (i + 1) * size] for i in range(count)]
        else:
            items, at = [], 12
            while at < len(value) and inner == STRING:
                end = take_text(value, at)[1]
                items.append(value[at:end])
                at = end
        if items and draw.random() < 0.7:
            items[draw.randrange(len(items))] = scalar(draw, inner)
        elif items:
            at = draw.randrange(len(items))
            items[at : at + 1] = draw.choice(([], items[at : at + 1] * 2, [draw.choice(items)]))
        return struct.pack("<IQ", inner, len(items)) + b"".join(items)
    return scalar(draw, kind)


def change_gguf(draw: Random, data: bytes) -> bytes:
    """Keys and tensors changed by what they mean; now and then bytes."""
    if draw.random() < 0.15:
        return change_bytes(draw, data)
    try:
        header = Header(data)
    except (struct.error, ValueError, KeyError, OverflowError, MemoryError):
        return change_bytes(draw, data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        if header.keys and draw.random() < 0.6:
            own = [key for key in header.keys if key[0].startswith(b"stpk.")]
            key = draw.choice(own if own and draw.random() < 0.4 else header.keys)
            kind = draw.randrange(6)
            if kind == 0:
                header.keys.remove(key)
            elif kind == 1:
                key[1], key[2] = gguf_value(draw)
            elif kind == 2:
                key[0] = draw.choice((draw.choice(header.keys)[0], draw.choice(TEXTS).encode("utf-8", "replace")))
            else:
                key[2] = changed_value(draw, key[1], key[2])
        elif header.tensors:
            tensor, other = draw.choice(header.tensors), draw.choice(header.tensors)
            kind = draw.randrange(7)
            if kind == 0:
                header.tensors.remove(tensor)
            elif kind == 1:
                tensor[0] = draw.choice((other[0], draw.choice(TEXTS).encode("utf-8", "replace")))
            elif kind == 2 and tensor[1]:
                tensor[1][draw.randrange(len(tensor[1]))] = draw.choice((number(draw), *other[1]))
            elif kind == 3:
                tensor[1] = draw.choice((tensor[1][::-1], tensor[1] + [1], tensor[1][1:], other[1]))
            elif kind == 4:
                tensor[2] = draw.choice((other[2], draw.randrange(40), number(draw)))
            elif kind == 5:
                tensor[3] = draw.choice((other[3], number(draw), number(draw) * 32))
            else:
                header.rest = change_bytes(draw, header.rest)
    return header.to_bytes()


def change_session(draw: Random, data: bytes) -> bytes:
    """A changed session whose checksum is right more often than not, so that the other checks are met."""
    changed = change_bytes(draw, data)
    if draw.random() < 0.8 and len(changed) >= 4:
        changed = changed[:-4] + struct.pack("<I", zlib.crc32(changed[:-4]))
    return changed


def change_safetensors(draw: Random, data: bytes) -> bytes:
    if draw.random() < 0.2 or len(data) < 8:
        return change_bytes(draw, data)
    (length,) = struct.unpack_from("<Q", data)
    header = change_json(draw, data[8 : 8 + min(length, len(data))])
    return struct.pack("<Q", len(header)) + header + data[8 + min(length, len(data)) :]


def change_archive(draw: Random, data: bytes) -> bytes:
    """A zip archive with one changed entry and right checksums; else bytes."""
    if draw.random() < 0.3:
        return change_bytes(draw, data)
    changed = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(changed, "w") as target:
            entries = source.infolist()
            chosen = draw.choice([entry for entry in entries if entry.filename.endswith(".pkl")] * 5 + entries)
            for entry in entries:
                content = source.read(entry)
                target.writestr(entry.filename, change_bytes(draw, content) if entry is chosen else content)
    except Exception:  # it is damaged already
        return change_bytes(draw, data)
    return changed.getvalue()


JINJA = (
    "{{|}}|{%|%}|-%}|for|in|if|endif|endfor|set|messages|loop|range(9)|join|~|*|**|'a'|1000000|[0]|.content|"
    "raise_exception('x')|tojson|macro m()|endmacro|m()|call|namespace|is|%|'%9999s'|format|replace|(|)|{|[|"
    "strftime_now('%Y')|__class__|attr('x')|not|and|recursive|loop(x)"
).split("|")


def change_template(draw: Random, data: bytes) -> bytes:
    """Words of the language put in, swapped or repeated; now and then bytes."""
    if draw.random() < 0.2:
        return change_bytes(draw, data)
    words = re.findall(rb"\w+|\s+|\{\{|\}\}|\{%-?|-?%\}|.", data, re.DOTALL)
    for _ in range(draw.choice((1, 1, 2, 4, 8))):
        at = draw.randrange(len(words) + 1)
        size = draw.choice((0, 1, 1, 5, 30))
        kind = draw.randrange(4)
        if kind == 0:
            words[at : at + size] = [draw.choice((b"", b" ", b"|")) + draw.choice(JINJA).encode() + b" "]
        elif kind == 1:
            del words[at : at + size]
        elif kind == 2:
            words[at:at] = words[at : at + size] * draw.choice((1, 2, 300))
        elif words:
            other = draw.randrange(len(words))
            words[at : at + 1] = words[other : other + 1]
    return b"".join(words)[: 1 << 16]
