# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Experts that live in a packed file: slots, the pager over them, and what it counts.

Made by opening.py, used by engine.pyx and session_memory.pyx; hot_experts.py saves and restores the counts of uses.
"""
cimport cython
from libc.errno cimport ENOMEM, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t

import os

from smallthinker_edge._native.core cimport *
from smallthinker_edge._native.memory cimport Arena

from smallthinker_edge.errors import OutOfMemoryError

# Measured: docs/notes/2026-11-24-reads-of-experts.md.
cdef enum:
    IO_THREADS = 1
    AHEAD_LAYERS = 2
    PIECE_BYTES = 1 << 20
    GIVE_WAY_NS = 2000000  # docs/notes/2026-11-30-cost-of-reads.md


@cython.no_gc_clear  # the collector must not free the slots while the pager's threads read into them
cdef class ExpertPaging:
    """Args:
        config: ModelConfig.
        path: the packed file. offsets: int64 [L * E], where each expert's blob starts; multiples of 4096.
        blob_bytes: of one expert, a multiple of 4096. slots: how many are kept in memory, at least E.
        io_threads: reads in flight at once.
        ahead: layers whose routers are asked before their turn, to read their experts ahead; 0 reads none ahead.
        piece: bytes after which such a read gives way to an expert that is wanted now. give_way_ns: or several of
            them, as many as the storage reads in this time; 0: one.
        sessions: bytes of the budget set aside for sessions: what they need beyond is taken from the slots, down to E;
            None: there is no budget. lend: more slots while sessions do not need it all.
        sums: uint32 [L * E], the CRC-32 of every blob, compared when it is first read; None compares nothing.
        cached: read from the system's page cache, and drop nothing from it, where it holds the file.

    Raises OSError where the file cannot be opened, OutOfMemoryError where memory or threads are missing, ValueError for
    too few slots.
    """

    def __cinit__(self, config, path, offsets, size_t blob_bytes, int64_t slots, *, int io_threads=IO_THREADS,
                  int64_t ahead=AHEAD_LAYERS, size_t piece=PIECE_BYTES, int64_t give_way_ns=GIVE_WAY_NS,
                  sessions=None, bint lend=False, sums=None, bint cached=False):
        cdef const int64_t[::1] table = offsets
        cdef const uint32_t[::1] checksums = sums
        cdef st_pager_config pager
        cdef int64_t E = config.n_experts, experts = config.n_layers * E
        if (slots < E or blob_bytes % 4096 or table.shape[0] != experts
                or sums is not None and checksums.shape[0] != experts):
            raise ValueError("too few slots, or sizes that do not fit the model")
        if io_threads < 1 or ahead < 0 or piece < 4096 or piece % 4096:
            raise ValueError("io_threads, ahead or piece is out of range")
        name = os.fsencode(path)
        self.reader = st_reader_open(name, cached)
        if self.reader == NULL:
            if errno == ENOMEM:
                raise OutOfMemoryError(f"no memory to open {os.fspath(path)}")
            raise OSError(errno, os.strerror(errno), os.fspath(path))
        pager.read, pager.source = st_reader_read, self.reader
        pager.experts, pager.layer, pager.offsets, pager.bytes = experts, E, &table[0], blob_bytes
        self.experts, self.slot_bytes, self.own_slots, self.least_slots = experts, blob_bytes, slots, E
        self.sessions, self.lend = -1 if sessions is None else sessions, lend
        self.most_slots = slots
        if lend and sessions is not None:
            self.most_slots = max(slots, min(experts, slots + self.sessions // <int64_t>blob_bytes))
        self.arena, self.slot_arena = Arena(), Arena()
        self.slot_memory = <uint8_t *>self.slot_arena.take_apart(self.most_slots * blob_bytes)
        pager.memory, pager.slots, pager.io_threads = self.slot_memory, self.most_slots, io_threads
        pager.piece, pager.give_way_ns, pager.sums, pager.stolen = piece, give_way_ns, NULL, st_stolen_ns
        pager.write = NULL
        if sums is not None:
            pager.sums = &checksums[0]
        self.state.ahead = min(ahead, <int64_t>config.n_layers - 1)
        self.state.ahead_logits = <float *>self.arena.take((self.state.ahead * E + 1) * 4)
        self.state.ahead_ids = <int32_t *>self.arena.take((self.state.ahead + 1) * E * 4)
        self.state.held = <int32_t *>self.arena.take(E * 4)
        self.state.held_tokens = <int32_t *>self.arena.take(E * 4)
        self.state.pager = st_pager_create(&pager)
        if self.state.pager == NULL:
            raise OutOfMemoryError("no memory, or no thread, to read experts from the file")
        self.slots = self.most_slots
        self.fit(0)

    def __dealloc__(self):
        self.give_back()

    cdef void give_back(self) noexcept:
        """Waits for reads in flight, ends the threads, closes the file and frees the slots, in this order."""
        with nogil:
            st_pager_destroy(self.state.pager)
            st_reader_close(self.reader)
            self.state.pager, self.reader = NULL, NULL
        for arena in (self.slot_arena, self.arena):
            if arena is not None:
                (<Arena>arena).give_back()

    @property
    def bytes(self):
        """Bytes of the slots that are the budget's own; those beyond are memory of the sessions."""
        return min(self.slots, self.own_slots) * self.slot_bytes + self.arena.bytes

    cdef int fit(self, int64_t in_use) except -1:
        """Gives slots to the pager, or takes them back, as sessions need the memory set aside for them, less, or more.

        in_use: bytes that they take. Not while experts are in use.
        """
        cdef int64_t slots = self.own_slots, size = self.slot_bytes, free = self.sessions - in_use
        if self.state.pager == NULL or self.sessions < 0:
            return 0
        if free < 0:
            slots -= (size - 1 - free) // size
        elif self.lend and free > ST_MEMORY_GRAIN:
            slots += (free - ST_MEMORY_GRAIN) // size
        slots = max(self.least_slots, min(slots, self.most_slots))
        if slots == self.slots:
            return 0
        with nogil:
            st_pager_resize(self.state.pager, slots)
            if slots < self.slots:  # to the end: earlier calls kept the page that theirs began in
                st_memory_return(self.slot_memory + slots * self.slot_bytes,
                                 (self.most_slots - slots) * self.slot_bytes)
        self.slots = slots
        return 0

    def stats(self):
        """Counts since it was opened; SmallThinker.stats() says what they mean."""
        cdef st_pager_stats stats
        self.check_open()
        st_pager_get_stats(self.state.pager, &stats)
        wanted, ahead = stats.hits + stats.ahead_hits + stats.misses, stats.predicted
        return {
            "slots": self.slots, "hits": stats.hits, "ahead_hits": stats.ahead_hits, "misses": stats.misses,
            "hit_rate": stats.hits / wanted if wanted else 0.0,
            "prediction_accuracy": stats.predicted_right / ahead if ahead else 0.0,
            "ahead_reads": stats.ahead_reads, "evictions": stats.evictions,
            "read_bytes": stats.bytes_read, "wasted_bytes": stats.bytes_wasted, "read_errors": stats.read_errors,
            "stall_seconds": stats.stall_ns / 1e9, "disk_seconds": stats.disk_ns / 1e9,
            "direct_io": bool(st_reader_direct(self.reader)),
        }

    def uses(self, double[::1] uses not None):
        """How many tokens used each expert lately, into float64 [L * E]."""
        self.check_open()
        if uses.shape[0] != self.experts:
            raise ValueError("one use for every expert is needed")
        st_pager_get_uses(self.state.pager, &uses[0])

    def warm(self, const int32_t[::1] ids not None, const double[::1] uses not None):
        """Takes uses of an earlier run for those experts, the most used first, and starts reading them."""
        cdef int64_t i
        self.check_open()
        if ids.shape[0] != uses.shape[0]:
            raise ValueError("one use for every expert is needed")
        for i in range(ids.shape[0]):
            if not 0 <= ids[i] < self.experts:
                raise ValueError("no such expert")
        if ids.shape[0]:
            st_pager_warm(self.state.pager, &ids[0], &uses[0], ids.shape[0])

    cdef int check_open(self) except -1:
        if self.state.pager == NULL:
            raise ValueError("the model is closed")
        return 0
