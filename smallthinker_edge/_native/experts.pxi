# The forward pass, part: gate, up and down of the chosen experts, sparse where the weights are packed. Included by
# engine.pyx after forward.pxi, whose structs it fills.

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
