# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The forward pass: weights in the packed layouts, KV caches, and one decode call over the kernel table.

Called by opening.py (weights) and session.py (decode). It never opens files and never sees text. One Engine
serves one decode at a time (session.py holds the lock); a KVCache belongs to one session.
"""
cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport errno
from libc.math cimport INFINITY, cos, expf, pow, sin, sqrtf
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport getpid

import os
from array import array

import numpy as np

from smallthinker_edge._native.core cimport *

from smallthinker_edge._native.layouts import KV_TYPES
from smallthinker_edge.errors import DecodeCancelled, ExpertReadError, OpenedBeforeFork

include "forward.pxi"
include "attention.pxi"
include "experts.pxi"
include "kv_cache.pxi"
include "head.pxi"

# Measured in docs/performance.md, "Under a memory cap".
cdef enum:
    IO_THREADS = 1
    AHEAD_LAYERS = 2
    PIECE_BYTES = 1 << 20
    MOST_CPUS = 1024  # a cpu_set_t has no more
    ROWS_KEPT = 1024  # of an embedding that is read from the file: 6 MB of page cache for the 21B


cdef enum:
    SLAB_BYTES = 32 << 20


cdef class Arena:
    """System memory that lives as long as this object; the total handed out is in `bytes`.

    Small blocks are cut from slabs large enough for huge pages: on pages of 4 KiB, attention's matrices of about a
    megabyte each streamed a quarter slower.
    """
    cdef list blocks
    cdef readonly size_t bytes
    cdef uint8_t *slab
    cdef size_t left

    def __cinit__(self):
        self.blocks = []
        self.bytes = self.left = 0
        self.slab = NULL

    def __dealloc__(self):
        self.give_back()

    cdef void give_back(self) noexcept:
        """Gives all of it back."""
        cdef uintptr_t p
        for address, size in self.blocks:
            p = address
            st_memory_free(<void *>p, size)
        self.blocks.clear()
        self.bytes = self.left = 0

    cdef void *map(self, size_t size) except NULL:
        cdef void *p = st_memory_alloc(size)
        if p == NULL:
            raise MemoryError(f"cannot get {size} bytes from the system")
        self.blocks.append((<uintptr_t>p, size))
        return p

    cdef void *take_apart(self, size_t size) except NULL:
        """The same in pages of its own: page aligned, committed when first written."""
        self.bytes += size
        return self.map(size + 64)

    cdef void *take(self, size_t size) except NULL:
        """size bytes of zeroed memory, 64-byte aligned, that may be prefetched 8 KiB past the end."""
        cdef size_t rounded = (size + 127) // 64 * 64
        cdef uint8_t *p
        self.bytes += size
        if rounded > SLAB_BYTES // 8:
            return self.map(rounded)
        if rounded > self.left:
            self.slab = <uint8_t *>self.map(SLAB_BYTES)
            self.left = SLAB_BYTES
        p = self.slab
        self.slab += rounded
        self.left -= rounded
        return p


cdef const st_kernels *find_table(name) except NULL:
    cdef const st_kernels *table
    if name is None:
        return st_cpu_best()
    encoded = name.encode()
    table = st_cpu_table(encoded)
    if table == NULL:
        raise ValueError(f"kernel table {name!r} is unknown or this CPU lacks its instructions")
    return table


@cython.no_gc_clear  # the collector must not free the slots while the pager's threads read into them
cdef class Engine:
    """The weights of one model and a thread team.

    Args:
        config: ModelConfig.
        threads: size of the team, >= 1.
        kernels: name of a kernel table; None picks the best of this CPU.
        batch: most tokens computed together; does not change the results.
        exact: keep every matrix as GGUF rows and compute in float32 (slow; the tests' yardstick).
        cpus: None, or for each thread the CPU it stays on (the caller's: while it computes).

    Weights are set once, from the loader; afterwards decode() may be called, by one thread at a time. All methods that
    compute raise OpenedBeforeFork in the child of a fork, and ValueError after close().
    """
    cdef Call call
    cdef Arena arena
    cdef Arena partials
    cdef st_reader *reader
    cdef readonly int64_t slots     # in use now
    cdef int64_t own_slots, most_slots
    cdef size_t lent, kv_in_use     # bytes set aside for keys and values, and those of all KVBlocks
    cdef uint8_t *slot_memory
    cdef int64_t decode_ns          # spent in decode()
    cdef int64_t tail_ns            # of that, after the last layer's last expert was in memory
    cdef size_t slot_bytes
    cdef list keep
    cdef readonly int threads
    cdef readonly bint exact
    cdef readonly object config
    cdef public object forget_rows  # None, or what to call now and then where the embedding is read from a file
    cdef int64_t rows_read          # since it was called
    cdef int64_t head_rows, head_tokens  # computed by sparse heads
    cdef long process               # that has the threads
    cdef bint closed
    cdef bint computing
    cdef object cancel              # of the decode() under way
    cdef object interrupt           # the exception that stopped it
    cdef public object routing  # None, or a list that decode() adds to: bytes of int32 [n, L, K], the experts chosen

    def __cinit__(self, config, int threads, kernels=None, int64_t batch=512, bint exact=False, cpus=None):
        cdef Call *c = &self.call
        cdef Shape *s = &c.s
        cdef int[::1] place
        if threads < 1 or batch < 1:
            raise ValueError("threads and batch must be at least 1")
        self.config, self.threads, self.exact = config, threads, exact
        self.process = getpid()
        c.engine = <void *>self
        self.arena = Arena()
        self.keep = []
        c.kernels = find_table(kernels)
        s.n_layers, s.d, s.heads, s.kv_heads = config.n_layers, config.d_model, config.n_heads, config.n_kv_heads
        s.hd, s.experts, s.used, s.f = config.head_dim, config.n_experts, config.n_experts_used, config.d_ffn
        s.vocab, s.eps, s.batch = config.vocab_size, config.rms_eps, batch
        s.softmax, s.down_transposed = config.gating == "softmax", config.down_transposed
        s.d_padded = (s.d + 255) // 256 * 256
        s.groups, s.nb_d = (s.f + 31) // 32, s.d // 32
        s.ffn_parts = (s.groups + ST_FFN_PART - 1) // ST_FFN_PART
        # Two shares of the chunks for every thread: a unit reads long runs of a neuron's row, and one may be stolen.
        chunks = (s.d + ST_DOWN_CHUNK - 1) // ST_DOWN_CHUNK
        s.down_step = max(1, chunks // (2 * threads))
        s.down_units = (chunks + s.down_step - 1) // s.down_step
        c.rope_half = config.rope_dim // 2
        c.layers = <Layer *>calloc(s.n_layers, sizeof(Layer))
        c.experts = <const uint8_t **>calloc(s.n_layers * s.experts, sizeof(void *))
        c.scratch = <Scratch *>calloc(threads, sizeof(Scratch))
        if cpus is None:
            c.team = st_team_create(threads, NULL)
        else:
            places = array("i", cpus)
            if len(places) != threads or not all(0 <= cpu < MOST_CPUS for cpu in places):
                raise ValueError(f"one CPU in 0..{MOST_CPUS - 1} is needed for every thread")
            place = places
            c.team = st_team_create(threads, &place[0])
        c.team_size = threads
        if c.layers == NULL or c.experts == NULL or c.scratch == NULL or c.team == NULL:
            raise MemoryError("cannot allocate the engine or start its threads")
        self.set_layers()
        self.allocate_buffers()

    cdef int set_layers(self) except -1:
        cdef int64_t l, windows = 0
        for l in range(self.call.s.n_layers):
            self.call.layers[l].rope = self.config.rope_layout[l]
            self.call.layers[l].window = self.config.window if self.config.window_layout[l] else 0
            self.call.layers[l].kv_index = windows if self.call.layers[l].window else l - windows
            windows += self.call.layers[l].window > 0
        return 0

    cdef int allocate_buffers(self) except -1:
        cdef Call *c = &self.call
        cdef Shape *s = &c.s
        cdef int64_t n = s.batch, width = max(s.d, s.heads * s.hd), i
        c.nq = (width + 127) // 128
        c.x = <float *>self.arena.take(n * s.d_padded * 4)
        c.hidden = <float *>self.arena.take(n * s.d * 4)
        c.xq = <st_q8x4 *>self.arena.take(n * c.nq * sizeof(st_q8x4))
        c.logits_router = <float *>self.arena.take(n * s.experts * 4)
        c.chosen = <int32_t *>self.arena.take(n * s.used * 4)
        c.weight = <float *>self.arena.take(n * s.used * 4)
        c.list_start = <int32_t *>self.arena.take((s.experts + 1) * 4)
        c.list_slot = <int32_t *>self.arena.take(n * s.used * 4)
        c.active_expert = <int32_t *>self.arena.take(s.experts * 4)
        c.order = <int32_t *>self.arena.take(s.experts * 4)
        c.held = <int32_t *>self.arena.take(s.experts * 4)
        c.held_tokens = <int32_t *>self.arena.take(s.experts * 4)
        c.q = <float *>self.arena.take(n * s.heads * s.hd * 4)
        c.attn = <float *>self.arena.take(n * s.heads * s.hd * 4)
        c.kv = <float *>self.arena.take(2 * n * s.kv_heads * s.hd * 4)
        c.nq_head = (s.hd + 127) // 128
        c.q8 = <st_q8x4 *>self.arena.take(2 * n * s.heads * c.nq_head * sizeof(st_q8x4))
        c.rope = <float *>self.arena.take(n * c.rope_half * 8)
        c.rope_window = c.rope
        if self.config.rope_theta_swa != self.config.rope_theta and any(self.config.window_layout):
            c.rope_window = <float *>self.arena.take(n * c.rope_half * 8)
        if s.down_transposed:
            c.fired = <st_fired *>self.arena.take(n * s.used * s.groups * sizeof(st_fired))
        else:
            c.active = <st_active *>self.arena.take(n * s.used * s.groups * sizeof(st_active))
        c.parts = <float *>self.arena.take(part_bytes(self.config, n))
        c.h = <float *>self.arena.take(n * s.used * s.f * 4)
        for i in range(self.threads):
            c.scratch[i].norm = <float *>self.arena.take(width * 4)
            c.scratch[i].xq = <st_q8x4 *>self.arena.take(c.nq * sizeof(st_q8x4))
            c.scratch[i].rows = <const st_q8x4 **>self.arena.take(2 * n * sizeof(void *))
            c.scratch[i].gate = <float *>self.arena.take(n * 32 * 4)
            c.scratch[i].row = <float *>self.arena.take(max(width, s.f) * 4)
            c.scratch[i].keys = <int32_t *>self.arena.take(s.experts * 4)
            c.scratch[i].scores = <float *>self.arena.take((2 * (s.heads // s.kv_heads) * ST_ATTN_CHUNK + s.hd) * 4)
            c.scratch[i].head = <st_q8x4 *>self.arena.take(c.nq_head * sizeof(st_q8x4))
            c.scratch[i].queries = <const st_q8x4 **>self.arena.take(2 * (s.heads // s.kv_heads) * sizeof(void *))
            c.scratch[i].out = <float *>self.arena.take(n * 64 * 4)
            c.scratch[i].selected = <int32_t *>self.arena.take(n * 4)
        return 0

    def __dealloc__(self):
        self.close()

    def close(self):
        """Ends the threads, waits for reads in flight, and gives files and memory back. Safe to call twice.

        RuntimeError while decode() runs.
        """
        cdef Call *c = &self.call
        if self.computing and self.process == getpid():
            raise RuntimeError("the model cannot be closed while it is computing")
        self.closed = True
        with nogil:
            st_team_destroy(c.team)
            st_pager_destroy(c.pager)
            st_reader_close(self.reader)
            free(c.layers)
            free(c.experts)
            free(c.scratch)
            c.team, c.pager, self.reader, c.layers, c.experts, c.scratch = NULL, NULL, NULL, NULL, NULL, NULL
        if self.arena is not None:
            self.arena.give_back()
        if self.partials is not None:
            self.partials.give_back()
        self.keep, self.forget_rows = [], None

    def check_usable(self):
        """Raises what the class says where the engine is closed or belongs to another process."""
        if self.process != getpid():
            raise OpenedBeforeFork(
                "the model was opened before this process was forked; open it in the process that uses it")
        if self.closed:
            raise ValueError("the model is closed")

    @property
    def kernels(self):
        """Name of the kernel table in use."""
        return self.call.kernels.name.decode()

    @property
    def bytes(self):
        """Bytes of weights and buffers that the engine owns (views of the file not counted)."""
        return self.arena.bytes

    cdef int make_matrix(self, Matrix *m, int type, int64_t rows, int64_t cols, data, int64_t unit, bint view,
                         bint sparse=False) except -1:
        """Packs (or keeps as rows) one matrix. unit: rows one work unit takes, which must suit the tiles. sparse: few
        of its rows will be read at a time."""
        cdef const uint8_t[::1] src = data
        cdef uint8_t *dst
        cdef size_t size
        if <size_t>src.shape[0] != st_row_bytes(type, cols) * rows:
            raise ValueError("matrix bytes do not match its shape and type")
        m.type, m.tiled, m.rows, m.cols = type, st_tiled(type), rows, cols
        if sparse and not self.exact and not view and st_sparse(type):
            m.layout = SPARSE_ROWS
            dst = <uint8_t *>self.arena.take(src.shape[0])
            with nogil:
                st_pack_rows(type, &src[0], rows, cols, dst)
        elif not self.exact and not view and m.tiled >= 0 and unit % ST_TILE_ROWS == 0:
            m.layout = TILE
            size = st_tile16_bytes(type, rows, cols)
            dst = <uint8_t *>self.arena.take(size)
            with nogil:
                st_pack_tile16(type, &src[0], rows, cols, dst, 0, (rows + ST_TILE_ROWS - 1) // ST_TILE_ROWS)
        else:
            m.layout = ROWS
            if view:
                m.data = &src[0]
                self.keep.append(data)
                return 0
            dst = <uint8_t *>self.arena.take(src.shape[0])
            memcpy(dst, &src[0], src.shape[0])
        m.data = dst
        return 0

    cdef float *make_vector(self, values, int64_t n) except NULL:
        cdef const float[::1] src = values
        cdef float *dst
        if src.shape[0] != n:
            raise ValueError("vector has the wrong length")
        dst = <float *>self.arena.take(n * 4)
        memcpy(dst, &src[0], n * 4)
        return dst

    def set_embedding(self, int type, data, bint view):
        """token_embd: GGUF rows; view keeps reading them from `data` (one row a token) and copies nothing."""
        self.make_matrix(&self.call.embedding, type, self.call.s.vocab, self.call.s.d, data, ST_TILE_ROWS, view,
                         self.call.predictor_in.rows > 0)

    def set_predictor(self, int type, data):
        """lm_head_profiler: K rows of d, then V rows of K, in one run of GGUF rows (K from the config). To be called
        before set_embedding() and set_head(), which lay the head out for reading single rows then."""
        cdef Call *c = &self.call
        cdef int64_t K = self.config.lm_head_predictor_size
        cdef size_t size = st_row_bytes(type, c.s.d) * K
        self.make_matrix(&c.predictor_in, type, K, c.s.d, data[:size], ST_TILE_ROWS, False)
        self.make_matrix(&c.predictor_out, type, c.s.vocab, K, data[size:], ST_TILE_ROWS, False)
        c.nq_z = (K + 127) // 128
        c.z = <float *>self.arena.take(c.s.batch * K * 4)
        c.zq = <st_q8x4 *>self.arena.take(c.s.batch * c.nq_z * sizeof(st_q8x4))

    def set_head(self, norm, type=None, data=None):
        """output_norm, and output; without a matrix the embedding serves as the head (tied)."""
        self.call.output_norm = self.make_vector(norm, self.call.s.d)
        if data is None:
            self.call.head = self.call.embedding
        else:
            self.make_matrix(&self.call.head, type, self.call.s.vocab, self.call.s.d, data, ST_TILE_ROWS, False,
                             self.call.predictor_in.rows > 0)

    def set_layer(self, int64_t l, attn_norm, ffn_norm, router, q, k, v, o):
        """Dense weights of layer l: float32 vectors, router [E * d], and (type, bytes) of q, k, v and o."""
        cdef Shape *s = &self.call.s
        cdef Layer *layer = self.call.layers + self.check_layer(l)
        layer.attn_norm = self.make_vector(attn_norm, s.d)
        layer.ffn_norm = self.make_vector(ffn_norm, s.d)
        layer.router = self.make_vector(router, s.experts * s.d)
        self.make_matrix(&layer.q, q[0], s.heads * s.hd, s.d, q[1], s.hd, False)
        self.make_matrix(&layer.k, k[0], s.kv_heads * s.hd, s.d, k[1], s.hd, False)
        self.make_matrix(&layer.v, v[0], s.kv_heads * s.hd, s.d, v[1], s.hd, False)
        self.make_matrix(&layer.o, o[0], s.d, s.heads * s.hd, o[1], 64, False)

    def set_experts(self, int64_t l, gate, up, down):
        """The experts of layer l: (type, bytes) of the stacked gate, up and down tensors."""
        cdef Shape *s = &self.call.s
        cdef Layer *layer = self.call.layers + self.check_layer(l)
        cdef const uint8_t[::1] g = gate[1], u = up[1], d = down[1]
        cdef int64_t e, E = s.experts
        cdef st_expert *expert = &layer.expert
        cdef size_t size
        cdef uint8_t *blob
        self.set_expert(layer, (gate[0], up[0], down[0]))
        if (expert.rows[0] * E != <size_t>g.shape[0] or expert.rows[1] * E != <size_t>u.shape[0]
                or expert.rows[2] * E != <size_t>d.shape[0]):
            raise ValueError("expert bytes do not match their shape and type")
        size = (expert.bytes + 63) // 64 * 64
        blob = <uint8_t *>self.arena.take(size * E)
        with nogil:
            for e in range(E):
                self.call.experts[l * E + e] = blob
                st_expert_pack(expert, &g[e * expert.rows[0]], &u[e * expert.rows[1]], &d[e * expert.rows[2]], blob)
                blob += size

    cdef int set_expert(self, Layer *layer, types) except -1:
        """How the experts of a layer stand in their blobs, by the numbers of the types of gate, up and down."""
        cdef Shape *s = &self.call.s
        gate, up, down = types
        if st_expert_init(&layer.expert, s.d, s.f, gate, up, down, s.down_transposed, not self.exact) < 0:
            raise ValueError("experts of a type that cannot be read, or sizes that do not fit it")
        return 0

    def page_experts(self, path, offsets, size_t blob_bytes, int64_t slots, types, *, int io_threads=IO_THREADS,
                     policy=None, int64_t ahead=AHEAD_LAYERS, size_t piece=PIECE_BYTES, size_t lent=0,
                     sums=None, bint cached=False):
        """Takes the experts from a packed file instead of set_experts().

        Args:
            path: the packed file. offsets: int64 [L * E], where each expert's blob starts; multiples of 4096.
            blob_bytes: of one expert, a multiple of 4096. slots: how many are kept in memory, at least E.
            types: per layer, the type numbers of gate, up and down.
            io_threads: reads in flight at once. policy: an eviction policy ("frequency" or "lru"); None: the best.
            ahead: layers whose routers are asked before their turn, to read their experts ahead; 0 reads none ahead.
            piece: bytes after which such a read gives way to an expert that is wanted now.
            lent: bytes of the budget that are set aside for keys and values: more slots while these do not need it.
            sums: uint32 [L * E], the CRC-32 of every blob, compared when it is first read; None compares nothing.
            cached: read from the system's page cache, and drop nothing from it, where it holds the file.

        Raises OSError where the file cannot be opened, ValueError for an unknown policy or too few slots.
        """
        cdef const int64_t[::1] table = offsets
        cdef const uint32_t[::1] checksums = sums
        cdef st_pager_config config
        cdef int64_t l
        cdef int64_t experts = self.call.s.n_layers * self.call.s.experts
        if (slots < self.call.s.experts or blob_bytes % 4096 or table.shape[0] != experts
                or sums is not None and checksums.shape[0] != experts):
            raise ValueError("too few slots, or sizes that do not fit the model")
        if io_threads < 1 or ahead < 0 or piece < 4096 or piece % 4096:
            raise ValueError("io_threads, ahead or piece is out of range")
        for l in range(self.call.s.n_layers):
            self.set_expert(&self.call.layers[l], types[l])
        name = os.fsencode(path)
        self.reader = st_reader_open(name, cached)
        if self.reader == NULL:
            raise OSError(errno, os.strerror(errno), os.fspath(path))
        encoded = policy.encode() if policy is not None else b""
        config.read, config.source = st_reader_read, self.reader
        config.experts, config.offsets, config.bytes = table.shape[0], &table[0], blob_bytes
        self.own_slots, self.most_slots = slots, max(slots, min(experts, slots + <int64_t>(lent // blob_bytes)))
        self.lent, self.slot_bytes = lent, blob_bytes
        self.slot_memory = <uint8_t *>self.arena.take_apart(self.most_slots * blob_bytes)
        self.arena.bytes -= (self.most_slots - slots) * blob_bytes  # those are memory of the KV cache
        config.memory, config.slots, config.io_threads = self.slot_memory, self.most_slots, io_threads
        config.policy, config.piece, config.sums = NULL, piece, NULL
        if sums is not None:
            config.sums = &checksums[0]
        if policy is not None:
            config.policy = encoded
        self.call.ahead = min(ahead, self.call.s.n_layers - 1)
        self.call.ahead_logits = <float *>self.arena.take((self.call.ahead * self.call.s.experts + 1) * 4)
        self.call.ahead_ids = <int32_t *>self.arena.take((self.call.ahead + 1) * self.call.s.experts * 4)
        self.call.pager = st_pager_create(&config)
        if self.call.pager == NULL:
            raise ValueError(f"cannot start the pager: unknown policy {policy!r}, or no memory")
        self.slots = self.most_slots
        self.fit_slots()

    cdef int fit_slots(self) except -1:
        """Gives slots to the pager, or takes them back, as the memory set aside for keys and values is free or needed.

        Not while decode() runs.
        """
        cdef int64_t slots = self.own_slots
        if self.call.pager == NULL or self.most_slots == self.own_slots:
            return 0
        if self.kv_in_use + ST_MEMORY_GRAIN < self.lent:
            slots += <int64_t>((self.lent - self.kv_in_use - ST_MEMORY_GRAIN) // self.slot_bytes)
        slots = min(slots, self.most_slots)
        if slots == self.slots:
            return 0
        with nogil:
            st_pager_resize(self.call.pager, slots)
            if slots < self.slots:  # to the end: earlier calls kept the page that theirs began in
                st_memory_return(self.slot_memory + slots * self.slot_bytes,
                                 (self.most_slots - slots) * self.slot_bytes)
        self.slots = slots
        return 0

    def pager_stats(self):
        """Counts since the model was opened, or None without a pager. See docs/performance.md for what they mean."""
        cdef st_pager_stats stats
        if self.call.pager == NULL:
            return None
        st_pager_get_stats(self.call.pager, &stats)
        wanted, ahead = stats.hits + stats.ahead_hits + stats.misses, stats.predicted
        return {
            "slots": self.slots, "hits": stats.hits, "ahead_hits": stats.ahead_hits, "misses": stats.misses,
            "hit_rate": stats.hits / wanted if wanted else 0.0,
            "prediction_accuracy": stats.predicted_right / ahead if ahead else 0.0,
            "ahead_reads": stats.ahead_reads, "evictions": stats.evictions,
            "read_bytes": stats.bytes_read, "wasted_bytes": stats.bytes_wasted, "read_errors": stats.read_errors,
            "decode_seconds": self.decode_ns / 1e9, "stall_seconds": stats.stall_ns / 1e9,
            "disk_seconds": stats.disk_ns / 1e9, "tail_seconds": self.tail_ns / 1e9,
            "direct_io": bool(st_reader_direct(self.reader)),
        }

    def expert_uses(self, double[::1] uses not None):
        """How many tokens used each expert lately, into float64 [L * E]; False without a pager."""
        if self.call.pager == NULL or uses.shape[0] != self.call.s.n_layers * self.call.s.experts:
            return False
        st_pager_get_uses(self.call.pager, &uses[0])
        return True

    def warm(self, const int32_t[::1] ids not None, const double[::1] uses not None):
        """Takes uses of an earlier run for those experts, the most used first, and starts reading them."""
        cdef int64_t i
        if self.call.pager == NULL or ids.shape[0] == 0:
            return
        if ids.shape[0] != uses.shape[0]:
            raise ValueError("one use for every expert is needed")
        for i in range(ids.shape[0]):
            if not 0 <= ids[i] < self.call.s.n_layers * self.call.s.experts:
                raise ValueError("no such expert")
        st_pager_warm(self.call.pager, &ids[0], &uses[0], ids.shape[0])

    cdef int64_t check_layer(self, int64_t l) except -1:
        self.check_usable()
        if not 0 <= l < self.call.s.n_layers:
            raise ValueError(f"no layer {l}")
        return l

    cdef int fill_rope(self, float *table, double theta, int64_t position, int64_t n) except -1:
        cdef int64_t t, i, half = self.call.rope_half
        cdef double angle
        for t in range(n):
            for i in range(half):
                angle = (position + t) * pow(theta, -<double>i / half)
                table[2 * t * half + i] = <float>cos(angle)
                table[(2 * t + 1) * half + i] = <float>sin(angle)
        return 0

    def decode(self, KVCache cache not None, tokens, logits, head_threshold=None, cancel=None):
        """Runs at most `batch` tokens at the cache's position and advances it.

        Args:
            cache: made for this engine, with room for the tokens.
            tokens: int32 [n], 1 <= n <= cache.room(), each below the vocabulary's size.
            logits: float32 [n, V] for all tokens, [1, V] for the last one, or None; filled in place.
            head_threshold: with a predictor, only logits whose score is above it are computed, the others are minus
                infinity (but all, where no score is). None, or no predictor: all.

            cancel: anything with is_set(), or None; looked at about every 50 ms, as is Ctrl-C in the main thread.

        Raises ExpertReadError when experts cannot be read, DecodeCancelled when cancelled: the cache's position stays,
        and decoding may be retried.
        """
        cdef Call *c = &self.call
        cdef const int32_t[::1] ids = tokens
        cdef float[:, ::1] out
        cdef uint8_t[::1] row
        cdef int64_t n = ids.shape[0], i, started
        cdef bint stopped
        self.check_usable()
        if self.computing:
            raise RuntimeError("the model is computing already")
        if not 1 <= n <= cache.room() or cache.position + n > cache.context or cache.engine is not self:
            raise ValueError("too many tokens, or none, or another engine's cache")
        for i in range(n):
            if not 0 <= ids[i] < c.s.vocab:
                raise ValueError(f"token {ids[i]} is outside the vocabulary of {c.s.vocab}")
        c.logits = NULL
        c.all_logits = 0
        if logits is not None:
            out = logits
            if out.shape[1] != c.s.vocab or out.shape[0] not in (1, n):
                raise ValueError("logits has the wrong shape")
            c.logits = &out[0, 0]
            c.all_logits = out.shape[0] == n
        c.sparse_head = logits is not None and head_threshold is not None and c.predictor_in.rows > 0
        if c.sparse_head:
            c.head_threshold = head_threshold
        self.size_partials(cache.context)
        c.tokens, c.n, c.position = &ids[0], n, cache.position
        self.fit_slots()
        cache.prepare(n)
        c.full_page, c.ring_page = cache.full_page, cache.ring_page
        c.kv_full, c.kv_ring, c.ring = cache.full_at, cache.ring_at, cache.ring_blocks
        self.fill_rope(c.rope, self.config.rope_theta, cache.position, n)
        if c.rope_window != c.rope:
            self.fill_rope(c.rope_window, self.config.rope_theta_swa, cache.position, n)
        c.failed = 0
        c.look_at = nanoseconds() + LOOK_NS
        self.cancel, self.interrupt = cancel, None
        c.trace = NULL
        chosen = None
        if self.routing is not None:
            chosen = bytearray(n * c.s.n_layers * c.s.used * sizeof(int32_t))
            row = chosen
            c.trace = <int32_t *>&row[0]
        self.computing = True  # from here to where it is False again nothing raises
        with nogil:
            started = nanoseconds()
            if c.pager != NULL:
                st_pager_interrupt(c.pager, 0)
            st_team_run(c.team, forward, c, n)
            stopped = st_team_stopped(c.team)
            if c.pager != NULL:
                self.tail_ns += st_pager_since_arrival(c.pager)
                st_pager_release(c.pager, c.held, c.n_held)
                c.n_held = 0
                if c.failed or stopped:
                    st_pager_ahead(c.pager, NULL, 0)
            self.decode_ns += nanoseconds() - started
        cache.advance(&ids[0], n, not (c.failed or stopped))
        self.computing = False
        self.rows_read += n
        if not (c.failed or stopped):
            c.clock += n
            if c.sparse_head:
                self.count_head_rows(n if c.all_logits else 1)
            if chosen is not None:
                self.routing.append(bytes(chosen))
        if self.forget_rows is not None and self.rows_read >= ROWS_KEPT:
            self.rows_read = 0
            self.forget_rows()
        interrupt, self.cancel, self.interrupt = self.interrupt, None, None
        if stopped:
            raise interrupt
        if c.failed:
            raise ExpertReadError("expert weights in the model file cannot be read or are damaged; nothing was decoded")

    cdef void count_head_rows(self, int64_t n) noexcept:
        cdef int64_t t, selected
        for t in range(n):
            selected = selected_rows(&self.call, t)
            self.head_rows += selected if selected else self.call.s.vocab
        self.head_tokens += n

    @property
    def head_share(self):
        """Share of the head's rows that decode() with a threshold has computed so far; None where it never did."""
        return self.head_rows / (<double>self.head_tokens * self.call.s.vocab) if self.head_tokens else None

    def final_states(self, float[:, ::1] out not None):
        """What the head was applied to in the last decode() of n tokens: float32 [n, d], filled in place."""
        cdef Call *c = &self.call
        cdef int64_t t
        self.check_usable()
        if out.shape[0] != c.n or out.shape[1] != c.s.d:
            raise ValueError("out has the wrong shape")
        for t in range(c.n):
            c.kernels.rmsnorm(c.x + t * c.s.d_padded, c.output_norm, c.s.d, c.s.eps, &out[t, 0])

    cdef int size_partials(self, int64_t context) except -1:
        """Room for the unmerged attention chunks of the longest context seen."""
        cdef Call *c = &self.call
        cdef int64_t chunks = (context + ST_ATTN_CHUNK - 1) // ST_ATTN_CHUNK + 1, parts
        if chunks <= c.max_chunks:
            return 0
        parts = max(<int64_t>self.threads, c.s.kv_heads) * chunks * (c.s.heads // c.s.kv_heads)
        cdef Arena arena = Arena()
        cdef float *partial = <float *>arena.take(parts * c.s.hd * 4)
        cdef float *m = <float *>arena.take(parts * 4)
        cdef float *sums = <float *>arena.take(parts * 4)
        c.partial, c.partial_m, c.partial_l, c.max_chunks = partial, m, sums, chunks
        self.partials = arena  # frees the old ones
        return 0
