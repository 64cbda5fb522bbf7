# The forward pass, nogil: what the threads of a team do together for one decode call. Included by engine.pyx, which
# owns the memory behind every pointer here. Phases are separated by barriers; within one, each thread works through its
# share of the units, and no unit's result depends on who computed it or with which other tokens.

cdef enum:
    TILE = 1   # Tile16 of Q4_0, Q8_0 or Q6_K, integer kernels
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
    int64_t kv_index    # its page in a KV block: among the full layers, or among the window layers
    int expert_layout
    int gate_type
    int up_type
    int down_type

cdef struct Shape:
    int64_t n_layers, d, heads, kv_heads, hd, experts, used, f, vocab, batch, context
    int64_t d_padded, groups, nb_d, nb_o, down_units, down_step
    float eps
    int softmax
    int down_transposed

# 32 neurons of one expert for one token, whose gate is known; up is still to be computed.
cdef struct Pending:
    int64_t slot          # -1: none
    int64_t group
    int64_t fired         # neurons whose gate is positive
    const uint8_t *up     # the expert's up rows
    int32_t index[32]     # the neurons that fired
    float gate[32]

# What one thread needs for itself.
cdef struct Scratch:
    float *norm           # [max(d, H*hd)]
    st_q8x4 *xq           # the same, quantised
    const st_q8x4 **rows  # [batch] pointers handed to the GEMMs
    float *gate           # [batch][32]
    float *up             # [32]
    Pending pending[2]    # the unit whose gate is computed last, and the one before
    float *row            # one dequantised row
    float *scores         # [2 * G][256], or one head
    st_q8x4 *head         # one head's keys or values, quantised
    const st_q8x4 **queries  # [2 * G] pointers into q8
    float *out            # [batch][64]: a unit's output before it is added to x

# One decode call; the team's threads share it.
cdef struct Call:
    Shape s
    const st_kernels *kernels
    st_team *team
    int64_t team_size
    Layer *layers
    const uint8_t **experts  # [L * E]; NULL where a pager holds them
    st_pager *pager
    int32_t *held         # pager ids pinned for the layer in work
    int64_t n_held
    int32_t *held_tokens  # how many tokens use each
    double clock          # tokens that this engine has computed
    int64_t ahead         # layers whose routers are asked before their turn; 0 reads nothing ahead
    float *ahead_logits   # [ahead][E] of one token
    int32_t *ahead_ids    # [ahead * E]
    int32_t *trace        # [n][L][K] chosen experts of this call, or NULL
    Matrix embedding, head
    float *output_norm
    Scratch *scratch
    const int32_t *tokens
    int64_t n, position
    int all_logits
    int failed            # an expert could not be read
    int kv_type           # ST_F16 or ST_Q8_0
    size_t kv_head_bytes, kv_page_bytes
    uint8_t **kv_full     # block of full layers by position // 256
    uint8_t **kv_ring     # block of window layers by position // 256 % ring
    int64_t ring
    st_q8x4 *q8           # [n][heads][query, its rest][nq_head], for a Q8_0 cache
    int64_t nq_head
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
        elif m.type == ST_Q6_K:
            c.kernels.gemm_q6_k(m.data, r1, m.cols // 32, r0 // 16, (r1 + 15) // 16, xq, n, y, ldy)
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


cdef int64_t shared_inputs(Call *c, int64_t units) noexcept nogil:
    """Units of the phase that starts with inputs(), before `units` units: prompts first normalise each token once."""
    return units if c.n == 1 else c.n


cdef void inputs(Call *c, Scratch *s, int tid, const float *norm_weight, int64_t units, const st_q8x4 *const **xq,
                 const float **xf) noexcept nogil:
    """What the next GEMM reads, before `units` units. One token: every thread makes its own copy, which is cheaper
    than a barrier."""
    cdef int64_t t
    if c.n == 1:
        c.kernels.rmsnorm(c.x, norm_weight, c.s.d, c.s.eps, s.norm)
        c.kernels.quantize(s.norm, c.s.d // 32 * 32, s.xq)
        s.rows[0] = s.xq
        xf[0] = s.norm
    else:
        while True:
            t = st_team_next(c.team, tid)
            if t < 0:
                break
            prepare(c, s, norm_weight, t)
        st_team_barrier(c.team, units)
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


cdef uint8_t *kv_head(Call *c, Layer *layer, int64_t p, int64_t unit) noexcept nogil:
    """Keys (unit = 2 * KV head) or values (one more) of the page that holds position p."""
    cdef int64_t block = p // ST_ATTN_CHUNK
    cdef uint8_t *data = c.kv_ring[block % c.ring] if layer.window else c.kv_full[block]
    return data + layer.kv_index * c.kv_page_bytes + unit * c.kv_head_bytes


cdef void store(Call *c, Layer *layer, int64_t p, int64_t unit, const float *x, Scratch *s) noexcept nogil:
    """Writes one head's key or value of position p."""
    cdef uint8_t *page = kv_head(c, layer, p, unit)
    cdef int64_t slot = p % ST_ATTN_CHUNK, hd = c.s.hd
    if c.kv_type == ST_F16:
        c.kernels.to_f16(x, <uint16_t *>page + slot * hd, hd)
        return
    c.kernels.quantize(x, hd, s.head)
    if unit % 2 == 0:
        st_kv_store_q8_key(s.head, hd, slot, page)
    else:
        st_kv_store_q8_value(s.head, hd, slot, page)


cdef void projection_unit(Call *c, Layer *layer, int64_t unit, const st_q8x4 *const *xq,
                          const float *xf, Scratch *s) noexcept nogil:
    """One head of q, k or v for all tokens; k and v go to the cache."""
    cdef int64_t hd = c.s.hd, t, head
    cdef float *out
    cdef st_q8x4 *query
    cdef int64_t ld = c.s.heads * hd
    cdef float *rope = c.rope_window if layer.window else c.rope
    if unit < c.s.heads:
        out = c.q + unit * hd
        mat_unit(c, &layer.q, unit * hd, unit * hd + hd, xq, xf, c.s.d, c.n, out, ld, s)
        if layer.rope:
            for t in range(c.n):
                rotate(rope + t * 2 * c.rope_half, c.rope_half, out + t * ld)
        if c.kv_type == ST_Q8_0:
            for t in range(c.n):
                query = c.q8 + 2 * (t * c.s.heads + unit) * c.nq_head
                c.kernels.quantize(out + t * ld, hd, query)
                st_kv_query_rest(out + t * ld, query, hd, s.scores)
                c.kernels.quantize(s.scores, hd, query + c.nq_head)
        return
    unit -= c.s.heads
    head = unit // 2
    out = c.kv + unit * hd * c.n
    mat_unit(c, &layer.k if unit % 2 == 0 else &layer.v, head * hd, head * hd + hd, xq, xf, c.s.d, c.n, out, hd, s)
    for t in range(c.n):
        if layer.rope and unit % 2 == 0:
            rotate(rope + t * 2 * c.rope_half, c.rope_half, out + t * hd)
        store(c, layer, c.position + t, unit, out + t * hd, s)


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


cdef int64_t ahead_units(Call *c) noexcept nogil:
    """Units of work that look ahead, in every layer alike: those past the last layer do nothing."""
    return c.ahead * ((c.s.experts + 7) // 8) if c.pager != NULL and c.n == 1 else 0


cdef void ahead_unit(Call *c, int64_t l, int64_t unit) noexcept nogil:
    """Eight logits of a later layer's router for this layer's residual: the best guess there is of its choice."""
    cdef int64_t per = (c.s.experts + 7) // 8, j = unit // per, e, e0 = unit % per * 8
    cdef const float *router
    if l + 1 + j >= c.s.n_layers:
        return
    router = c.layers[l + 1 + j].router
    for e in range(e0, min(e0 + 8, c.s.experts)):
        c.ahead_logits[j * c.s.experts + e] = c.kernels.dot(router + e * c.s.d, c.x, c.s.d)


cdef void read_ahead(Call *c, int64_t l) noexcept nogil:
    """Names the experts that the next layers will probably choose; in a prompt, all of the next layer's."""
    cdef int64_t E = c.s.experts, n = 0, j, k, e, best, layers = min(c.ahead, c.s.n_layers - 1 - l)
    cdef float *logits
    if c.ahead == 0:
        return
    if c.n > 1:
        if layers > 0 and c.n * c.s.used >= E:
            for e in range(E):
                c.ahead_ids[e] = <int32_t>((l + 1) * E + e)
            n = E
        layers = 0
    for j in range(layers):
        logits = c.ahead_logits + j * E
        for k in range(c.s.used):
            best = 0
            for e in range(1, E):
                if logits[e] > logits[best]:
                    best = e
            logits[best] = -INFINITY
            c.ahead_ids[n] = <int32_t>((l + 1 + j) * E + best)
            n += 1
    st_pager_ahead(c.pager, c.ahead_ids, n)


cdef void page_in(Call *c, int64_t l) noexcept nogil:
    """Lets go of the last layer's experts and asks for this layer's; one thread, as soon as they are known."""
    cdef int64_t i, e, n = 0
    cdef int progress
    list_tokens(c)
    if c.trace != NULL:
        for i in range(c.n):
            memcpy(c.trace + (i * c.s.n_layers + l) * c.s.used, c.chosen + i * c.s.used, c.s.used * sizeof(int32_t))
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
    read_ahead(c, l)
    # Those in memory first, then what is being read. One look at each: it may arrive between two looks.
    for i in range(c.n_active):
        c.held_tokens[i] = st_pager_progress(c.pager, c.held[i])
    for progress in range(2, -1, -1):
        for i in range(c.n_active):
            if c.held_tokens[i] == progress:
                c.order[n] = c.active_expert[i]
                n += 1


cdef const uint8_t *expert_blob(Call *c, int64_t l, int64_t e) noexcept nogil:
    """The weights of an expert, waiting for them; NULL where they cannot be read."""
    if c.pager == NULL:
        return c.experts[l * c.s.experts + e]
    return st_pager_take(c.pager, <int32_t>(l * c.s.experts + e))


cdef const st_kernels *attention_q8_table(const st_kernels *table) noexcept nogil:
    """The table, or plain C where it has no attention over Q8_0."""
    return table if table.attention_q8 != NULL else &st_kernels_ref


cdef void attention_chunk(Call *c, Layer *layer, int64_t t, int64_t kv, int64_t chunk, float *acc, float *m,
                          float *lsum, Scratch *s) noexcept nogil:
    """Positions of one page that token t may see, for the heads of one KV head."""
    cdef int64_t hd = c.s.hd, G = c.s.heads // c.s.kv_heads, p = c.position + t, g
    cdef int64_t start = chunk * ST_ATTN_CHUNK, p0 = 0, p1 = min(ST_ATTN_CHUNK, p + 1 - start)
    cdef const uint8_t *k = kv_head(c, layer, start, 2 * kv)
    cdef const uint8_t *v = kv_head(c, layer, start, 2 * kv + 1)
    cdef float scale = 1 / sqrtf(<float>hd)
    if layer.window:
        p0 = max(0, p - layer.window + 1 - start)
    if c.kv_type == ST_F16:
        c.kernels.attention(c.q + (t * c.s.heads + kv * G) * hd, G, hd, <const uint16_t *>k + p0 * hd,
                            <const uint16_t *>v + p0 * hd, p1 - p0, scale, s.scores, acc, m, lsum)
        return
    for g in range(G):
        s.queries[g] = c.q8 + 2 * (t * c.s.heads + kv * G + g) * c.nq_head
        s.queries[G + g] = s.queries[g] + c.nq_head
    attention_q8_table(c.kernels).attention_q8(s.queries, G, hd, k, v, p0, p1, scale, s.scores, acc, m, lsum)


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


cdef int64_t attention_units(Call *c, Layer *layer) noexcept nogil:
    if c.n > 1:
        return c.n * (1 + c.s.kv_heads)
    return 1 + (c.position // ST_ATTN_CHUNK - first_chunk(layer, c.position) + 1) * c.s.kv_heads


cdef void attention_phase(Call *c, Layer *layer, int64_t l, int tid, Scratch *s) noexcept nogil:
    cdef int64_t G = c.s.heads // c.s.kv_heads, hd = c.s.hd, u, t, kv, i, chunk0, chunks, base
    if c.n == 1:
        chunk0 = first_chunk(layer, c.position)
        chunks = c.position // ST_ATTN_CHUNK - chunk0 + 1
        while True:
            u = st_team_next(c.team, tid)
            if u < 0:
                break
            if u == 0:
                choose_experts(c, 0)
                page_in(c, l)
                continue
            kv = (u - 1) // chunks
            i = (u - 1) % chunks
            base = (kv * c.max_chunks + i) * G
            attention_chunk(c, layer, 0, kv, chunk0 + i, c.partial + base * hd, c.partial_m + base,
                            c.partial_l + base, s)
        return
    while True:
        u = st_team_next(c.team, tid)
        if u < 0:
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
            attention_chunk(c, layer, t, kv, chunk0 + i, c.partial + (base + i * G) * hd,
                            c.partial_m + base + i * G, c.partial_l + base + i * G, s)
        merge_chunks(c, c.partial + base * hd, c.partial_m + base, c.partial_l + base, chunks, G,
                     c.attn + (t * c.s.heads + kv * G) * hd)


cdef int64_t output_units(Call *c) noexcept nogil:
    return (c.s.d + 63) // 64


cdef void output_phase(Call *c, Layer *layer, int64_t l, int tid, Scratch *s) noexcept nogil:
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
            t = st_team_next(c.team, tid)
            if t < 0:
                break
            if t == 0:
                page_in(c, l)
            else:
                c.kernels.quantize(c.attn + (t - 1) * width, width // 32 * 32, c.xq + (t - 1) * c.nq)
        st_team_barrier(c.team, output_units(c))
        for t in range(c.n):
            s.rows[t] = c.xq + t * c.nq
        xf = c.attn
    while True:
        u = st_team_next(c.team, tid)
        if u < 0:
            break
        r0 = u * 64
        r1 = min(r0 + 64, c.s.d)
        mat_unit(c, &layer.o, r0, r1, s.rows, xf, width, c.n, s.out, 64, s)
        for t in range(c.n):
            for r in range(r1 - r0):
                c.x[t * c.s.d_padded + r0 + r] += s.out[t * 64 + r]


# ---------------------------------------------------------------- experts

cdef void neurons_packed(Call *c, const uint8_t *blob, int64_t e, int64_t g, const st_q8x4 *const *xq,
                         Scratch *s) noexcept nogil:
    """Gate of 32 neurons for every token of the expert, then up only where the gate is positive."""
    cdef int64_t i, m = c.list_start[e + 1] - c.list_start[e], tile_bytes = c.s.nb_d * ST_TILE_Q4_0_BYTES
    cdef int32_t *slots = c.list_slot + c.list_start[e]
    cdef Pending *p = s.pending
    cdef float value[32]
    for i in range(m):
        s.rows[c.s.batch + i] = xq[slots[i] // c.s.used]
    c.kernels.gemm_q4_0(blob, c.s.f, c.s.nb_d, 2 * g, 2 * g + 2, s.rows + c.s.batch, m, s.gate, 32)
    for i in range(m):
        fill_pending(p, s.gate + i * 32, slots[i], g, blob + c.s.groups * 2 * tile_bytes)
        c.kernels.rows_q4_0(p.up, c.s.nb_d, p.index, p.fired, s.rows[c.s.batch + i], value)
        finish_pending(c, p, value, s)


cdef void fill_pending(Pending *p, const float *gate, int64_t slot, int64_t g, const uint8_t *up) noexcept nogil:
    cdef int64_t j
    p.slot, p.group, p.up, p.fired = slot, g, up, 0
    memcpy(p.gate, gate, 32 * sizeof(float))
    for j in range(32):
        if not gate[j] <= 0:
            p.index[p.fired] = <int32_t>(32 * g + j)
            p.fired += 1


cdef void finish_pending(Call *c, Pending *p, const float *value, Scratch *s) noexcept nogil:
    """value: up of the neurons that fired."""
    cdef int64_t j
    memset(s.up, 0, 32 * sizeof(float))
    for j in range(p.fired):
        s.up[p.index[j] - 32 * p.group] = value[j]
    c.kernels.activate(p.gate, s.up, c.active + p.slot * c.s.groups + p.group)


cdef void neurons_decode(Call *c, const uint8_t *blob, int64_t e, int64_t g, Scratch *s) noexcept nogil:
    """The same for one token, three units deep: this one's gate is computed, the rows of the unit before are
    prefetched, those of the unit before that are computed. blob NULL: no unit is left, finish the pending ones."""
    cdef int64_t tile_bytes = c.s.nb_d * ST_TILE_Q4_0_BYTES
    cdef Pending *last = &s.pending[0]
    cdef Pending *first = &s.pending[1]
    cdef float value[32]
    cdef int64_t n = first.fired if first.slot >= 0 else 0, n_ahead = last.fired if last.slot >= 0 else 0
    if blob != NULL:
        c.kernels.gate_up_q4_0(blob + 2 * g * tile_bytes, c.s.nb_d, s.xq, s.gate, first.up, first.index, n, value,
                               last.up, last.index, n_ahead)
    elif n:
        c.kernels.rows_q4_0(first.up, c.s.nb_d, first.index, n, s.xq, value)
    if first.slot >= 0:
        finish_pending(c, first, value, s)
    first[0] = last[0]
    last.slot = -1
    if blob != NULL:
        fill_pending(last, s.gate, c.list_slot[c.list_start[e]], g, blob + c.s.groups * 2 * tile_bytes)


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


cdef void down_packed(Call *c, const uint8_t *blob, int64_t e, int64_t unit) noexcept nogil:
    cdef int64_t i, m = c.list_start[e + 1] - c.list_start[e], groups = c.s.groups
    cdef int64_t c0 = unit * c.s.down_step, c1 = min(c0 + c.s.down_step, (c.s.d + ST_DOWN_CHUNK - 1) // ST_DOWN_CHUNK)
    cdef int32_t *slots = c.list_slot + c.list_start[e]
    cdef const uint8_t *down = blob + c.s.groups * 2 * c.s.nb_d * ST_TILE_Q4_0_BYTES + c.s.f * c.s.nb_d * 18
    for i in range(m):
        c.kernels.down_q4_0(down, c.s.d, groups, c0, c1, c.active + slots[i] * groups, c.weight[slots[i]],
                            c.x + slots[i] // c.s.used * c.s.d_padded + c0 * ST_DOWN_CHUNK)


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


cdef int64_t expert_of_unit(Call *c, int64_t u, int64_t *g) noexcept nogil:
    """Which expert and which 32 neurons (g) unit u of the neuron phase is. Where the groups divide evenly, each thread
    has its part of every expert, experts in memory first: then all wait for the same missing one, and late."""
    cdef int64_t parts = c.team_size if c.s.groups % c.team_size == 0 else 1
    cdef int64_t width = c.s.groups // parts, part = u // (c.n_active * width), i = u % (c.n_active * width)
    g[0] = part * width + i % width
    return c.order[i // width]


cdef bint expert_phases(Call *c, Layer *layer, int64_t l, int tid, Scratch *s, int64_t next_units) noexcept nogil:
    """x += the experts' weighted outputs. False, for every thread alike, when an expert could not be read."""
    cdef const st_q8x4 *const *xq
    cdef const float *xf
    cdef const uint8_t *blob
    cdef int64_t u, i, e, g, units, packed = layer.expert_layout == EXPERT_PACKED
    inputs(c, s, tid, layer.ffn_norm, c.n_active * c.s.groups, &xq, &xf)
    s.pending[0].slot = s.pending[1].slot = -1
    while True:
        u = st_team_next(c.team, tid)
        if u < 0:
            break
        e = expert_of_unit(c, u, &g)
        blob = expert_blob(c, l, e)
        if blob == NULL:
            continue
        if packed and c.n == 1:
            neurons_decode(c, blob, e, g, s)
        elif packed:
            neurons_packed(c, blob, e, g, xq, s)
        else:
            neurons_rows(c, layer, blob, e, g, xf, s)
    if packed and c.n == 1:
        neurons_decode(c, NULL, 0, 0, s)
        neurons_decode(c, NULL, 0, 0, s)
    units = c.s.down_units if packed else (c.s.d + GENERIC_CHUNK - 1) // GENERIC_CHUNK
    st_team_barrier(c.team, units)
    for i in range(c.n_active):
        if expert_blob(c, l, c.active_expert[i]) == NULL:
            return False
    while True:
        u = st_team_next(c.team, tid)
        if u < 0:
            break
        for i in range(c.n_active):
            e = c.active_expert[i]
            blob = expert_blob(c, l, e)
            if packed:
                down_packed(c, blob, e, u)
            else:
                down_rows(c, layer, blob, e, u, s)
    st_team_barrier(c.team, next_units)
    return True


# ---------------------------------------------------------------- the whole pass

cdef void embed(Call *c, int tid, int64_t next_units) noexcept nogil:
    cdef int64_t t
    cdef const Matrix *m = &c.embedding
    while True:
        t = st_team_next(c.team, tid)
        if t < 0:
            break
        if m.layout == TILE:
            st_dequantize_tile16_row(m.type, m.data, m.cols, c.tokens[t], c.x + t * c.s.d_padded)
        else:
            st_dequantize_row(m.type, m.data + c.tokens[t] * st_row_bytes(m.type, m.cols), m.cols,
                              c.x + t * c.s.d_padded)
    st_team_barrier(c.team, next_units)


cdef int64_t head_units(Call *c) noexcept nogil:
    return (c.s.vocab + 255) // 256


cdef void head_phase(Call *c, int tid, Scratch *s) noexcept nogil:
    """Logits of the last token, or of all."""
    cdef const st_q8x4 *const *xq
    cdef const float *xf
    cdef int64_t u, r0, first = 0 if c.all_logits else c.n - 1, V = c.s.vocab
    inputs(c, s, tid, c.output_norm, head_units(c), &xq, &xf)
    while True:
        u = st_team_next(c.team, tid)
        if u < 0:
            break
        r0 = u * 256
        mat_unit(c, &c.head, r0, min(r0 + 256, V), xq + first, xf + first * c.s.d, c.s.d, c.n - first,
                 c.logits + r0, V, s)


cdef int64_t projection_units(Call *c) noexcept nogil:
    return c.n * ((c.s.experts + 7) // 8) + ahead_units(c) + c.s.heads + 2 * c.s.kv_heads


cdef void projection_phase(Call *c, Layer *layer, int64_t l, int tid, Scratch *s) noexcept nogil:
    """The router, q, k and v."""
    cdef const st_q8x4 *const *xq
    cdef const float *xf
    cdef int64_t u, routers = c.n * ((c.s.experts + 7) // 8), ahead = ahead_units(c)
    inputs(c, s, tid, layer.attn_norm, projection_units(c), &xq, &xf)
    while True:
        u = st_team_next(c.team, tid)
        if u < 0:
            break
        if u < routers:
            router_unit(c, layer, u)
        elif u - routers < ahead:
            ahead_unit(c, l, u - routers)
        else:
            projection_unit(c, layer, u - routers - ahead, xq, xf, s)


cdef void forward(void *arg, int tid) noexcept nogil:
    cdef Call *c = <Call *>arg
    cdef Scratch *s = c.scratch + tid
    cdef Layer *layer
    cdef int64_t l, next_units = shared_inputs(c, projection_units(c))
    embed(c, tid, next_units)
    for l in range(c.s.n_layers):
        layer = c.layers + l
        projection_phase(c, layer, l, tid, s)
        st_team_barrier(c.team, attention_units(c, layer))
        attention_phase(c, layer, l, tid, s)
        st_team_barrier(c.team, output_units(c) if c.n == 1 else c.n + 1)
        output_phase(c, layer, l, tid, s)
        st_team_barrier(c.team, shared_inputs(c, c.n_active * c.s.groups))
        if l == c.s.n_layers - 1:
            next_units = shared_inputs(c, head_units(c))
        if not expert_phases(c, layer, l, tid, s, next_units):
            if tid == 0:
                c.failed = 1
            return
    if c.logits != NULL:
        head_phase(c, tid, s)
