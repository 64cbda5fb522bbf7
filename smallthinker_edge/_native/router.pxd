# cython: cdivision=True
# The router and what follows from it at once: which experts a token uses, which weights are wanted from storage, and
# which will probably be. It speaks before attention, so that storage works while attention computes.
from libc.math cimport INFINITY, expf
from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.string cimport memcpy, memset

from smallthinker_edge._native.buffers cimport Buffers, Scratch
from smallthinker_edge._native.core cimport *
from smallthinker_edge._native.weights cimport Layer, Shape, Weights

cdef enum:
    ROUTER_UNIT = 8  # experts of one unit

# What the forward pass keeps of the pager from layer to layer.
cdef struct Paging:
    st_pager *pager       # NULL: all experts are in memory
    int64_t ahead         # layers whose routers are asked before their turn; 0 reads nothing ahead
    float *ahead_logits   # [ahead][E] of one token
    int32_t *ahead_ids    # [(ahead + 1) * E]
    int32_t *held         # [E] pager ids pinned for the layer in work
    int32_t *held_tokens  # [E] how many tokens use each; then how near each is
    int64_t n_held


cdef inline int64_t router_units(const Shape *shape, int64_t n) noexcept nogil:
    """Units that make the router logits of n tokens."""
    return n * ((shape.experts + ROUTER_UNIT - 1) // ROUTER_UNIT)


cdef inline void some_logits(const st_kernels *kernels, const Shape *shape, const Layer *layer, const float *x,
                             int64_t part, float *logits) noexcept nogil:
    """Logits of experts 8 * part .. 8 * part + 7 (those there are) for one token's raw residual; of absent ones minus
    infinity, so that others are chosen."""
    cdef int64_t e
    for e in range(ROUTER_UNIT * part, min(ROUTER_UNIT * part + ROUTER_UNIT, shape.experts)):
        if layer.absent != NULL and layer.absent[e]:
            logits[e] = -INFINITY
        else:
            logits[e] = kernels.dot(layer.router + e * shape.d, x, shape.d)


cdef inline void router_unit(const Weights *weights, const Layer *layer, Buffers *buffers, int64_t unit) noexcept nogil:
    """Eight experts' router logits of one token."""
    cdef int64_t per = router_units(&weights.shape, 1), t = unit // per
    some_logits(weights.kernels, &weights.shape, layer, buffers.x + t * weights.shape.d_padded, unit % per,
                buffers.router_logits + t * weights.shape.experts)


cdef inline void choose_experts(const Weights *weights, Buffers *buffers, int64_t t, Scratch *scratch) noexcept nogil:
    """Top K by logit (lower id wins a tie), weights normalised, stored by ascending id."""
    cdef int64_t K = weights.shape.used, E = weights.shape.experts, k, e, j
    cdef float *logits = buffers.router_logits + t * E
    cdef int32_t *ids = buffers.chosen + t * K
    cdef float *w = buffers.weight + t * K
    cdef float total = 0, top
    weights.kernels.top_k(logits, E, K, scratch.keys, ids)
    top = logits[ids[0]]
    for k in range(1, K):  # insertion sort by id
        e = ids[k]
        j = k
        while j > 0 and ids[j - 1] > e:
            ids[j] = ids[j - 1]
            j -= 1
        ids[j] = <int32_t>e
    for k in range(K):
        w[k] = expf(logits[ids[k]] - top) if weights.shape.softmax else 1 / (1 + expf(-logits[ids[k]]))
        total += w[k]
    if not weights.shape.softmax and total < 6.103515625e-5:
        total = 6.103515625e-5
    for k in range(K):
        w[k] /= total


cdef inline void list_tokens(const Shape *shape, Buffers *buffers, int64_t n) noexcept nogil:
    """Which (token, k) slots each expert serves."""
    cdef int64_t i, total = n * shape.used, e
    cdef int32_t *start = buffers.list_start
    memset(start, 0, (shape.experts + 1) * sizeof(int32_t))
    for i in range(total):
        start[buffers.chosen[i] + 1] += 1
    buffers.n_active = 0
    for e in range(shape.experts):
        if start[e + 1]:
            buffers.active_expert[buffers.n_active] = <int32_t>e
            buffers.n_active += 1
        start[e + 1] += start[e]
    for i in range(total):
        e = buffers.chosen[i]
        buffers.list_slot[start[e]] = <int32_t>i
        start[e] += 1
    for e in range(shape.experts, 0, -1):
        start[e] = start[e - 1]
    start[0] = 0


cdef inline void want_experts(const Weights *weights, Buffers *buffers, Paging *paging, int64_t l, int64_t n,
                              int32_t *trace, Scratch *scratch) noexcept nogil:
    """Lets go of the last layer's experts and asks for this layer's; one thread, as soon as all n tokens have chosen.

    trace: [n][L][K] that takes the choice, or NULL.
    """
    cdef const Shape *shape = &weights.shape
    cdef int64_t i, e, ordered = 0
    cdef int progress
    list_tokens(shape, buffers, n)
    if trace != NULL:
        for i in range(n):
            memcpy(trace + (i * shape.layers + l) * shape.used, buffers.chosen + i * shape.used,
                   shape.used * sizeof(int32_t))
    if paging.pager == NULL:
        for i in range(buffers.n_active):
            buffers.order[i] = <int32_t>i
        return
    st_pager_release(paging.pager, paging.held, paging.n_held)
    for i in range(buffers.n_active):
        e = buffers.active_expert[i]
        paging.held[i] = <int32_t>(l * shape.experts + e)
        paging.held_tokens[i] = buffers.list_start[e + 1] - buffers.list_start[e]
    paging.n_held = buffers.n_active
    st_pager_want(paging.pager, paging.held, paging.held_tokens, paging.n_held, n)
    read_ahead(weights, paging, l, n, scratch)
    # Those in memory first, then what is being read. One look at each: it may arrive between two looks.
    for i in range(buffers.n_active):
        paging.held_tokens[i] = st_pager_progress(paging.pager, paging.held[i])
    for progress in range(2, -1, -1):
        for i in range(buffers.n_active):
            if paging.held_tokens[i] == progress:
                buffers.order[ordered] = <int32_t>i
                ordered += 1


cdef inline int64_t ahead_units(const Shape *shape, const Paging *paging, int64_t n) noexcept nogil:
    """Units of work that look ahead, in every layer alike: those past the last layer do nothing."""
    return paging.ahead * router_units(shape, 1) if paging.pager != NULL and n == 1 else 0


cdef inline void ahead_unit(const Weights *weights, const Buffers *buffers, Paging *paging, int64_t l,
                            int64_t unit) noexcept nogil:
    """Eight logits of a later layer's router for this layer's residual: the best guess there is of its choice."""
    cdef int64_t per = router_units(&weights.shape, 1), j = unit // per
    if l + 1 + j < weights.shape.layers:
        some_logits(weights.kernels, &weights.shape, &weights.layers[l + 1 + j], buffers.x, unit % per,
                    paging.ahead_logits + j * weights.shape.experts)


cdef inline void read_ahead(const Weights *weights, Paging *paging, int64_t l, int64_t n,
                            Scratch *scratch) noexcept nogil:
    """Names the experts that the next layers will probably choose; in a prompt, all of the next layer's."""
    cdef int64_t E = weights.shape.experts, K = weights.shape.used, named = 0, j, k, e
    cdef int64_t layers = min(paging.ahead, weights.shape.layers - 1 - l)
    if paging.ahead == 0:
        return
    if n > 1:
        if layers > 0 and n * K >= E:
            for e in range(E):
                if weights.layers[l + 1].absent == NULL or not weights.layers[l + 1].absent[e]:
                    paging.ahead_ids[named] = <int32_t>((l + 1) * E + e)
                    named += 1
        layers = 0
    for j in range(layers):
        weights.kernels.top_k(paging.ahead_logits + j * E, E, K, scratch.keys, paging.ahead_ids + named)
        for k in range(named, named + K):
            paging.ahead_ids[k] += <int32_t>((l + 1 + j) * E)
        named += K
    st_pager_ahead(paging.pager, paging.ahead_ids, named)
