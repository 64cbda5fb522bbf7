# cython: cdivision=True
# Copies of what the matrices of some layers are multiplied with, for measure/imatrix.py. A call without a Capture
# passes these by, and a call with one computes the same bits.
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from smallthinker_edge._native.buffers cimport Buffers
from smallthinker_edge._native.core cimport *
from smallthinker_edge._native.weights cimport Layer, Weights

# Of up to T tokens in layers first .. first + layers - 1. Slot t * K + k: the k-th of token t's experts in ascending
# order.
cdef struct Capture:
    int64_t first
    int64_t layers
    int64_t tokens    # T
    float *attention  # [layers][T][d]: of q, k and v
    float *output     # [layers][T][H*hd]: of the output projection
    float *ffn        # [layers][T][d]: of gate and up
    float *neurons    # [layers][T*K][f]: of down, before an expert is weighted


cdef inline bint captured(const Capture *capture, int64_t l) noexcept nogil:
    return capture != NULL and capture.first <= l < capture.first + capture.layers


cdef inline void capture_normalised(const Weights *weights, const Buffers *buffers, const float *norm, float *out,
                                    int64_t n, int tid, int threads) noexcept nogil:
    """out[n][d]: the residual normalised with `norm`, this thread's tokens."""
    cdef int64_t t, d = weights.shape.d
    for t in range(n * tid // threads, n * (tid + 1) // threads):
        weights.kernels.rmsnorm(buffers.x + t * weights.shape.d_padded, norm, d, weights.shape.eps, out + t * d)


cdef inline void capture_attention(const Capture *capture, const Weights *weights, const Buffers *buffers, int64_t l,
                                   int64_t n, int tid, int threads) noexcept nogil:
    """Between the embedding, or the layer before, and attention's output projection."""
    capture_normalised(weights, buffers, weights.layers[l].attn_norm,
                       capture.attention + (l - capture.first) * capture.tokens * weights.shape.d, n, tid, threads)


cdef inline void capture_output(const Capture *capture, const Weights *weights, const Buffers *buffers, int64_t l,
                                int64_t n, int tid, int threads) noexcept nogil:
    """After attention, of a call of several tokens."""
    cdef int64_t t, width = weights.shape.heads * weights.shape.hd
    for t in range(n * tid // threads, n * (tid + 1) // threads):
        memcpy(capture.output + ((l - capture.first) * capture.tokens + t) * width, buffers.attn + t * width,
               width * sizeof(float))


cdef inline void capture_ffn(const Capture *capture, const Weights *weights, const Buffers *buffers, int64_t l,
                             int64_t n, int tid, int threads) noexcept nogil:
    """After the output projection, before the experts add to the residual."""
    capture_normalised(weights, buffers, weights.layers[l].ffn_norm,
                       capture.ffn + (l - capture.first) * capture.tokens * weights.shape.d, n, tid, threads)


cdef inline void capture_neurons(const Capture *capture, const Weights *weights, const Buffers *buffers, int64_t l,
                                 int64_t n, int tid, int threads) noexcept nogil:
    """After the layer's experts, of a call that computed neurons and down one after the other."""
    cdef int64_t slot, K = weights.shape.used, first = (l - capture.first) * capture.tokens * K
    for slot in range(n * tid // threads * K, n * (tid + 1) // threads * K):
        neurons_of(weights, buffers, weights.layers + l, slot, capture.neurons + (first + slot) * weights.shape.f)


cdef inline void neurons_of(const Weights *weights, const Buffers *buffers, const Layer *layer, int64_t slot,
                            float *out) noexcept nogil:
    """out[f]: what down was multiplied with, as the layout of the layer's experts keeps it."""
    cdef int64_t f = weights.shape.f, groups = weights.shape.groups, i, g
    cdef const st_q8x4 *quad
    if layer.expert.layout == ST_EXPERT_ROWS:
        memcpy(out, buffers.h + slot * f, f * sizeof(float))
        return
    if layer.expert.layout == ST_EXPERT_TILES:
        for i in range(f):
            quad = buffers.hq + slot * buffers.nq_h + i // 128
            out[i] = quad.scale[i % 128 // 32 * 4] * quad.q[i % 32 // 16][i % 128 // 32][i % 16]
        return
    memset(out, 0, f * sizeof(float))
    for g in range(groups):
        if weights.shape.down_transposed:
            for i in range(4 * buffers.fired[slot * groups + g].quads):
                out[32 * g + buffers.fired[slot * groups + g].index[i]] += buffers.fired[slot * groups + g].h[i]
        else:
            for i in range(4 * buffers.active[slot * groups + g].quads):
                out[32 * g + buffers.active[slot * groups + g].index[i]] += (
                    buffers.active[slot * groups + g].scale * buffers.active[slot * groups + g].h[i])


cdef class MatrixInputs:
    cdef Capture capture
    cdef readonly object attention, output, ffn, neurons
