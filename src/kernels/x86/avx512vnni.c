/* AVX-512 with VNNI: the matrix kernels and attention at 512 bits. The small operations of 32 numbers are those
 * of the 256-bit table, which every CPU of this table can run. */
#include "small.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

#define PREFETCH_AHEAD 4096 /* measured: 76 GB/s against 50 without, two threads streaming Q4_0 tiles */

static inline __m512i load512(const void *p) { return _mm512_loadu_si512(p); }

static inline __m512i broadcast4(const int8_t *p) {
    int32_t v;
    memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
}

static inline __m512 load_f16x16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }

static inline void prefetch_block(const uint8_t *p, int bytes) {
    for (int i = 0; i < bytes; i += 64)
        _mm_prefetch((const char *)p + PREFETCH_AHEAD + i, _MM_HINT_T0);
}

/* exp for x <= 0: 2^n times a degree-6 polynomial on [-ln2/2, ln2/2] (Taylor terms; error below 2e-7 there). */
static inline __m512 exp16(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f)); /* the result there is below 2e-38: nothing to add to 1 */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                    _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* The sum starts at -8 * sum(x), so that nibbles 0..15 need no offset. Weights are unpacked once for N tokens. */
#define TILE_Q4_0(NAME, N)                                                                                             \
    static void NAME(const uint8_t *tile, int64_t nb, const st_q8x4 *const *x, __m512 *total) {                        \
        const __m512i nibble = _mm512_set1_epi8(15);                                                                   \
        __m512 sum[N];                                                                                                 \
        for (int t = 0; t < N; t++)                                                                                    \
            sum[t] = _mm512_setzero_ps();                                                                              \
        for (int64_t b = 0; b < nb; b++, tile += ST_TILE_Q4_0_BYTES) {                                                 \
            int lane = b % 4;                                                                                          \
            __m512i low[4], high[4];                                                                                   \
            prefetch_block(tile, ST_TILE_Q4_0_BYTES);                                                                  \
            __m512 scale = load_f16x16(tile);                                                                          \
            for (int g = 0; g < 4; g++) {                                                                              \
                __m512i w = load512(tile + 32 + 64 * g);                                                               \
                low[g] = _mm512_and_si512(w, nibble);                                                                  \
                high[g] = _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble);                                           \
            }                                                                                                          \
            _Pragma("GCC unroll 8") for (int t = 0; t < N; t++) {                                                      \
                const st_q8x4 *q = x[t] + b / 4;                                                                       \
                __m512i even = _mm512_set1_epi32(q->corr[4 * lane]), odd = _mm512_setzero_si512();                     \
                for (int g = 0; g < 4; g++) {                                                                          \
                    even = _mm512_dpbusd_epi32(even, low[g], broadcast4(q->q[0][lane] + 4 * g));                       \
                    odd = _mm512_dpbusd_epi32(odd, high[g], broadcast4(q->q[1][lane] + 4 * g));                        \
                }                                                                                                      \
                __m512 s = _mm512_mul_ps(scale, _mm512_set1_ps(q->scale[4 * lane]));                                   \
                sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(even, odd)), s, sum[t]);                  \
            }                                                                                                          \
        }                                                                                                              \
        for (int t = 0; t < N; t++)                                                                                    \
            total[t] = sum[t];                                                                                         \
    }

/* w XOR 128 is w + 128 unsigned; 16 * corr = -128 * sum(x) takes the offset back. */
#define TILE_Q8_0(NAME, N)                                                                                             \
    static void NAME(const uint8_t *tile, int64_t nb, const st_q8x4 *const *x, __m512 *total) {                        \
        const __m512i flip = _mm512_set1_epi8(-128);                                                                   \
        __m512 sum[N];                                                                                                 \
        for (int t = 0; t < N; t++)                                                                                    \
            sum[t] = _mm512_setzero_ps();                                                                              \
        for (int64_t b = 0; b < nb; b++, tile += ST_TILE_Q8_0_BYTES) {                                                 \
            int lane = b % 4;                                                                                          \
            __m512i u[8];                                                                                              \
            prefetch_block(tile, ST_TILE_Q8_0_BYTES);                                                                  \
            __m512 scale = load_f16x16(tile);                                                                          \
            for (int g = 0; g < 8; g++)                                                                                \
                u[g] = _mm512_xor_si512(load512(tile + 32 + 64 * g), flip);                                            \
            _Pragma("GCC unroll 8") for (int t = 0; t < N; t++) {                                                      \
                const st_q8x4 *q = x[t] + b / 4;                                                                       \
                __m512i even = _mm512_set1_epi32(16 * q->corr[4 * lane]), odd = _mm512_setzero_si512();                \
                for (int g = 0; g < 4; g++) {                                                                          \
                    even = _mm512_dpbusd_epi32(even, u[g], broadcast4(q->q[0][lane] + 4 * g));                         \
                    odd = _mm512_dpbusd_epi32(odd, u[g + 4], broadcast4(q->q[1][lane] + 4 * g));                       \
                }                                                                                                      \
                __m512 s = _mm512_mul_ps(scale, _mm512_set1_ps(q->scale[4 * lane]));                                   \
                sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(even, odd)), s, sum[t]);                  \
            }                                                                                                          \
        }                                                                                                              \
        for (int t = 0; t < N; t++)                                                                                    \
            total[t] = sum[t];                                                                                         \
    }

TILE_Q4_0(tile_q4_0_x1, 1)
TILE_Q4_0(tile_q4_0_x2, 2)
TILE_Q4_0(tile_q4_0_x4, 4)
TILE_Q4_0(tile_q4_0_x8, 8)
TILE_Q8_0(tile_q8_0_x1, 1)
TILE_Q8_0(tile_q8_0_x2, 2)
TILE_Q8_0(tile_q8_0_x4, 4)
TILE_Q8_0(tile_q8_0_x8, 8)

/* A tile's weights stay in the first cache levels while it serves all tokens, eight at a time. */
#define GEMM(NAME, TYPE, BYTES)                                                                                        \
    static void NAME(const uint8_t *w, int64_t rows, int64_t nb, int64_t t0, int64_t t1, const st_q8x4 *const *x,      \
                     int64_t n, float *y, int64_t ldy) {                                                               \
        for (int64_t tile = t0; tile < t1; tile++) {                                                                   \
            const uint8_t *p = w + tile * nb * BYTES;                                                                  \
            float *out = y + (tile - t0) * ST_TILE_ROWS;                                                               \
            int64_t left = rows - tile * ST_TILE_ROWS;                                                                 \
            __mmask16 mask = left >= ST_TILE_ROWS ? 0xffff : (__mmask16)((1u << left) - 1);                            \
            __m512 sum[8];                                                                                             \
            for (int64_t t = 0, step; t < n; t += step) {                                                              \
                step = n - t >= 8 ? 8 : n - t >= 4 ? 4 : n - t >= 2 ? 2 : 1;                                           \
                switch (step) {                                                                                        \
                case 8: tile_##TYPE##_x8(p, nb, x + t, sum); break;                                                    \
                case 4: tile_##TYPE##_x4(p, nb, x + t, sum); break;                                                    \
                case 2: tile_##TYPE##_x2(p, nb, x + t, sum); break;                                                    \
                default: tile_##TYPE##_x1(p, nb, x + t, sum); break;                                                   \
                }                                                                                                      \
                for (int64_t i = 0; i < step; i++)                                                                     \
                    _mm512_mask_storeu_ps(out + (t + i) * ldy, mask, sum[i]);                                          \
            }                                                                                                          \
        }                                                                                                              \
    }

GEMM(gemm_q4_0, q4_0, ST_TILE_Q4_0_BYTES)
GEMM(gemm_q8_0, q8_0, ST_TILE_Q8_0_BYTES)

/* Four blocks (64 nibble bytes) a step; each block leaves 4 sums, which the replicated scales fit. */
static void rows_q4_0(const uint8_t *w, int64_t nb, const int32_t *index, int64_t n, const st_q8x4 *x, float *out) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    for (int64_t k = 0; k < n; k++) {
        const uint8_t *scales = w + index[k] * nb * 18, *nibbles = scales + 2 * nb;
        if (k + 2 < n)
            for (int64_t i = 0; i < nb * 18; i += 64)
                _mm_prefetch((const char *)w + index[k + 2] * nb * 18 + i, _MM_HINT_T0);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t b = 0; b < nb; b += 4) {
            const st_q8x4 *q = x + b / 4;
            int64_t left = nb - b;
            __mmask16 mask = left >= 4 ? 0xffff : (__mmask16)((1u << 4 * left) - 1);
            __m512i v = _mm512_maskz_loadu_epi32(mask, nibbles + 16 * b);
            __m128i d = _mm_maskz_loadu_epi16((__mmask8)(left >= 4 ? 15 : (1 << left) - 1), scales + 2 * b);
            __m512i even = _mm512_dpbusd_epi32(load512(q->corr), _mm512_and_si512(v, nibble), load512(q->q[0]));
            __m512i odd = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble),
                                              load512(q->q[1]));
            __m512 s = _mm512_permutexvar_ps(spread, _mm512_castps128_ps512(_mm_cvtph_ps(d)));
            sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(even, odd)),
                                  _mm512_mul_ps(s, _mm512_loadu_ps(q->scale)), sum);
        }
        out[k] = _mm512_reduce_add_ps(sum);
    }
}

static inline void prefetch_lines(const uint8_t *lines, const st_active *a) {
    for (int k = 0; k < 4 * a->quads; k++)
        _mm_prefetch((const char *)lines + 64 * a->index[k], _MM_HINT_T0);
}

static void down_q4_0(const uint8_t *chunk, int64_t groups, const st_active *a, float weight, float *y) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const uint8_t *lines = chunk + groups * ST_DOWN_CHUNK * 2;
    __m512 total[8];
    for (int i = 0; i < 8; i++)
        total[i] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
        if (g + 2 < groups)
            prefetch_lines(lines + 32 * 64 * (g + 2), a + g + 2);
        if (a[g].quads == 0)
            continue;
        __m512i sum[8];
        for (int i = 0; i < 8; i++)
            sum[i] = _mm512_set1_epi32(a[g].corr);
        for (int k = 0; k < 4 * a[g].quads; k += 4) {
            const uint8_t *p = lines + 32 * 64 * g, *index = a[g].index + k;
            __m512i l0 = load512(p + 64 * index[0]), l1 = load512(p + 64 * index[1]);
            __m512i l2 = load512(p + 64 * index[2]), l3 = load512(p + 64 * index[3]);
            __m512i a0 = _mm512_unpacklo_epi8(l0, l1), a1 = _mm512_unpackhi_epi8(l0, l1);
            __m512i b0 = _mm512_unpacklo_epi8(l2, l3), b1 = _mm512_unpackhi_epi8(l2, l3);
            __m512i v[4] = {_mm512_unpacklo_epi16(a0, b0), _mm512_unpackhi_epi16(a0, b0), _mm512_unpacklo_epi16(a1, b1),
                            _mm512_unpackhi_epi16(a1, b1)};
            __m512i h = broadcast4(a[g].h + k);
            for (int i = 0; i < 4; i++) {
                sum[2 * i] = _mm512_dpbusd_epi32(sum[2 * i], _mm512_and_si512(v[i], nibble), h);
                sum[2 * i + 1] =
                    _mm512_dpbusd_epi32(sum[2 * i + 1], _mm512_and_si512(_mm512_srli_epi16(v[i], 4), nibble), h);
            }
        }
        for (int i = 0; i < 8; i++) {
            __m512 d = _mm512_mul_ps(load_f16x16(chunk + (g * ST_DOWN_CHUNK + 16 * i) * 2), _mm512_set1_ps(a[g].scale));
            total[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[i]), d, total[i]);
        }
    }
    for (int i = 0; i < 8; i++)
        _mm512_storeu_ps(y + 16 * i, _mm512_fmadd_ps(_mm512_set1_ps(weight), total[i], _mm512_loadu_ps(y + 16 * i)));
}

static float dot_f16(const float *q, const uint16_t *k, int64_t n) {
    __m512 s0 = _mm512_setzero_ps(), s1 = s0;
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        s0 = _mm512_fmadd_ps(_mm512_loadu_ps(q + i), load_f16x16(k + i), s0);
        s1 = _mm512_fmadd_ps(_mm512_loadu_ps(q + i + 16), load_f16x16(k + i + 16), s1);
    }
    for (; i < n; i += 16) {
        __mmask16 mask = n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
        __m512 key = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, k + i));
        s0 = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, q + i), key, s0);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(s0, s1));
}

/* scores[0..n) -> exp(score - max); returns their sum. */
static float softmax_chunk(float *s, int64_t n, float *max) {
    __m512 m = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (int64_t p = 0; p < n; p += 16) {
        __mmask16 mask = n - p >= 16 ? 0xffff : (__mmask16)((1u << (n - p)) - 1);
        m = _mm512_mask_max_ps(m, mask, m, _mm512_maskz_loadu_ps(mask, s + p));
    }
    *max = _mm512_reduce_max_ps(m);
    m = _mm512_set1_ps(*max);
    for (int64_t p = 0; p < n; p += 16) {
        __mmask16 mask = n - p >= 16 ? 0xffff : (__mmask16)((1u << (n - p)) - 1);
        __m512 e = _mm512_maskz_mov_ps(mask, exp16(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, s + p), m)));
        _mm512_mask_storeu_ps(s + p, mask, e);
        sum = _mm512_add_ps(sum, e);
    }
    return _mm512_reduce_add_ps(sum);
}

static void attention(const float *q, int64_t G, int64_t hd, const uint16_t *k, const uint16_t *v, int64_t n,
                      float scale, float *scores, float *acc, float *m, float *l) {
    for (int64_t p = 0; p < n; p++)
        for (int64_t h = 0; h < G; h++)
            scores[h * ST_ATTN_CHUNK + p] = dot_f16(q + h * hd, k + p * hd, hd) * scale;
    for (int64_t h = 0; h < G; h++)
        l[h] = softmax_chunk(scores + h * ST_ATTN_CHUNK, n, m + h);
    for (int64_t i = 0; i < hd; i += 16) {
        __mmask16 mask = hd - i >= 16 ? 0xffff : (__mmask16)((1u << (hd - i)) - 1);
        for (int64_t h = 0; h < G; h += 4) { /* up to four heads share the read and conversion of v */
            const float *s[4];
            __m512 a[4];
            for (int j = 0; j < 4; j++) {
                s[j] = scores + (h + j < G ? h + j : h) * ST_ATTN_CHUNK;
                a[j] = _mm512_setzero_ps();
            }
            for (int64_t p = 0; p < n; p++) {
                __m512 value = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, v + p * hd + i));
                for (int j = 0; j < 4; j++)
                    a[j] = _mm512_fmadd_ps(_mm512_set1_ps(s[j][p]), value, a[j]);
            }
            for (int j = 0; j < 4 && h + j < G; j++)
                _mm512_mask_storeu_ps(acc + (h + j) * hd + i, mask, a[j]);
        }
    }
}

static float dot(const float *a, const float *b, int64_t n) {
    __m512 s0 = _mm512_setzero_ps(), s1 = s0;
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        s0 = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), s0);
        s1 = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 16), _mm512_loadu_ps(b + i + 16), s1);
    }
    for (; i < n; i += 16) {
        __mmask16 mask = n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
        s0 = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, a + i), _mm512_maskz_loadu_ps(mask, b + i), s0);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(s0, s1));
}

const st_kernels st_kernels_avx512vnni = {
    .name = "avx512vnni",
    .quantize = st_avx2_quantize,
    .gemm_q4_0 = gemm_q4_0,
    .gemm_q8_0 = gemm_q8_0,
    .rows_q4_0 = rows_q4_0,
    .down_q4_0 = down_q4_0,
    .activate = st_avx2_activate,
    .attention = attention,
    .rmsnorm = st_avx2_rmsnorm,
    .dot = dot,
    .axpy = st_avx2_axpy,
    .to_f16 = st_avx2_to_f16,
};
