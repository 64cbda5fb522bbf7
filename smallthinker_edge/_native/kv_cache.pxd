# cython: cdivision=True
# Keys and values as the forward pass finds them: blocks of 256 positions, a page a layer (kv.h).
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t

from smallthinker_edge._native.core cimport *
from smallthinker_edge._native.session_memory cimport SessionMemory
from smallthinker_edge._native.weights cimport Layer, all_finite

# 256 positions of one layer.
cdef struct KVPage:
    int type              # ST_F16 or ST_Q8_0
    size_t head_bytes     # the keys or the values of one head
    size_t bytes

# What one decode call sees of a cache.
cdef struct KVView:
    KVPage full_page
    KVPage ring_page
    uint8_t **full        # block of full layers by position // 256
    uint8_t **ring        # block of window layers by position // 256 % ring_blocks
    int64_t ring_blocks


cdef inline const KVPage *kv_page(const KVView *kv, const Layer *layer) noexcept nogil:
    return &kv.ring_page if layer.window else &kv.full_page


cdef inline uint8_t *kv_head(const KVView *kv, const Layer *layer, int64_t position, int64_t unit) noexcept nogil:
    """Keys (unit = 2 * KV head) or values (one more) of the page that holds a position."""
    cdef int64_t block = position // ST_ATTN_CHUNK
    cdef const KVPage *page = kv_page(kv, layer)
    cdef uint8_t *data = kv.ring[block % kv.ring_blocks] if layer.window else kv.full[block]
    return data + layer.kv_index * page.bytes + unit * page.head_bytes


cdef inline bint store_head(const st_kernels *kernels, const KVView *kv, const Layer *layer, int64_t position,
                            int64_t unit, const float *x, int64_t hd, st_q8x4 *quantised) noexcept nogil:
    """Writes one head's key or value of a position; False where it is not finite or too large. quantised: a head."""
    cdef uint8_t *page = kv_head(kv, layer, position, unit)
    cdef int64_t slot = position % ST_ATTN_CHUNK, i
    cdef uint16_t *halves = <uint16_t *>page + slot * hd
    cdef int bad = 0
    if kv_page(kv, layer).type == ST_F16:
        kernels.to_f16(x, halves, hd)
        for i in range(hd):
            bad |= (halves[i] & 0x7c00) == 0x7c00
        return not bad
    kernels.quantize(x, hd, quantised)
    if unit % 2 == 0:
        st_kv_store_q8_key(quantised, hd, slot, page)
    else:
        st_kv_store_q8_value(quantised, hd, slot, page)
    return all_finite(x, hd)


cdef class KVBlock:
    cdef uint8_t *data
    cdef readonly size_t bytes
    cdef int owners
    cdef SessionMemory memory

cdef class KVCache:
    cdef SessionMemory memory
    cdef int32_t *ids      # [context] the tokens decoded so far
    cdef list full         # KVBlock by position // 256
    cdef list ring         # KVBlock by position // 256 % ring_blocks, None before first use
    cdef KVView view
    cdef readonly int64_t position
    cdef readonly int64_t context
    cdef readonly str kv
    cdef readonly int64_t lost   # window layers have forgotten the positions below this one
    cdef int64_t n_full, n_window, window

    cdef void release(self, int64_t first_full, int64_t first_ring)
    cdef int prepare(self, int64_t n) except -1
    cdef void advance(self, const int32_t *tokens, int64_t n, bint done) noexcept
