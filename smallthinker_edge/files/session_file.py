"""Saved sessions: one file with the tokens and the KV cache of a session, so that a prompt is paid for once.

Called by Session.save() and load(). Nothing in a file is trusted: sizes are checked before memory is taken, and the
session changes only after the checksum of everything has matched.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from io import BufferedReader
from typing import NoReturn

import numpy as np

from smallthinker_edge._native.kv_cache import KVCache
from smallthinker_edge.errors import SessionFormatError
from smallthinker_edge.files.atomic import atomic_file, forget
from smallthinker_edge.files.config import ModelFile
from smallthinker_edge.files.gguf import slices
from smallthinker_edge.files.packed import PackedFile

MAGIC, VERSION = b"STKVSESS", 1
PIECE = 4 << 20
# magic, version, type of the KV cache, the model's hash, positions, positions lost by window layers, blocks, their
# bytes in all. Little-endian; then int32 tokens, the blocks, and a crc32 of everything before it.
HEADER = struct.Struct("<8sI8s32sQQQQ")


def model_hash(file: ModelFile, budget: bool = False) -> bytes:
    """SHA-256 of the names, types and shapes of all tensors, of the data of those that are not experts, and of which
    experts a packed file lacks.

    A GGUF and the packed file made from it have the same hash. Experts' weights are not read: with all the dense
    weights and the routers equal, two models are taken to be the same. budget: leave nothing of it in the page cache.
    """
    digest = hashlib.sha256()
    if isinstance(file, PackedFile) and "stpk.absent" in file.container.metadata:
        digest.update(f"absent {file.container.metadata['stpk.absent']}\n".encode())
    for name in sorted(file.tensors):
        info = file.tensors[name]
        digest.update(f"{name} {info.type} {tuple(info.shape)}\n".encode())
        if not name.endswith("_exps.weight"):
            for part in slices(file.stored(name)):
                digest.update(part.data)
                if budget:
                    file.forget(name)
    return digest.digest()


def save(path: str | os.PathLike[str], cache: KVCache, model: bytes) -> None:
    """Writes a session, atomically: a reader sees the old file or the new one. Raises OSError."""
    blocks = cache.blocks()
    header = HEADER.pack(
        MAGIC, VERSION, cache.kv.encode(), model, cache.position, cache.lost, len(blocks), sum(b.size for b in blocks)
    )
    parts: list[bytes | memoryview] = [header, cache.tokens.astype("<i4").tobytes(), *(block.data for block in blocks)]
    with atomic_file(path) as file:
        total = at = 0
        for part in parts:
            for piece in _pieces(memoryview(part)):
                file.write(at, piece)
                file.settle()
                at, total = at + len(piece), zlib.crc32(piece, total)
        file.write(at, struct.pack("<I", total))


def _pieces(data: memoryview) -> Iterator[memoryview]:
    """The bytes in pieces that the page cache, which a memory limit counts, may hold for a moment."""
    return (data[at : at + PIECE] for at in range(0, len(data), PIECE))


class _Reader:
    """Reads exactly what is asked for and keeps the checksum."""

    def __init__(self, file: BufferedReader, path: str) -> None:
        self.file, self.path, self.total, self.at = file, path, 0, 0

    def fail(self, message: str, field: str) -> NoReturn:
        raise SessionFormatError(message, path=self.path, field=field, offset=self.at)

    def into(self, buffer: memoryview, field: str) -> None:
        for piece in _pieces(buffer):
            if self.file.readinto(piece) != len(piece):
                self.fail("the file ends too early", field)
            forget(self.file.fileno())
            self.total = zlib.crc32(piece, self.total)
            self.at += len(piece)


def saved_tokens(path: str | os.PathLike[str], kv: str, model: bytes) -> np.ndarray | None:
    """Tokens int32 of a saved session of this model and kind of KV cache, None of any other file. Raises OSError.

    They are not checked: load() does that.
    """
    with open(path, "rb") as file:
        raw = file.read(HEADER.size)
        if len(raw) < HEADER.size:
            return None
        magic, version, file_kv, of_model, position, *_ = HEADER.unpack(raw)
        ours = (magic, version, file_kv.rstrip(b"\0"), of_model) == (MAGIC, VERSION, kv.encode(), model)
        if not ours or os.fstat(file.fileno()).st_size < HEADER.size + 4 * position:
            return None
        data = file.read(4 * position)
        return np.frombuffer(data, "<i4").astype(np.int32) if len(data) == 4 * position else None


def load(path: str | os.PathLike[str], empty: KVCache, vocab_size: int, model: bytes) -> None:
    """Fills a new cache from a file. Where it raises, the cache is of no use any more.

    Raises SessionFormatError for a file that is damaged, of another version, model or KV type, or longer than the
    cache's context; OSError where it cannot be read.
    """
    with open(path, "rb") as file:
        reader = _Reader(file, os.fspath(path))
        raw = bytearray(HEADER.size)
        reader.into(memoryview(raw), "header")
        magic, version, kv, of_model, position, lost, count, size = HEADER.unpack(raw)
        reader.at = 0
        if magic != MAGIC:
            reader.fail("is not a saved session", "magic")
        if version != VERSION:
            reader.fail(f"version {version}; this library reads version {VERSION}", "version")
        if of_model != model:
            reader.fail("was saved with another model", "model")
        if kv.rstrip(b"\0") != empty.kv.encode():
            reader.fail(f"was saved with another KV cache than {empty.kv}", "kv")
        if position > empty.context:
            reader.fail(f"holds {position} tokens; the context is {empty.context}", "position")
        if os.fstat(file.fileno()).st_size != HEADER.size + 4 * position + size + 4:
            reader.fail("the file's length does not match its header", "size")
        reader.at = HEADER.size
        tokens = np.zeros(position, "<i4")
        if position:
            reader.into(tokens.data.cast("B"), "tokens")
            if not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
                reader.fail(f"a token id is outside the vocabulary of {vocab_size}", "tokens")
        try:
            empty.restore(tokens.astype(np.int32), lost)
        except (ValueError, OverflowError) as error:
            reader.fail(str(error), "position")
        blocks = empty.blocks()
        if len(blocks) != count or sum(block.size for block in blocks) != size:
            reader.fail("the blocks are not those of this model", "blocks")
        for block in blocks:
            reader.into(block.data, "blocks")
        if file.read(4) != struct.pack("<I", reader.total):
            reader.fail("is damaged: its checksum does not match", "crc32")
