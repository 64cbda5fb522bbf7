# The forward pass, part: router, projections, attention over the KV cache and its output projection. Included by
# engine.pyx after forward.pxi, whose structs it fills.

cdef inline KVPage *kv_page(Call *c, Layer *layer) noexcept nogil:
    return &c.ring_page if layer.window else &c.full_page


cdef uint8_t *kv_head(Call *c, Layer *layer, int64_t p, int64_t unit) noexcept nogil:
    """Keys (unit = 2 * KV head) or values (one more) of the page that holds position p."""
    cdef int64_t block = p // ST_ATTN_CHUNK
    cdef KVPage *page = kv_page(c, layer)
    cdef uint8_t *data = c.kv_ring[block % c.ring] if layer.window else c.kv_full[block]
    return data + layer.kv_index * page.bytes + unit * page.head_bytes


cdef void store(Call *c, Layer *layer, int64_t p, int64_t unit, const float *x, Scratch *s) noexcept nogil:
    """Writes one head's key or value of position p."""
    cdef uint8_t *page = kv_head(c, layer, p, unit)
    cdef int64_t slot = p % ST_ATTN_CHUNK, hd = c.s.hd
    if kv_page(c, layer).type == ST_F16:
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
    cdef int64_t hd = c.s.hd, half = c.rope_half, t, head
    cdef float *out
    cdef st_q8x4 *query
    cdef int64_t ld = c.s.heads * hd
    cdef float *rope = c.rope_window if layer.window else c.rope
    if unit < c.s.heads:
        out = c.q + unit * hd
        mat_unit(c, &layer.q, unit * hd, unit * hd + hd, xq, xf, c.s.d, c.n, out, ld, s)
        if layer.rope:
            for t in range(c.n):
                c.kernels.rope(out + t * ld, rope + t * 2 * half, rope + t * 2 * half + half, half)
        if kv_page(c, layer).type == ST_Q8_0:
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
            c.kernels.rope(out + t * hd, rope + t * 2 * half, rope + t * 2 * half + half, half)
        store(c, layer, c.position + t, unit, out + t * hd, s)


cdef void router_logits(Call *c, const float *router, const float *x, int64_t part, float *logits) noexcept nogil:
    """Logits of experts 8 * part .. 8 * part + 7 (those there are) for one token's raw residual."""
    cdef int64_t e
    for e in range(8 * part, min(8 * part + 8, c.s.experts)):
        logits[e] = c.kernels.dot(router + e * c.s.d, x, c.s.d)


cdef void router_unit(Call *c, Layer *layer, int64_t unit) noexcept nogil:
    """Eight experts' router logits of one token."""
    cdef int64_t per = (c.s.experts + 7) // 8, t = unit // per
    router_logits(c, layer.router, c.x + t * c.s.d_padded, unit % per, c.logits_router + t * c.s.experts)


cdef void choose_experts(Call *c, int64_t t, Scratch *s) noexcept nogil:
    """Top K by logit (lower id wins a tie), weights normalised, stored by ascending id."""
    cdef int64_t K = c.s.used, E = c.s.experts, k, e, j
    cdef float *logits = c.logits_router + t * E
    cdef int32_t *ids = c.chosen + t * K
    cdef float *w = c.weight + t * K
    cdef float total = 0, top
    c.kernels.top_k(logits, E, K, s.keys, ids)
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
    cdef int64_t per = (c.s.experts + 7) // 8, j = unit // per
    if l + 1 + j < c.s.n_layers:
        router_logits(c, c.layers[l + 1 + j].router, c.x, unit % per, c.ahead_logits + j * c.s.experts)


cdef void read_ahead(Call *c, int64_t l, Scratch *s) noexcept nogil:
    """Names the experts that the next layers will probably choose; in a prompt, all of the next layer's."""
    cdef int64_t E = c.s.experts, n = 0, j, k, e, layers = min(c.ahead, c.s.n_layers - 1 - l)
    if c.ahead == 0:
        return
    if c.n > 1:
        if layers > 0 and c.n * c.s.used >= E:
            for e in range(E):
                c.ahead_ids[e] = <int32_t>((l + 1) * E + e)
            n = E
        layers = 0
    for j in range(layers):
        c.kernels.top_k(c.ahead_logits + j * E, E, c.s.used, s.keys, c.ahead_ids + n)
        for k in range(c.s.used):
            c.ahead_ids[n] += <int32_t>((l + 1 + j) * E)
            n += 1
    st_pager_ahead(c.pager, c.ahead_ids, n)


cdef void page_in(Call *c, int64_t l, Scratch *s) noexcept nogil:
    """Lets go of the last layer's experts and asks for this layer's; one thread, as soon as they are known."""
    cdef int64_t i, e, n = 0
    cdef int progress
    list_tokens(c)
    if c.trace != NULL:
        for i in range(c.n):
            memcpy(c.trace + (i * c.s.n_layers + l) * c.s.used, c.chosen + i * c.s.used, c.s.used * sizeof(int32_t))
    if c.pager == NULL:
        for i in range(c.n_active):
            c.order[i] = <int32_t>i
        return
    st_pager_release(c.pager, c.held, c.n_held)
    for i in range(c.n_active):
        e = c.active_expert[i]
        c.held[i] = <int32_t>(l * c.s.experts + e)
        c.held_tokens[i] = c.list_start[e + 1] - c.list_start[e]
    c.n_held = c.n_active
    st_pager_want(c.pager, c.held, c.held_tokens, c.n_held, c.clock + c.n)
    read_ahead(c, l, s)
    # Those in memory first, then what is being read. One look at each: it may arrive between two looks.
    for i in range(c.n_active):
        c.held_tokens[i] = st_pager_progress(c.pager, c.held[i])
    for progress in range(2, -1, -1):
        for i in range(c.n_active):
            if c.held_tokens[i] == progress:
                c.order[n] = <int32_t>i
                n += 1


cdef const uint8_t *expert_blob(Call *c, int64_t l, int64_t e, int tid) noexcept nogil:
    """The weights of an expert, waiting for them; NULL where they cannot be read, or the call was interrupted."""
    if c.pager == NULL:
        return c.experts[l * c.s.experts + e]
    while tid == 0 and not st_pager_wait(c.pager, <int32_t>(l * c.s.experts + e), LOOK_NS):
        if look_up(c):
            st_pager_interrupt(c.pager, 1)
            break
    return st_pager_take(c.pager, <int32_t>(l * c.s.experts + e))


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
    if kv_page(c, layer).type == ST_F16:
        c.kernels.attention(c.q + (t * c.s.heads + kv * G) * hd, G, hd, <const uint16_t *>k + p0 * hd,
                            <const uint16_t *>v + p0 * hd, p1 - p0, scale, s.scores, acc, m, lsum)
        return
    for g in range(G):
        s.queries[g] = c.q8 + 2 * (t * c.s.heads + kv * G + g) * c.nq_head
        s.queries[G + g] = s.queries[g] + c.nq_head
    c.kernels.attention_q8(s.queries, G, hd, k, v, p0, p1, scale, s.scores, acc, m, lsum)


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
            u = next_unit(c, tid)
            if u < 0:
                break
            if u == 0:
                choose_experts(c, 0, s)
                page_in(c, l, s)
                continue
            kv = (u - 1) // chunks
            i = (u - 1) % chunks
            base = (kv * c.max_chunks + i) * G
            attention_chunk(c, layer, 0, kv, chunk0 + i, c.partial + base * hd, c.partial_m + base,
                            c.partial_l + base, s)
        return
    while True:
        u = next_unit(c, tid)
        if u < 0:
            break
        if u < c.n:
            choose_experts(c, u, s)
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
            t = next_unit(c, tid)
            if t < 0:
                break
            if t == 0:
                page_in(c, l, s)
            else:
                c.kernels.quantize(c.attn + (t - 1) * width, width // 32 * 32, c.xq + (t - 1) * c.nq)
        st_team_barrier(c.team, output_units(c))
        for t in range(c.n):
            s.rows[t] = c.xq + t * c.nq
        xf = c.attn
    while True:
        u = next_unit(c, tid)
        if u < 0:
            break
        r0 = u * 64
        r1 = min(r0 + 64, c.s.d)
        mat_unit(c, &layer.o, r0, r1, s.rows, xf, width, c.n, s.out, 64, s)
        for t in range(c.n):
            for r in range(r1 - r0):
                c.x[t * c.s.d_padded + r0 + r] += s.out[t * 64 + r]
