# cython: cdivision=True
# Gate, up and down of the chosen experts, as the layout of their blobs wants it.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t
from libc.string cimport memcpy, memset

from smallthinker_edge._native.buffers cimport FEW_TOKENS, NEURON_TOKENS, NEURON_UNIT, Buffers, Scratch
from smallthinker_edge._native.call cimport Call, expert_blob, inputs, next_unit
from smallthinker_edge._native.core cimport *
from smallthinker_edge._native.weights cimport Layer, Shape, dequantize

cdef enum:
    ROWS_CHUNK = 256  # outputs of one down unit over GGUF rows; a multiple of every block size
    TILES_CHUNK = 64  # and over tiles
    UP_TOKENS = 4     # of an expert, from which on up is computed row by row for all of them


cdef inline bint few_tokens(const Call *call, const Layer *layer) noexcept nogil:
    """Whether the FFN runs by parts of experts, gate to down at once: quicker where tokens hardly share an expert, as
    measured up to two each. Changes no bit. Not where neurons are captured: they are in no buffer then."""
    return (call.n <= FEW_TOKENS and call.capture == NULL
            and (call.n == 1 or call.n * call.weights.shape.used < 2 * call.buffers.n_active)
            and layer.expert.layout == ST_EXPERT_SPARSE)


cdef inline int64_t neuron_units(const Call *call, const Layer *layer) noexcept nogil:
    return call.buffers.n_active * (
        call.weights.shape.parts if few_tokens(call, layer) else neuron_units_of_expert(call, layer))


cdef inline int64_t neuron_units_of_expert(const Call *call, const Layer *layer) noexcept nogil:
    """Units of an expert's gate and up, where down is another phase."""
    cdef const Shape *shape = &call.weights.shape
    if layer.expert.layout == ST_EXPERT_TILES:
        return (shape.f + NEURON_UNIT - 1) // NEURON_UNIT
    return shape.groups


cdef inline int64_t output_chunks(const Shape *shape) noexcept nogil:
    return (shape.d + ST_DOWN_CHUNK - 1) // ST_DOWN_CHUNK


cdef inline int64_t down_step(const Call *call) noexcept nogil:
    """Chunks of one down unit. Two units for every thread: a unit reads long runs of a neuron's row, and one may be
    stolen."""
    return max(1, output_chunks(&call.weights.shape) // (2 * st_team_size(call.team)))


cdef inline int64_t down_units(const Call *call, const Layer *layer) noexcept nogil:
    """Units of the phase after the neurons: outputs, each of all experts."""
    cdef const Shape *shape = &call.weights.shape
    if few_tokens(call, layer):
        return call.n * output_chunks(shape)
    if layer.expert.layout == ST_EXPERT_SPARSE:
        return (output_chunks(shape) + down_step(call) - 1) // down_step(call)
    if layer.expert.layout == ST_EXPERT_TILES:
        return (shape.d + TILES_CHUNK - 1) // TILES_CHUNK
    return (shape.d + ROWS_CHUNK - 1) // ROWS_CHUNK


cdef inline bint expert_phases(Call *call, const Layer *layer, int64_t l, int tid, Scratch *scratch,
                               int64_t next_units) noexcept nogil:
    """x += the experts' weighted outputs. False, for every thread alike, when an expert could not be read."""
    cdef Buffers *buffers = call.buffers
    cdef const st_q8x4 *const *xq
    cdef const float *xf
    cdef int64_t u, i
    inputs(call, scratch, tid, layer.ffn_norm, neuron_units(call, layer), &xq, &xf)
    if few_tokens(call, layer):
        parts_phase(call, layer, l, tid, xq, scratch)
    else:
        neurons_phase(call, layer, l, tid, xq, xf, scratch)
    for i in range(buffers.n_active if tid == 0 else 0):  # here it can be interrupted, at the barrier it cannot
        if expert_blob(call, l, buffers.active_expert[i], tid) == NULL:
            break
    st_team_barrier(call.team, down_units(call, layer))
    if st_team_stopped(call.team):
        return True
    for i in range(buffers.n_active):
        if expert_blob(call, l, buffers.active_expert[i], tid) == NULL:
            return False
    while True:
        u = next_unit(call, tid)
        if u < 0:
            break
        if few_tokens(call, layer):
            add_parts(call, u)
        else:
            down_unit(call, layer, l, u, tid, scratch)
    st_team_barrier(call.team, next_units)
    return True


cdef inline int64_t expert_of_unit(const Call *call, int64_t u, int64_t per_expert, int64_t *within) noexcept nogil:
    """Which active expert unit u of the neuron phase belongs to, and which of its `per_expert` units it is (within).
    Where these divide evenly, each thread has its part of every expert, experts in memory first: then all wait for the
    same missing one, and late."""
    cdef int64_t threads = st_team_size(call.team), shares = threads if per_expert % threads == 0 else 1
    cdef int64_t width = per_expert // shares, all_ = call.buffers.n_active * width, share = u // all_, i = u % all_
    within[0] = share * width + i % width
    return call.buffers.active_expert[call.buffers.order[i // width]]


# ---------------------------------------------------------------- few tokens: gate to down at once, by parts

cdef inline void parts_phase(Call *call, const Layer *layer, int64_t l, int tid, const st_q8x4 *const *xq,
                             Scratch *scratch) noexcept nogil:
    """Gate, up and down of a few tokens' experts, into buffers.parts."""
    cdef const uint8_t *blob
    cdef int64_t u, e, part = 0, sent = 0
    cdef int _
    memset(scratch.stage, 0, sizeof(scratch.stage))
    while True:
        u = next_unit(call, tid)
        if u < 0:
            break
        e = expert_of_unit(call, u, call.weights.shape.parts, &part)
        blob = expert_blob(call, l, e, tid)
        if blob != NULL:
            send_part(call, layer, blob, e, part, xq, &sent, scratch)
    for _ in range(3):
        ffn_step(call, layer, scratch)


cdef inline void ffn_step(const Call *call, const Layer *layer, Scratch *scratch) noexcept nogil:
    """Moves what is on its way through the FFN of a few tokens a stage further; stage 0 is free afterwards."""
    call.weights.kernels.ffn(layer.expert.tiled, call.weights.shape.d // 32, scratch.stage)
    st_neurons_advance(scratch.stage)


cdef inline float *part_of(const Call *call, int64_t slot, int64_t part) noexcept nogil:
    """[d_padded]: what a part of the expert of slot t * K + k adds to token t."""
    return call.buffers.parts + (slot * call.weights.shape.parts + part) * call.weights.shape.d_padded


cdef inline void send_part(const Call *call, const Layer *layer, const uint8_t *blob, int64_t e, int64_t part,
                           const st_q8x4 *const *xq, int64_t *sent, Scratch *scratch) noexcept nogil:
    """Sends the neurons of a part of expert e through the FFN, for each of its tokens while their weights are in the
    cache; those of the last steps stay on their way until others, or nothing, follow them. sent: how many groups this
    thread has sent."""
    cdef const Shape *shape = &call.weights.shape
    cdef Buffers *buffers = call.buffers
    cdef int64_t g, i, slot, g0 = part * ST_FFN_PART, g1 = min(g0 + ST_FFN_PART, shape.groups)
    cdef st_neurons *neurons
    for i in range(buffers.list_start[e], buffers.list_start[e + 1]):
        memset(part_of(call, buffers.list_slot[i], part), 0, shape.d_padded * sizeof(float))
    for g in range(g0, g1):
        for i in range(buffers.list_start[e], buffers.list_start[e + 1]):
            slot = buffers.list_slot[i]
            neurons = &scratch.neurons[sent[0] % 4]
            sent[0] += 1
            neurons.x = xq[slot // shape.used]
            neurons.gate = blob + g * layer.expert.group_bytes
            neurons.up, neurons.up_stride = blob + layer.expert.up_at, layer.expert.stride
            neurons.down, neurons.transposed = st_expert_down(&layer.expert, blob), shape.down_transposed
            neurons.y, neurons.group = part_of(call, slot, part), g
            scratch.stage[0] = neurons
            ffn_step(call, layer, scratch)


cdef inline void add_parts(const Call *call, int64_t unit) noexcept nogil:
    """x += weight * part, experts in ascending order and part by part, for ST_DOWN_CHUNK outputs of one token."""
    cdef const Shape *shape = &call.weights.shape
    cdef int64_t chunks = output_chunks(shape), t = unit // chunks, first = unit % chunks * ST_DOWN_CHUNK, slot, part
    for slot in range(t * shape.used, (t + 1) * shape.used):
        for part in range(shape.parts):
            call.weights.kernels.axpy(call.buffers.weight[slot], part_of(call, slot, part) + first,
                                      call.buffers.x + t * shape.d_padded + first, ST_DOWN_CHUNK)


# ---------------------------------------------------------------- many tokens: neurons first, then down

cdef inline void neurons_phase(Call *call, const Layer *layer, int64_t l, int tid, const st_q8x4 *const *xq,
                               const float *xf, Scratch *scratch) noexcept nogil:
    """Gate and up of all tokens' experts, into buffers.active, fired, hq or h."""
    cdef const uint8_t *blob
    cdef int64_t u, e, g = 0
    while True:
        u = next_unit(call, tid)
        if u < 0:
            break
        e = expert_of_unit(call, u, neuron_units_of_expert(call, layer), &g)
        blob = expert_blob(call, l, e, tid)
        if blob == NULL:
            continue
        if layer.expert.layout == ST_EXPERT_SPARSE:
            neurons_sparse(call, layer, blob, e, g, xq, scratch)
        elif layer.expert.layout == ST_EXPERT_TILES:
            neurons_tiles(call, layer, blob, e, g, xq, scratch)
        else:
            neurons_rows(call, layer, blob, e, g, xf, scratch)


cdef inline void down_unit(Call *call, const Layer *layer, int64_t l, int64_t unit, int tid,
                           Scratch *scratch) noexcept nogil:
    """Down of every expert's neurons for a chunk of the outputs, experts in ascending order."""
    cdef int64_t i, e
    cdef const uint8_t *blob
    for i in range(call.buffers.n_active):
        e = call.buffers.active_expert[i]
        blob = expert_blob(call, l, e, tid)
        if layer.expert.layout == ST_EXPERT_SPARSE:
            down_sparse(call, layer, blob, e, unit)
        elif layer.expert.layout == ST_EXPERT_TILES:
            down_tiles(call, layer, blob, e, unit, scratch)
        else:
            down_rows(call, layer, blob, e, unit, scratch)


cdef inline void neurons_sparse(const Call *call, const Layer *layer, const uint8_t *blob, int64_t e, int64_t g,
                                const st_q8x4 *const *xq, Scratch *scratch) noexcept nogil:
    """Gate of 32 neurons for every token of the expert, then up only where the gate is positive."""
    cdef const st_kernels *kernels = call.weights.kernels
    cdef const Shape *shape = &call.weights.shape
    cdef Buffers *buffers = call.buffers
    cdef int64_t i, first, turns, nb = shape.d // 32, m = buffers.list_start[e + 1] - buffers.list_start[e]
    cdef const int32_t *slots = buffers.list_slot + buffers.list_start[e]
    cdef const st_q8x4 **rows = scratch.rows + buffers.batch
    cdef st_neurons *neurons = scratch.neurons
    cdef float value[32]
    cdef float up[32]
    neurons.group = g
    for i in range(m):
        rows[i] = xq[slots[i] // shape.used]
    kernels.gemm[layer.expert.tiled[0]](blob, shape.f, nb, 2 * g, 2 * g + 2, rows, m, scratch.gate, 32)
    if m >= UP_TOKENS and kernels.up[layer.expert.tiled[1]] != NULL and not shape.down_transposed:
        turns = (m + ST_UP_TOKENS - 1) // ST_UP_TOKENS
        for i in range(turns):
            first = m * i // turns
            up_of_many(call, layer, blob, g, slots + first, rows + first, m * (i + 1) // turns - first,
                       scratch.gate + first * 32, scratch)
        return
    for i in range(m):
        memcpy(neurons.g, scratch.gate + i * 32, 32 * sizeof(float))
        st_neurons_choose(neurons)
        kernels.rows[layer.expert.tiled[1]](blob + layer.expert.up_at, layer.expert.stride, nb, neurons.index,
                                            neurons.fired, rows[i], value)
        if shape.down_transposed:
            st_neurons_multiply(neurons, value, buffers.fired + slots[i] * shape.groups + g)
        else:
            st_neurons_spread(neurons, value, up)
            kernels.activate(neurons.g, up, buffers.active + slots[i] * shape.groups + g)


cdef inline void up_of_many(const Call *call, const Layer *layer, const uint8_t *blob, int64_t g, const int32_t *slots,
                            const st_q8x4 *const *x, int64_t m, const float *gate, Scratch *scratch) noexcept nogil:
    """Up of a group for at most ST_UP_TOKENS tokens with these gates [m][32], and their activations."""
    cdef const st_kernels *kernels = call.weights.kernels
    cdef const Shape *shape = &call.weights.shape
    cdef float *up = scratch.neurons_of_unit
    cdef uint32_t fires[32]
    cdef int64_t i
    st_neurons_tokens(gate, m, fires)
    kernels.up[layer.expert.tiled[1]](blob + layer.expert.up_at + 32 * g * layer.expert.stride, layer.expert.stride,
                                      shape.d // 32, x, m, fires, up)
    for i in range(m):
        kernels.activate(gate + i * 32, up + i * 32, call.buffers.active + slots[i] * shape.groups + g)


cdef inline void down_sparse(const Call *call, const Layer *layer, const uint8_t *blob, int64_t e,
                             int64_t unit) noexcept nogil:
    cdef const st_kernels *kernels = call.weights.kernels
    cdef const Shape *shape = &call.weights.shape
    cdef Buffers *buffers = call.buffers
    cdef int64_t i, slot, n = 0, c0 = unit * down_step(call), c1 = min(c0 + down_step(call), output_chunks(shape))
    cdef int64_t m = buffers.list_start[e + 1] - buffers.list_start[e]
    cdef int64_t turns = (m + ST_DOWN_TOKENS - 1) // ST_DOWN_TOKENS
    cdef st_down_view down = st_expert_down(&layer.expert, blob)
    cdef const st_active *active[ST_DOWN_TOKENS]
    cdef float weight[ST_DOWN_TOKENS]
    cdef float *y[ST_DOWN_TOKENS]
    cdef float *x
    for i in range(buffers.list_start[e], buffers.list_start[e + 1]):
        slot = buffers.list_slot[i]
        x = buffers.x + slot // shape.used * shape.d_padded + c0 * ST_DOWN_CHUNK
        if shape.down_transposed:
            kernels.down_transposed[layer.expert.tiled[2]](&down, shape.d, shape.groups, c0, c1,
                                                           buffers.fired + slot * shape.groups, buffers.weight[slot], x)
            continue
        active[n], weight[n], y[n] = buffers.active + slot * shape.groups, buffers.weight[slot], x
        n += 1
        if n * turns >= m or i == buffers.list_start[e + 1] - 1:
            kernels.down[layer.expert.tiled[2]](&down, shape.d, shape.groups, c0, c1, active, weight, n, y)
            n = 0


# ---------------------------------------------------------------- experts in tiles, every neuron

cdef inline void neurons_tiles(const Call *call, const Layer *layer, const uint8_t *blob, int64_t e, int64_t unit,
                               const st_q8x4 *const *xq, Scratch *scratch) noexcept nogil:
    """Gate times up of NEURON_UNIT neurons for every token of the expert, quantised."""
    cdef const st_kernels *kernels = call.weights.kernels
    cdef const Shape *shape = &call.weights.shape
    cdef Buffers *buffers = call.buffers
    cdef const int32_t *slots = buffers.list_slot + buffers.list_start[e]
    cdef const st_q8x4 **rows = scratch.rows + buffers.batch
    cdef int64_t turn, first, i, n, count, m = buffers.list_start[e + 1] - buffers.list_start[e], nb = shape.d // 32
    cdef int64_t t0 = unit * (NEURON_UNIT // ST_TILE_ROWS), width = min(shape.f - unit * NEURON_UNIT, NEURON_UNIT)
    cdef int64_t t1 = t0 + (width + ST_TILE_ROWS - 1) // ST_TILE_ROWS
    cdef float *gate
    cdef float *up
    for turn in range((m + NEURON_TOKENS - 1) // NEURON_TOKENS):
        first = turn * NEURON_TOKENS
        count = min(m - first, NEURON_TOKENS)
        for i in range(count):
            rows[i] = xq[slots[first + i] // shape.used]
        gate, up = scratch.neurons_of_unit, scratch.neurons_of_unit + NEURON_TOKENS * NEURON_UNIT
        kernels.gemm[layer.expert.tiled[0]](blob, shape.f, nb, t0, t1, rows, count, gate, NEURON_UNIT)
        kernels.gemm[layer.expert.tiled[1]](blob + layer.expert.up_at, shape.f, nb, t0, t1, rows, count, up,
                                            NEURON_UNIT)
        for i in range(count):
            for n in range(width):
                gate[n] = 0 if gate[n] <= 0 else gate[n] * up[n]
            kernels.quantize(gate, width, buffers.hq + slots[first + i] * buffers.nq_h + unit)
            gate, up = gate + NEURON_UNIT, up + NEURON_UNIT


cdef inline void down_tiles(const Call *call, const Layer *layer, const uint8_t *blob, int64_t e, int64_t unit,
                            Scratch *scratch) noexcept nogil:
    cdef const st_kernels *kernels = call.weights.kernels
    cdef const Shape *shape = &call.weights.shape
    cdef Buffers *buffers = call.buffers
    cdef const int32_t *slots = buffers.list_slot + buffers.list_start[e]
    cdef const st_q8x4 **rows = scratch.rows + buffers.batch
    cdef int64_t i, m = buffers.list_start[e + 1] - buffers.list_start[e]
    cdef int64_t r0 = unit * TILES_CHUNK, r1 = min(r0 + TILES_CHUNK, shape.d)
    for i in range(m):
        rows[i] = buffers.hq + slots[i] * buffers.nq_h
    kernels.gemm[layer.expert.tiled[2]](blob + layer.expert.down_at, shape.d, shape.f // 32, r0 // ST_TILE_ROWS,
                                        (r1 + ST_TILE_ROWS - 1) // ST_TILE_ROWS, rows, m, scratch.out, TILES_CHUNK)
    for i in range(m):
        kernels.axpy(buffers.weight[slots[i]], scratch.out + i * TILES_CHUNK,
                     buffers.x + slots[i] // shape.used * shape.d_padded + r0, r1 - r0)


# ---------------------------------------------------------------- experts in GGUF rows, in float arithmetic

cdef inline void neurons_rows(const Call *call, const Layer *layer, const uint8_t *blob, int64_t e, int64_t g,
                              const float *xf, Scratch *scratch) noexcept nogil:
    """Gate times up of 32 neurons for every token of the expert."""
    cdef const st_kernels *kernels = call.weights.kernels
    cdef const Shape *shape = &call.weights.shape
    cdef Buffers *buffers = call.buffers
    cdef int64_t i, n, fired, d = shape.d, m = buffers.list_start[e + 1] - buffers.list_start[e]
    cdef const int32_t *slots = buffers.list_slot + buffers.list_start[e]
    cdef size_t gate_row = st_row_bytes(layer.expert.gate, d), up_row = st_row_bytes(layer.expert.up, d)
    cdef float *gate = scratch.gate
    cdef const float *x
    for n in range(32 * g, min(32 * g + 32, shape.f)):
        dequantize(kernels, layer.expert.gate, blob + n * gate_row, d, scratch.row)
        fired = 0
        for i in range(m):
            gate[i] = kernels.dot(scratch.row, xf + slots[i] // shape.used * d, d)
            fired += not gate[i] <= 0
        if fired:
            dequantize(kernels, layer.expert.up, blob + layer.expert.up_at + n * up_row, d, scratch.row)
        for i in range(m):
            x = xf + slots[i] // shape.used * d
            buffers.h[slots[i] * shape.f + n] = 0 if gate[i] <= 0 else gate[i] * kernels.dot(scratch.row, x, d)


cdef inline void down_rows(const Call *call, const Layer *layer, const uint8_t *blob, int64_t e, int64_t chunk,
                           Scratch *scratch) noexcept nogil:
    cdef const st_kernels *kernels = call.weights.kernels
    cdef const Shape *shape = &call.weights.shape
    cdef Buffers *buffers = call.buffers
    cdef int64_t i, r, slot, f = shape.f, r0 = chunk * ROWS_CHUNK, r1 = min(r0 + ROWS_CHUNK, shape.d)
    cdef const uint8_t *down = blob + layer.expert.down_at
    cdef size_t row_bytes = st_row_bytes(layer.expert.down, f)
    if shape.down_transposed:
        down_rows_transposed(call, layer, down, e, r0, r1, scratch)
        return
    for r in range(r0, r1):
        dequantize(kernels, layer.expert.down, down + r * row_bytes, f, scratch.row)
        for i in range(buffers.list_start[e], buffers.list_start[e + 1]):
            slot = buffers.list_slot[i]
            buffers.x[slot // shape.used * shape.d_padded + r] += (
                buffers.weight[slot] * kernels.dot(scratch.row, buffers.h + slot * f, f))


cdef inline void down_rows_transposed(const Call *call, const Layer *layer, const uint8_t *down, int64_t e, int64_t r0,
                                      int64_t r1, Scratch *scratch) noexcept nogil:
    """Outputs r0..r1 where a neuron's weights are one row."""
    cdef const st_kernels *kernels = call.weights.kernels
    cdef const Shape *shape = &call.weights.shape
    cdef Buffers *buffers = call.buffers
    cdef int64_t i, n, slot
    cdef size_t row_bytes = st_row_bytes(layer.expert.down, shape.d), first = st_row_bytes(layer.expert.down, r0)
    cdef float h
    for n in range(shape.f):
        if silent(call, e, n):
            continue
        dequantize(kernels, layer.expert.down, down + n * row_bytes + first, r1 - r0, scratch.row)
        for i in range(buffers.list_start[e], buffers.list_start[e + 1]):
            slot = buffers.list_slot[i]
            h = buffers.h[slot * shape.f + n]
            if h != 0:
                kernels.axpy(buffers.weight[slot] * h, scratch.row,
                             buffers.x + slot // shape.used * shape.d_padded + r0, r1 - r0)


cdef inline bint silent(const Call *call, int64_t e, int64_t n) noexcept nogil:
    """Whether neuron n of expert e fires for none of its tokens."""
    cdef int64_t i
    for i in range(call.buffers.list_start[e], call.buffers.list_start[e + 1]):
        if call.buffers.h[call.buffers.list_slot[i] * call.weights.shape.f + n] != 0:
            return False
    return True
