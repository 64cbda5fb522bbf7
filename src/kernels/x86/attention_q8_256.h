/* attention_q8 at 256 bits, included by vec256.h after gemm_q8_0 and exp8. Two heads share each read and widening of
 * the values. Never included elsewhere. */
#include "smallthinker/kv.h"

#ifdef __AVXVNNI__
#define MADD16(sum, a, b) _mm256_dpwssd_avx_epi32(sum, a, b)
#else
#define MADD16(sum, a, b) _mm256_add_epi32(sum, _mm256_madd_epi16(a, b))
#endif

/* All ones in the lanes of eight positions from p that are in p0..p1. */
static inline __m256 lanes_q8(int64_t p, int64_t p0, int64_t p1) {
    __m256i at = _mm256_add_epi32(_mm256_set1_epi32((int)p), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    __m256i low = _mm256_cmpgt_epi32(at, _mm256_set1_epi32((int)p0 - 1));
    return _mm256_castsi256_ps(_mm256_and_si256(low, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)p1), at)));
}

/* s[p0..p1) = (s + rest) * scale -> exp(score - max), zero for the rest of the tiles touched; returns their sum. */
static float softmax_q8(float *s, const float *rest, int64_t p0, int64_t p1, float scale, float *max) {
    __m256 m = _mm256_set1_ps(-INFINITY), none = m, sum = _mm256_setzero_ps(), bad = sum;
    int64_t start = p0 / 16 * 16, end = (p1 + 15) / 16 * 16;
    for (int64_t p = start; p < end; p += 8) {
        __m256 x = _mm256_add_ps(_mm256_loadu_ps(s + p), _mm256_loadu_ps(rest + p));
        x = _mm256_blendv_ps(none, _mm256_mul_ps(x, _mm256_set1_ps(scale)), lanes_q8(p, p0, p1));
        _mm256_storeu_ps(s + p, x);
        bad = _mm256_or_ps(bad, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        m = _mm256_max_ps(m, x);
    }
    int nan = _mm256_movemask_ps(bad);
    *max = nan ? NAN : max8(m);
    m = _mm256_set1_ps(*max);
    for (int64_t p = start; p < end; p += 8) {
        __m256 e = _mm256_and_ps(exp8(_mm256_sub_ps(_mm256_loadu_ps(s + p), m)), lanes_q8(p, p0, p1));
        _mm256_storeu_ps(s + p, e);
        sum = _mm256_add_ps(sum, e);
    }
    return nan ? NAN : sum8(sum);
}

/* w[G][256] = scores times the block's scales, in 15 bits of the largest scale, which is returned. */
static float weights_q8(const uint8_t *scales, const float *scores, int64_t G, int64_t p0, int64_t p1, int16_t *w) {
    float by[ST_ATTN_CHUNK];
    int64_t start = p0 / 16 * 16, end = (p1 + 15) / 16 * 16;
    __m256 most = _mm256_setzero_ps(), bad = most;
    for (int64_t p = start; p < end; p += 8) {
        __m256 d = _mm256_and_ps(load_f16x8(scales + 2 * p), lanes_q8(p, p0, p1));
        bad = _mm256_or_ps(bad, _mm256_cmp_ps(d, d, _CMP_UNORD_Q));
        most = _mm256_max_ps(most, d);
        _mm256_storeu_ps(by + p, d);
    }
    float top = _mm256_movemask_ps(bad) ? NAN : max8(most), inverse = top > 0 ? 32767 / top : 0;
    for (int64_t p = start; p < end; p += 16) {
        __m256 f0 = _mm256_mul_ps(_mm256_loadu_ps(by + p), _mm256_set1_ps(inverse));
        __m256 f1 = _mm256_mul_ps(_mm256_loadu_ps(by + p + 8), _mm256_set1_ps(inverse));
        for (int64_t h = 0; h < G; h++) {
            const float *s = scores + h * ST_ATTN_CHUNK + p;
            __m256i e0 = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(s), f0));
            __m256i e1 = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(s + 8), f1));
            __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(e0, e1), 0xd8);
            _mm256_storeu_si256((__m256i *)(w + h * ST_ATTN_CHUNK + p), both);
        }
    }
    return top;
}

/* Sums of one block of 32 dimensions for two heads (the same one twice where G is odd). */
static void values_q8(const uint8_t *lines, const int16_t *w0, const int16_t *w1, int64_t p0, int64_t p1, float by,
                      float *out0, float *out1) {
    __m256i s0[4], s1[4];
    for (int i = 0; i < 4; i++)
        s0[i] = s1[i] = _mm256_setzero_si256();
    for (int64_t pair = p0 / 2; pair < (p1 + 1) / 2; pair++) {
        const uint8_t *line = lines + 64 * pair;
        __m256i a = broadcast4((const int8_t *)(w0 + 2 * pair)), b = broadcast4((const int8_t *)(w1 + 2 * pair));
        for (int i = 0; i < 4; i++) {
            __m256i x = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(line + 16 * i)));
            s0[i] = MADD16(s0[i], x, a);
            s1[i] = MADD16(s1[i], x, b);
        }
    }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(out0 + 8 * i, _mm256_mul_ps(_mm256_cvtepi32_ps(s0[i]), _mm256_set1_ps(by)));
        _mm256_storeu_ps(out1 + 8 * i, _mm256_mul_ps(_mm256_cvtepi32_ps(s1[i]), _mm256_set1_ps(by)));
    }
}

/* Sums of one block for all heads, two at a time. */
static void values_q8_all(const uint8_t *lines, const int16_t *w, int64_t G, int64_t p0, int64_t p1, float by,
                          float *acc, int64_t hd) {
    for (int64_t h = 0; h < G; h += 2) {
        int64_t other = h + 1 < G ? h + 1 : h;
        values_q8(lines, w + h * ST_ATTN_CHUNK, w + other * ST_ATTN_CHUNK, p0, p1, by, acc + h * hd, acc + other * hd);
    }
}
