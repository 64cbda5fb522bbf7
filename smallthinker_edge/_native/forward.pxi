# The forward pass, nogil: what the threads of a team do together for one decode call. Included by engine.pyx, which
# owns the memory behind every pointer here. Phases are separated by barriers; within one, threads claim units of
# work, and no unit's result depends on who computed it or with which other tokens.

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
