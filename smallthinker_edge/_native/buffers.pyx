# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The buffers of the forward pass: what they are, how large, and one set of them. plan.py counts, engine.pyx owns."""
cimport cython
from libc.math cimport cos, pow, sin
from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport calloc, free

from smallthinker_edge._native.core cimport *
from smallthinker_edge._native.memory cimport Arena
from smallthinker_edge._native.weights cimport Shape

from smallthinker_edge._native.layouts import EXPERT_LAYOUTS
from smallthinker_edge.errors import OutOfMemoryError


def buffer_sizes(config, int64_t batch, int threads, *, bint predictor=True, bint q8=False, experts=("sparse",)):
    """Bytes of every buffer by its name, those of one thread as scratch.NAME, for a ModelConfig.

    The one list that both the engine and the memory plan take sizes from.

    Args:
        batch: most tokens computed together. threads: of the team.
        predictor: the LM head's is used where there is one. q8: keys and values are in Q8_0 somewhere.
        experts: the layouts of the layers' experts, see EXPERT_LAYOUTS of layouts.pyx.
    """
    cdef int64_t n = batch, d = config.d_model, f = config.d_ffn, hd = config.head_dim, E = config.n_experts
    cdef int64_t K = config.n_experts_used, heads = config.n_heads, kv_heads = config.n_kv_heads
    cdef int64_t width = max(d, heads * hd), G = heads // kv_heads, groups = (f + 31) // 32
    cdef int64_t d_padded = (d + 255) // 256 * 256, rope = n * (config.rope_dim // 2) * 8
    cdef int64_t scores = config.lm_head_predictor_size if predictor else 0
    cdef int64_t parts = (groups + ST_FFN_PART - 1) // ST_FFN_PART
    cdef int64_t output = sizeof(st_fired) if config.down_transposed else sizeof(st_active)
    two_ropes = config.rope_theta_swa != config.rope_theta and any(config.window_layout)
    return {
        "x": n * d_padded * 4,
        "hidden": n * d * 4,
        "xq": n * blocks(width) * sizeof(st_q8x4),
        "router_logits": n * E * 4,
        "chosen": n * K * 4,
        "weight": n * K * 4,
        "list_start": (E + 1) * 4,
        "list_slot": n * K * 4,
        "active_expert": E * 4,
        "order": E * 4,
        "q": n * heads * hd * 4,
        "attn": n * heads * hd * 4,
        "kv": 2 * n * kv_heads * hd * 4,
        "q8": 2 * n * heads * blocks(hd) * sizeof(st_q8x4) if q8 else 0,
        "rope": rope,
        "rope_window": rope if two_ropes else 0,
        "active": n * K * groups * output if "sparse" in experts else 0,
        "parts": min(n, FEW_TOKENS) * K * parts * d_padded * 4 if "sparse" in experts else 0,
        "h": n * K * f * 4 if "rows" in experts else 0,
        "hq": n * K * blocks(f) * sizeof(st_q8x4) if "tiles" in experts else 0,
        "z": n * scores * 4,
        "zq": n * blocks(scores) * sizeof(st_q8x4),
        "scratch.norm": threads * width * 4,
        "scratch.xq": threads * blocks(width) * sizeof(st_q8x4),
        "scratch.rows": threads * 2 * n * sizeof(void *),
        "scratch.gate": threads * n * 32 * 4,
        "scratch.neurons_of_unit": threads * 2 * NEURON_TOKENS * NEURON_UNIT * 4,
        "scratch.row": threads * max(width, f) * 4,
        "scratch.keys": threads * E * 4,
        "scratch.scores": threads * ST_ATTN_SCRATCH(ST_ATTN_TOKENS * G, hd) * 4,
        "scratch.head": threads * blocks(hd) * sizeof(st_q8x4),
        "scratch.queries": threads * 2 * G * sizeof(void *),
        "scratch.out": threads * n * 64 * 4,
        "scratch.selected": threads * n * 4,
    }


def partial_sizes(config, int64_t context, int threads):
    """Bytes of attention's unmerged chunks by their names, for the longest context in use."""
    cdef int64_t G = config.n_heads // config.n_kv_heads
    parts = max(threads * ST_ATTN_TOKENS, config.n_kv_heads) * chunks_of(context) * G
    return {"partial": parts * config.head_dim * 4, "partial_m": parts * 4, "partial_l": parts * 4}


cdef int64_t blocks(int64_t cols):
    """st_q8x4 of a quantised row."""
    return (cols + 127) // 128


cdef int64_t chunks_of(int64_t context):
    return (context + ST_ATTN_CHUNK - 1) // ST_ATTN_CHUNK + 1


@cython.no_gc_clear  # __dealloc__ gives the arenas back
cdef class ModelBuffers:
    """One set of buffers for `batch` tokens and `threads` threads of a ModelConfig.

    Those that only some models or caches need are taken by fit() when these are first met.
    """

    def __cinit__(self, config, int64_t batch, int threads, bint predictor):
        cdef Buffers *b = &self.buffers
        cdef Scratch *s
        cdef int i
        self.config, self.threads = config, threads
        self.arena = Arena()
        sizes = buffer_sizes(config, batch, threads, predictor=predictor, experts=())
        b.batch = batch
        b.nq = blocks(max(config.d_model, config.n_heads * config.head_dim))
        b.nq_h = blocks(config.d_ffn)
        b.nq_head, b.nq_z = blocks(config.head_dim), blocks(config.lm_head_predictor_size if predictor else 0)
        b.scratch = <Scratch *>calloc(threads, sizeof(Scratch))
        if b.scratch == NULL:
            raise OutOfMemoryError("cannot allocate the threads' buffers")
        b.x = <float *>self.arena.take(sizes["x"])
        b.hidden = <float *>self.arena.take(sizes["hidden"])
        b.xq = <st_q8x4 *>self.arena.take(sizes["xq"])
        b.router_logits = <float *>self.arena.take(sizes["router_logits"])
        b.chosen = <int32_t *>self.arena.take(sizes["chosen"])
        b.weight = <float *>self.arena.take(sizes["weight"])
        b.list_start = <int32_t *>self.arena.take(sizes["list_start"])
        b.list_slot = <int32_t *>self.arena.take(sizes["list_slot"])
        b.active_expert = <int32_t *>self.arena.take(sizes["active_expert"])
        b.order = <int32_t *>self.arena.take(sizes["order"])
        b.q = <float *>self.arena.take(sizes["q"])
        b.attn = <float *>self.arena.take(sizes["attn"])
        b.kv = <float *>self.arena.take(sizes["kv"])
        b.rope = b.rope_window = <float *>self.arena.take(sizes["rope"])
        if sizes["rope_window"]:
            b.rope_window = <float *>self.arena.take(sizes["rope_window"])
        if sizes["z"]:
            b.z = <float *>self.arena.take(sizes["z"])
            b.zq = <st_q8x4 *>self.arena.take(sizes["zq"])
        for i in range(threads):
            s = b.scratch + i
            s.norm = <float *>self.arena.take(sizes["scratch.norm"] // threads)
            s.xq = <st_q8x4 *>self.arena.take(sizes["scratch.xq"] // threads)
            s.rows = <const st_q8x4 **>self.arena.take(sizes["scratch.rows"] // threads)
            s.gate = <float *>self.arena.take(sizes["scratch.gate"] // threads)
            s.neurons_of_unit = <float *>self.arena.take(sizes["scratch.neurons_of_unit"] // threads)
            s.row = <float *>self.arena.take(sizes["scratch.row"] // threads)
            s.keys = <int32_t *>self.arena.take(sizes["scratch.keys"] // threads)
            s.scores = <float *>self.arena.take(sizes["scratch.scores"] // threads)
            s.head = <st_q8x4 *>self.arena.take(sizes["scratch.head"] // threads)
            s.queries = <const st_q8x4 **>self.arena.take(sizes["scratch.queries"] // threads)
            s.out = <float *>self.arena.take(sizes["scratch.out"] // threads)
            s.selected = <int32_t *>self.arena.take(sizes["scratch.selected"] // threads)

    def __dealloc__(self):
        self.give_back()

    cdef void give_back(self) noexcept:
        """Frees everything. Nothing may be computed any more."""
        free(self.buffers.scratch)
        self.buffers.scratch = NULL
        for arena in (self.arena, self.partials):
            if arena is not None:
                (<Arena>arena).give_back()

    @property
    def bytes(self):
        """Bytes taken."""
        return self.arena.bytes + (0 if self.partials is None else self.partials.bytes)

    cdef int64_t lacks(self, int64_t context, bint q8) except -1:
        """Bytes that fit() would take for a cache with this context, in Q8_0 or not."""
        cdef int64_t size = 0
        if q8 and self.buffers.q8 == NULL:
            size += buffer_sizes(self.config, self.buffers.batch, self.threads, q8=True)["q8"]
        if chunks_of(context) > self.buffers.max_chunks:
            size += sum(partial_sizes(self.config, context, self.threads).values())
            size -= 0 if self.partials is None else self.partials.bytes
        return size

    cdef int fit(self, int64_t context, bint q8, int expert_layouts) except -1:
        """Takes what this call needs beyond earlier ones; for attention, by the longest context seen."""
        cdef Buffers *b = &self.buffers
        cdef Arena arena
        cdef float *partial
        cdef float *m
        cdef float *sums
        if q8 and b.q8 == NULL:
            b.q8 = <st_q8x4 *>self.arena.take(buffer_sizes(self.config, b.batch, self.threads, q8=True)["q8"])
        self.fit_experts(expert_layouts)
        if chunks_of(context) <= b.max_chunks:
            return 0
        sizes = partial_sizes(self.config, context, self.threads)
        arena = Arena()
        partial = <float *>arena.take(sizes["partial"])
        m = <float *>arena.take(sizes["partial_m"])
        sums = <float *>arena.take(sizes["partial_l"])
        b.partial, b.partial_m, b.partial_l, b.max_chunks = partial, m, sums, chunks_of(context)
        self.partials = arena  # frees the old ones
        return 0

    cdef int fit_experts(self, int layouts) except -1:
        """What experts in these layouts (bits 1 << ST_EXPERT_...) need, where it is not there yet."""
        cdef Buffers *b = &self.buffers
        if layouts & ~self.expert_layouts == 0:
            return 0
        sizes = buffer_sizes(self.config, b.batch, self.threads, experts=EXPERT_LAYOUTS)
        if layouts >> ST_EXPERT_SPARSE & 1 and b.parts == NULL:
            if self.config.down_transposed:
                b.fired = <st_fired *>self.arena.take(sizes["active"])
            else:
                b.active = <st_active *>self.arena.take(sizes["active"])
            b.parts = <float *>self.arena.take(sizes["parts"])
        if layouts >> ST_EXPERT_ROWS & 1 and b.h == NULL:
            b.h = <float *>self.arena.take(sizes["h"])
        if layouts >> ST_EXPERT_TILES & 1 and b.hq == NULL:
            b.hq = <st_q8x4 *>self.arena.take(sizes["hq"])
        self.expert_layouts |= layouts
        return 0

    cdef int fill_rope(self, const Shape *shape, int64_t position, int64_t n) except -1:
        """The angles of n positions."""
        cdef Buffers *b = &self.buffers
        fill_angles(b.rope, self.config.rope_theta, shape.rope_half, position, n)
        if b.rope_window != b.rope:
            fill_angles(b.rope_window, self.config.rope_theta_swa, shape.rope_half, position, n)
        return 0


cdef void fill_angles(float *table, double theta, int64_t half, int64_t position, int64_t n) noexcept nogil:
    cdef int64_t t, i
    cdef double angle
    for t in range(n):
        for i in range(half):
            angle = (position + t) * pow(theta, -<double>i / half)
            table[2 * t * half + i] = <float>cos(angle)
            table[(2 * t + 1) * half + i] = <float>sin(angle)
