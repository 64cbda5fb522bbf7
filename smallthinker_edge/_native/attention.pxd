# cython: cdivision=True
# Projections, attention over the KV cache, and its output projection.
from libc.math cimport expf, sqrtf
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t
from libc.string cimport memset

from smallthinker_edge._native.buffers cimport Buffers, Scratch
from smallthinker_edge._native.call cimport Call, check_finite, count_down, inputs, next_unit, set_flag
from smallthinker_edge._native.core cimport *
from smallthinker_edge._native.kv_cache cimport kv_head, kv_page, store_head
from smallthinker_edge._native.router cimport (
    ahead_unit, ahead_units, choose_experts, router_unit, router_units, want_experts)
from smallthinker_edge._native.weights cimport Layer, Shape, multiply

cdef enum:
    OUTPUT_UNIT = 64  # rows of the output projection


cdef inline int64_t projection_units(const Call *call) noexcept nogil:
    cdef const Shape *shape = &call.weights.shape
    return router_units(shape, call.n) + ahead_units(shape, call.paging, call.n) + shape.heads + 2 * shape.kv_heads


cdef inline void projection_phase(Call *call, const Layer *layer, int64_t l, int tid, Scratch *scratch) noexcept nogil:
    """The router, q, k and v."""
    cdef const st_q8x4 *const *xq
    cdef const float *xf
    cdef int64_t u, routers = router_units(&call.weights.shape, call.n)
    cdef int64_t ahead = ahead_units(&call.weights.shape, call.paging, call.n)
    inputs(call, scratch, tid, layer.attn_norm, projection_units(call), &xq, &xf)
    if tid == 0:
        call.undecided = call.n
    while True:
        u = next_unit(call, tid)
        if u < 0:
            break
        if u < routers:
            router_unit(call.weights, layer, call.buffers, u)
        elif u - routers < ahead:
            ahead_unit(call.weights, call.buffers, call.paging, l, u - routers)
        else:
            projection_unit(call, layer, u - routers - ahead, xq, xf, scratch)


cdef inline void projection_unit(Call *call, const Layer *layer, int64_t unit, const st_q8x4 *const *xq,
                                 const float *xf, Scratch *scratch) noexcept nogil:
    """One head of q, k or v for all tokens; k and v go to the cache."""
    if unit < call.weights.shape.heads:
        query_unit(call, layer, unit, xq, xf, scratch)
    else:
        key_value_unit(call, layer, unit - call.weights.shape.heads, xq, xf, scratch)


cdef inline void query_unit(Call *call, const Layer *layer, int64_t head, const st_q8x4 *const *xq, const float *xf,
                            Scratch *scratch) noexcept nogil:
    cdef const st_kernels *kernels = call.weights.kernels
    cdef const Shape *shape = &call.weights.shape
    cdef Buffers *buffers = call.buffers
    cdef int64_t hd = shape.hd, ld = shape.heads * hd, t
    cdef float *out = buffers.q + head * hd
    cdef st_q8x4 *query
    multiply(kernels, &layer.q, head * hd, head * hd + hd, xq, xf, shape.d, call.n, out, ld, scratch.row)
    for t in range(call.n):
        check_finite(call, out + t * ld, hd)
    if layer.rope:
        for t in range(call.n):
            rotate(call, layer, t, out + t * ld)
    if kv_page(&call.kv, layer).type == ST_Q8_0:
        for t in range(call.n):
            query = buffers.q8 + 2 * (t * shape.heads + head) * buffers.nq_head
            kernels.quantize(out + t * ld, hd, query)
            st_kv_query_rest(out + t * ld, query, hd, query + buffers.nq_head)


cdef inline void key_value_unit(Call *call, const Layer *layer, int64_t unit, const st_q8x4 *const *xq,
                                const float *xf, Scratch *scratch) noexcept nogil:
    """Keys (unit = 2 * KV head) or values (one more)."""
    cdef const st_kernels *kernels = call.weights.kernels
    cdef int64_t hd = call.weights.shape.hd, head = unit // 2, t
    cdef float *out = call.buffers.kv + unit * hd * call.n
    multiply(kernels, &layer.k if unit % 2 == 0 else &layer.v, head * hd, head * hd + hd, xq, xf,
             call.weights.shape.d, call.n, out, hd, scratch.row)
    for t in range(call.n):
        if layer.rope and unit % 2 == 0:
            rotate(call, layer, t, out + t * hd)
        if not store_head(kernels, &call.kv, layer, call.position + t, unit, out + t * hd, hd, scratch.head):
            set_flag(&call.not_finite)


cdef inline void rotate(const Call *call, const Layer *layer, int64_t t, float *head) noexcept nogil:
    """RoPE of one head at token t's position."""
    cdef int64_t half = call.weights.shape.rope_half
    cdef const float *angles = (call.buffers.rope_window if layer.window else call.buffers.rope) + t * 2 * half
    call.weights.kernels.rope(head, angles, angles + half, half)


cdef inline int64_t first_chunk(const Layer *layer, int64_t p) noexcept nogil:
    """The first chunk of 256 positions that position p may see."""
    return max(0, p - layer.window + 1) // ST_ATTN_CHUNK if layer.window else 0


cdef inline int64_t first_seen(const Layer *layer, int64_t p, int64_t start) noexcept nogil:
    """The first position of the chunk from `start` on that position p may see, within the chunk."""
    return max(0, p - layer.window + 1 - start) if layer.window else 0


cdef inline int64_t chunks_seen(const Layer *layer, int64_t p) noexcept nogil:
    return p // ST_ATTN_CHUNK - first_chunk(layer, p) + 1


cdef inline void attention_chunk(Call *call, const Layer *layer, int64_t t, int64_t kv_head_, int64_t chunk,
                                 int64_t part, Scratch *scratch) noexcept nogil:
    """Positions of one page that token t may see, for the heads of one KV head, into partial results number `part`."""
    cdef const Shape *shape = &call.weights.shape
    cdef Buffers *buffers = call.buffers
    cdef int64_t hd = shape.hd, G = shape.heads // shape.kv_heads, p = call.position + t, g
    cdef int64_t start = chunk * ST_ATTN_CHUNK, p0 = first_seen(layer, p, start), p1 = min(ST_ATTN_CHUNK, p + 1 - start)
    cdef const uint8_t *k = kv_head(&call.kv, layer, start, 2 * kv_head_)
    cdef const uint8_t *v = kv_head(&call.kv, layer, start, 2 * kv_head_ + 1)
    cdef float scale = 1 / sqrtf(<float>hd)
    cdef float *acc = buffers.partial + part * G * hd
    cdef float *m = buffers.partial_m + part * G
    cdef float *sums = buffers.partial_l + part * G
    if kv_page(&call.kv, layer).type == ST_F16:
        call.weights.kernels.attention(buffers.q + (t * shape.heads + kv_head_ * G) * hd, G, hd,
                                       <const uint16_t *>k + p0 * hd, <const uint16_t *>v + p0 * hd, p1 - p0, scale,
                                       scratch.scores, acc, m, sums)
        return
    for g in range(G):
        scratch.queries[g] = buffers.q8 + 2 * (t * shape.heads + kv_head_ * G + g) * buffers.nq_head
        scratch.queries[G + g] = scratch.queries[g] + buffers.nq_head
    call.weights.kernels.attention_q8(scratch.queries, G, hd, k, v, p0, p1, scale, scratch.scores, acc, m, sums)


cdef inline void attention_chunks(Call *call, const Layer *layer, int64_t t0, int64_t t1, int64_t kv_head_,
                                  int64_t chunk, int64_t part, Scratch *scratch) noexcept nogil:
    """The same of tokens t0 .. t1 - 1, which all see the chunk: into partial results `part` and the next ones."""
    cdef const Shape *shape = &call.weights.shape
    cdef Buffers *buffers = call.buffers
    cdef int64_t hd = shape.hd, G = shape.heads // shape.kv_heads, start = chunk * ST_ATTN_CHUNK, t
    cdef int32_t p0[ST_ATTN_TOKENS]
    cdef int32_t p1[ST_ATTN_TOKENS]
    if t1 - t0 == 1 or kv_page(&call.kv, layer).type != ST_F16:
        for t in range(t0, t1):
            attention_chunk(call, layer, t, kv_head_, chunk, part + t - t0, scratch)
        return
    for t in range(t0, t1):
        p0[t - t0] = <int32_t>first_seen(layer, call.position + t, start)
        p1[t - t0] = <int32_t>min(ST_ATTN_CHUNK, call.position + t + 1 - start)
    call.weights.kernels.attention_many(
        buffers.q + (t0 * shape.heads + kv_head_ * G) * hd, shape.heads * hd, t1 - t0, G, hd,
        <const uint16_t *>kv_head(&call.kv, layer, start, 2 * kv_head_),
        <const uint16_t *>kv_head(&call.kv, layer, start, 2 * kv_head_ + 1), p0, p1, 1 / sqrtf(<float>hd),
        scratch.scores, buffers.partial + part * G * hd, buffers.partial_m + part * G, buffers.partial_l + part * G)


cdef inline void merge_chunks(Call *call, int64_t first, int64_t step, int64_t chunks, float *out) noexcept nogil:
    """out[G][hd]: softmax over the partial results first, first + step, ... of the chunks of a KV head, ascending."""
    cdef int64_t hd = call.weights.shape.hd, G = call.weights.shape.heads // call.weights.shape.kv_heads, g, i, j
    cdef const float *acc = call.buffers.partial + first * G * hd
    cdef const float *m = call.buffers.partial_m + first * G
    cdef const float *sums = call.buffers.partial_l + first * G
    cdef float top, total, w
    for g in range(G):
        top = m[g]
        for i in range(1, chunks):
            if m[i * step * G + g] > top:
                top = m[i * step * G + g]
        total = 0
        memset(out + g * hd, 0, hd * sizeof(float))
        for i in range(chunks):
            w = expf(m[i * step * G + g] - top)
            total += w * sums[i * step * G + g]
            call.weights.kernels.axpy(w, acc + (i * step * G + g) * hd, out + g * hd, hd)
        for j in range(hd):
            out[g * hd + j] /= total


cdef inline int64_t tokens_together(const Call *call) noexcept nogil:
    """How many tokens of a prompt share each read of keys and values; fewer where threads would be without work."""
    return max(1, min(ST_ATTN_TOKENS, call.n * call.weights.shape.kv_heads // st_team_size(call.team)))


cdef inline int64_t attention_units(const Call *call, const Layer *layer) noexcept nogil:
    cdef int64_t kv_heads = call.weights.shape.kv_heads, together = tokens_together(call)
    if call.n > 1:
        return call.n + (call.n + together - 1) // together * kv_heads
    return 1 + chunks_seen(layer, call.position) * kv_heads


cdef inline void attention_phase(Call *call, const Layer *layer, int64_t l, int tid, Scratch *scratch) noexcept nogil:
    """First every token chooses its experts, and whoever sees the last one choose sends the wants to storage; then
    attention of a few tokens and one KV head a unit, or where there is one token of one chunk of it."""
    cdef int64_t kv_heads = call.weights.shape.kv_heads, together = tokens_together(call), u, t0, chunks
    while True:
        u = next_unit(call, tid)
        if u < 0:
            break
        if u < call.n:
            choose_experts(call.weights, call.buffers, u, scratch)
            if count_down(&call.undecided) == 0:
                want_experts(call.weights, call.buffers, call.paging, l, call.n, call.trace, scratch)
        elif call.n > 1:
            t0 = (u - call.n) // kv_heads * together
            prompt_unit(call, layer, t0, min(call.n, t0 + together), (u - call.n) % kv_heads, tid, scratch)
        else:
            chunks = chunks_seen(layer, call.position)
            attention_chunk(call, layer, 0, (u - 1) // chunks, first_chunk(layer, call.position) + (u - 1) % chunks,
                            (u - 1) // chunks * call.buffers.max_chunks + (u - 1) % chunks, scratch)


cdef inline void prompt_unit(Call *call, const Layer *layer, int64_t t0, int64_t t1, int64_t kv_head_, int tid,
                             Scratch *scratch) noexcept nogil:
    """All chunks of tokens t0 .. t1 - 1 for one KV head."""
    cdef const Shape *shape = &call.weights.shape
    cdef int64_t first = first_chunk(layer, call.position + t0), last = (call.position + t1 - 1) // ST_ATTN_CHUNK
    cdef int64_t parts = tid * call.buffers.max_chunks * ST_ATTN_TOKENS, chunk, start, a, b, t, p
    for chunk in range(first, last + 1):
        start = chunk * ST_ATTN_CHUNK
        a, b = max(t0, start - call.position), t1
        if layer.window:
            b = min(t1, start + ST_ATTN_CHUNK + layer.window - 1 - call.position)
        attention_chunks(call, layer, a, b, kv_head_, chunk, parts + (chunk - first) * ST_ATTN_TOKENS + a - t0, scratch)
    for t in range(t0, t1):
        p = call.position + t
        merge_chunks(call, parts + (first_chunk(layer, p) - first) * ST_ATTN_TOKENS + t - t0, ST_ATTN_TOKENS,
                     chunks_seen(layer, p),
                     call.buffers.attn + (t * shape.heads + kv_head_ * (shape.heads // shape.kv_heads)) * shape.hd)


cdef inline int64_t output_units(const Call *call) noexcept nogil:
    return (call.weights.shape.d + OUTPUT_UNIT - 1) // OUTPUT_UNIT


cdef inline void output_phase(Call *call, const Layer *layer, int tid, Scratch *scratch) noexcept nogil:
    """x += W_o . attention"""
    cdef const st_kernels *kernels = call.weights.kernels
    cdef const Shape *shape = &call.weights.shape
    cdef Buffers *buffers = call.buffers
    cdef int64_t width = shape.heads * shape.hd, u, t, r, r0, r1
    cdef const float *xf = output_inputs(call, layer, tid, scratch)
    while True:
        u = next_unit(call, tid)
        if u < 0:
            break
        r0 = u * OUTPUT_UNIT
        r1 = min(r0 + OUTPUT_UNIT, shape.d)
        multiply(kernels, &layer.o, r0, r1, scratch.rows, xf, width, call.n, scratch.out, OUTPUT_UNIT, scratch.row)
        for t in range(call.n):
            for r in range(r1 - r0):
                buffers.x[t * shape.d_padded + r0 + r] += scratch.out[t * OUTPUT_UNIT + r]


cdef inline const float *output_inputs(Call *call, const Layer *layer, int tid, Scratch *scratch) noexcept nogil:
    """Attention's output as floats, and quantised in scratch.rows. Like inputs(), a phase of its own in prompts."""
    cdef const st_kernels *kernels = call.weights.kernels
    cdef const Shape *shape = &call.weights.shape
    cdef Buffers *buffers = call.buffers
    cdef int64_t width = shape.heads * shape.hd, t, kv_head_, chunks
    if call.n == 1:
        chunks = chunks_seen(layer, call.position)
        for kv_head_ in range(shape.kv_heads):
            merge_chunks(call, kv_head_ * buffers.max_chunks, 1, chunks,
                         scratch.norm + kv_head_ * (width // shape.kv_heads))
        kernels.quantize(scratch.norm, width // 32 * 32, scratch.xq)
        scratch.rows[0] = scratch.xq
        return scratch.norm
    while True:
        t = next_unit(call, tid)
        if t < 0:
            break
        kernels.quantize(buffers.attn + t * width, width // 32 * 32, buffers.xq + t * buffers.nq)
    st_team_barrier(call.team, output_units(call))
    for t in range(call.n):
        scratch.rows[t] = buffers.xq + t * buffers.nq
    return buffers.attn
