/* attention_q8 at 512 bits, included by the AVX-512 table after its gemm_q8_0 and exp16. All G heads share each read
 * and widening of the values. Never included elsewhere. */
#include "smallthinker/kv.h"

enum { Q8_HEADS = 6 }; /* heads that share a read: twice as many sums, the values and the weights fit 32 registers */

/* The lanes of sixteen positions from p that are in p0..p1. */
static inline __mmask16 lanes_q8(int64_t p, int64_t p0, int64_t p1) {
    unsigned low = p < p0 ? 0xffffu << (p0 - p) : 0xffffu, high = p1 - p < 16 ? (1u << (p1 - p)) - 1 : 0xffffu;
    return (__mmask16)(low & high);
}

/* s[p0..p1) = (s + rest) * scale -> exp(score - max), zero for the rest of the tiles touched; returns their sum. */
static float softmax_q8(float *s, const float *rest, int64_t p0, int64_t p1, float scale, float *max) {
    __m512 m = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps(), by = _mm512_set1_ps(scale);
    __mmask16 bad = 0;
    for (int64_t p = p0 / 16 * 16; p < p1; p += 16) {
        __mmask16 in = lanes_q8(p, p0, p1);
        __m512 x = _mm512_mul_ps(_mm512_add_ps(_mm512_loadu_ps(s + p), _mm512_loadu_ps(rest + p)), by);
        _mm512_storeu_ps(s + p, x);
        bad |= _mm512_mask_cmp_ps_mask(in, x, x, _CMP_UNORD_Q);
        m = _mm512_mask_max_ps(m, in, m, x);
    }
    *max = bad ? NAN : _mm512_reduce_max_ps(m);
    m = _mm512_set1_ps(*max);
    for (int64_t p = p0 / 16 * 16; p < p1; p += 16) {
        __mmask16 in = lanes_q8(p, p0, p1);
        __m512 e = _mm512_maskz_mov_ps(in, exp16(_mm512_sub_ps(_mm512_loadu_ps(s + p), m)));
        _mm512_storeu_ps(s + p, e);
        sum = _mm512_add_ps(sum, e);
    }
    return bad ? NAN : _mm512_reduce_add_ps(sum);
}

/* scores[G][256] = exp(score - m), of the positions p0..p1; l: their sums. Between the tiles of a whole page's keys the
 * first block of its values v is asked for. */
static void softmaxes_q8(const uint8_t *k, const uint8_t *v, int64_t nb, const st_q8x4 *const *q, int64_t G, int64_t p0,
                         int64_t p1, float scale, float *scores, float *m, float *l) {
    int64_t t0 = p0 / ST_TILE_ROWS, t1 = (p1 + ST_TILE_ROWS - 1) / ST_TILE_ROWS;
    /* Values stand in another order than keys: only all of a block's are where tiles are. */
    int64_t asked = t1 - t0 == ST_ATTN_CHUNK / ST_TILE_ROWS ? ST_TILE_Q8_0_BYTES : 0;
    for (int64_t t = t0; t < t1; t++) {
        prefetch_far(v + t * asked, asked);
        gemm_q8_0(k, ST_ATTN_CHUNK, nb, t, t + 1, q, 2 * G, scores + t * ST_TILE_ROWS, ST_ATTN_CHUNK);
    }
    for (int64_t h = 0; h < G; h++)
        l[h] = softmax_q8(scores + h * ST_ATTN_CHUNK, scores + (G + h) * ST_ATTN_CHUNK, p0, p1, scale, m + h);
}

/* Sums of one block of dimensions for N heads; w: [N][256] weights, of which p0..p1 rounded to pairs are read.
 * Meanwhile the bytes are asked for that stand so far ahead. */
#define VALUES_Q8(N)                                                                                                   \
    static void values_q8_x##N(const uint8_t *lines, int64_t ahead, const int16_t *w, int64_t p0, int64_t p1,          \
                               float by, float *acc, int64_t hd) {                                                     \
        __m512i low[N], high[N];                                                                                       \
        for (int h = 0; h < N; h++)                                                                                    \
            low[h] = high[h] = _mm512_setzero_si512();                                                                 \
        for (int64_t pair = p0 / 2; pair < (p1 + 1) / 2; pair++) {                                                     \
            const __m256i *line = (const __m256i *)(lines + 64 * pair);                                                \
            st_prefetch_l1((const uint8_t *)line + PREFETCH_NEAR);                                                     \
            st_prefetch_l2((const uint8_t *)line + ahead);                                                             \
            __m512i a = _mm512_cvtepi8_epi16(_mm256_loadu_si256(line));                                                \
            __m512i b = _mm512_cvtepi8_epi16(_mm256_loadu_si256(line + 1));                                            \
            _Pragma("GCC unroll 8") for (int h = 0; h < N; h++) {                                                      \
                __m512i weight = broadcast4((const int8_t *)(w + h * ST_ATTN_CHUNK + 2 * pair));                       \
                low[h] = _mm512_dpwssd_epi32(low[h], a, weight);                                                       \
                high[h] = _mm512_dpwssd_epi32(high[h], b, weight);                                                     \
            }                                                                                                          \
        }                                                                                                              \
        for (int h = 0; h < N; h++) {                                                                                  \
            _mm512_storeu_ps(acc + h * hd, _mm512_mul_ps(_mm512_cvtepi32_ps(low[h]), _mm512_set1_ps(by)));             \
            _mm512_storeu_ps(acc + h * hd + 16, _mm512_mul_ps(_mm512_cvtepi32_ps(high[h]), _mm512_set1_ps(by)));       \
        }                                                                                                              \
    }

VALUES_Q8(1)
VALUES_Q8(2)
VALUES_Q8(3)
VALUES_Q8(4)
VALUES_Q8(5)
VALUES_Q8(6)

/* w[G][256] = scores times the block's scales, in 15 bits of the largest scale, which is returned. */
static float weights_q8(const uint8_t *scales, const float *scores, int64_t G, int64_t p0, int64_t p1, int16_t *w) {
    float by[ST_ATTN_CHUNK];
    __m512 most = _mm512_setzero_ps();
    __mmask16 bad = 0;
    for (int64_t p = p0 / 16 * 16; p < p1; p += 16) {
        __mmask16 in = lanes_q8(p, p0, p1);
        __m512 d = _mm512_maskz_mov_ps(in, load_f16x16(scales + 2 * p));
        bad |= _mm512_cmp_ps_mask(d, d, _CMP_UNORD_Q);
        most = _mm512_max_ps(most, d);
        _mm512_storeu_ps(by + p, d);
    }
    float top = bad ? NAN : _mm512_reduce_max_ps(most), inverse = top > 0 ? 32767 / top : 0;
    for (int64_t p = p0 / 16 * 16; p < p1; p += 16) {
        __m512 f = _mm512_mul_ps(_mm512_loadu_ps(by + p), _mm512_set1_ps(inverse));
        for (int64_t h = 0; h < G; h++) {
            __m512i e = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(scores + h * ST_ATTN_CHUNK + p), f));
            _mm256_storeu_si256((__m256i *)(w + h * ST_ATTN_CHUNK + p), _mm512_cvtsepi32_epi16(e));
        }
    }
    return top;
}

/* Sums of one block for all heads, up to Q8_HEADS at a time. ahead: bytes to the next block, 0 at the last. */
static void values_q8_all(const uint8_t *lines, int64_t ahead, const int16_t *w, int64_t G, int64_t p0, int64_t p1,
                          float by, float *acc, int64_t hd) {
    for (int64_t h = 0, step; h < G; h += step, w += step * ST_ATTN_CHUNK, acc += step * hd) {
        step = G - h < Q8_HEADS ? G - h : G - h == Q8_HEADS + 1 ? 4 : Q8_HEADS; /* seven as four and three */
        switch (step) {
        case 6: values_q8_x6(lines, ahead, w, p0, p1, by, acc, hd); break;
        case 5: values_q8_x5(lines, ahead, w, p0, p1, by, acc, hd); break;
        case 4: values_q8_x4(lines, ahead, w, p0, p1, by, acc, hd); break;
        case 3: values_q8_x3(lines, ahead, w, p0, p1, by, acc, hd); break;
        case 2: values_q8_x2(lines, ahead, w, p0, p1, by, acc, hd); break;
        default: values_q8_x1(lines, ahead, w, p0, p1, by, acc, hd); break;
        }
    }
}
