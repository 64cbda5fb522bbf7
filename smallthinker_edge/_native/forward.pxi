# The forward pass, nogil: what the threads of a team do together for one decode call. Included by engine.pyx, which
# owns the memory behind every pointer here. Phases are separated by barriers; within one, each thread works through its
# share of the units, and no unit's result depends on who computed it or with which other tokens.

cdef enum:
    TILE = 1   # Tile16 of a tiled type, integer kernels
    ROWS = 2   # rows as in GGUF, dequantised one at a time, float arithmetic
    SPARSE_ROWS = 3  # a sparse type in the Rows layout, integer kernels: where few rows of many are read
    FEW_TOKENS = 8  # up to which experts are read once, gate to down (docs/performance.md, short batches)
    GENERIC_CHUNK = 256  # outputs of one down unit over GGUF rows; a multiple of every block size
    LOOK_NS = 50000000  # between two looks for Ctrl-C and at the cancel signal
    UNITS_A_LOOK = 8  # of thread 0 in decoding, between two looks at the clock

cdef struct Matrix:
    int layout
    int type
    int tiled             # st_tiled(type)
    int64_t rows
    int64_t cols
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
    st_expert expert    # every expert's blob

cdef struct Shape:
    int64_t n_layers, d, heads, kv_heads, hd, experts, used, f, vocab, batch
    int64_t d_padded, groups, ffn_parts, nb_d, down_units, down_step
    float eps
    int softmax
    int down_transposed

# A page of the KV cache: 256 positions of one layer.
cdef struct KVPage:
    int type              # ST_F16 or ST_Q8_0
    size_t head_bytes     # the keys or the values of one head
    size_t bytes

# What one thread needs for itself.
cdef struct Scratch:
    float *norm           # [max(d, H*hd)]
    st_q8x4 *xq           # the same, quantised
    const st_q8x4 **rows  # [batch] pointers handed to the GEMMs
    st_neurons neurons[4]  # on their way through the FFN of a few tokens
    st_neurons *stage[4]   # which of them is where; NULL: none
    float *gate           # [batch][32]
    float *row            # one dequantised row
    int32_t *keys         # [E] of top_k
    float *scores         # [2 * G][256], or one head
    st_q8x4 *head         # one head's keys or values, quantised
    int32_t *selected     # [batch] rows of the LM head that this thread has selected
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
    Matrix predictor_in   # [K, d]; cols 0 where the file has none
    Matrix predictor_out  # [V, K]
    int sparse_head       # this call computes only the rows whose score is above the threshold
    float head_threshold
    float *z              # [n][K] predictor_in . x
    st_q8x4 *zq           # [n][nq_z]
    int64_t nq_z
    Scratch *scratch
    const int32_t *tokens
    int64_t n, position
    int all_logits
    int failed            # an expert could not be read
    void *engine          # whose interrupt look_up() sets
    int64_t look_at       # when it is to look again, on the monotonic clock
    int64_t units_taken   # by thread 0
    KVPage full_page, ring_page
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
    int32_t *order        # places in active_expert, experts that are in memory first
    int64_t n_active
    float *q              # [n][H*hd]
    float *attn           # [n][H*hd]
    float *partial        # [unit][G][hd] of one token (n == 1), or of one thread
    float *partial_m
    float *partial_l
    int64_t max_chunks
    float *kv             # [2 * kv_heads][n][hd]
    float *rope           # [n][cos, sin][rope_dim/2]
    float *rope_window    # the same for window layers; rope itself where theta does not differ
    int64_t rope_half
    st_active *active     # [n*K][groups]
    st_fired *fired       # the same where down is transposed
    float *parts          # [FEW_TOKENS * K * ffn_parts][d_padded]: what each part of an expert adds, not yet weighted
    float *h              # [n*K][f], where experts stay in GGUF rows
    float *logits


# ---------------------------------------------------------------- units of work

cdef int64_t nanoseconds() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec


cdef inline int64_t next_unit(Call *c, int tid) noexcept nogil:
    """The next unit of this phase for a thread, -1 where there is none. Thread 0, the caller's, looks now and then
    whether it should go on."""
    if tid == 0:
        c.units_taken += 1
        if c.n > 1 or c.units_taken % UNITS_A_LOOK == 0:
            look_up(c)
    return st_team_next(c.team, tid)


cdef bint look_up(Call *c) noexcept nogil:
    """Looks for Ctrl-C and at the cancel signal, at most every LOOK_NS; stops the team and says so where one came."""
    cdef int64_t now = nanoseconds()
    if now < c.look_at:
        return False
    c.look_at = now + LOOK_NS
    if not interrupted(c):
        return False
    st_team_stop(c.team)
    return True


cdef bint interrupted(Call *c) noexcept with gil:
    cdef Engine engine = <Engine>c.engine
    try:
        PyErr_CheckSignals()
        if engine.cancel is not None and engine.cancel.is_set():
            raise DecodeCancelled("decoding was cancelled")
    except BaseException as error:  # decode() raises it, when the threads have come back
        engine.interrupt = error
    return engine.interrupt is not None


# ---------------------------------------------------------------- matrices

cdef inline void dequantize(Call *c, int type, const uint8_t *row, int64_t cols, float *out) noexcept nogil:
    if type == ST_F16:
        c.kernels.from_f16(<const uint16_t *>row, out, cols)
    else:
        st_dequantize_row(type, row, cols, out)


cdef void mat_unit(Call *c, const Matrix *m, int64_t r0, int64_t r1, const st_q8x4 *const *xq, const float *xf,
                   int64_t ldx, int64_t n, float *y, int64_t ldy, Scratch *s) noexcept nogil:
    """y[i * ldy + r - r0] = W[r] . x[i] for rows r0..r1 (r0 a multiple of 16 for TILE)."""
    cdef int64_t r, i
    cdef size_t row_bytes
    cdef int32_t index[64]
    if m.layout == SPARSE_ROWS:
        for r in range(r0, r1):
            index[(r - r0) % 64] = <int32_t>r
            if (r - r0) % 64 == 63 or r == r1 - 1:
                for i in range(n):
                    c.kernels.rows[m.tiled](m.data, m.cols // 32, index, (r - r0) % 64 + 1, xq[i],
                                            y + i * ldy + (r - r0) // 64 * 64)
        return
    if m.layout == TILE:
        c.kernels.gemm[m.tiled](m.data, r1, m.cols // 32, r0 // 16, (r1 + 15) // 16, xq, n, y, ldy)
        return
    row_bytes = st_row_bytes(m.type, m.cols)
    for r in range(r0, r1):
        dequantize(c, m.type, m.data + r * row_bytes, m.cols, s.row)
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
            t = next_unit(c, tid)
            if t < 0:
                break
            prepare(c, s, norm_weight, t)
        st_team_barrier(c.team, units)
        for t in range(c.n):
            s.rows[t] = c.xq + t * c.nq
        xf[0] = c.hidden
    xq[0] = s.rows


# ---------------------------------------------------------------- the whole pass

cdef void embed(Call *c, int tid, Scratch *s, int64_t next_units) noexcept nogil:
    cdef int64_t t
    cdef const Matrix *m = &c.embedding
    cdef uint8_t *row
    while True:
        t = next_unit(c, tid)
        if t < 0:
            break
        if m.layout == TILE:
            st_dequantize_tile16_row(m.type, m.data, m.cols, c.tokens[t], c.x + t * c.s.d_padded)
        elif m.layout == SPARSE_ROWS:
            row = <uint8_t *>s.row
            st_unpack_rows(m.type, m.data + c.tokens[t] * st_row_bytes(m.type, m.cols), 1, m.cols, row)
            st_dequantize_row(m.type, row, m.cols, c.x + t * c.s.d_padded)
        else:
            st_dequantize_row(m.type, m.data + c.tokens[t] * st_row_bytes(m.type, m.cols), m.cols,
                              c.x + t * c.s.d_padded)
    st_team_barrier(c.team, next_units)


cdef int64_t projection_units(Call *c) noexcept nogil:
    return c.n * ((c.s.experts + 7) // 8) + ahead_units(c) + c.s.heads + 2 * c.s.kv_heads


cdef void projection_phase(Call *c, Layer *layer, int64_t l, int tid, Scratch *s) noexcept nogil:
    """The router, q, k and v."""
    cdef const st_q8x4 *const *xq
    cdef const float *xf
    cdef int64_t u, routers = c.n * ((c.s.experts + 7) // 8), ahead = ahead_units(c)
    inputs(c, s, tid, layer.attn_norm, projection_units(c), &xq, &xf)
    while True:
        u = next_unit(c, tid)
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
    embed(c, tid, s, next_units)
    for l in range(c.s.n_layers):
        layer = c.layers + l
        projection_phase(c, layer, l, tid, s)
        st_team_barrier(c.team, attention_units(c, layer))
        if st_team_stopped(c.team):
            return
        attention_phase(c, layer, l, tid, s)
        st_team_barrier(c.team, output_units(c) if c.n == 1 else c.n + 1)
        if st_team_stopped(c.team):
            return
        output_phase(c, layer, l, tid, s)
        st_team_barrier(c.team, shared_inputs(c, neuron_units(c, layer)))
        if st_team_stopped(c.team):
            return
        if l == c.s.n_layers - 1:
            next_units = shared_inputs(c, first_head_units(c))
        if not expert_phases(c, layer, l, tid, s, next_units):
            if tid == 0:
                c.failed = 1
            return
        if st_team_stopped(c.team):
            return
    if c.logits != NULL:
        head_phase(c, tid, s)
