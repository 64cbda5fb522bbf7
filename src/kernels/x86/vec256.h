/* The kernels of the 256-bit tables, included by avx2.c and avxvnni.c. The includer defines ST_TABLE,
 * ST_TABLE_NAME and, for unsigned bytes u times signed bytes s summed over one block of 32 columns:
 *   DOT(sum, u, s)       sum += u * s, at most 8 times with u <= 15 before
 *   TO_I32(sum)          eight 32-bit sums of four neighbouring products each
 *   DOT_SIGNED(w, s)     eight 32-bit sums of signed w times signed s (|w|, |s| <= 128, s != -128) */
#include "smallthinker/kernels.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

#define PREFETCH_AHEAD 4096 /* measured: 76 GB/s against 50 without, two threads streaming Q4_0 tiles */

static inline __m256i load256(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }

static inline __m256i broadcast4(const int8_t *p) {
    int32_t v;
    memcpy(&v, p, 4);
    return _mm256_set1_epi32(v);
}

static inline __m256 load_f16x8(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }

static inline void prefetch_block(const uint8_t *p, int bytes) {
    for (int i = 0; i < bytes; i += 64)
        _mm_prefetch((const char *)p + PREFETCH_AHEAD + i, _MM_HINT_T0);
}

static inline float sum8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

static inline float max8(__m256 v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

/* exp for x <= 0: 2^n times a degree-6 polynomial on [-ln2/2, ln2/2] (Taylor terms; error below 2e-7 there). */
static inline __m256 exp8(__m256 x) {
    x = _mm256_max_ps(x, _mm256_set1_ps(-87.0f)); /* the result there is below 2e-38: nothing to add to 1 */
    __m256 n =
        _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 p = _mm256_set1_ps(1.0f / 720);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 120));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 24));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 6));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(p, _mm256_castsi256_ps(e));
}

/* Largest |x| of 32 floats; NaN where one is NaN. */
static inline float amax32(const __m256 x[4]) {
    const __m256 absolute = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 m = _mm256_setzero_ps(), nan = _mm256_setzero_ps();
    for (int i = 0; i < 4; i++) {
        m = _mm256_max_ps(_mm256_and_ps(x[i], absolute), m);
        nan = _mm256_or_ps(nan, _mm256_cmp_ps(x[i], x[i], _CMP_UNORD_Q));
    }
    return _mm256_movemask_ps(nan) ? NAN : max8(m);
}

/* 32 floats times inverse, rounded to bytes in order; zero where the product is no number within +-127. */
static inline __m256i round32(const __m256 x[4], float inverse) {
    const __m256 absolute = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256i q[4];
    for (int i = 0; i < 4; i++) {
        __m256 v = _mm256_mul_ps(x[i], _mm256_set1_ps(inverse));
        __m256 ok = _mm256_cmp_ps(_mm256_and_ps(v, absolute), _mm256_set1_ps(127.25f), _CMP_LT_OQ);
        q[i] = _mm256_and_si256(_mm256_cvtps_epi32(v), _mm256_castps_si256(ok));
    }
    __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

static inline int sum_bytes(__m256i bytes) {
    __m256i s = _mm256_sad_epu8(_mm256_xor_si256(bytes, _mm256_set1_epi8(-128)), _mm256_setzero_si256());
    __m128i t = _mm_add_epi64(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    return (int)(_mm_cvtsi128_si64(t) + _mm_extract_epi64(t, 1)) - 32 * 128;
}

static void quantize(const float *x, int64_t cols, st_q8x4 *out) {
    for (int64_t b = 0; b < cols / ST_BLOCK; b++, x += ST_BLOCK) {
        st_q8x4 *quad = out + b / 4;
        int lane = b % 4;
        if (lane == 0)
            memset(quad, 0, sizeof *quad);
        __m256 v[4];
        for (int i = 0; i < 4; i++)
            v[i] = _mm256_loadu_ps(x + 8 * i);
        float amax = amax32(v);
        __m256i q = round32(v, amax > 0 ? 127 / amax : 0);
        _mm_storeu_si128((__m128i *)quad->q[0][lane], _mm256_castsi256_si128(q));
        _mm_storeu_si128((__m128i *)quad->q[1][lane], _mm256_extracti128_si256(q, 1));
        quad->corr[4 * lane] = -8 * sum_bytes(q);
        _mm_storeu_ps(quad->scale + 4 * lane, _mm_set1_ps(amax / 127));
    }
}

/* One block of one tile for N tokens; half h is rows 8h..8h+7. */
#define GEMM_Q4_0(NAME, N)                                                                                             \
    static void NAME(const uint8_t *tile, int64_t nb, const st_q8x4 *const *x, __m256 sum[N][2]) {                     \
        const __m256i nibble = _mm256_set1_epi8(15);                                                                   \
        for (int t = 0; t < N; t++)                                                                                    \
            sum[t][0] = sum[t][1] = _mm256_setzero_ps();                                                               \
        for (int64_t b = 0; b < nb; b++, tile += ST_TILE_Q4_0_BYTES) {                                                 \
            int lane = b % 4;                                                                                          \
            prefetch_block(tile, ST_TILE_Q4_0_BYTES);                                                                  \
            for (int h = 0; h < 2; h++) {                                                                              \
                __m256i low[4], high[4];                                                                               \
                __m256 scale = load_f16x8(tile + 16 * h);                                                              \
                for (int g = 0; g < 4; g++) {                                                                          \
                    __m256i w = load256(tile + 32 + 64 * g + 32 * h);                                                  \
                    low[g] = _mm256_and_si256(w, nibble);                                                              \
                    high[g] = _mm256_and_si256(_mm256_srli_epi16(w, 4), nibble);                                       \
                }                                                                                                      \
                for (int t = 0; t < N; t++) {                                                                          \
                    const st_q8x4 *q = x[t] + b / 4;                                                                   \
                    __m256i acc = _mm256_setzero_si256();                                                              \
                    for (int g = 0; g < 4; g++) {                                                                      \
                        acc = DOT(acc, low[g], broadcast4(q->q[0][lane] + 4 * g));                                     \
                        acc = DOT(acc, high[g], broadcast4(q->q[1][lane] + 4 * g));                                    \
                    }                                                                                                  \
                    acc = _mm256_add_epi32(TO_I32(acc), _mm256_set1_epi32(q->corr[4 * lane]));                         \
                    __m256 s = _mm256_mul_ps(scale, _mm256_set1_ps(q->scale[4 * lane]));                               \
                    sum[t][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc), s, sum[t][h]);                                \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

#define GEMM_Q8_0(NAME, N)                                                                                             \
    static void NAME(const uint8_t *tile, int64_t nb, const st_q8x4 *const *x, __m256 sum[N][2]) {                     \
        for (int t = 0; t < N; t++)                                                                                    \
            sum[t][0] = sum[t][1] = _mm256_setzero_ps();                                                               \
        for (int64_t b = 0; b < nb; b++, tile += ST_TILE_Q8_0_BYTES) {                                                 \
            int lane = b % 4;                                                                                          \
            prefetch_block(tile, ST_TILE_Q8_0_BYTES);                                                                  \
            for (int h = 0; h < 2; h++) {                                                                              \
                __m256 scale = load_f16x8(tile + 16 * h);                                                              \
                for (int t = 0; t < N; t++) {                                                                          \
                    const st_q8x4 *q = x[t] + b / 4;                                                                   \
                    __m256i acc = _mm256_setzero_si256();                                                              \
                    for (int g = 0; g < 8; g++) {                                                                      \
                        __m256i w = load256(tile + 32 + 64 * g + 32 * h);                                              \
                        acc = _mm256_add_epi32(acc, DOT_SIGNED(w, broadcast4(q->q[g / 4][lane] + 4 * (g % 4))));       \
                    }                                                                                                  \
                    __m256 s = _mm256_mul_ps(scale, _mm256_set1_ps(q->scale[4 * lane]));                               \
                    sum[t][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc), s, sum[t][h]);                                \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

GEMM_Q4_0(tile_q4_0_x1, 1)
GEMM_Q4_0(tile_q4_0_x2, 2)
GEMM_Q4_0(tile_q4_0_x4, 4)
GEMM_Q8_0(tile_q8_0_x1, 1)
GEMM_Q8_0(tile_q8_0_x2, 2)
GEMM_Q8_0(tile_q8_0_x4, 4)

/* Stores up to 16 rows of one token. */
static inline void store_rows(const __m256 sum[2], int64_t count, float *y) {
    if (count >= ST_TILE_ROWS) {
        _mm256_storeu_ps(y, sum[0]);
        _mm256_storeu_ps(y + 8, sum[1]);
    } else {
        float all[ST_TILE_ROWS];
        _mm256_storeu_ps(all, sum[0]);
        _mm256_storeu_ps(all + 8, sum[1]);
        memcpy(y, all, (size_t)count * sizeof *y);
    }
}

/* A tile's weights stay in the first cache levels while it serves all tokens, four, two and one at a time. */
#define GEMM(NAME, TYPE, BYTES)                                                                                        \
    static void NAME(const uint8_t *w, int64_t rows, int64_t nb, int64_t t0, int64_t t1, const st_q8x4 *const *x,      \
                     int64_t n, float *y, int64_t ldy) {                                                               \
        for (int64_t tile = t0; tile < t1; tile++) {                                                                   \
            const uint8_t *p = w + tile * nb * BYTES;                                                                  \
            float *out = y + (tile - t0) * ST_TILE_ROWS;                                                               \
            __m256 sum[4][2];                                                                                          \
            for (int64_t t = 0, step; t < n; t += step) {                                                              \
                step = n - t >= 4 ? 4 : n - t >= 2 ? 2 : 1;                                                            \
                if (step == 4)                                                                                         \
                    tile_##TYPE##_x4(p, nb, x + t, sum);                                                               \
                else if (step == 2)                                                                                    \
                    tile_##TYPE##_x2(p, nb, x + t, sum);                                                               \
                else                                                                                                   \
                    tile_##TYPE##_x1(p, nb, x + t, sum);                                                               \
                for (int64_t i = 0; i < step; i++)                                                                     \
                    store_rows(sum[i], rows - tile * ST_TILE_ROWS, out + (t + i) * ldy);                               \
            }                                                                                                          \
        }                                                                                                              \
    }

GEMM(gemm_q4_0, q4_0, ST_TILE_Q4_0_BYTES)
GEMM(gemm_q8_0, q8_0, ST_TILE_Q8_0_BYTES)

/* Two blocks (32 nibble bytes) a step; DOT leaves 4 sums a block, which the replicated scales fit. */
static void rows_q4_0(const uint8_t *w, int64_t nb, const int32_t *index, int64_t n, const st_q8x4 *x, float *out) {
    const __m256i nibble = _mm256_set1_epi8(15), spread = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    for (int64_t k = 0; k < n; k++) {
        const uint8_t *scales = w + index[k] * nb * 18, *nibbles = scales + 2 * nb;
        if (k + 2 < n)
            for (int64_t i = 0; i < nb * 18; i += 64)
                _mm_prefetch((const char *)w + index[k + 2] * nb * 18 + i, _MM_HINT_T0);
        __m256 sum = _mm256_setzero_ps();
        for (int64_t b = 0; b < nb; b += 2) {
            const st_q8x4 *q = x + b / 4;
            int lane = b % 4;
            uint16_t pair[8] = {0};
            __m256i v;
            if (b + 1 < nb) {
                memcpy(pair, scales + 2 * b, 4);
                v = load256(nibbles + 16 * b);
            } else {
                memcpy(pair, scales + 2 * b, 2);
                v = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(nibbles + 16 * b)));
                v = _mm256_inserti128_si256(v, _mm_setzero_si128(), 1);
            }
            __m256i acc = DOT(_mm256_setzero_si256(), _mm256_and_si256(v, nibble), load256(q->q[0][lane]));
            acc = DOT(acc, _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble), load256(q->q[1][lane]));
            acc = _mm256_add_epi32(TO_I32(acc), load256(q->corr + 4 * lane));
            __m256 d = _mm256_permutevar8x32_ps(load_f16x8(pair), spread);
            sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc), _mm256_mul_ps(d, _mm256_loadu_ps(q->scale + 4 * lane)), sum);
        }
        out[k] = sum8(sum);
    }
}

/* One half of the lines (lanes 2*half, 2*half + 1) of one group: 8 sums of 8 outputs, [v][low, high]. */
static inline void down_group(const uint8_t *lines, const st_active *a, int half, __m256i sum[8]) {
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int i = 0; i < 8; i++)
        sum[i] = _mm256_setzero_si256();
    for (int k = 0; k < 4 * a->quads; k += 4) {
        const uint8_t *p = lines + 32 * half;
        __m256i l0 = load256(p + 64 * a->index[k]), l1 = load256(p + 64 * a->index[k + 1]);
        __m256i l2 = load256(p + 64 * a->index[k + 2]), l3 = load256(p + 64 * a->index[k + 3]);
        __m256i a0 = _mm256_unpacklo_epi8(l0, l1), a1 = _mm256_unpackhi_epi8(l0, l1);
        __m256i b0 = _mm256_unpacklo_epi8(l2, l3), b1 = _mm256_unpackhi_epi8(l2, l3);
        __m256i v[4] = {_mm256_unpacklo_epi16(a0, b0), _mm256_unpackhi_epi16(a0, b0), _mm256_unpacklo_epi16(a1, b1),
                        _mm256_unpackhi_epi16(a1, b1)};
        __m256i h = broadcast4(a->h + k);
        for (int i = 0; i < 4; i++) {
            sum[2 * i] = DOT(sum[2 * i], _mm256_and_si256(v[i], nibble), h);
            sum[2 * i + 1] = DOT(sum[2 * i + 1], _mm256_and_si256(_mm256_srli_epi16(v[i], 4), nibble), h);
        }
    }
}

static void down_q4_0(const uint8_t *chunk, int64_t groups, const st_active *a, float weight, float *y) {
    const uint8_t *lines = chunk + groups * ST_DOWN_CHUNK * 2;
    for (int half = 0; half < 2; half++) {
        __m256 total[8], w = _mm256_set1_ps(weight);
        for (int i = 0; i < 8; i++)
            total[i] = _mm256_setzero_ps();
        for (int64_t g = 0; g < groups; g++) {
            __m256i sum[8];
            if (a[g].quads == 0)
                continue;
            down_group(lines + 32 * 64 * g, a + g, half, sum);
            const uint8_t *scales = chunk + g * ST_DOWN_CHUNK * 2 + 16 * half;
            for (int i = 0; i < 8; i++) {
                __m256i s = _mm256_add_epi32(TO_I32(sum[i]), _mm256_set1_epi32(a[g].corr));
                __m256 d = _mm256_mul_ps(load_f16x8(scales + 32 * i), _mm256_set1_ps(a[g].scale));
                total[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(s), d, total[i]);
            }
        }
        for (int i = 0; i < 8; i++) {
            float *out = y + 16 * i + 8 * half;
            _mm256_storeu_ps(out, _mm256_fmadd_ps(w, total[i], _mm256_loadu_ps(out)));
        }
    }
}

static void activate(const float *g, const float *up, st_active *out) {
    __m256 h[4];
    unsigned fires = 0;
    memset(out, 0, sizeof *out);
    for (int i = 0; i < 4; i++) {
        __m256 gate = _mm256_loadu_ps(g + 8 * i);
        __m256 on = _mm256_cmp_ps(gate, _mm256_setzero_ps(), _CMP_NLE_UQ);
        fires |= (unsigned)_mm256_movemask_ps(on) << 8 * i;
        h[i] = _mm256_and_ps(on, _mm256_mul_ps(gate, _mm256_loadu_ps(up + 8 * i)));
    }
    out->count = __builtin_popcount(fires);
    if (!fires)
        return;
    float amax = amax32(h);
    __m256i q = round32(h, amax > 0 ? 127 / amax : 0);
    unsigned used = ~(unsigned)_mm256_movemask_epi8(_mm256_cmpeq_epi8(q, _mm256_setzero_si256()));
    int8_t bytes[32];
    int n = 0;
    _mm256_storeu_si256((__m256i *)bytes, q);
    for (; used; used &= used - 1) {
        int i = __builtin_ctz(used);
        out->index[n] = (uint8_t)i;
        out->h[n++] = bytes[i];
    }
    if (n == 0 && !(amax <= 0)) /* only NaN or infinity: keep one entry so that the scale is seen */
        n = 1;
    out->corr = -8 * sum_bytes(q);
    out->quads = (n + 3) / 4;
    out->scale = amax / 127;
}

static float dot_f16(const float *q, const uint16_t *k, int64_t n) {
    __m256 s0 = _mm256_setzero_ps(), s1 = s0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        s0 = _mm256_fmadd_ps(_mm256_loadu_ps(q + i), load_f16x8(k + i), s0);
        s1 = _mm256_fmadd_ps(_mm256_loadu_ps(q + i + 8), load_f16x8(k + i + 8), s1);
    }
    if (i < n)
        s0 = _mm256_fmadd_ps(_mm256_loadu_ps(q + i), load_f16x8(k + i), s0);
    return sum8(_mm256_add_ps(s0, s1));
}

/* scores[0..n) -> exp(score - max); returns their sum. Lanes past n count nothing. */
static float softmax_chunk(float *s, int64_t n, float *max) {
    int64_t padded = (n + 7) / 8 * 8;
    for (int64_t p = n; p < padded; p++)
        s[p] = -INFINITY;
    __m256 m = _mm256_set1_ps(-INFINITY), sum = _mm256_setzero_ps();
    for (int64_t p = 0; p < padded; p += 8)
        m = _mm256_max_ps(m, _mm256_loadu_ps(s + p));
    *max = max8(m);
    m = _mm256_set1_ps(*max);
    for (int64_t p = 0; p < padded; p += 8) {
        __m256 e = exp8(_mm256_sub_ps(_mm256_loadu_ps(s + p), m));
        if (p + 8 > n)
            e = _mm256_and_ps(e, _mm256_cmp_ps(_mm256_loadu_ps(s + p), _mm256_set1_ps(-INFINITY), _CMP_NEQ_UQ));
        _mm256_storeu_ps(s + p, e);
        sum = _mm256_add_ps(sum, e);
    }
    return sum8(sum);
}

static void attention(const float *q, int64_t G, int64_t hd, const uint16_t *k, const uint16_t *v, int64_t n,
                      float scale, float *scores, float *acc, float *m, float *l) {
    for (int64_t p = 0; p < n; p++)
        for (int64_t h = 0; h < G; h++)
            scores[h * ST_ATTN_CHUNK + p] = dot_f16(q + h * hd, k + p * hd, hd) * scale;
    for (int64_t h = 0; h < G; h++)
        l[h] = softmax_chunk(scores + h * ST_ATTN_CHUNK, n, m + h);
    for (int64_t i = 0; i < hd; i += 8)
        for (int64_t h = 0; h < G; h += 2) { /* two heads share the read and conversion of v */
            const float *s0 = scores + h * ST_ATTN_CHUNK, *s1 = h + 1 < G ? s0 + ST_ATTN_CHUNK : s0;
            __m256 a0 = _mm256_setzero_ps(), a1 = a0;
            for (int64_t p = 0; p < n; p++) {
                __m256 value = load_f16x8(v + p * hd + i);
                a0 = _mm256_fmadd_ps(_mm256_set1_ps(s0[p]), value, a0);
                a1 = _mm256_fmadd_ps(_mm256_set1_ps(s1[p]), value, a1);
            }
            _mm256_storeu_ps(acc + h * hd + i, a0);
            if (h + 1 < G)
                _mm256_storeu_ps(acc + (h + 1) * hd + i, a1);
        }
}

static float dot(const float *a, const float *b, int64_t n) {
    __m256 s0 = _mm256_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        s0 = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i), s0);
        s1 = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8), _mm256_loadu_ps(b + i + 8), s1);
        s2 = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 16), _mm256_loadu_ps(b + i + 16), s2);
        s3 = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 24), _mm256_loadu_ps(b + i + 24), s3);
    }
    float sum = sum8(_mm256_add_ps(_mm256_add_ps(s0, s1), _mm256_add_ps(s2, s3)));
    for (; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

static void rmsnorm(const float *x, const float *w, int64_t n, float eps, float *out) {
    float scale = 1 / sqrtf(dot(x, x, n) / (float)n + eps);
    __m256 s = _mm256_set1_ps(scale);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(x + i), s), _mm256_loadu_ps(w + i)));
    for (; i < n; i++)
        out[i] = x[i] * scale * w[i];
}

static void axpy(float a, const float *x, float *y, int64_t n) {
    __m256 s = _mm256_set1_ps(a);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(y + i, _mm256_fmadd_ps(s, _mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i)));
    for (; i < n; i++)
        y[i] += a * x[i];
}

static void to_f16(const float *x, uint16_t *out, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < n; i++)
        out[i] = st_f32_to_f16(x[i]);
}

const st_kernels ST_TABLE = {
    .name = ST_TABLE_NAME,
    .quantize = quantize,
    .gemm_q4_0 = gemm_q4_0,
    .gemm_q8_0 = gemm_q8_0,
    .rows_q4_0 = rows_q4_0,
    .down_q4_0 = down_q4_0,
    .activate = activate,
    .attention = attention,
    .rmsnorm = rmsnorm,
    .dot = dot,
    .axpy = axpy,
    .to_f16 = to_f16,
};
