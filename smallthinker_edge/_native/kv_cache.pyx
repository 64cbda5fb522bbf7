# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The KV cache of one session: blocks of 256 positions that grow with the context and that forks share.

It owns their memory; the forward pass writes through the KVView of a cache. It never computes.
Used by session.py; session_file.py saves and loads them, plan.py asks what they will take.
"""
cimport cython
from cpython.buffer cimport PyBUF_READ, PyBUF_WRITE
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

import numpy as np

from smallthinker_edge._native.core cimport *

from smallthinker_edge._native.layouts import KV_TYPES

from smallthinker_edge.errors import OutOfMemoryError


@cython.no_gc_clear  # __dealloc__ counts in the memory
cdef class KVBlock:
    """Keys and values of 256 positions for all layers of one kind (full or window), one page (kv.h) after another.

    owners counts the caches that hold it: with more than one it is read-only. Changed with the GIL held. Made between
    decode calls only: its memory may have been lent to the pager.
    """

    def __cinit__(self, SessionMemory memory not None, size_t size):
        memory.take(size, f"{ST_ATTN_CHUNK} positions of a KV cache")
        self.memory, self.bytes, self.owners = memory, size, 1  # undone by __dealloc__, whatever fails from here on
        self.data = <uint8_t *>st_memory_alloc(size)
        if self.data == NULL:
            raise OutOfMemoryError(f"cannot get {size} bytes for the KV cache from the system")

    def __dealloc__(self):
        if self.memory is not None:
            self.memory.give(self.bytes)
        st_memory_free(self.data, self.bytes)

    def view(self):
        """The bytes, uint8, writable; valid as long as this object."""
        return np.frombuffer(PyMemoryView_FromMemory(<char *>self.data, self.bytes, PyBUF_WRITE), np.uint8)


@cython.no_gc_clear  # __dealloc__ counts owners in the blocks
cdef class KVCache:
    """Keys and values of one session.

    Args:
        memory: of the engine that it serves.
        context: most positions.
        kv: "f16"; "q8_0": 34 instead of 64 bytes for 32 dimensions in the layers that grow with the context, window
            layers in F16; "q8_0-all": window layers too.

    Full layers take a block per 256 positions as these are first decoded. Window layers are a ring of blocks that
    holds the window and 255 positions more: so far a rewind is free, and so long may a batch be once it is full.
    Raises MemoryBudgetError, OutOfMemoryError, ValueError for an unknown kv or one that the head width does not fit.
    """

    def __cinit__(self, SessionMemory memory not None, int64_t context, str kv="f16"):
        cdef KVView *view = &self.view
        config = memory.config
        self.context, self.kv = context, kv
        view.full_page, view.ring_page = page_of(kv, False, config), page_of(kv, True, config)
        self.window = min(<int64_t>config.window, context) if any(config.window_layout) else 0
        self.n_window = sum(config.window_layout) if self.window else 0
        self.n_full = config.n_layers - self.n_window
        view.ring_blocks = ring_blocks(self.window)
        self.full, self.ring = [], [None] * view.ring_blocks
        memory.count(context * sizeof(int32_t), f"the {context} ids of a session")
        self.memory = memory
        view.full = <uint8_t **>calloc(context // ST_ATTN_CHUNK + 1, sizeof(void *))
        view.ring = <uint8_t **>calloc(view.ring_blocks + 1, sizeof(void *))
        self.ids = <int32_t *>calloc(context + 1, sizeof(int32_t))
        if view.full == NULL or view.ring == NULL or self.ids == NULL:
            raise OutOfMemoryError("cannot allocate a KV cache")

    def __dealloc__(self):
        cdef int64_t i
        if self.full is not None:
            for i in range(len(self.full)):
                (<KVBlock>self.full[i]).owners -= 1
        if self.ring is not None:
            for i in range(len(self.ring)):
                if self.ring[i] is not None:
                    (<KVBlock>self.ring[i]).owners -= 1
        if self.memory is not None:
            self.memory.give(self.context * sizeof(int32_t))
        free(self.view.full)
        free(self.view.ring)
        free(self.ids)

    cdef void release(self, int64_t first_full, int64_t first_ring):
        """Gives up the blocks from these indices on. One that is given up has one owner less, on MemoryError too."""
        cdef KVBlock block
        cdef int64_t i
        while len(self.full) > first_full:
            block = self.full.pop()
            block.owners -= 1
        for i in range(first_ring, self.view.ring_blocks):
            block = self.ring[i]
            if block is not None:
                block.owners -= 1
                self.ring[i] = None

    @property
    def ring_blocks(self):
        """Blocks of a window layer's ring; 0 where the model has no window layers."""
        return self.view.ring_blocks

    @property
    def bytes(self):
        """Bytes of memory that the blocks take now, those shared with forks counted in each."""
        return sum(block.bytes for block in self.full) + sum(b.bytes for b in self.ring if b is not None)

    def room(self):
        """Most tokens of the next decode() call, at most the engine's batch; results do not depend on it."""
        cdef int64_t size = self.view.ring_blocks * ST_ATTN_CHUNK
        if self.n_window == 0 or self.position + self.memory.batch <= size:
            return self.memory.batch
        return min(self.memory.batch, size - self.window + 1)

    cdef int prepare(self, int64_t n) except -1:
        """Makes the next n positions writable: new blocks, or copies of shared ones. Nothing changes on MemoryError."""
        cdef int64_t j, slot
        for j in range(self.position // ST_ATTN_CHUNK, (self.position + n - 1) // ST_ATTN_CHUNK + 1):
            if self.n_full:
                if j == len(self.full):
                    self.full.append(KVBlock(self.memory, self.n_full * self.view.full_page.bytes))
                else:
                    self.full[j] = own(self.full[j])
                self.view.full[j] = (<KVBlock>self.full[j]).data
            if self.n_window:
                slot = j % self.view.ring_blocks
                block = self.ring[slot]
                if block is None:
                    block = KVBlock(self.memory, self.n_window * self.view.ring_page.bytes)
                self.ring[slot] = own(block)
                self.view.ring[slot] = (<KVBlock>self.ring[slot]).data
        return 0

    cdef void advance(self, const int32_t *tokens, int64_t n, bint done) noexcept:
        """After n positions were written: counts them, unless the call failed; the ring has lost what they replaced."""
        if self.n_window:
            self.lost = max(self.lost, self.position + n - self.view.ring_blocks * ST_ATTN_CHUNK)
        if done:
            memcpy(self.ids + self.position, tokens, n * sizeof(int32_t))
            self.position += n

    @property
    def tokens(self):
        """The ids decoded so far, int32 [position]; a copy."""
        ids = PyMemoryView_FromMemory(<char *>self.ids, (self.position + 1) * sizeof(int32_t), PyBUF_READ)
        return np.array(np.frombuffer(ids, np.int32))[:self.position]

    def rewindable(self, int64_t position):
        """Whether rewind(position) can be done: window layers must still hold the window before it."""
        return 0 <= position <= self.position and (
            position == 0 or self.n_window == 0 or max(0, position - self.window + 1) >= self.lost)

    def rewind(self, int64_t position):
        """Forgets the positions from `position` on, and frees the memory of whole blocks. ValueError if impossible."""
        if not self.rewindable(position):
            raise ValueError(f"cannot go from position {self.position} back to {position}")
        self.position = position
        if position == 0:
            self.lost = 0
        blocks = (position + ST_ATTN_CHUNK - 1) // ST_ATTN_CHUNK
        self.release(blocks, blocks if blocks < self.view.ring_blocks and self.lost == 0 else self.view.ring_blocks)

    def fork(self):
        """An independent cache at the same position that shares this one's blocks until either writes to them."""
        cdef KVCache other = KVCache(self.memory, self.context, self.kv)
        cdef list full = list(self.full), ring = list(self.ring)
        cdef int64_t i
        other.full, other.ring = full, ring  # from here to the last owner is counted nothing may fail
        for i in range(len(full)):
            (<KVBlock>full[i]).owners += 1
            other.view.full[i] = self.view.full[i]
        for i in range(self.view.ring_blocks):
            if ring[i] is not None:
                (<KVBlock>ring[i]).owners += 1
            other.view.ring[i] = self.view.ring[i]
        memcpy(other.ids, self.ids, self.position * sizeof(int32_t))
        other.position, other.lost = self.position, self.lost
        return other

    def blocks(self):
        """Writable views of the blocks that hold positions, full layers first: what a saved session contains."""
        # One that a failed decode left beyond the position holds nothing.
        cdef int64_t used = (self.position + ST_ATTN_CHUNK - 1) // ST_ATTN_CHUNK
        return [(<KVBlock>block).view() for block in [*self.full[:used], *self.ring[:min(self.view.ring_blocks, used)]]]

    def restore(self, const int32_t[::1] tokens not None, int64_t lost):
        """Makes an empty cache hold these tokens' positions; the caller fills blocks() then.

        Raises ValueError for positions that cannot be.
        """
        cdef int64_t kept = self.view.ring_blocks * ST_ATTN_CHUNK, position = tokens.shape[0]
        if self.position or position > self.context:
            raise ValueError("not an empty cache, or too many positions")
        least = max(0, position - kept) if self.n_window else 0
        if not least <= lost <= (max(0, position - self.window + 1) if self.n_window else 0):
            raise ValueError("the window's positions are not all there")
        if position:
            self.prepare(position)
            memcpy(self.ids, &tokens[0], position * sizeof(int32_t))
            self.position, self.lost = position, lost


cdef KVBlock own(KVBlock block):
    """The block itself, or a copy of one that other caches hold too."""
    cdef KVBlock copy
    if block.owners == 1:
        return block
    copy = KVBlock(block.memory, block.bytes)
    memcpy(copy.data, block.data, block.bytes)
    block.owners -= 1
    return copy


cdef KVPage page_of(kv, bint window, config) except *:
    """The page of a full or a window layer of a ModelConfig. ValueError as KVCache()."""
    cdef KVPage page
    if kv not in KV_TYPES:
        raise ValueError(f"kv must be one of {', '.join(KV_TYPES)}, not {kv!r}")
    if any(st_kv_head_bytes(type_, config.head_dim) == 0 for type_ in KV_TYPES[kv]):
        raise ValueError(f"heads of {config.head_dim}, no multiple of 32, cannot be kept in {kv}: use kv='f16'")
    page.type = KV_TYPES[kv][window]
    page.head_bytes = st_kv_head_bytes(page.type, config.head_dim)
    page.bytes = 2 * config.n_kv_heads * page.head_bytes
    return page


def ring_blocks(int64_t window):
    """Blocks of 256 positions that a window layer's ring has: the window, and 255 positions more; 0 without one."""
    return (window + 2 * ST_ATTN_CHUNK - 2) // ST_ATTN_CHUNK if window else 0


def kv_bytes(config, int64_t context, kv="f16"):
    """Bytes of a KV cache that is full to `context` positions, for a ModelConfig. ValueError as KVCache()."""
    windowed = sum(config.window_layout) if config.window else 0
    blocks = (context + ST_ATTN_CHUNK - 1) // ST_ATTN_CHUNK
    full = page_of(kv, False, config).bytes * (config.n_layers - windowed) * blocks
    return full + page_of(kv, True, config).bytes * windowed * min(blocks, ring_blocks(config.window))
