/* What needs no intrinsics: plain C, included by every table's file, so that the compiler vectorises it for that
 * table's instructions. Nothing here sums, so no rounding depends on the width. */
#ifndef SMALLTHINKER_PLAIN_H
#define SMALLTHINKER_PLAIN_H

#include "smallthinker/kernels.h"

#include <string.h>

/* What 16 blocks of 32 outputs each multiply the nibbles of a group's neurons by, where down is transposed: for the
 * blocks, four neurons' bytes by four, their -8 * sum, and the scale of the products. */
typedef struct block_weights {
    int8_t h[8][16][4];
    int32_t corr[16];
    float scale[16];
} block_weights;

/* Where the scales of Down stand in a K type (layout.h): the head of group g's super-block, and the group's own; head,
 * scales: bytes of a chunk of these. */
static inline const uint8_t *down_k_head(const st_down_view *down, int64_t g) {
    return down->scales + 8 * down->scale_stride * (size_t)(g / 8);
}

static inline const uint8_t *down_k_scales(const st_down_view *down, int64_t g, int head, int scales) {
    size_t chunks = down->scale_stride / (size_t)(head / 8 + scales);
    return down_k_head(down, g) + chunks * (size_t)(head + g % 8 * scales);
}

/* Where part `step` of `steps` of n things begins. */
static inline int64_t share(int64_t n, int64_t step, int64_t steps) { return n * step / steps; }

static inline void rope(float *v, const float *restrict cosine, const float *restrict sine, int64_t half) {
    float *restrict low = v, *restrict high = v + half;
    for (int64_t i = 0; i < half; i++) {
        float a = low[i], b = high[i];
        low[i] = a * cosine[i] - b * sine[i];
        high[i] = a * sine[i] + b * cosine[i];
    }
}

/* attention_many by `attention`, token by token. */
static inline void attention_each(st_attention *attention, const float *q, int64_t ldq, int64_t n, int64_t G,
                                  int64_t hd, const uint16_t *k, const uint16_t *v, const int32_t *p0,
                                  const int32_t *p1, float scale, float *scratch, float *acc, float *m, float *l) {
    for (int64_t i = 0; i < n; i++)
        attention(q + i * ldq, G, hd, k + p0[i] * hd, v + p0[i] * hd, p1[i] - p0[i], scale, scratch, acc + i * G * hd,
                  m + i * G, l + i * G);
}

/* Integers that order as the floats do; NaN above everything, -0 as 0. */
static inline void order_keys(const float *restrict x, int64_t n, int32_t *restrict keys) {
    for (int64_t i = 0; i < n; i++) {
        float v = x[i] + 0.0f;
        int32_t bits;
        memcpy(&bits, &v, 4);
        bits = v != v ? 0x7fc00000 : bits;
        keys[i] = bits ^ (bits >> 31 & 0x7fffffff);
    }
}

static inline void top_k(const float *x, int64_t n, int64_t k, int32_t *keys, int32_t *ids) {
    order_keys(x, n, keys);
    for (int64_t j = 0; j < k; j++) {
        int32_t most = INT32_MIN, first = 0;
        for (int64_t i = 0; i < n; i++)
            most = keys[i] > most ? keys[i] : most;
        while (keys[first] != most)
            first++;
        ids[j] = first;
        keys[first] = INT32_MIN;
    }
}

#endif
