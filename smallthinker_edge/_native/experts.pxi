# The forward pass, part: gate, up and down of the chosen experts, sparse where the weights are packed. Included by
# engine.pyx after forward.pxi, whose structs it fills.

cdef void neurons_packed(Call *c, Layer *layer, const uint8_t *blob, int64_t e, int64_t g, const st_q8x4 *const *xq,
                         Scratch *s) noexcept nogil:
    """Gate of 32 neurons for every token of the expert, then up only where the gate is positive."""
    cdef int64_t i, m = c.list_start[e + 1] - c.list_start[e]
    cdef int32_t *slots = c.list_slot + c.list_start[e]
    cdef st_neurons *n = s.neurons
    cdef const uint8_t *rows = blob + layer.expert.up_at
    cdef float value[32]
    cdef float up[32]
    n.group = g
    for i in range(m):
        s.rows[c.s.batch + i] = xq[slots[i] // c.s.used]
    c.kernels.gemm[layer.expert.tiled](blob, c.s.f, c.s.nb_d, 2 * g, 2 * g + 2, s.rows + c.s.batch, m, s.gate, 32)
    for i in range(m):
        memcpy(n.g, s.gate + i * 32, 32 * sizeof(float))
        st_neurons_choose(n)
        c.kernels.rows[layer.expert.tiled](rows, c.s.nb_d, n.index, n.fired, s.rows[c.s.batch + i], value)
        if c.s.down_transposed:
            st_neurons_multiply(n, value, c.fired + slots[i] * c.s.groups + g)
        else:
            st_neurons_spread(n, value, up)
            c.kernels.activate(n.g, up, c.active + slots[i] * c.s.groups + g)


cdef void ffn_step(Call *c, Layer *layer, Scratch *s) noexcept nogil:
    """Moves what is on its way through the FFN of a few tokens a stage further; stage 0 is free afterwards."""
    c.kernels.ffn[layer.expert.tiled](c.s.nb_d, c.s.groups, s.stage)
    st_neurons_advance(s.stage)


def part_bytes(config, int64_t batch):
    """Bytes of what the parts of experts add to a few tokens, kept until all are known, for a ModelConfig."""
    cdef int64_t groups = (config.d_ffn + 31) // 32, padded = (config.d_model + 255) // 256 * 256
    return min(batch, FEW_TOKENS) * config.n_experts_used * ((groups + ST_FFN_PART - 1) // ST_FFN_PART) * padded * 4


cdef float *part_of(Call *c, int64_t slot, int64_t part) noexcept nogil:
    """[d_padded]: what a part of the expert of slot t * K + k adds to token t."""
    return c.parts + (slot * c.s.ffn_parts + part) * c.s.d_padded


cdef void ffn_part(Call *c, Layer *layer, const uint8_t *blob, int64_t e, int64_t part, const st_q8x4 *const *xq,
                   int64_t *steps, Scratch *s) noexcept nogil:
    """Sends the neurons of a part of expert e through the FFN, for each of its tokens while their weights are in the
    cache; those of the last steps stay on their way until others, or nothing, follow them. steps: how many groups this
    thread has sent."""
    cdef int64_t g, i, g0 = part * ST_FFN_PART, g1 = min(g0 + ST_FFN_PART, c.s.groups)
    cdef st_neurons *n
    for i in range(c.list_start[e], c.list_start[e + 1]):
        memset(part_of(c, c.list_slot[i], part), 0, c.s.d_padded * sizeof(float))
    for g in range(g0, g1):
        for i in range(c.list_start[e], c.list_start[e + 1]):
            n = &s.neurons[steps[0] % 4]
            steps[0] += 1
            n.x = xq[c.list_slot[i] // c.s.used]
            n.gate = blob + g * layer.expert.group_bytes
            n.up = blob + layer.expert.up_at
            n.down, n.transposed = blob + layer.expert.down_at, c.s.down_transposed
            n.y, n.group = part_of(c, c.list_slot[i], part), g
            s.stage[0] = n
            ffn_step(c, layer, s)


cdef void add_parts(Call *c, int64_t unit) noexcept nogil:
    """x += weight * part, experts in ascending order and part by part, for ST_DOWN_CHUNK outputs of one token."""
    cdef int64_t chunks = (c.s.d + ST_DOWN_CHUNK - 1) // ST_DOWN_CHUNK, t = unit // chunks
    cdef int64_t slot, part, first = unit % chunks * ST_DOWN_CHUNK
    for slot in range(t * c.s.used, (t + 1) * c.s.used):
        for part in range(c.s.ffn_parts):
            c.kernels.axpy(c.weight[slot], part_of(c, slot, part) + first, c.x + t * c.s.d_padded + first,
                           ST_DOWN_CHUNK)


cdef void neurons_rows(Call *c, Layer *layer, const uint8_t *blob, int64_t e, int64_t g, const float *xf,
                       Scratch *s) noexcept nogil:
    """The same over GGUF rows in float arithmetic."""
    cdef int64_t i, n, fired, m = c.list_start[e + 1] - c.list_start[e], d = c.s.d
    cdef int32_t *slots = c.list_slot + c.list_start[e]
    cdef size_t gate_row = st_row_bytes(layer.expert.gate, d), up_row = st_row_bytes(layer.expert.up, d)
    cdef const uint8_t *up = blob + layer.expert.up_at
    cdef const float *x
    for n in range(32 * g, min(32 * g + 32, c.s.f)):
        dequantize(c, layer.expert.gate, blob + n * gate_row, d, s.row)
        fired = 0
        for i in range(m):
            s.gate[i] = c.kernels.dot(s.row, xf + slots[i] // c.s.used * d, d)
            fired += not s.gate[i] <= 0
        if fired:
            dequantize(c, layer.expert.up, up + n * up_row, d, s.row)
        for i in range(m):
            x = xf + slots[i] // c.s.used * d
            c.h[slots[i] * c.s.f + n] = 0 if s.gate[i] <= 0 else s.gate[i] * c.kernels.dot(s.row, x, d)


cdef void down_packed(Call *c, Layer *layer, const uint8_t *blob, int64_t e, int64_t unit) noexcept nogil:
    cdef int64_t i, m = c.list_start[e + 1] - c.list_start[e], groups = c.s.groups
    cdef int64_t c0 = unit * c.s.down_step, c1 = min(c0 + c.s.down_step, (c.s.d + ST_DOWN_CHUNK - 1) // ST_DOWN_CHUNK)
    cdef int32_t *slots = c.list_slot + c.list_start[e]
    cdef const uint8_t *down = blob + layer.expert.down_at
    cdef float *x
    for i in range(m):
        x = c.x + slots[i] // c.s.used * c.s.d_padded + c0 * ST_DOWN_CHUNK
        if c.s.down_transposed:
            c.kernels.down_transposed[layer.expert.tiled](down, c.s.d, groups, c0, c1, c.fired + slots[i] * groups,
                                                          c.weight[slots[i]], x)
        else:
            c.kernels.down[layer.expert.tiled](down, c.s.d, groups, c0, c1, c.active + slots[i] * groups,
                                               c.weight[slots[i]], x)


cdef bint silent(Call *c, const int32_t *slots, int64_t m, int64_t n) noexcept nogil:
    """Whether neuron n fires for none of the tokens."""
    cdef int64_t i
    for i in range(m):
        if c.h[slots[i] * c.s.f + n] != 0:
            return False
    return True


cdef void down_rows(Call *c, Layer *layer, const uint8_t *blob, int64_t e, int64_t chunk, Scratch *s) noexcept nogil:
    cdef int64_t i, n, r, m = c.list_start[e + 1] - c.list_start[e], d = c.s.d, f = c.s.f
    cdef int64_t r0 = chunk * GENERIC_CHUNK, r1 = min(r0 + GENERIC_CHUNK, d)
    cdef int32_t *slots = c.list_slot + c.list_start[e]
    cdef const uint8_t *down = blob + layer.expert.down_at
    cdef size_t row_bytes
    cdef float *x
    cdef float h
    if c.s.down_transposed:
        row_bytes = st_row_bytes(layer.expert.down, d)
        for n in range(f):
            if silent(c, slots, m, n):
                continue
            dequantize(c, layer.expert.down, down + n * row_bytes + st_row_bytes(layer.expert.down, r0), r1 - r0, s.row)
            for i in range(m):
                h = c.h[slots[i] * f + n]
                if h != 0:
                    x = c.x + slots[i] // c.s.used * c.s.d_padded
                    c.kernels.axpy(c.weight[slots[i]] * h, s.row, x + r0, r1 - r0)
        return
    row_bytes = st_row_bytes(layer.expert.down, f)
    for r in range(r0, r1):
        dequantize(c, layer.expert.down, down + r * row_bytes, f, s.row)
        for i in range(m):
            x = c.x + slots[i] // c.s.used * c.s.d_padded
            x[r] += c.weight[slots[i]] * c.kernels.dot(s.row, c.h + slots[i] * f, f)


cdef bint few_tokens(Call *c, Layer *layer) noexcept nogil:
    """Whether the FFN runs by parts of experts, gate to down at once: quicker where tokens hardly share an expert, as
    measured up to two each. Changes no bit."""
    return (c.n <= FEW_TOKENS and (c.n == 1 or c.n * c.s.used < 2 * c.n_active)
            and layer.expert.tiled >= 0)


cdef int64_t neuron_units(Call *c, Layer *layer) noexcept nogil:
    return c.n_active * (c.s.ffn_parts if few_tokens(c, layer) else c.s.groups)


cdef int64_t output_chunks(Call *c, Layer *layer) noexcept nogil:
    """Units of the phase after the neurons: outputs, each of all experts."""
    if few_tokens(c, layer):
        return c.n * ((c.s.d + ST_DOWN_CHUNK - 1) // ST_DOWN_CHUNK)
    if layer.expert.tiled >= 0:
        return c.s.down_units
    return (c.s.d + GENERIC_CHUNK - 1) // GENERIC_CHUNK


cdef int64_t expert_of_unit(Call *c, int64_t u, int64_t per_expert, int64_t *within) noexcept nogil:
    """Which active expert unit u of the neuron phase belongs to, and which of its `per_expert` units it is (within).
    Where these divide evenly, each thread has its part of every expert, experts in memory first: then all wait for the
    same missing one, and late."""
    cdef int64_t shares = c.team_size if per_expert % c.team_size == 0 else 1
    cdef int64_t width = per_expert // shares, share = u // (c.n_active * width), i = u % (c.n_active * width)
    within[0] = share * width + i % width
    return c.order[i // width]


cdef bint expert_phases(Call *c, Layer *layer, int64_t l, int tid, Scratch *s, int64_t next_units) noexcept nogil:
    """x += the experts' weighted outputs. False, for every thread alike, when an expert could not be read."""
    cdef const st_q8x4 *const *xq
    cdef const float *xf
    cdef int64_t u, i
    inputs(c, s, tid, layer.ffn_norm, neuron_units(c, layer), &xq, &xf)
    if few_tokens(c, layer):
        ffn_phase(c, layer, l, tid, xq, s)
    else:
        neurons_phase(c, layer, l, tid, xq, xf, s)
    for i in range(c.n_active if tid == 0 else 0):  # here it can be interrupted, at the barrier it cannot
        if expert_blob(c, l, c.active_expert[i], tid) == NULL:
            break
    st_team_barrier(c.team, output_chunks(c, layer))
    if st_team_stopped(c.team):
        return True
    for i in range(c.n_active):
        if expert_blob(c, l, c.active_expert[i], tid) == NULL:
            return False
    while True:
        u = next_unit(c, tid)
        if u < 0:
            break
        if few_tokens(c, layer):
            add_parts(c, u)
        else:
            down_unit(c, layer, l, u, tid, s)
    st_team_barrier(c.team, next_units)
    return True


cdef void ffn_phase(Call *c, Layer *layer, int64_t l, int tid, const st_q8x4 *const *xq, Scratch *s) noexcept nogil:
    """Gate, up and down of a few tokens' experts, into c.parts."""
    cdef const uint8_t *blob
    cdef int64_t u, e, part, steps = 0
    memset(s.stage, 0, sizeof(s.stage))
    while True:
        u = next_unit(c, tid)
        if u < 0:
            break
        e = c.active_expert[expert_of_unit(c, u, c.s.ffn_parts, &part)]
        blob = expert_blob(c, l, e, tid)
        if blob != NULL:
            ffn_part(c, layer, blob, e, part, xq, &steps, s)
    for u in range(3):
        ffn_step(c, layer, s)


cdef void neurons_phase(Call *c, Layer *layer, int64_t l, int tid, const st_q8x4 *const *xq, const float *xf,
                        Scratch *s) noexcept nogil:
    """Gate and up of all tokens' experts, into c.active or c.h."""
    cdef const uint8_t *blob
    cdef int64_t u, e, g
    while True:
        u = next_unit(c, tid)
        if u < 0:
            break
        e = c.active_expert[expert_of_unit(c, u, c.s.groups, &g)]
        blob = expert_blob(c, l, e, tid)
        if blob == NULL:
            continue
        if layer.expert.tiled >= 0:
            neurons_packed(c, layer, blob, e, g, xq, s)
        else:
            neurons_rows(c, layer, blob, e, g, xf, s)


cdef void down_unit(Call *c, Layer *layer, int64_t l, int64_t unit, int tid, Scratch *s) noexcept nogil:
    """Down of every expert's neurons for a chunk of the outputs, experts in ascending order."""
    cdef int64_t i, e
    cdef const uint8_t *blob
    for i in range(c.n_active):
        e = c.active_expert[i]
        blob = expert_blob(c, l, e, tid)
        if layer.expert.tiled >= 0:
            down_packed(c, layer, blob, e, unit)
        else:
            down_rows(c, layer, blob, e, unit, s)
