# cython: boundscheck=False, wraparound=False, cdivision=True
"""Times kernels where they run: in C, on a thread team, without Python in between.

Called by smallthinker_edge/measure. A new kernel is one `apply_` function and one line of APPLY. It checks no results:
that is the tests' work.
"""
from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

import numpy as np

from smallthinker_edge._native.core cimport *
from smallthinker_edge._native.kernels cimport down_bytes, down_view

from smallthinker_edge._native.kernels import need

from smallthinker_edge.errors import OutOfMemoryError

cdef extern from "smallthinker/bandwidth.h" nogil:
    enum:
        ST_READ_STEP
    uint64_t st_read_memory(const uint8_t *p, size_t bytes, int streams, size_t ahead)

READ_STEP = ST_READ_STEP


cdef double seconds_now() noexcept nogil:
    return st_nanoseconds() * 1e-9


cdef class Memory:
    """Bytes from the system, in huge pages where it has them, as the engine's weights are; a writable buffer."""
    cdef uint8_t *data
    cdef readonly Py_ssize_t size

    def __cinit__(self, Py_ssize_t size):
        self.data = <uint8_t *>st_memory_alloc(size)
        if self.data == NULL:
            raise OutOfMemoryError(f"cannot get {size} bytes from the system")
        self.size = size

    def __dealloc__(self):
        st_memory_free(self.data, self.size)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.data, self.size, 0, flags)


def allocate(Py_ssize_t size):
    """A uint8 array over Memory."""
    return np.frombuffer(Memory(size), np.uint8)


# What a kernel is applied to: `count` items of `stride` bytes, from item `first` on, round and round.
cdef struct Job:
    const st_kernels *k
    st_team *team
    void (*apply)(const Job *job, const uint8_t *item, int tid) noexcept nogil
    const uint8_t *data
    int64_t stride, items, first, count
    int64_t rows, cols, tokens
    int type, tiled           # of kernels over weights; its place
    const int32_t *index      # [n_index] rows of rows
    int64_t n_index
    const float *gate         # [rows] of ffn: what the gate's outputs are taken to be
    const st_active *active   # [rows / 32]
    const st_fired *fired     # the same, of down_transposed
    st_expert expert          # of ffn: where its parts stand in an item
    const st_q8x4 *const *xq  # [tokens] quantised rows of `cols` columns
    float *x                  # [rows of attention, or cols]
    float *out                # one of out_stride floats for every thread
    int64_t out_stride
    int streams
    int64_t ahead


cdef void apply_read(const Job *j, const uint8_t *item, int tid) noexcept nogil:
    j.out[tid * j.out_stride] = <float>st_read_memory(item, j.stride, j.streams, j.ahead)


cdef void apply_gemm(const Job *j, const uint8_t *item, int tid) noexcept nogil:
    j.k.gemm[j.tiled](item, j.rows, j.cols // 32, 0, (j.rows + 15) // 16, j.xq, j.tokens, j.out + tid * j.out_stride,
                      j.rows)


cdef void apply_rows(const Job *j, const uint8_t *item, int tid) noexcept nogil:
    j.k.rows[j.tiled](item, st_row_bytes(j.type, j.cols), j.cols // 32, j.index, j.n_index, j.xq[0],
                      j.out + tid * j.out_stride)


cdef void apply_up(const Job *j, const uint8_t *item, int tid) noexcept nogil:
    """All groups for all tokens; every third neuron fires in each. By rows where the table has nothing better, as the
    forward pass does."""
    cdef int64_t g, i, t, n, stride = st_row_bytes(j.type, j.cols)
    cdef uint32_t fires[32]
    cdef int32_t index[32]
    cdef const uint8_t *w
    cdef float *up = j.out + tid * j.out_stride
    for i in range(32):
        fires[i] = <uint32_t>0x49249249 << i % 3
    if j.tokens < 32:
        for i in range(32):
            fires[i] &= (<uint32_t>1 << j.tokens) - 1
    for g in range(j.rows // 32):
        w = item + 32 * g * stride
        if j.k.up[j.tiled] != NULL:
            j.k.up[j.tiled](w, stride, j.cols // 32, j.xq, j.tokens, fires, up)
            continue
        for t in range(j.tokens):
            n = 0
            for i in range(32):
                index[n] = <int32_t>i
                n += fires[i] >> t & 1
            j.k.rows[j.tiled](w, stride, j.cols // 32, index, n, j.xq[t], up)


cdef void apply_down(const Job *j, const uint8_t *item, int tid) noexcept nogil:
    """A whole matrix [cols][rows]: rows are the neurons, as everywhere here."""
    cdef st_down_view view = down_view(item, j.type, False, j.cols, j.rows)
    cdef const st_active *active[ST_DOWN_TOKENS]
    cdef float weight[ST_DOWN_TOKENS]
    cdef float *y[ST_DOWN_TOKENS]
    cdef int64_t t
    for t in range(j.tokens):
        active[t], weight[t], y[t] = j.active, 1e-3, j.out + tid * j.out_stride + t * ((j.cols + 127) // 128 * 128)
    j.k.down[j.tiled](&view, j.cols, j.rows // 32, 0, (j.cols + ST_DOWN_CHUNK - 1) // ST_DOWN_CHUNK, active, weight,
                      j.tokens, y)


cdef void apply_down_transposed(const Job *j, const uint8_t *item, int tid) noexcept nogil:
    cdef st_down_view view = down_view(item, j.type, True, j.cols, j.rows)
    j.k.down_transposed[j.tiled](&view, j.cols, j.rows // 32, 0, (j.cols + ST_DOWN_CHUNK - 1) // ST_DOWN_CHUNK, j.fired,
                                 1e-3, j.out + tid * j.out_stride)


cdef void step_ffn(const st_kernels *k, const st_expert *expert, const uint8_t *blob, int64_t group, const float *gate,
                   const st_q8x4 *x, float *y, st_neurons *neurons, st_neurons **stage) noexcept nogil:
    """Sends a group of an expert's neurons into the FFN, as the forward pass does; blob NULL: none. Only the cost of
    the computed gate counts: its outputs are replaced by `gate`."""
    if blob != NULL:
        stage[0] = neurons
        neurons.gate = blob + group * expert.group_bytes
        neurons.up, neurons.up_stride = blob + expert.up_at, expert.stride
        neurons.down = st_expert_down(expert, blob)
        neurons.x, neurons.transposed, neurons.y, neurons.group = x, expert.transposed, y, group
    k.ffn(expert.tiled, expert.d // 32, stage)
    if blob != NULL:
        memcpy(neurons.g, gate + 32 * group, 32 * sizeof(float))
        st_neurons_choose(neurons)
    st_neurons_advance(stage)


cdef void apply_ffn(const Job *j, const uint8_t *item, int tid) noexcept nogil:
    """A whole expert of `rows` neurons for one token."""
    cdef st_neurons[4] neurons
    cdef st_neurons *stage[4]
    cdef int64_t g, _
    memset(stage, 0, sizeof(stage))
    for g in range(j.rows // 32):
        step_ffn(j.k, &j.expert, item, g, j.gate, j.xq[0], j.out + tid * j.out_stride, neurons + g % 4, stage)
    for _ in range(3):
        step_ffn(j.k, &j.expert, NULL, 0, NULL, j.xq[0], NULL, NULL, stage)


cdef void apply_attention(const Job *j, const uint8_t *item, int tid) noexcept nogil:
    """`rows` query heads of `cols` against `tokens` positions: keys, then values."""
    cdef const uint16_t *keys = <const uint16_t *>item
    cdef float *out = j.out + tid * j.out_stride
    cdef float *scores = out + j.rows * j.cols
    cdef float *m = scores + j.rows * ST_ATTN_CHUNK
    j.k.attention(j.x, j.rows, j.cols, keys, keys + j.tokens * j.cols, j.tokens, 0.1, scores, out, m, m + j.rows)


cdef void apply_attention_many(const Job *j, const uint8_t *item, int tid) noexcept nogil:
    """The same for ST_ATTN_TOKENS tokens, which all see all positions."""
    cdef const uint16_t *keys = <const uint16_t *>item
    cdef int64_t rows = ST_ATTN_TOKENS * j.rows, i
    cdef float *out = j.out + tid * j.out_stride
    cdef float *m = out + rows * j.cols
    cdef int32_t first[ST_ATTN_TOKENS]
    cdef int32_t last[ST_ATTN_TOKENS]
    for i in range(ST_ATTN_TOKENS):
        first[i], last[i] = 0, <int32_t>j.tokens
    j.k.attention_many(j.x, j.rows * j.cols, ST_ATTN_TOKENS, j.rows, j.cols, keys, keys + j.tokens * j.cols, first,
                       last, 0.1, m + 2 * rows, out, m, m + rows)


cdef void apply_attention_q8(const Job *j, const uint8_t *item, int tid) noexcept nogil:
    """The same over a page in Q8_0; the queries and their rests are the first 2 * `rows` inputs."""
    cdef float *out = j.out + tid * j.out_stride
    cdef float *scores = out + j.rows * j.cols
    cdef float *m = scores + 2 * j.rows * ST_ATTN_CHUNK
    j.k.attention_q8(j.xq, j.rows, j.cols, item, item + st_kv_head_bytes(ST_Q8_0, j.cols), 0, j.tokens, 0.1, scores,
                     out, m, m + j.rows)


cdef void apply_quantize(const Job *j, const uint8_t *item, int tid) noexcept nogil:
    j.k.quantize(j.x, j.cols, <st_q8x4 *>(j.out + tid * j.out_stride))


cdef void apply_activate(const Job *j, const uint8_t *item, int tid) noexcept nogil:
    j.k.activate(j.x, j.x + 32, <st_active *>(j.out + tid * j.out_stride))


cdef void apply_rmsnorm(const Job *j, const uint8_t *item, int tid) noexcept nogil:
    j.k.rmsnorm(j.x, j.x, j.cols, 1e-6, j.out + tid * j.out_stride)


cdef void apply_dot(const Job *j, const uint8_t *item, int tid) noexcept nogil:
    j.out[tid * j.out_stride] = j.k.dot(<const float *>item, j.x, j.cols)


cdef void apply_axpy(const Job *j, const uint8_t *item, int tid) noexcept nogil:
    j.k.axpy(1e-6, j.x, j.out + tid * j.out_stride, j.cols)


cdef void apply_to_f16(const Job *j, const uint8_t *item, int tid) noexcept nogil:
    j.k.to_f16(j.x, <uint16_t *>(j.out + tid * j.out_stride), j.cols)


cdef void apply_from_f16(const Job *j, const uint8_t *item, int tid) noexcept nogil:
    j.k.from_f16(<const uint16_t *>item, j.out + tid * j.out_stride, j.cols)


cdef void apply_rope(const Job *j, const uint8_t *item, int tid) noexcept nogil:
    """One head of `cols`; the angles do not matter."""
    j.k.rope(j.out + tid * j.out_stride, j.x, j.x + j.cols // 2, j.cols // 2)


cdef void apply_top_k(const Job *j, const uint8_t *item, int tid) noexcept nogil:
    """The largest `tokens` of `cols`."""
    cdef int32_t *keys = <int32_t *>(j.out + tid * j.out_stride)
    j.k.top_k(j.x, j.cols, j.tokens, keys, keys + j.cols)


ctypedef void (*apply_t)(const Job *job, const uint8_t *item, int tid) noexcept nogil

cdef enum:
    NO_TYPE
    TILED    # an array by tiled type, all there
    SPARSE   # those of the sparse types; ffn: an expert whose three are of one
    TRANSPOSED  # those that Down transposed has

cdef struct Named:
    const char *name
    apply_t apply
    int types

cdef Named[19] APPLY
APPLY[0] = Named("read", apply_read, NO_TYPE)
APPLY[1] = Named("gemm", apply_gemm, TILED)
APPLY[2] = Named("rows", apply_rows, SPARSE)
APPLY[3] = Named("ffn", apply_ffn, SPARSE)
APPLY[4] = Named("down", apply_down, SPARSE)
APPLY[5] = Named("down_transposed", apply_down_transposed, TRANSPOSED)
APPLY[6] = Named("attention", apply_attention, NO_TYPE)
APPLY[7] = Named("attention_q8", apply_attention_q8, NO_TYPE)
APPLY[8] = Named("quantize", apply_quantize, NO_TYPE)
APPLY[9] = Named("activate", apply_activate, NO_TYPE)
APPLY[10] = Named("rmsnorm", apply_rmsnorm, NO_TYPE)
APPLY[11] = Named("dot", apply_dot, NO_TYPE)
APPLY[12] = Named("axpy", apply_axpy, NO_TYPE)
APPLY[13] = Named("to_f16", apply_to_f16, NO_TYPE)
APPLY[14] = Named("from_f16", apply_from_f16, NO_TYPE)
APPLY[15] = Named("rope", apply_rope, NO_TYPE)
APPLY[16] = Named("top_k", apply_top_k, NO_TYPE)
APPLY[17] = Named("up", apply_up, SPARSE)
APPLY[18] = Named("attention_many", apply_attention_many, NO_TYPE)


def _named_kernels():
    """What can be timed: name -> (its place in APPLY, family, number of its type or -1); gemm_q4_0 is gemm of Q4_0."""
    cdef int i, number
    result = {}
    for i in range(<int>(sizeof(APPLY) // sizeof(Named))):
        family = APPLY[i].name.decode()
        if APPLY[i].types == NO_TYPE:
            result[family] = (i, family, -1)
            continue
        for number in range(ST_TYPE_NUMBERS):
            if (st_tiled(number) >= 0 if APPLY[i].types == TILED
                    else st_down_scale_bytes(number, APPLY[i].types == TRANSPOSED, 32) > 0):
                result[f"{family}_{st_type_of(number).name.decode().lower()}"] = (i, family, number)
    return result


KERNELS = _named_kernels()


cdef void run_job(void *arg, int tid) noexcept nogil:
    cdef const Job *j = <const Job *>arg
    cdef int64_t i = tid
    while i < j.count:
        j.apply(j, j.data + (j.first + i) % j.items * j.stride, tid)
        i += st_team_size(j.team)


# A token's FFN: `used` experts after one another in the pool, from expert `first` on.
cdef struct Ffn:
    const st_kernels *k
    st_team *team
    const uint8_t *data
    st_expert expert          # where not whole; else gate, up and down follow one another in Tile16, as large as rows
    int64_t experts, first, tokens, used, d, f, parts
    const float *gate         # [f] what the gate is taken to be, so that the share of active neurons is the wanted one
    const st_q8x4 *x
    float *hidden             # whole: [used][f]; else [used][parts][d]
    float *y                  # [d]
    uint8_t *scratch          # per thread: scratch_stride bytes
    int64_t scratch_stride


cdef const uint8_t *expert_at(Ffn *t, int64_t token, int64_t slot) noexcept nogil:
    return t.data + (t.first + token * t.used + slot) % t.experts * t.expert.bytes


cdef void dense_neurons(Ffn *t, const uint8_t *expert, int64_t slot, int64_t group, float *out) noexcept nogil:
    """Gate and up of 32 neurons, both whole."""
    cdef int64_t i
    cdef st_gemm *gemm = t.k.gemm[t.expert.tiled[0]]
    gemm(expert, t.f, t.d // 32, 2 * group, 2 * group + 2, &t.x, 1, out, 32)
    gemm(expert + t.expert.up_at, t.f, t.d // 32, 2 * group, 2 * group + 2, &t.x, 1, out + 32, 32)
    for i in range(32):
        t.hidden[slot * t.f + 32 * group + i] = max(t.gate[32 * group + i], <float>0) * out[32 + i]


cdef void dense_down(Ffn *t, int64_t token, int64_t chunk, const st_q8x4 *hidden, float *out) noexcept nogil:
    """128 outputs of every expert."""
    cdef int64_t slot, i, tile = chunk * (ST_DOWN_CHUNK // ST_TILE_ROWS)
    cdef const uint8_t *w
    for slot in range(t.used):
        w = expert_at(t, token, slot) + t.expert.down_at
        row = hidden + slot * ((t.f + 127) // 128)
        t.k.gemm[t.expert.tiled[2]](w, t.d, t.f // 32, tile, tile + ST_DOWN_CHUNK // ST_TILE_ROWS, &row, 1, out,
                                    ST_DOWN_CHUNK)
        for i in range(ST_DOWN_CHUNK):
            t.y[chunk * ST_DOWN_CHUNK + i] += out[i]


cdef void run_dense(void *arg, int tid) noexcept nogil:
    cdef Ffn *t = <Ffn *>arg
    cdef float *out = <float *>(t.scratch + tid * t.scratch_stride)
    cdef st_q8x4 *hidden = <st_q8x4 *>(t.scratch + tid * t.scratch_stride + 1024)
    cdef int64_t token, u, slot, groups = t.f // 32
    for token in range(t.tokens):
        while True:
            u = st_team_next(t.team, tid)
            if u < 0:
                break
            dense_neurons(t, expert_at(t, token, u // groups), u // groups, u % groups, out)
        st_team_barrier(t.team, t.d // ST_DOWN_CHUNK)
        for slot in range(t.used):
            t.k.quantize(t.hidden + slot * t.f, t.f, hidden + slot * ((t.f + 127) // 128))
        while True:
            u = st_team_next(t.team, tid)
            if u < 0:
                break
            dense_down(t, token, u, hidden, out)
        st_team_barrier(t.team, t.used * groups)


cdef void run_sparse(void *arg, int tid) noexcept nogil:
    """As the forward pass: parts of experts from gate to down, then their sum."""
    cdef Ffn *t = <Ffn *>arg
    cdef int64_t token, u, i, g, _, steps, groups = t.f // 32
    cdef st_neurons *neurons = <st_neurons *>(t.scratch + tid * t.scratch_stride)
    cdef st_neurons *stage[4]
    cdef float *y
    for token in range(t.tokens):
        memset(stage, 0, sizeof(stage))
        steps = 0
        while True:
            u = st_team_next(t.team, tid)
            if u < 0:
                break
            y = t.hidden + u * t.d
            memset(y, 0, t.d * sizeof(float))
            for g in range(u % t.parts * ST_FFN_PART, min((u % t.parts + 1) * ST_FFN_PART, groups)):
                step_ffn(t.k, &t.expert, expert_at(t, token, u // t.parts), g, t.gate, t.x, y, neurons + steps % 4,
                         stage)
                steps += 1
        for _ in range(3):
            step_ffn(t.k, &t.expert, NULL, 0, NULL, t.x, NULL, NULL, stage)
        st_team_barrier(t.team, t.d // ST_DOWN_CHUNK)
        while True:
            u = st_team_next(t.team, tid)
            if u < 0:
                break
            for i in range(t.used * t.parts):
                t.k.axpy(0.25, t.hidden + i * t.d + u * ST_DOWN_CHUNK, t.y + u * ST_DOWN_CHUNK, ST_DOWN_CHUNK)
        st_team_barrier(t.team, t.used * t.parts)


cdef int64_t expert_bytes(int type, int64_t d, int64_t f, bint transposed) except -1:
    """Of an expert whose neurons are skipped."""
    cdef st_expert expert
    need(st_expert_init(&expert, d, f, type, type, type, transposed, True) == 0)
    return expert.bytes


cdef class Timer:
    """Times kernels of one table on a team of `threads`. One thread uses it at a time.

    Raises ValueError for a table that this CPU cannot run, MemoryError where threads or memory are missing.
    """
    cdef const st_kernels *k
    cdef st_team *team
    cdef readonly int threads

    def __cinit__(self, str table, int threads):
        encoded = table.encode()
        self.k = st_cpu_table(encoded)
        if self.k == NULL or threads < 1:
            raise ValueError(f"no kernel table {table!r} on this CPU, or no threads")
        self.threads = threads
        self.team = st_team_create(threads, NULL)
        if self.team == NULL:
            raise OutOfMemoryError("cannot start the threads")

    def __dealloc__(self):
        st_team_destroy(self.team)

    @staticmethod
    def kernels():
        """Names of what run() can time."""
        return list(KERNELS)

    def run(self, str kernel, const uint8_t[::1] data, int64_t stride, int64_t first, int64_t count, *, int64_t rows=0,
            int64_t cols=0, int64_t tokens=1, index=None, active=None, bint transposed=False, int streams=1,
            int64_t ahead=0):
        """Applies a kernel to `count` items of `data`, `stride` bytes each, round and round from item `first` on.

        Args:
            kernel: one of kernels(). The threads take items in turns.
            data: 64-byte aligned, followed by memory that may be prefetched (allocate()).
            rows, cols, tokens: of a matrix kernel: its shape and how many inputs it is multiplied with; of attention:
                query heads (in attention_many of each of ST_ATTN_TOKENS tokens), their size and positions; of the
                others only cols counts, their length.
            index: int32, rows that rows_* computes, or neurons of ffn_* that fire. active: [rows / 32] of dtype ACTIVE
                for down_*, FIRED for down_transposed_*. transposed: the down of ffn_* is.
            streams, ahead: of "read", see bandwidth.h; stride must be a multiple of streams * READ_STEP.

        Returns seconds. Raises ValueError where sizes do not fit.
        """
        cdef Job job
        cdef const int32_t[::1] chosen = np.zeros(1, np.int32) if index is None else index
        need(kernel in KERNELS)
        place, family, type_ = KERNELS[kernel]
        cdef int64_t a_bytes = sizeof(st_fired) if family == "down_transposed" else sizeof(st_active)
        cdef const uint8_t[::1] a = np.zeros((rows // 32 + 1) * a_bytes, np.uint8) if active is None else \
            active.view(np.uint8)
        cdef int64_t i, q_bytes = (cols + 127) // 128 * <int64_t>sizeof(st_q8x4)
        cdef int64_t queries = {"attention": 1, "attention_many": ST_ATTN_TOKENS}.get(kernel, 0) * rows
        cdef int64_t width = max(cols, 64 + queries * cols)
        cdef double started
        job.apply, job.type, job.tiled = APPLY[<int>place].apply, type_, st_tiled(type_)
        need(stride > 0 and count > 0 and tokens > 0 and 0 <= first)
        need(self.item_bytes(kernel, rows, cols, tokens, transposed) <= stride <= data.shape[0])
        need(a.shape[0] >= rows // 32 * a_bytes and streams >= 1 and ahead >= 0)
        need(kernel != "read" or stride % (streams * ST_READ_STEP) == 0)
        need(family != "ffn" or (rows % 32 == 0 and cols % 128 == 0))
        need(kernel != "top_k" or tokens <= cols)
        need(family != "down" or tokens <= ST_DOWN_TOKENS)
        need(queries == 0 or tokens <= ST_ATTN_CHUNK)
        need(kernel != "attention_q8" or (2 * rows <= tokens <= ST_ATTN_CHUNK and cols % 32 == 0))
        picks = family in ("rows", "ffn")
        need(family != "up" or (tokens <= ST_UP_TOKENS and rows % 32 == 0))
        need(not np.any(np.asarray(chosen) < 0) and (not picks or np.all(np.asarray(chosen) < rows)))
        job.k, job.team, job.data, job.stride, job.items = self.k, self.team, &data[0], stride, data.shape[0] // stride
        job.first, job.count, job.rows, job.cols, job.tokens = first % job.items, count, rows, cols, tokens
        job.index, job.n_index, job.active = &chosen[0], chosen.shape[0], <const st_active *>&a[0]
        job.fired = <const st_fired *>&a[0]
        need(family != "ffn" or st_expert_init(&job.expert, cols, rows, type_, type_, type_, transposed, True) == 0)
        job.streams, job.ahead = streams, ahead
        fires = np.full(rows + 1, -1, np.float32)
        if picks:
            fires[chosen] = 1
        cdef const float[::1] gate = fires
        job.gate = &gate[0]
        cdef float[::1] x = np.random.default_rng(0).standard_normal(width).astype(np.float32)
        job.x = &x[0]
        inputs = Memory(tokens * q_bytes + 64)
        cdef uint8_t[::1] quantized = inputs
        pointers = np.empty(tokens, np.uintp)
        cdef size_t[::1] p = pointers
        for i in range(tokens):
            p[i] = <size_t>&quantized[i * q_bytes]
            self.k.quantize(&x[0], cols // 32 * 32, <st_q8x4 *>&quantized[i * q_bytes])
            if kernel == "attention_q8" and rows <= i < 2 * rows:
                st_kv_query_rest(&x[0], <st_q8x4 *>&quantized[0], cols, <st_q8x4 *>&quantized[i * q_bytes])
        job.xq = <const st_q8x4 *const *>&p[0]
        job.out_stride = (rows * max(tokens, 1) + rows * (cols + 2 * ST_ATTN_CHUNK + 2) * kernel.startswith("attention")
                          + (queries * (cols + 2) + ST_ATTN_SCRATCH(queries, cols)) * (kernel == "attention_many")
                          + tokens * (cols + ST_DOWN_CHUNK) * (family == "down") + 2 * cols + chosen.shape[0]
                          + 1024) // 64 * 64
        outputs = Memory(self.threads * job.out_stride * 4)
        cdef uint8_t[::1] out = outputs
        job.out = <float *>&out[0]
        with nogil:
            started = seconds_now()
            st_team_run(self.team, run_job, &job, 0)
            started = seconds_now() - started
        return started

    @staticmethod
    def line_bytes(str kernel, int64_t cols):
        """Bytes of a neuron's line of down, of a kernel over these."""
        return st_down_line_bytes(KERNELS[kernel][2], cols)

    @staticmethod
    def item_bytes(str kernel, int64_t rows, int64_t cols, int64_t tokens=1, bint transposed=False):
        """Bytes of one item that a kernel reads, 0 where it reads none."""
        _, family, type_ = KERNELS[kernel]
        if family == "gemm":
            return st_tile16_bytes(type_, rows, cols)
        if family in ("rows", "up"):
            return rows * st_row_bytes(type_, cols)
        if family == "ffn":
            return expert_bytes(type_, cols, rows, transposed)
        if family in ("down", "down_transposed"):
            return down_bytes(type_, family == "down_transposed", cols, rows)
        if kernel == "attention_q8":
            return 2 * st_kv_head_bytes(ST_Q8_0, cols)
        if kernel in ("attention", "attention_many"):
            return 2 * 2 * tokens * cols
        return {"dot": 4 * cols, "from_f16": 2 * cols}.get(kernel, 0)

    def ffn(self, const uint8_t[::1] data, int64_t d, int64_t f, int64_t used, const float[::1] gate, *, bint whole,
            int64_t first, int64_t tokens, bint transposed=False):
        """The FFN of `tokens` tokens, one after another, each with the next `used` experts of the pool `data`.

        Args:
            d, f: multiples of 128 and of 32. gate: [f], what the gate's outputs are taken to be, so that the share of
                positive ones is the wanted one; the product is computed all the same.
            whole: gate, up and down as dense matrices (Tile16) instead. transposed: down is, where not whole.

        Returns seconds. Raises ValueError where sizes do not fit.
        """
        cdef Ffn t
        cdef double started
        need(d % 128 == 0 and f % 32 == 0 and d > 0 and f > 0 and used > 0 and tokens > 0 and first >= 0)
        need(gate.shape[0] == f)
        need(st_expert_init(&t.expert, d, f, ST_Q4_0, ST_Q4_0, ST_Q4_0, transposed, True) == 0)
        t.experts = data.shape[0] // <int64_t>t.expert.bytes
        need(t.experts >= used)
        t.k, t.team, t.data, t.first, t.tokens, t.used = self.k, self.team, &data[0], first % t.experts, tokens, used
        t.d, t.f, t.gate, t.parts = d, f, &gate[0], (f // 32 + ST_FFN_PART - 1) // ST_FFN_PART
        t.scratch_stride = (1024 + used * ((f + 127) // 128) * <int64_t>sizeof(st_q8x4) + 4096) // 64 * 64
        cdef int64_t q_bytes = (d + 127) // 128 * <int64_t>sizeof(st_q8x4), hidden = used * max(f, t.parts * d)
        memory = Memory(q_bytes + hidden * 4 + d * 4 + self.threads * t.scratch_stride + 512)
        cdef uint8_t[::1] bytes = memory
        cdef float[::1] x = np.random.default_rng(0).standard_normal(d).astype(np.float32)
        t.x = <const st_q8x4 *>&bytes[0]
        self.k.quantize(&x[0], d, <st_q8x4 *>&bytes[0])
        t.hidden = <float *>&bytes[q_bytes]
        t.y = t.hidden + hidden
        t.scratch = &bytes[(q_bytes + hidden * 4 + d * 4 + 63) // 64 * 64]
        with nogil:
            started = seconds_now()
            if whole:
                st_team_run(self.team, run_dense, &t, used * (f // 32))
            else:
                st_team_run(self.team, run_sparse, &t, used * t.parts)
            started = seconds_now() - started
        return started
