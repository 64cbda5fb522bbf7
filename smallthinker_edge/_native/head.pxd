# cython: cdivision=True
# The LM head, whole or only some rows: those that the file's predictor selects, or those that a caller allows.
from libc.math cimport INFINITY
from libc.stdint cimport int32_t, int64_t

from smallthinker_edge._native.buffers cimport Buffers, Scratch
from smallthinker_edge._native.call cimport Call, inputs, next_unit
from smallthinker_edge._native.core cimport *
from smallthinker_edge._native.weights cimport multiply, multiply_some

cdef enum:
    HEAD_ROWS = 256  # vocabulary rows of one unit


cdef inline int64_t head_units(const Call *call) noexcept nogil:
    return (call.weights.shape.vocab + HEAD_ROWS - 1) // HEAD_ROWS


cdef inline int64_t first_head_units(const Call *call) noexcept nogil:
    """Units of the head's first phase."""
    if call.sparse_head:
        return (call.weights.predictor_in.rows + ST_TILE_ROWS - 1) // ST_TILE_ROWS
    return head_units(call)


cdef inline void head_phase(Call *call, int tid, Scratch *scratch) noexcept nogil:
    """Logits of the last token, or of all."""
    cdef const st_q8x4 *const *xq
    cdef const float *xf
    cdef int64_t u, first = 0 if call.all_logits else call.n - 1
    inputs(call, scratch, tid, call.weights.output_norm, first_head_units(call), &xq, &xf)
    xq += first
    xf += first * call.weights.shape.d
    if call.sparse_head:
        sparse_head_phases(call, tid, xq, xf, call.n - first, scratch)
        return
    while True:
        u = next_unit(call, tid)
        if u < 0:
            break
        if call.allowed != NULL:
            allowed_head_unit(call, u, xq, xf, scratch)
        else:
            head_unit(call, u, xq, xf, call.n - first, call.logits, scratch)


cdef inline void head_unit(const Call *call, int64_t u, const st_q8x4 *const *xq, const float *xf, int64_t n,
                           float *logits, Scratch *scratch) noexcept nogil:
    cdef int64_t r0 = u * HEAD_ROWS, V = call.weights.shape.vocab
    multiply(call.weights.kernels, &call.weights.head, r0, min(r0 + HEAD_ROWS, V), xq, xf, call.weights.shape.d, n,
             logits + r0, V, scratch.row)


cdef inline void allowed_head_unit(const Call *call, int64_t u, const st_q8x4 *const *xq, const float *xf,
                                   Scratch *scratch) noexcept nogil:
    """One token's logits of the allowed rows of a unit, minus infinity for the others."""
    cdef int64_t r0 = u * HEAD_ROWS, r1 = min(r0 + HEAD_ROWS, call.weights.shape.vocab), r, count = 0
    cdef int32_t index[HEAD_ROWS]
    for r in range(r0, r1):
        index[count] = <int32_t>r
        count += call.allowed[r // 32] >> (r % 32) & 1
    if count == r1 - r0:
        head_unit(call, u, xq, xf, 1, call.logits, scratch)
    else:
        some_logits(call, r0, r1, index, count, xq, xf, call.logits, scratch)


cdef inline void some_logits(const Call *call, int64_t r0, int64_t r1, const int32_t *index, int64_t count,
                             const st_q8x4 *const *xq, const float *xf, float *logits, Scratch *scratch) noexcept nogil:
    """One token's logits of the rows index[count], which are between r0 and r1; minus infinity for the rest there."""
    cdef int64_t r
    cdef float value[HEAD_ROWS]
    multiply_some(call.weights.kernels, &call.weights.head, index, count, xq, xf, value, scratch.row)
    for r in range(r0, r1):
        logits[r] = -INFINITY
    for r in range(count):
        logits[index[r]] = value[r]


cdef inline void sparse_head_phases(Call *call, int tid, const st_q8x4 *const *xq, const float *xf, int64_t n,
                                    Scratch *scratch) noexcept nogil:
    """Scores of all rows from the predictor, logits of those above the threshold, minus infinity for the others. A
    token without any such row gets all its logits."""
    cdef const st_kernels *kernels = call.weights.kernels
    cdef Buffers *buffers = call.buffers
    cdef int64_t u, r0, t, K = call.weights.predictor_in.rows, V = call.weights.shape.vocab
    cdef const st_q8x4 **zq = scratch.rows + buffers.batch
    cdef bint whole = False
    while True:
        u = next_unit(call, tid)
        if u < 0:
            break
        r0 = u * ST_TILE_ROWS
        multiply(kernels, &call.weights.predictor_in, r0, min(r0 + ST_TILE_ROWS, K), xq, xf, call.weights.shape.d, n,
                 buffers.z + r0, K, scratch.row)
    st_team_barrier(call.team, n)
    while True:
        t = next_unit(call, tid)
        if t < 0:
            break
        kernels.quantize(buffers.z + t * K, K, buffers.zq + t * buffers.nq_z)
    st_team_barrier(call.team, head_units(call))
    for t in range(n):
        scratch.selected[t] = 0
        zq[t] = buffers.zq + t * buffers.nq_z
    while True:
        u = next_unit(call, tid)
        if u < 0:
            break
        sparse_head_unit(call, u, zq, xq, xf, n, scratch)
    st_team_barrier(call.team, head_units(call))
    for t in range(n):
        whole |= selected_rows(call, t) == 0
    while whole:
        u = next_unit(call, tid)
        if u < 0:
            break
        for t in range(n):
            if selected_rows(call, t) == 0:
                head_unit(call, u, xq + t, xf + t * call.weights.shape.d, 1, call.logits + t * V, scratch)


cdef inline int64_t selected_rows(const Call *call, int64_t t) noexcept nogil:
    """Rows that all threads together have selected for a token."""
    cdef int64_t i, total = 0
    for i in range(st_team_size(call.team)):
        total += call.buffers.scratch[i].selected[t]
    return total


cdef inline void sparse_head_unit(const Call *call, int64_t u, const st_q8x4 *const *zq, const st_q8x4 *const *xq,
                                  const float *xf, int64_t n, Scratch *scratch) noexcept nogil:
    """One unit's scores, written where the logits go, and then these."""
    cdef const st_kernels *kernels = call.weights.kernels
    cdef int64_t V = call.weights.shape.vocab, r0 = u * HEAD_ROWS, r1 = min(r0 + HEAD_ROWS, V), t, r, count
    cdef int32_t index[HEAD_ROWS]
    cdef float *logits
    multiply(kernels, &call.weights.predictor_out, r0, r1, zq, call.buffers.z, call.weights.predictor_in.rows, n,
             call.logits + r0, V, scratch.row)
    for t in range(n):
        logits = call.logits + t * V
        count = 0
        for r in range(r0, r1):
            index[count] = <int32_t>r
            count += logits[r] > call.head_threshold
        scratch.selected[t] += <int32_t>count
        some_logits(call, r0, r1, index, count, xq + t, xf + t * call.weights.shape.d, logits, scratch)
