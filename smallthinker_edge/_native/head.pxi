# The forward pass, part: the LM head, whole or only the rows that the file's predictor selects. Included by engine.pyx
# after forward.pxi, whose structs it reads.

cdef enum:
    HEAD_ROWS = 256  # vocabulary rows of one unit


cdef int64_t head_units(Call *c) noexcept nogil:
    return (c.s.vocab + HEAD_ROWS - 1) // HEAD_ROWS


cdef int64_t first_head_units(Call *c) noexcept nogil:
    """Units of the head's first phase."""
    return (c.predictor_in.rows + ST_TILE_ROWS - 1) // ST_TILE_ROWS if c.sparse_head else head_units(c)


cdef void head_phase(Call *c, int tid, Scratch *s) noexcept nogil:
    """Logits of the last token, or of all."""
    cdef const st_q8x4 *const *xq
    cdef const float *xf
    cdef int64_t u, first = 0 if c.all_logits else c.n - 1
    inputs(c, s, tid, c.output_norm, first_head_units(c), &xq, &xf)
    xq += first
    xf += first * c.s.d
    if c.sparse_head:
        sparse_head_phases(c, tid, xq, xf, c.n - first, s)
        return
    while True:
        u = next_unit(c, tid)
        if u < 0:
            break
        head_unit(c, u, xq, xf, c.n - first, c.logits, s)


cdef void head_unit(Call *c, int64_t u, const st_q8x4 *const *xq, const float *xf, int64_t n, float *logits,
                    Scratch *s) noexcept nogil:
    cdef int64_t r0 = u * HEAD_ROWS, V = c.s.vocab
    mat_unit(c, &c.head, r0, min(r0 + HEAD_ROWS, V), xq, xf, c.s.d, n, logits + r0, V, s)


cdef void sparse_head_phases(Call *c, int tid, const st_q8x4 *const *xq, const float *xf, int64_t n,
                             Scratch *s) noexcept nogil:
    """Scores of all rows from the predictor, logits of those above the threshold, minus infinity for the others. A
    token without any such row gets all its logits."""
    cdef int64_t u, r0, t, K = c.predictor_in.rows
    cdef const st_q8x4 **zq = s.rows + c.s.batch
    cdef bint whole = False
    while True:
        u = next_unit(c, tid)
        if u < 0:
            break
        r0 = u * ST_TILE_ROWS
        mat_unit(c, &c.predictor_in, r0, min(r0 + ST_TILE_ROWS, K), xq, xf, c.s.d, n, c.z + r0, K, s)
    st_team_barrier(c.team, n)
    while True:
        t = next_unit(c, tid)
        if t < 0:
            break
        c.kernels.quantize(c.z + t * K, K, c.zq + t * c.nq_z)
    st_team_barrier(c.team, head_units(c))
    for t in range(n):
        s.selected[t] = 0
        zq[t] = c.zq + t * c.nq_z
    while True:
        u = next_unit(c, tid)
        if u < 0:
            break
        sparse_head_unit(c, u, zq, xq, xf, n, s)
    st_team_barrier(c.team, head_units(c))
    for t in range(n):
        whole |= selected_rows(c, t) == 0
    while whole:
        u = next_unit(c, tid)
        if u < 0:
            break
        for t in range(n):
            if selected_rows(c, t) == 0:
                head_unit(c, u, xq + t, xf + t * c.s.d, 1, c.logits + t * c.s.vocab, s)


cdef int64_t selected_rows(Call *c, int64_t t) noexcept nogil:
    """Rows that all threads together have selected for a token."""
    cdef int64_t i, total = 0
    for i in range(c.team_size):
        total += c.scratch[i].selected[t]
    return total


cdef void sparse_head_unit(Call *c, int64_t u, const st_q8x4 *const *zq, const st_q8x4 *const *xq, const float *xf,
                           int64_t n, Scratch *s) noexcept nogil:
    """One unit's scores, written where the logits go, and then these."""
    cdef int64_t V = c.s.vocab, r0 = u * HEAD_ROWS, r1 = min(r0 + HEAD_ROWS, V), t, r, count
    cdef int32_t index[HEAD_ROWS]
    cdef float value[HEAD_ROWS]
    cdef float *logits
    mat_unit(c, &c.predictor_out, r0, r1, zq, c.z, c.predictor_in.rows, n, c.logits + r0, V, s)
    for t in range(n):
        logits = c.logits + t * V
        count = 0
        for r in range(r0, r1):
            index[count] = <int32_t>r
            count += logits[r] > c.head_threshold
            logits[r] = -INFINITY
        s.selected[t] += <int32_t>count
        mat_rows(c, &c.head, index, count, xq + t, xf + t * c.s.d, value, s)
        for r in range(count):
            logits[index[r]] = value[r]


cdef void mat_rows(Call *c, const Matrix *m, const int32_t *index, int64_t count, const st_q8x4 *const *xq,
                   const float *xf, float *y, Scratch *s) noexcept nogil:
    """y[i] = W[index[i]] . x for ascending rows: the same bits as mat_unit's."""
    cdef int64_t i, tile = -1
    cdef float values[ST_TILE_ROWS]
    if m.layout == SPARSE_ROWS:
        c.kernels.rows[m.tiled](m.data, m.cols // 32, index, count, xq[0], y)
        return
    for i in range(count):
        if m.layout == ROWS:
            mat_unit(c, m, index[i], index[i] + 1, xq, xf, m.cols, 1, y + i, 1, s)
            continue
        if index[i] // ST_TILE_ROWS != tile:
            tile = index[i] // ST_TILE_ROWS
            mat_unit(c, m, tile * ST_TILE_ROWS, min((tile + 1) * ST_TILE_ROWS, m.rows), xq, xf, m.cols, 1, values,
                     ST_TILE_ROWS, s)
        y[i] = values[index[i] % ST_TILE_ROWS]
