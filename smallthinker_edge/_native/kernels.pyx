# cython: boundscheck=False, wraparound=False, cdivision=True
"""The kernel tables and the layouts of matrices, one thin method each, for tests and measuring.

Never called by the forward pass; doctor.py takes the tables' names from here. Buffers are the caller's NumPy arrays, so
that a test can put guard zones around them; only their sizes are checked.
"""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

import numpy as np

from smallthinker_edge._native.core cimport *

Q8X4_BYTES = sizeof(st_q8x4)
ACTIVE_BYTES = sizeof(st_active)
FFN_PART = ST_FFN_PART  # groups of 32 neurons whose down is summed before it is weighted
ACTIVE = np.dtype([("h", "i1", 32), ("index", "u1", 32), ("corr", "i4"), ("corr_low", "i4"), ("low", "i4"),
                   ("high", "i4"), ("quads", "i4"), ("scale", "f4"), ("count", "i4")])
FIRED = np.dtype([("h", "f4", 32), ("index", "u1", 32), ("quads", "i4")])


def tables():
    """Names of the kernel tables that this CPU can run, best first; the last is "ref"."""
    cdef const char *const *names = st_cpu_tables()
    cdef int i = 0
    result = []
    while names[i] != NULL:
        if st_cpu_supports(names[i]):
            result.append(names[i].decode())
        i += 1
    return result


def need(condition):
    """Raises ValueError where a test or benchmark hands over a buffer that is too small."""
    if not condition:
        raise ValueError("a buffer is too small for the sizes given")


def kv_head_bytes(int64_t hd):
    """Bytes of the keys, or of the values, of one KV head in a Q8_0 page."""
    return st_kv_head_bytes(ST_Q8_0, hd)


def query_rest(const float[::1] x, const uint8_t[::1] q):
    """What is left of x by its quantised form q, as attention_q8 takes it: uint8, as long as q."""
    need(x.shape[0] % 32 == 0 and q.shape[0] >= (x.shape[0] + 127) // 128 * <int64_t>sizeof(st_q8x4))
    out = np.zeros(q.shape[0], np.uint8)
    cdef uint8_t[::1] rest = out
    st_kv_query_rest(&x[0], <const st_q8x4 *>&q[0], x.shape[0], <st_q8x4 *>&rest[0])
    return out


def pack_tile16(int type, const uint8_t[::1] src, int64_t rows, int64_t cols):
    """GGUF rows to Tile16 bytes (layout.h)."""
    need(src.shape[0] == rows * <int64_t>st_row_bytes(type, cols))
    out = np.empty(st_tile16_bytes(type, rows, cols), np.uint8)
    cdef uint8_t[::1] dst = out
    st_pack_tile16(type, &src[0], rows, cols, &dst[0], 0, (rows + 15) // 16)
    return out


def unpack_tile16(int type, const uint8_t[::1] src, int64_t rows, int64_t cols):
    """Tile16 bytes back to GGUF rows."""
    need(src.shape[0] == <int64_t>st_tile16_bytes(type, rows, cols))
    out = np.empty(rows * st_row_bytes(type, cols), np.uint8)
    cdef uint8_t[::1] dst = out
    st_unpack_tile16(type, &src[0], rows, cols, &dst[0])
    return out


def dequantize(int type, const uint8_t[::1] row, int64_t cols):
    """One GGUF row of a type that can be read, as floats."""
    need(0 < row.shape[0] == <int64_t>st_row_bytes(type, cols))
    out = np.empty(cols, np.float32)
    cdef float[::1] dst = out
    st_dequantize_row(type, &row[0], cols, &dst[0])
    return out


def pack_rows(int type, const uint8_t[::1] src, int64_t rows, int64_t cols, bint back=False):
    """GGUF rows of a sparse type to the Rows layout, or back."""
    need(st_sparse(type) and 0 < src.shape[0] == rows * <int64_t>st_row_bytes(type, cols))
    out = np.empty(src.shape[0], np.uint8)
    cdef uint8_t[::1] dst = out
    if back:
        st_unpack_rows(type, &src[0], src.shape[0] // rows, rows, cols, &dst[0])
    else:
        st_pack_rows(type, &src[0], rows, cols, &dst[0], src.shape[0] // rows)
    return out


def pack_down(int type, const uint8_t[::1] src, int64_t d, int64_t f, bint transposed=False):
    """GGUF rows [d][f] to the Down layout; transposed: rows [f][d] to Down transposed."""
    cdef int64_t size = f * <int64_t>st_row_bytes(type, d) if transposed else d * <int64_t>st_row_bytes(type, f)
    need(src.shape[0] == size and down_bytes(type, transposed, d, f) > 0)
    out = np.empty(down_bytes(type, transposed, d, f), np.uint8)
    cdef uint8_t[::1] dst = out
    cdef st_down_view view = down_view(&dst[0], type, transposed, d, f)
    st_pack_down(type, transposed, &src[0], d, f, &dst[0] + (view.lines - view.scales), &dst[0], &view)
    return out


def unpack_down(int type, const uint8_t[::1] src, int64_t d, int64_t f, bint transposed=False):
    """The Down layout, or Down transposed, back to GGUF rows."""
    need(src.shape[0] == down_bytes(type, transposed, d, f) > 0)
    out = np.empty(f * st_row_bytes(type, d) if transposed else d * st_row_bytes(type, f), np.uint8)
    cdef uint8_t[::1] dst = out
    cdef st_down_view view = down_view(&src[0], type, transposed, d, f)
    st_unpack_down(type, transposed, &view, d, f, &dst[0])
    return out


def multiply(const float[::1] g, const float[::1] up):
    """Gate and up of 32 neurons -> one entry of dtype FIRED, as the FFN makes it for a transposed down."""
    cdef st_neurons n
    cdef float[32] value
    cdef int64_t i
    need(g.shape[0] == 32 and up.shape[0] == 32)
    n.group = 0
    memcpy(n.g, &g[0], sizeof(n.g))
    st_neurons_choose(&n)
    for i in range(n.fired):
        value[i] = up[n.index[i]]
    out = np.zeros(sizeof(st_fired), np.uint8)
    cdef uint8_t[::1] o = out
    st_neurons_multiply(&n, value, <st_fired *>&o[0])
    return out.view(FIRED)[0]


cdef class Table:
    """One kernel table. Raises ValueError for a name that this CPU cannot run."""
    cdef const st_kernels *k
    cdef readonly str name

    def __cinit__(self, str name):
        encoded = name.encode()
        self.k = st_cpu_table(encoded)
        if self.k == NULL:
            raise ValueError(f"no kernel table {name!r} on this CPU")
        self.name = name

    def quantize(self, const float[::1] x, uint8_t[::1] out):
        need(out.shape[0] >= (x.shape[0] + 127) // 128 * <int64_t>sizeof(st_q8x4))
        self.k.quantize(&x[0], x.shape[0], <st_q8x4 *>&out[0])

    def gemm(self, int type, const uint8_t[::1] w, int64_t rows, int64_t cols, int64_t t0, int64_t t1,
             const uint8_t[:, ::1] x, float[::1] y, int64_t ldy, int64_t repeat=1):
        """x: [n][quantised row]; y[i * ldy + r - 16 * t0]. repeat: for timing."""
        cdef int64_t n = x.shape[0], i, _
        cdef int tiled = st_tiled(type)
        need(tiled >= 0 and w.shape[0] == <int64_t>st_tile16_bytes(type, rows, cols))
        need(0 <= t0 < t1 <= (rows + 15) // 16)
        need(x.shape[1] >= (cols + 127) // 128 * <int64_t>sizeof(st_q8x4))
        need(y.shape[0] >= (n - 1) * ldy + min(rows, 16 * t1) - 16 * t0)
        cdef const st_q8x4 **p = <const st_q8x4 **>malloc(n * sizeof(void *))
        for i in range(n):
            p[i] = <const st_q8x4 *>&x[i, 0]
        with nogil:
            for _ in range(repeat):
                self.k.gemm[tiled](&w[0], rows, cols // 32, t0, t1, p, n, &y[0], ldy)
        free(p)

    def rows(self, int type, const uint8_t[::1] w, int64_t cols, const int32_t[::1] index, const uint8_t[::1] x,
             float[::1] out):
        need(st_sparse(type) and out.shape[0] >= index.shape[0])
        if index.shape[0]:
            self.k.rows[st_tiled(type)](&w[0], st_row_bytes(type, cols), cols // 32, &index[0], index.shape[0],
                                        <const st_q8x4 *>&x[0], &out[0])

    def up(self, int type, const uint8_t[::1] w, int64_t cols, const uint8_t[:, ::1] x, const uint32_t[::1] fires,
           float[::1] out):
        """32 rows for x: [n][quantised row]; out: [n][32]. False where the table has no such kernel."""
        cdef const st_q8x4 *rows[ST_UP_TOKENS]
        cdef int64_t i, n = x.shape[0]
        need(st_sparse(type) and w.shape[0] == 32 * <int64_t>st_row_bytes(type, cols) and fires.shape[0] == 32)
        need(1 <= n <= ST_UP_TOKENS and out.shape[0] >= 32 * n)
        need(x.shape[1] >= (cols + 127) // 128 * <int64_t>sizeof(st_q8x4) and int(np.max(fires)) >> n == 0)
        if self.k.up[st_tiled(type)] == NULL:
            return False
        for i in range(n):
            rows[i] = <const st_q8x4 *>&x[i, 0]
        self.k.up[st_tiled(type)](&w[0], st_row_bytes(type, cols), cols // 32, rows, n, &fires[0], &out[0])
        return True

    def ffn(self, types, const uint8_t[::1] gate, const uint8_t[::1] up, const uint8_t[::1] down, int64_t d, int64_t f,
            const uint8_t[::1] x, int64_t g0, int64_t g1, float[::1] y, bint transposed=False):
        """y += what the groups g0..g1 (32 neurons each) of an expert [f] add to the outputs, one step after another.
        types: of gate, up and down."""
        cdef int64_t g, groups = f // 32, nb = d // 32
        cdef int gate_type = types[0], up_type = types[1], down_type = types[2]
        cdef int[3] tiled = [st_tiled(gate_type), st_tiled(up_type), st_tiled(down_type)]
        cdef st_neurons[4] neurons
        cdef st_neurons *stage[4]
        need(d % 32 == 0 and f % 32 == 0 and 0 <= g0 < g1 <= groups)
        cdef int64_t tile_bytes = st_tile16_bytes(gate_type, 16, d)
        need(tile_bytes > 0 and gate.shape[0] == f // 16 * tile_bytes)
        need(st_sparse(up_type) and up.shape[0] == f * <int64_t>st_row_bytes(up_type, d))
        need(down.shape[0] == down_bytes(down_type, transposed, d, f) and y.shape[0] >= (d + 127) // 128 * 128)
        need(x.shape[0] >= (d + 127) // 128 * <int64_t>sizeof(st_q8x4))
        memset(stage, 0, sizeof(stage))
        for g in range(g0, g1 + 3):
            if g < g1:
                stage[0] = &neurons[g % 4]
                stage[0].gate, stage[0].up = &gate[2 * g * tile_bytes], &up[0]
                stage[0].up_stride = st_row_bytes(up_type, d)
                stage[0].down = down_view(&down[0], down_type, transposed, d, f)
                stage[0].x, stage[0].transposed = <const st_q8x4 *>&x[0], transposed
                stage[0].y, stage[0].group = &y[0], g
            self.k.ffn(tiled, nb, stage)
            st_neurons_advance(stage)

    def down(self, int type, const uint8_t[::1] w, int64_t d, int64_t f, int64_t c0, int64_t c1, active, float weight,
             float[::1] y):
        """Chunks c0..c1 of 128 outputs; active: f / 32 entries of dtype ACTIVE of each token, whose outputs follow one
        another in y."""
        cdef const uint8_t[::1] a = active.view(np.uint8)
        cdef st_down_view view = down_view(&w[0], type, False, d, f)
        need(w.shape[0] == down_bytes(type, False, d, f) > 0)
        need(0 <= c0 < c1 <= (d + ST_DOWN_CHUNK - 1) // ST_DOWN_CHUNK)
        need(a.shape[0] >= f // 32 * <int64_t>sizeof(st_active) and y.shape[0] >= (c1 - c0) * ST_DOWN_CHUNK)
        cdef int64_t n = a.shape[0] // (f // 32) // <int64_t>sizeof(st_active), t, width = (c1 - c0) * ST_DOWN_CHUNK
        cdef const st_active *of[ST_DOWN_TOKENS]
        cdef float weights[ST_DOWN_TOKENS]
        cdef float *outs[ST_DOWN_TOKENS]
        need(1 <= n <= ST_DOWN_TOKENS and y.shape[0] >= n * width)
        for t in range(n):
            of[t], weights[t], outs[t] = <const st_active *>&a[0] + t * (f // 32), weight, &y[t * width]
        self.k.down[st_tiled(type)](&view, d, f // 32, c0, c1, of, weights, n, outs)

    def down_transposed(self, int type, const uint8_t[::1] w, int64_t d, int64_t f, int64_t c0, int64_t c1, fired,
                        float weight, float[::1] y):
        """The same over Down transposed; fired: f / 32 entries of dtype FIRED."""
        cdef const uint8_t[::1] a = fired.view(np.uint8)
        cdef st_down_view view = down_view(&w[0], type, True, d, f)
        need(w.shape[0] == down_bytes(type, True, d, f) > 0)
        need(0 <= c0 < c1 <= (d + ST_DOWN_CHUNK - 1) // ST_DOWN_CHUNK)
        need(a.shape[0] >= f // 32 * <int64_t>sizeof(st_fired) and y.shape[0] >= (c1 - c0) * ST_DOWN_CHUNK)
        self.k.down_transposed[st_tiled(type)](&view, d, f // 32, c0, c1, <const st_fired *>&a[0], weight, &y[0])

    def activate(self, const float[::1] g, const float[::1] up):
        """-> one entry of dtype ACTIVE."""
        need(g.shape[0] == 32 and up.shape[0] == 32)
        out = np.zeros(sizeof(st_active), np.uint8)
        cdef uint8_t[::1] o = out
        self.k.activate(&g[0], &up[0], <st_active *>&o[0])
        return out.view(ACTIVE)[0]

    def attention(self, const float[:, ::1] q, const uint16_t[:, ::1] k, const uint16_t[:, ::1] v, float scale,
                  float[::1] scores, float[:, ::1] acc, float[::1] m, float[::1] l, int64_t repeat=1):
        cdef int64_t G = q.shape[0], hd = q.shape[1], n = k.shape[0], _
        need(k.shape[1] == hd and v.shape[1] == hd and v.shape[0] == n and 1 <= n <= ST_ATTN_CHUNK)
        need(scores.shape[0] >= G * ST_ATTN_CHUNK and acc.shape[0] >= G and acc.shape[1] == hd)
        for _ in range(repeat):
            self.k.attention(&q[0, 0], G, hd, &k[0, 0], &v[0, 0], n, scale, &scores[0], &acc[0, 0], &m[0], &l[0])

    def attention_many(self, const float[:, :, ::1] q, const uint16_t[:, ::1] k, const uint16_t[:, ::1] v,
                       const int32_t[::1] p0, const int32_t[::1] p1, float scale, float[::1] scratch,
                       float[:, :, ::1] acc, float[:, ::1] m, float[:, ::1] l):
        """q, acc: [tokens][G][hd]; m, l: [tokens][G]; k, v: [256][hd]."""
        cdef int64_t n = q.shape[0], G = q.shape[1], hd = q.shape[2], i
        need(1 <= n <= ST_ATTN_TOKENS and p0.shape[0] == p1.shape[0] == acc.shape[0] == m.shape[0] == l.shape[0] == n)
        need(k.shape[1] == v.shape[1] == acc.shape[2] == hd and k.shape[0] == v.shape[0] == ST_ATTN_CHUNK)
        need(acc.shape[1] == m.shape[1] == l.shape[1] == G and scratch.shape[0] >= ST_ATTN_SCRATCH(n * G, hd))
        for i in range(n):
            need(0 <= p0[i] < p1[i] <= ST_ATTN_CHUNK)
        self.k.attention_many(&q[0, 0, 0], G * hd, n, G, hd, &k[0, 0], &v[0, 0], &p0[0], &p1[0], scale, &scratch[0],
                              &acc[0, 0, 0], &m[0, 0], &l[0, 0])

    @staticmethod
    def attention_scratch(int64_t rows, int64_t hd):
        """Floats of scratch that attention_many needs for `rows` queries."""
        return ST_ATTN_SCRATCH(rows, hd)

    def kv_store(self, const float[:, ::1] keys, const float[:, ::1] values, int64_t first, uint8_t[::1] k,
                 uint8_t[::1] v):
        """Writes positions first, first + 1, ... of one KV head to the keys k and values v of a Q8_0 page (kv.h)."""
        cdef int64_t n = keys.shape[0], hd = keys.shape[1], p, size = st_kv_head_bytes(ST_Q8_0, hd)
        need(size > 0 and k.shape[0] == size and v.shape[0] == size and 0 <= first and first + n <= ST_ATTN_CHUNK)
        need(values.shape[0] == n and values.shape[1] == hd)
        cdef uint8_t[::1] x = np.zeros((hd + 127) // 128 * sizeof(st_q8x4), np.uint8)
        for p in range(n):
            self.k.quantize(&keys[p, 0], hd, <st_q8x4 *>&x[0])
            st_kv_store_q8_key(<st_q8x4 *>&x[0], hd, first + p, &k[0])
            self.k.quantize(&values[p, 0], hd, <st_q8x4 *>&x[0])
            st_kv_store_q8_value(<st_q8x4 *>&x[0], hd, first + p, &v[0])

    def attention_q8(self, const uint8_t[:, ::1] q, int64_t hd, const uint8_t[::1] k, const uint8_t[::1] v, int64_t p0,
                     int64_t p1, float scale, float[::1] scores, float[:, ::1] acc, float[::1] m, float[::1] l,
                     int64_t repeat=1):
        """q: [2 * G][quantised row], the queries and then their query_rest(); k, v: a page as kv_store() fills it.
        repeat: for timing."""
        cdef int64_t G = q.shape[0] // 2, i, _
        need(q.shape[0] == 2 * G and q.shape[1] >= (hd + 127) // 128 * <int64_t>sizeof(st_q8x4))
        need(0 <= p0 < p1 <= ST_ATTN_CHUNK)
        need(k.shape[0] == v.shape[0] == <int64_t>st_kv_head_bytes(ST_Q8_0, hd))
        need(scores.shape[0] >= 2 * G * ST_ATTN_CHUNK and acc.shape[0] >= G and acc.shape[1] == hd)
        cdef const st_q8x4 **rows = <const st_q8x4 **>malloc(2 * G * sizeof(void *))
        for i in range(2 * G):
            rows[i] = <const st_q8x4 *>&q[i, 0]
        with nogil:
            for _ in range(repeat):
                self.k.attention_q8(rows, G, hd, &k[0], &v[0], p0, p1, scale, &scores[0], &acc[0, 0], &m[0], &l[0])
        free(rows)

    def rmsnorm(self, const float[::1] x, const float[::1] w, float eps, float[::1] out):
        need(w.shape[0] == x.shape[0] <= out.shape[0])
        self.k.rmsnorm(&x[0], &w[0], x.shape[0], eps, &out[0])

    def dot(self, const float[::1] a, const float[::1] b):
        need(a.shape[0] == b.shape[0])
        return self.k.dot(&a[0], &b[0], a.shape[0])

    def axpy(self, float a, const float[::1] x, float[::1] y):
        need(y.shape[0] >= x.shape[0])
        self.k.axpy(a, &x[0], &y[0], x.shape[0])

    def to_f16(self, const float[::1] x, uint16_t[::1] out):
        need(out.shape[0] >= x.shape[0])
        self.k.to_f16(&x[0], &out[0], x.shape[0])

    def from_f16(self, const uint16_t[::1] x, float[::1] out):
        need(out.shape[0] >= x.shape[0])
        self.k.from_f16(&x[0], &out[0], x.shape[0])

    def rope(self, float[::1] v, const float[::1] cosine, const float[::1] sine):
        need(cosine.shape[0] == sine.shape[0] and v.shape[0] >= 2 * cosine.shape[0])
        self.k.rope(&v[0], &cosine[0], &sine[0], cosine.shape[0])

    def top_k(self, const float[::1] x, int32_t[::1] ids):
        """ids: filled with where the largest of x are."""
        cdef int32_t[::1] keys = np.empty(x.shape[0], np.int32)
        need(1 <= ids.shape[0] <= x.shape[0])
        self.k.top_k(&x[0], x.shape[0], ids.shape[0], &keys[0], &ids[0])
