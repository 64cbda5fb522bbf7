# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The forward pass: weights in the packed layouts, KV caches, and one decode call over the kernel table.

Called by loader.py (weights) and session.py (decode). It never opens files and never sees text. One Engine
serves one decode at a time (session.py holds the lock); a KVCache belongs to one session.
"""
from libc.errno cimport errno
from libc.math cimport cos, expf, pow, sin, sqrtf
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

import os

from smallthinker_edge._native.core cimport *

from smallthinker_edge.errors import ExpertReadError

cdef enum:
    TILE = 1   # Tile16 of Q4_0 or Q8_0, integer kernels
    ROWS = 2   # rows as in GGUF, dequantised one at a time, float arithmetic
    EXPERT_PACKED = 1
    EXPERT_ROWS = 2
    GENERIC_CHUNK = 256  # outputs of one down unit over GGUF rows; a multiple of every block size

cdef struct Matrix:
    int layout
    int type
    int64_t rows
    int64_t cols
    size_t bytes        # what data owns; 0 for a view
    const uint8_t *data

cdef struct Layer:
    float *attn_norm
    float *ffn_norm
    float *router
    Matrix q
    Matrix k
    Matrix v
    Matrix o
    int rope
    int64_t window
    int expert_layout
    int gate_type
    int up_type
    int down_type

cdef struct Shape:
    int64_t n_layers, d, heads, kv_heads, hd, experts, used, f, vocab, batch, context
    int64_t d_padded, groups, nb_d, nb_o, down_units
    float eps
    int softmax
    int down_transposed

# What one thread needs for itself.
cdef struct Scratch:
    float *norm           # [max(d, H*hd)]
    st_q8x4 *xq           # the same, quantised
    const st_q8x4 **rows  # [batch] pointers handed to the GEMMs
    float *gate           # [batch][32]
    float *up             # [32]
    float *row            # one dequantised row
    float *scores         # [G][256]
    float *out            # [batch][64]: a unit's output before it is added to x

# One decode call; the team's threads share it.
cdef struct Call:
    Shape s
    const st_kernels *kernels
    st_team *team
    Layer *layers
    const uint8_t **experts  # [L * E]; NULL where a pager holds them
    st_pager *pager
    int32_t *held         # pager ids pinned for the layer in work
    int64_t n_held
    int32_t *held_tokens  # how many tokens use each
    double clock          # tokens that this engine has computed
    Matrix embedding, head
    float *output_norm
    Scratch *scratch
    const int32_t *tokens
    int64_t n, position
    int all_logits
    int failed            # an expert could not be read
    uint16_t **cache_k
    uint16_t **cache_v
    int64_t *capacity
    float *x              # [n][d_padded] residual
    float *hidden         # [n][d] normalised, for ROWS matrices
    st_q8x4 *xq           # [n][nq]
    int64_t nq            # st_q8x4 a row
    float *logits_router  # [n][E]
    int32_t *chosen       # [n][K] ascending expert id
    float *weight         # [n][K]
    int32_t *list_start   # [E + 1]
    int32_t *list_slot    # [n * K]: t * K + k, grouped by expert
    int32_t *active_expert  # those with tokens, ascending
    int32_t *order        # the same, experts that are in memory first
    int64_t n_active
    float *q              # [n][H*hd]
    float *attn           # [n][H*hd]
    float *partial        # [unit][G][hd] of one token (n == 1), or of one thread
    float *partial_m
    float *partial_l
    int64_t max_chunks
    float *kv             # [2 * kv_heads][n][hd]
    float *rope           # [n][rope_dim/2][cos, sin]
    float *rope_window    # the same for window layers, whose theta may differ
    int64_t rope_half
    st_active *active     # [n*K][groups]
    float *h              # [n*K][f], EXPERT_ROWS
    float *logits


# ---------------------------------------------------------------- matrices

cdef void mat_unit(Call *c, const Matrix *m, int64_t r0, int64_t r1, const st_q8x4 *const *xq, const float *xf,
                   int64_t ldx, int64_t n, float *y, int64_t ldy, Scratch *s) noexcept nogil:
    """y[i * ldy + r - r0] = W[r] . x[i] for rows r0..r1 (r0 a multiple of 16 for TILE)."""
    cdef int64_t r, i
    cdef size_t row_bytes
    if m.layout == TILE:
        if m.type == ST_Q4_0:
            c.kernels.gemm_q4_0(m.data, r1, m.cols // 32, r0 // 16, (r1 + 15) // 16, xq, n, y, ldy)
        else:
            c.kernels.gemm_q8_0(m.data, r1, m.cols // 32, r0 // 16, (r1 + 15) // 16, xq, n, y, ldy)
        return
    row_bytes = st_row_bytes(m.type, m.cols)
    for r in range(r0, r1):
        st_dequantize_row(m.type, m.data + r * row_bytes, m.cols, s.row)
        for i in range(n):
            y[i * ldy + r - r0] = c.kernels.dot(s.row, xf + i * ldx, m.cols)


cdef void prepare(Call *c, Scratch *s, const float *norm_weight, int64_t t) noexcept nogil:
    """Normalised and quantised x of token t into the shared rows (n > 1)."""
    c.kernels.rmsnorm(c.x + t * c.s.d_padded, norm_weight, c.s.d, c.s.eps, c.hidden + t * c.s.d)
    c.kernels.quantize(c.hidden + t * c.s.d, c.s.d // 32 * 32, c.xq + t * c.nq)


cdef void inputs(Call *c, Scratch *s, const float *norm_weight, const st_q8x4 *const **xq, const float **xf,
                 ) noexcept nogil:
    """What the next GEMM reads. One token: every thread makes its own copy, which is cheaper than a barrier."""
    cdef int64_t t
    if c.n == 1:
        c.kernels.rmsnorm(c.x, norm_weight, c.s.d, c.s.eps, s.norm)
        c.kernels.quantize(s.norm, c.s.d // 32 * 32, s.xq)
        s.rows[0] = s.xq
        xf[0] = s.norm
    else:
        while True:
            t = st_team_claim(c.team, 1)
            if t >= c.n:
                break
            prepare(c, s, norm_weight, t)
        st_team_barrier(c.team)
        for t in range(c.n):
            s.rows[t] = c.xq + t * c.nq
        xf[0] = c.hidden
    xq[0] = s.rows


# ---------------------------------------------------------------- attention

cdef void rotate(const float *rope, int64_t half, float *v) noexcept nogil:
    """NEOX rotation of one head: element i with i + half."""
    cdef int64_t i
    cdef float a, b
    for i in range(half):
        a = v[i]
        b = v[i + half]
        v[i] = a * rope[2 * i] - b * rope[2 * i + 1]
        v[i + half] = a * rope[2 * i + 1] + b * rope[2 * i]


cdef void projection_unit(Call *c, Layer *layer, int64_t l, int64_t unit, const st_q8x4 *const *xq,
                          const float *xf, Scratch *s) noexcept nogil:
    """One head of q, k or v for all tokens; k and v go to the cache as fp16."""
    cdef int64_t hd = c.s.hd, t, slot, head
    cdef float *out
    cdef int64_t ld = c.s.heads * hd
    cdef uint16_t *cache
    cdef float *rope = c.rope_window if layer.window else c.rope
    if unit < c.s.heads:
        out = c.q + unit * hd
        mat_unit(c, &layer.q, unit * hd, unit * hd + hd, xq, xf, c.s.d, c.n, out, ld, s)
        if layer.rope:
            for t in range(c.n):
                rotate(rope + t * 2 * c.rope_half, c.rope_half, out + t * ld)
        return
    unit -= c.s.heads
    head = unit // 2
    out = c.kv + unit * hd * c.n
    mat_unit(c, &layer.k if unit % 2 == 0 else &layer.v, head * hd, head * hd + hd, xq, xf, c.s.d, c.n, out, hd, s)
    cache = (c.cache_k[l] if unit % 2 == 0 else c.cache_v[l]) + head * c.capacity[l] * hd
    for t in range(c.n):
        if layer.rope and unit % 2 == 0:
            rotate(rope + t * 2 * c.rope_half, c.rope_half, out + t * hd)
        slot = (c.position + t) % c.capacity[l]
        c.kernels.to_f16(out + t * hd, cache + slot * hd, hd)


cdef void router_unit(Call *c, Layer *layer, int64_t unit) noexcept nogil:
    """Eight experts' router logits of one token, from the raw residual."""
    cdef int64_t per = (c.s.experts + 7) // 8, t = unit // per, e, e0 = unit % per * 8
    for e in range(e0, min(e0 + 8, c.s.experts)):
        c.logits_router[t * c.s.experts + e] = c.kernels.dot(layer.router + e * c.s.d, c.x + t * c.s.d_padded, c.s.d)


cdef void choose_experts(Call *c, int64_t t) noexcept nogil:
    """Top K by logit (lower id wins a tie), weights normalised, stored by ascending id."""
    cdef int64_t K = c.s.used, E = c.s.experts, k, e, best, j
    cdef float *logits = c.logits_router + t * E
    cdef int32_t *ids = c.chosen + t * K
    cdef float *w = c.weight + t * K
    cdef float total = 0, top
    for k in range(K):
        best = -1
        for e in range(E):
            for j in range(k):
                if ids[j] == e:
                    break
            else:
                if best < 0 or logits[e] > logits[best]:
                    best = e
        ids[k] = <int32_t>best
    top = logits[ids[0]]
    for k in range(1, K):  # insertion sort by id
        e = ids[k]
        j = k
        while j > 0 and ids[j - 1] > e:
            ids[j] = ids[j - 1]
            j -= 1
        ids[j] = <int32_t>e
    for k in range(K):
        w[k] = expf(logits[ids[k]] - top) if c.s.softmax else 1 / (1 + expf(-logits[ids[k]]))
        total += w[k]
    if not c.s.softmax and total < 6.103515625e-5:
        total = 6.103515625e-5
    for k in range(K):
        w[k] /= total


cdef void list_tokens(Call *c) noexcept nogil:
    """Which (token, k) slots each expert serves; one thread."""
    cdef int64_t i, total = c.n * c.s.used, e
    memset(c.list_start, 0, (c.s.experts + 1) * sizeof(int32_t))
    for i in range(total):
        c.list_start[c.chosen[i] + 1] += 1
    c.n_active = 0
    for e in range(c.s.experts):
        if c.list_start[e + 1]:
            c.active_expert[c.n_active] = <int32_t>e
            c.n_active += 1
        c.list_start[e + 1] += c.list_start[e]
    for i in range(total):
        e = c.chosen[i]
        c.list_slot[c.list_start[e]] = <int32_t>i
        c.list_start[e] += 1
    for e in range(c.s.experts, 0, -1):
        c.list_start[e] = c.list_start[e - 1]
    c.list_start[0] = 0


cdef void page_in(Call *c, int64_t l) noexcept nogil:
    """Lets go of the last layer's experts and asks for this layer's; one thread, as soon as they are known."""
    cdef int64_t i, e, front = 0
    cdef int pass_
    list_tokens(c)
    if c.pager == NULL:
        memcpy(c.order, c.active_expert, c.n_active * sizeof(int32_t))
        return
    st_pager_release(c.pager, c.held, c.n_held)
    for i in range(c.n_active):
        e = c.active_expert[i]
        c.held[i] = <int32_t>(l * c.s.experts + e)
        c.held_tokens[i] = c.list_start[e + 1] - c.list_start[e]
    c.n_held = c.n_active
    st_pager_want(c.pager, c.held, c.held_tokens, c.n_held, c.clock + c.n)
    for pass_ in range(2):
        for i in range(c.n_active):
            if (st_pager_ready(c.pager, c.held[i]) != 0) == (pass_ == 0):
                if front < c.n_active:
                    c.order[front] = c.active_expert[i]
                    front += 1


cdef const uint8_t *expert_blob(Call *c, int64_t l, int64_t e) noexcept nogil:
    """The weights of an expert, waiting for them; NULL where they cannot be read."""
    if c.pager == NULL:
        return c.experts[l * c.s.experts + e]
    return st_pager_take(c.pager, <int32_t>(l * c.s.experts + e))


cdef void attention_chunk(Call *c, Layer *layer, int64_t l, int64_t t, int64_t kv, int64_t chunk, float *acc,
                          float *m, float *lsum, Scratch *s) noexcept nogil:
    """Positions of one 256-aligned chunk that token t may see, for the heads of one KV head."""
    cdef int64_t hd = c.s.hd, G = c.s.heads // c.s.kv_heads, p = c.position + t
    cdef int64_t p0 = chunk * ST_ATTN_CHUNK, p1 = min(p0 + ST_ATTN_CHUNK, p + 1)
    cdef int64_t at
    if layer.window:
        p0 = max(p0, p - layer.window + 1)
    at = (kv * c.capacity[l] + p0 % c.capacity[l]) * hd
    c.kernels.attention(c.q + (t * c.s.heads + kv * G) * hd, G, hd, c.cache_k[l] + at, c.cache_v[l] + at, p1 - p0,
                        1 / sqrtf(<float>hd), s.scores, acc, m, lsum)


cdef void merge_chunks(Call *c, const float *acc, const float *m, const float *lsum, int64_t chunks, int64_t stride,
                       float *out) noexcept nogil:
    """Softmax over chunks in ascending order; part i of head g is at i * stride + g."""
    cdef int64_t hd = c.s.hd, G = c.s.heads // c.s.kv_heads, g, i, j
    cdef float top, total, w
    for g in range(G):
        top = m[g]
        for i in range(1, chunks):
            if m[i * stride + g] > top:
                top = m[i * stride + g]
        total = 0
        memset(out + g * hd, 0, hd * sizeof(float))
        for i in range(chunks):
            w = expf(m[i * stride + g] - top)
            total += w * lsum[i * stride + g]
            c.kernels.axpy(w, acc + (i * stride + g) * hd, out + g * hd, hd)
        for j in range(hd):
            out[g * hd + j] /= total


cdef int64_t first_chunk(Layer *layer, int64_t p) noexcept nogil:
    return max(0, p - layer.window + 1) // ST_ATTN_CHUNK if layer.window else 0


cdef void attention_phase(Call *c, Layer *layer, int64_t l, int tid, Scratch *s) noexcept nogil:
    cdef int64_t G = c.s.heads // c.s.kv_heads, hd = c.s.hd, u, t, kv, i, chunk0, chunks, base
    if c.n == 1:
        chunk0 = first_chunk(layer, c.position)
        chunks = c.position // ST_ATTN_CHUNK - chunk0 + 1
        while True:
            u = st_team_claim(c.team, 1)
            if u > chunks * c.s.kv_heads:
                break
            if u == 0:
                choose_experts(c, 0)
                page_in(c, l)
                continue
            kv = (u - 1) // chunks
            i = (u - 1) % chunks
            base = (kv * c.max_chunks + i) * G
            attention_chunk(c, layer, l, 0, kv, chunk0 + i, c.partial + base * hd, c.partial_m + base,
                            c.partial_l + base, s)
        return
    while True:
        u = st_team_claim(c.team, 1)
        if u >= c.n * (1 + c.s.kv_heads):
            break
        if u < c.n:
            choose_experts(c, u)
            continue
        u -= c.n
        t = u // c.s.kv_heads
        kv = u % c.s.kv_heads
        chunk0 = first_chunk(layer, c.position + t)
        chunks = (c.position + t) // ST_ATTN_CHUNK - chunk0 + 1
        base = tid * c.max_chunks * G
        for i in range(chunks):
            attention_chunk(c, layer, l, t, kv, chunk0 + i, c.partial + (base + i * G) * hd,
                            c.partial_m + base + i * G, c.partial_l + base + i * G, s)
        merge_chunks(c, c.partial + base * hd, c.partial_m + base, c.partial_l + base, chunks, G,
                     c.attn + (t * c.s.heads + kv * G) * hd)


cdef void output_phase(Call *c, Layer *layer, int64_t l, Scratch *s) noexcept nogil:
    """x += W_o . attention"""
    cdef int64_t hd = c.s.hd, G = c.s.heads // c.s.kv_heads, width = c.s.heads * hd, kv, chunk0, chunks, base, t, r
    cdef int64_t u, r0, r1
    cdef const float *xf
    if c.n == 1:
        chunk0 = first_chunk(layer, c.position)
        chunks = c.position // ST_ATTN_CHUNK - chunk0 + 1
        for kv in range(c.s.kv_heads):
            base = kv * c.max_chunks * G
            merge_chunks(c, c.partial + base * hd, c.partial_m + base, c.partial_l + base, chunks, G,
                         s.norm + kv * G * hd)
        c.kernels.quantize(s.norm, width // 32 * 32, s.xq)
        s.rows[0] = s.xq
        xf = s.norm
    else:
        while True:
            t = st_team_claim(c.team, 1)
            if t > c.n:
                break
            if t == c.n:
                page_in(c, l)
            else:
                c.kernels.quantize(c.attn + t * width, width // 32 * 32, c.xq + t * c.nq)
        st_team_barrier(c.team)
        for t in range(c.n):
            s.rows[t] = c.xq + t * c.nq
        xf = c.attn
    while True:
        u = st_team_claim(c.team, 1)
        r0 = u * 64
        if r0 >= c.s.d:
            break
        r1 = min(r0 + 64, c.s.d)
        mat_unit(c, &layer.o, r0, r1, s.rows, xf, width, c.n, s.out, 64, s)
        for t in range(c.n):
            for r in range(r1 - r0):
                c.x[t * c.s.d_padded + r0 + r] += s.out[t * 64 + r]


# ---------------------------------------------------------------- experts

cdef void neurons_packed(Call *c, const uint8_t *blob, int64_t e, int64_t g, const st_q8x4 *const *xq,
                         Scratch *s) noexcept nogil:
    """Gate of 32 neurons for every token of the expert, then up only where the gate is positive."""
    cdef int64_t i, m = c.list_start[e + 1] - c.list_start[e], j, fired, tile_bytes = c.s.nb_d * ST_TILE_Q4_0_BYTES
    cdef int32_t *slots = c.list_slot + c.list_start[e]
    cdef const uint8_t *up = blob + c.s.groups * 2 * tile_bytes
    cdef int32_t index[32]
    cdef float value[32]
    cdef float *gate
    for i in range(m):
        s.rows[c.s.batch + i] = xq[slots[i] // c.s.used]
    c.kernels.gemm_q4_0(blob, c.s.f, c.s.nb_d, 2 * g, 2 * g + 2, s.rows + c.s.batch, m, s.gate, 32)
    for i in range(m):
        gate = s.gate + i * 32
        fired = 0
        for j in range(32):
            s.up[j] = 0
            if not gate[j] <= 0:
                index[fired] = <int32_t>(32 * g + j)
                fired += 1
        c.kernels.rows_q4_0(up, c.s.nb_d, index, fired, s.rows[c.s.batch + i], value)
        for j in range(fired):
            s.up[index[j] - 32 * g] = value[j]
        c.kernels.activate(gate, s.up, c.active + slots[i] * c.s.groups + g)


cdef void neurons_rows(Call *c, Layer *layer, const uint8_t *blob, int64_t e, int64_t g, const float *xf,
                       Scratch *s) noexcept nogil:
    """The same over GGUF rows in float arithmetic."""
    cdef int64_t i, n, m = c.list_start[e + 1] - c.list_start[e], d = c.s.d
    cdef int32_t *slots = c.list_slot + c.list_start[e]
    cdef size_t gate_row = st_row_bytes(layer.gate_type, d), up_row = st_row_bytes(layer.up_type, d)
    cdef const uint8_t *up = blob + c.s.f * gate_row
    cdef const float *x
    for n in range(32 * g, min(32 * g + 32, c.s.f)):
        st_dequantize_row(layer.gate_type, blob + n * gate_row, d, s.row)
        for i in range(m):
            s.gate[i] = c.kernels.dot(s.row, xf + slots[i] // c.s.used * d, d)
        st_dequantize_row(layer.up_type, up + n * up_row, d, s.row)
        for i in range(m):
            x = xf + slots[i] // c.s.used * d
            c.h[slots[i] * c.s.f + n] = 0 if s.gate[i] <= 0 else s.gate[i] * c.kernels.dot(s.row, x, d)


cdef void down_packed(Call *c, const uint8_t *blob, int64_t e, int64_t chunk) noexcept nogil:
    cdef int64_t i, m = c.list_start[e + 1] - c.list_start[e], groups = c.s.groups
    cdef int32_t *slots = c.list_slot + c.list_start[e]
    cdef const uint8_t *down = blob + c.s.groups * 2 * c.s.nb_d * ST_TILE_Q4_0_BYTES + c.s.f * c.s.nb_d * 18
    down += chunk * (groups * ST_DOWN_CHUNK * 2 + c.s.f * (ST_DOWN_CHUNK // 2))
    for i in range(m):
        c.kernels.down_q4_0(down, groups, c.active + slots[i] * groups, c.weight[slots[i]],
                            c.x + slots[i] // c.s.used * c.s.d_padded + chunk * ST_DOWN_CHUNK)


cdef void down_rows(Call *c, Layer *layer, const uint8_t *blob, int64_t e, int64_t chunk, Scratch *s) noexcept nogil:
    cdef int64_t i, n, r, m = c.list_start[e + 1] - c.list_start[e], d = c.s.d, f = c.s.f
    cdef int64_t r0 = chunk * GENERIC_CHUNK, r1 = min(r0 + GENERIC_CHUNK, d)
    cdef int32_t *slots = c.list_slot + c.list_start[e]
    cdef const uint8_t *down = blob + f * (st_row_bytes(layer.gate_type, d) + st_row_bytes(layer.up_type, d))
    cdef size_t row_bytes
    cdef float *x
    cdef float h
    if c.s.down_transposed:
        row_bytes = st_row_bytes(layer.down_type, d)
        for n in range(f):
            st_dequantize_row(layer.down_type, down + n * row_bytes + st_row_bytes(layer.down_type, r0), r1 - r0, s.row)
            for i in range(m):
                h = c.h[slots[i] * f + n]
                if h != 0:
                    x = c.x + slots[i] // c.s.used * c.s.d_padded
                    c.kernels.axpy(c.weight[slots[i]] * h, s.row, x + r0, r1 - r0)
        return
    row_bytes = st_row_bytes(layer.down_type, f)
    for r in range(r0, r1):
        st_dequantize_row(layer.down_type, down + r * row_bytes, f, s.row)
        for i in range(m):
            x = c.x + slots[i] // c.s.used * c.s.d_padded
            x[r] += c.weight[slots[i]] * c.kernels.dot(s.row, c.h + slots[i] * f, f)


cdef bint expert_phases(Call *c, Layer *layer, int64_t l, Scratch *s) noexcept nogil:
    """x += the experts' weighted outputs. False, for every thread alike, when an expert could not be read."""
    cdef const st_q8x4 *const *xq
    cdef const float *xf
    cdef const uint8_t *blob
    cdef int64_t u, i, e, units, packed = layer.expert_layout == EXPERT_PACKED
    inputs(c, s, layer.ffn_norm, &xq, &xf)
    while True:
        u = st_team_claim(c.team, 1)
        if u >= c.n_active * c.s.groups:
            break
        e = c.order[u // c.s.groups]
        blob = expert_blob(c, l, e)
        if blob == NULL:
            continue
        if packed:
            neurons_packed(c, blob, e, u % c.s.groups, xq, s)
        else:
            neurons_rows(c, layer, blob, e, u % c.s.groups, xf, s)
    st_team_barrier(c.team)
    for i in range(c.n_active):
        if expert_blob(c, l, c.active_expert[i]) == NULL:
            return False
    units = c.s.down_units if packed else (c.s.d + GENERIC_CHUNK - 1) // GENERIC_CHUNK
    while True:
        u = st_team_claim(c.team, 1)
        if u >= units:
            break
        for i in range(c.n_active):
            e = c.active_expert[i]
            blob = expert_blob(c, l, e)
            if packed:
                down_packed(c, blob, e, u)
            else:
                down_rows(c, layer, blob, e, u, s)
    st_team_barrier(c.team)
    return True


# ---------------------------------------------------------------- the whole pass

cdef void embed(Call *c) noexcept nogil:
    cdef int64_t t
    cdef const Matrix *m = &c.embedding
    while True:
        t = st_team_claim(c.team, 1)
        if t >= c.n:
            break
        if m.layout == TILE:
            st_dequantize_tile16_row(m.type, m.data, m.cols, c.tokens[t], c.x + t * c.s.d_padded)
        else:
            st_dequantize_row(m.type, m.data + c.tokens[t] * st_row_bytes(m.type, m.cols), m.cols,
                              c.x + t * c.s.d_padded)
    st_team_barrier(c.team)


cdef void head_phase(Call *c, Scratch *s) noexcept nogil:
    """Logits of the last token, or of all."""
    cdef const st_q8x4 *const *xq
    cdef const float *xf
    cdef int64_t u, r0, first = 0 if c.all_logits else c.n - 1, V = c.s.vocab
    inputs(c, s, c.output_norm, &xq, &xf)
    while True:
        u = st_team_claim(c.team, 1)
        r0 = u * 256
        if r0 >= V:
            break
        mat_unit(c, &c.head, r0, min(r0 + 256, V), xq + first, xf + first * c.s.d, c.s.d, c.n - first,
                 c.logits + r0, V, s)


cdef void forward(void *arg, int tid) noexcept nogil:
    cdef Call *c = <Call *>arg
    cdef Scratch *s = c.scratch + tid
    cdef Layer *layer
    cdef const st_q8x4 *const *xq
    cdef const float *xf
    cdef int64_t l, u, routers = c.n * ((c.s.experts + 7) // 8)
    embed(c)
    for l in range(c.s.n_layers):
        layer = c.layers + l
        inputs(c, s, layer.attn_norm, &xq, &xf)
        while True:
            u = st_team_claim(c.team, 1)
            if u < routers:
                router_unit(c, layer, u)
            elif u - routers < c.s.heads + 2 * c.s.kv_heads:
                projection_unit(c, layer, l, u - routers, xq, xf, s)
            else:
                break
        st_team_barrier(c.team)
        attention_phase(c, layer, l, tid, s)
        st_team_barrier(c.team)
        output_phase(c, layer, l, s)
        st_team_barrier(c.team)
        if not expert_phases(c, layer, l, s):
            if tid == 0:
                c.failed = 1
            return
    if c.logits != NULL:
        head_phase(c, s)


# ---------------------------------------------------------------- Python face

cdef class Arena:
    """System memory that lives as long as this object; the total is in `bytes`."""
    cdef list blocks
    cdef readonly size_t bytes

    def __cinit__(self):
        self.blocks = []
        self.bytes = 0

    def __dealloc__(self):
        cdef uintptr_t p
        for address, size in self.blocks:
            p = address
            st_memory_free(<void *>p, size)

    cdef void *take(self, size_t size) except NULL:
        cdef void *p = st_memory_alloc(size + 64)
        if p == NULL:
            raise MemoryError(f"cannot get {size} bytes from the system")
        self.blocks.append((<uintptr_t>p, size + 64))
        self.bytes += size
        return p


cdef class KVCache:
    """Keys and values of one session, fp16, [layer][kv head][position][head dim].

    Window layers are rings: a multiple of 256 positions that holds the window and one batch. Memory is committed
    as positions are first written.
    """
    cdef Arena arena
    cdef uint16_t **k
    cdef uint16_t **v
    cdef int64_t *capacity
    cdef readonly int64_t position
    cdef readonly int64_t context

    def __cinit__(self, Engine engine, int64_t context):
        cdef int64_t l, L = engine.call.s.n_layers, window
        cdef size_t size
        self.arena = Arena()
        self.context = context
        self.k = <uint16_t **>calloc(L, sizeof(void *))
        self.v = <uint16_t **>calloc(L, sizeof(void *))
        self.capacity = <int64_t *>calloc(L, sizeof(int64_t))
        if self.k == NULL or self.v == NULL or self.capacity == NULL:
            raise MemoryError("cannot allocate a KV cache")
        for l in range(L):
            window = engine.call.layers[l].window
            self.capacity[l] = min(context, window + engine.call.s.batch) if window else context
            self.capacity[l] = (self.capacity[l] + ST_ATTN_CHUNK - 1) // ST_ATTN_CHUNK * ST_ATTN_CHUNK
            size = engine.call.s.kv_heads * self.capacity[l] * engine.call.s.hd * sizeof(uint16_t)
            self.k[l] = <uint16_t *>self.arena.take(size)
            self.v[l] = <uint16_t *>self.arena.take(size)

    def __dealloc__(self):
        free(self.k)
        free(self.v)
        free(self.capacity)

    @property
    def bytes(self):
        """Bytes reserved at full context."""
        return self.arena.bytes

    def reset(self):
        """Forgets every position."""
        self.position = 0


cdef const st_kernels *find_table(name) except NULL:
    cdef const st_kernels *table
    if name is None:
        return st_cpu_best()
    encoded = name.encode()
    table = st_cpu_table(encoded)
    if table == NULL:
        raise ValueError(f"kernel table {name!r} is unknown or this CPU lacks its instructions")
    return table


cdef class Engine:
    """The weights of one model and a thread team.

    Args:
        config: ModelConfig.
        threads: size of the team, >= 1.
        kernels: name of a kernel table; None picks the best of this CPU.
        batch: most tokens computed together; does not change the results.
        exact: keep every matrix as GGUF rows and compute in float32 (slow; the tests' yardstick).

    Weights are set once, from the loader; afterwards decode() may be called, by one thread at a time.
    """
    cdef Call call
    cdef Arena arena
    cdef Arena partials
    cdef st_reader *reader
    cdef readonly int64_t slots
    cdef list keep
    cdef readonly int threads
    cdef readonly bint exact
    cdef object config

    def __cinit__(self, config, int threads, kernels=None, int64_t batch=512, bint exact=False):
        cdef Call *c = &self.call
        cdef Shape *s = &c.s
        if threads < 1 or batch < 1:
            raise ValueError("threads and batch must be at least 1")
        self.config, self.threads, self.exact = config, threads, exact
        self.arena = Arena()
        self.keep = []
        c.kernels = find_table(kernels)
        s.n_layers, s.d, s.heads, s.kv_heads = config.n_layers, config.d_model, config.n_heads, config.n_kv_heads
        s.hd, s.experts, s.used, s.f = config.head_dim, config.n_experts, config.n_experts_used, config.d_ffn
        s.vocab, s.eps, s.batch = config.vocab_size, config.rms_eps, batch
        s.softmax, s.down_transposed = config.gating == "softmax", config.down_transposed
        s.d_padded = (s.d + 255) // 256 * 256
        s.groups, s.nb_d = (s.f + 31) // 32, s.d // 32
        s.down_units = (s.d + ST_DOWN_CHUNK - 1) // ST_DOWN_CHUNK
        c.rope_half = config.rope_dim // 2
        c.layers = <Layer *>calloc(s.n_layers, sizeof(Layer))
        c.experts = <const uint8_t **>calloc(s.n_layers * s.experts, sizeof(void *))
        c.scratch = <Scratch *>calloc(threads, sizeof(Scratch))
        c.team = st_team_create(threads)
        if c.layers == NULL or c.experts == NULL or c.scratch == NULL or c.team == NULL:
            raise MemoryError("cannot allocate the engine or start its threads")
        self.set_layers()
        self.allocate_buffers()

    cdef int set_layers(self) except -1:
        cdef int64_t l
        for l in range(self.call.s.n_layers):
            self.call.layers[l].rope = self.config.rope_layout[l]
            self.call.layers[l].window = self.config.window if self.config.window_layout[l] else 0
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
        c.rope = <float *>self.arena.take(n * c.rope_half * 8)
        c.rope_window = <float *>self.arena.take(n * c.rope_half * 8)
        c.active = <st_active *>self.arena.take(n * s.used * s.groups * sizeof(st_active))
        c.h = <float *>self.arena.take(n * s.used * s.f * 4)
        for i in range(self.threads):
            c.scratch[i].norm = <float *>self.arena.take(width * 4)
            c.scratch[i].xq = <st_q8x4 *>self.arena.take(c.nq * sizeof(st_q8x4))
            c.scratch[i].rows = <const st_q8x4 **>self.arena.take(2 * n * sizeof(void *))
            c.scratch[i].gate = <float *>self.arena.take(n * 32 * 4)
            c.scratch[i].up = <float *>self.arena.take(32 * 4)
            c.scratch[i].row = <float *>self.arena.take(max(width, s.f) * 4)
            c.scratch[i].scores = <float *>self.arena.take(s.heads // s.kv_heads * ST_ATTN_CHUNK * 4)
            c.scratch[i].out = <float *>self.arena.take(n * 64 * 4)
        return 0

    def __dealloc__(self):
        st_team_destroy(self.call.team)
        st_pager_destroy(self.call.pager)
        st_reader_close(self.reader)
        free(self.call.layers)
        free(self.call.experts)
        free(self.call.scratch)

    @property
    def kernels(self):
        """Name of the kernel table in use."""
        return self.call.kernels.name.decode()

    @property
    def bytes(self):
        """Bytes of weights and buffers that the engine owns (views of the file not counted)."""
        return self.arena.bytes

    cdef int make_matrix(self, Matrix *m, int type, int64_t rows, int64_t cols, data, int64_t unit,
                         bint view) except -1:
        """Packs (or keeps as rows) one matrix. unit: rows one work unit takes, which must suit the tiles."""
        cdef const uint8_t[::1] src = data
        cdef uint8_t *dst
        cdef size_t size
        if <size_t>src.shape[0] != st_row_bytes(type, cols) * rows:
            raise ValueError("matrix bytes do not match its shape and type")
        m.type, m.rows, m.cols = type, rows, cols
        if not self.exact and not view and type in (ST_Q4_0, ST_Q8_0) and unit % ST_TILE_ROWS == 0:
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
        self.make_matrix(&self.call.embedding, type, self.call.s.vocab, self.call.s.d, data, ST_TILE_ROWS, view)

    def set_head(self, norm, type=None, data=None):
        """output_norm, and output; without a matrix the embedding serves as the head (tied)."""
        self.call.output_norm = self.make_vector(norm, self.call.s.d)
        if data is None:
            self.call.head = self.call.embedding
        else:
            self.make_matrix(&self.call.head, type, self.call.s.vocab, self.call.s.d, data, ST_TILE_ROWS, False)

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
        cdef int64_t tiles = (s.f + ST_TILE_ROWS - 1) // ST_TILE_ROWS
        cdef size_t gs = g.shape[0] // E, us = u.shape[0] // E, ds = d.shape[0] // E, gate_bytes, size
        cdef uint8_t *blob
        cdef int64_t down_cols = s.d if s.down_transposed else s.f
        cdef int64_t down_rows_ = s.f if s.down_transposed else s.d
        layer.gate_type, layer.up_type, layer.down_type = gate[0], up[0], down[0]
        if (st_row_bytes(layer.gate_type, s.d) * s.f * E != <size_t>g.shape[0]
                or st_row_bytes(layer.up_type, s.d) * s.f * E != <size_t>u.shape[0]
                or st_row_bytes(layer.down_type, down_cols) * down_rows_ * E != <size_t>d.shape[0]):
            raise ValueError("expert bytes do not match their shape and type")
        layer.expert_layout = self.expert_layout(layer)
        gate_bytes, size = gs, gs + us + ds
        if layer.expert_layout == EXPERT_PACKED:
            gate_bytes = st_tile16_bytes(ST_Q4_0, s.f, s.d)
            size = gate_bytes + us + st_down_bytes(s.d, s.f)
        size = (size + 63) // 64 * 64
        blob = <uint8_t *>self.arena.take(size * E)
        with nogil:
            for e in range(E):
                self.call.experts[l * E + e] = blob
                if layer.expert_layout == EXPERT_PACKED:
                    st_pack_tile16(ST_Q4_0, &g[e * gs], s.f, s.d, blob, 0, tiles)
                    st_pack_rows_q4_0(&u[e * us], s.f, s.d, blob + gate_bytes)
                    st_pack_down_q4_0(&d[e * ds], s.d, s.f, blob + gate_bytes + us)
                else:
                    memcpy(blob, &g[e * gs], gs)
                    memcpy(blob + gs, &u[e * us], us)
                    memcpy(blob + gs + us, &d[e * ds], ds)
                blob += size

    def page_experts(self, path, offsets, size_t blob_bytes, int64_t slots, types, *, io_threads=4, policy=None):
        """Takes the experts from a packed file instead of set_experts().

        Args:
            path: the packed file. offsets: int64 [L * E], where each expert's blob starts; multiples of 4096.
            blob_bytes: of one expert, a multiple of 4096. slots: how many are kept in memory, at least E.
            types: per layer, the type numbers of gate, up and down.
            io_threads: reads in flight at once. policy: an eviction policy ("frequency" or "lru"); None: the best.

        Raises OSError where the file cannot be opened, ValueError for an unknown policy or too few slots.
        """
        cdef const int64_t[::1] table = offsets
        cdef st_pager_config config
        cdef int64_t l
        cdef int64_t experts = self.call.s.n_layers * self.call.s.experts
        if slots < self.call.s.experts or blob_bytes % 4096 or table.shape[0] != experts:
            raise ValueError("too few slots, or sizes that do not fit the model")
        for l in range(self.call.s.n_layers):
            layer = &self.call.layers[l]
            layer.gate_type, layer.up_type, layer.down_type = types[l]
            layer.expert_layout = self.expert_layout(layer)
        name = os.fsencode(path)
        self.reader = st_reader_open(name)
        if self.reader == NULL:
            raise OSError(errno, os.strerror(errno), os.fspath(path))
        encoded = policy.encode() if policy is not None else b""
        config.read, config.source = st_reader_read, self.reader
        config.experts, config.offsets, config.bytes = table.shape[0], &table[0], blob_bytes
        config.memory = <uint8_t *>self.arena.take(slots * blob_bytes)
        config.slots, config.io_threads = slots, io_threads
        config.policy = NULL
        if policy is not None:
            config.policy = encoded
        self.call.pager = st_pager_create(&config)
        if self.call.pager == NULL:
            raise ValueError(f"cannot start the pager: unknown policy {policy!r}, or no memory")
        self.slots = slots

    cdef int expert_layout(self, Layer *layer) noexcept:
        cdef Shape *s = &self.call.s
        if (not self.exact and not s.down_transposed and s.f % 32 == 0
                and layer.gate_type == layer.up_type == layer.down_type == ST_Q4_0):
            return EXPERT_PACKED
        return EXPERT_ROWS

    def pager_stats(self):
        """Counts since the model was opened, or None without a pager; stall_seconds is summed over threads."""
        cdef st_pager_stats stats
        if self.call.pager == NULL:
            return None
        st_pager_get_stats(self.call.pager, &stats)
        return {
            "slots": self.slots, "hits": stats.hits, "misses": stats.misses, "evictions": stats.evictions,
            "bytes_read": stats.bytes_read, "read_errors": stats.read_errors, "stall_seconds": stats.stall_ns / 1e9,
            "direct_io": bool(st_reader_direct(self.reader)),
        }

    cdef int64_t check_layer(self, int64_t l) except -1:
        if not 0 <= l < self.call.s.n_layers:
            raise ValueError(f"no layer {l}")
        return l

    cdef int fill_rope(self, float *table, double theta, int64_t position, int64_t n) except -1:
        cdef int64_t t, i, half = self.call.rope_half
        cdef double angle
        for t in range(n):
            for i in range(half):
                angle = (position + t) * pow(theta, -<double>i / half)
                table[2 * (t * half + i)] = <float>cos(angle)
                table[2 * (t * half + i) + 1] = <float>sin(angle)
        return 0

    def decode(self, KVCache cache not None, tokens, logits):
        """Runs at most `batch` tokens at the cache's position and advances it.

        Args:
            cache: of this engine, with room for the tokens.
            tokens: int32 [n], 1 <= n <= batch, each below the vocabulary's size.
            logits: float32 [n, V] for all tokens, [1, V] for the last one, or None; filled in place.

        Raises ExpertReadError when experts cannot be read: the cache's position stays, and decoding may be retried.
        """
        cdef Call *c = &self.call
        cdef const int32_t[::1] ids = tokens
        cdef float[:, ::1] out
        cdef int64_t n = ids.shape[0], i
        if not 1 <= n <= c.s.batch or cache.position + n > cache.context:
            raise ValueError("too many tokens, or none")
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
        self.size_partials(cache.context)
        c.tokens, c.n, c.position = &ids[0], n, cache.position
        c.cache_k, c.cache_v, c.capacity = cache.k, cache.v, cache.capacity
        self.fill_rope(c.rope, self.config.rope_theta, cache.position, n)
        self.fill_rope(c.rope_window, self.config.rope_theta_swa, cache.position, n)
        c.failed = 0
        with nogil:
            st_team_run(c.team, forward, c)
            if c.pager != NULL:
                st_pager_release(c.pager, c.held, c.n_held)
                c.n_held = 0
        if c.failed:
            raise ExpertReadError("expert weights could not be read from the model file; nothing was decoded")
        c.clock += n
        cache.position += n

    cdef int size_partials(self, int64_t context) except -1:
        """Room for the unmerged attention chunks of the longest context seen."""
        cdef Call *c = &self.call
        cdef int64_t chunks = (context + ST_ATTN_CHUNK - 1) // ST_ATTN_CHUNK + 1, parts
        if chunks <= c.max_chunks:
            return 0
        parts = max(<int64_t>self.threads, c.s.kv_heads) * chunks * (c.s.heads // c.s.kv_heads)
        arena = Arena()
        c.partial = <float *>(<Arena>arena).take(parts * c.s.hd * 4)
        c.partial_m = <float *>(<Arena>arena).take(parts * 4)
        c.partial_l = <float *>(<Arena>arena).take(parts * 4)
        self.partials = arena
        c.max_chunks = chunks
        return 0
