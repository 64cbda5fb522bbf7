/* AVX2 + FMA + F16C: products of a block are summed in 16 bits (8 x 2 x 15 x 127 = 30480 fits), widened once. */
#define DOT(sum, u, s) _mm256_add_epi16(sum, _mm256_maddubs_epi16(u, s))
#define DOTS(bits) ((bits) == 4 ? 8 : (bits) == 5 ? 4 : 2)
#define TO_I32(sum) _mm256_madd_epi16(sum, _mm256_set1_epi16(1))
/* maddubs wants one unsigned operand: |w| times s with w's sign; 2 x 128 x 127 = 32512 fits. */
#define DOT_SIGNED(w, s)                                                                                               \
    _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(s, w)), _mm256_set1_epi16(1))
/* Zen 3 streams Q4_0 from memory 9 % quicker by two threads without it, K types as quick. */
#define PREFETCH_FAR 0
#include "vec256.h"

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

void st_avx2_activate(const float *g, const float *up, st_active *out) {
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
    out->low = __builtin_popcount(used & 0xffff);
    out->high = __builtin_popcount(used >> 16);
    _mm256_storeu_si256((__m256i *)bytes, q);
    for (; used; used &= used - 1) {
        int i = __builtin_ctz(used);
        out->index[n] = (uint8_t)i;
        out->h[n++] = bytes[i];
    }
    if (n == 0 && !(amax <= 0)) /* only NaN or infinity: keep one entry so that the scale is seen */
        n = out->low = 1;
    out->corr = -8 * sum_bytes(q);
    out->corr_low = -8 * sum_bytes(_mm256_zextsi128_si256(_mm256_castsi256_si128(q)));
    out->quads = (n + 3) / 4;
    out->scale = amax / 127;
    for (int i = n; n > 0 && i < 4 * out->quads + 3 && i < 32; i++)
        out->index[i] = out->index[n - 1];
}

enum { HEADS = 3 }; /* query heads that share a key or value: 12 sums, of 16 registers */

/* Lane i = the sum of a[i]'s lanes. */
static inline __m128 sum4x8(const __m256 a[4]) {
    __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

/* Scores of H heads at four positions (the last one repeated beyond n); each key is read and widened once. */
static inline __attribute__((always_inline)) void scores_h(const int H, const float *q, int64_t hd, const uint16_t *k,
                                                           int64_t n, float scale, float *scores) {
    __m256 sum[HEADS][4];
    for (int h = 0; h < H; h++)
        for (int p = 0; p < 4; p++)
            sum[h][p] = _mm256_setzero_ps();
    for (int64_t i = 0; i < hd; i += 8)
        _Pragma("GCC unroll 4") for (int p = 0; p < 4; p++) {
            __m256 key = load_f16x8(k + (p < n ? p : n - 1) * hd + i);
            for (int h = 0; h < H; h++)
                sum[h][p] = _mm256_fmadd_ps(_mm256_loadu_ps(q + h * hd + i), key, sum[h][p]);
        }
    for (int h = 0; h < H; h++) {
        __m128 four = _mm_mul_ps(sum4x8(sum[h]), _mm_set1_ps(scale));
        float *to = scores + h * ST_ATTN_CHUNK;
        if (n >= 4)
            _mm_storeu_ps(to, four);
        else
            memcpy(to, &four, sizeof *to * (size_t)n);
    }
}

/* acc[h] = sum over n positions of scores[h][p] * v[p], 32 columns of H heads at a time, or the J * 8 that are left. */
static inline __attribute__((always_inline)) void values_j(const int H, const int J, const float *scores,
                                                           const uint16_t *v, int64_t hd, int64_t n, float *acc) {
    __m256 sum[HEADS][4];
    for (int h = 0; h < H; h++)
        for (int j = 0; j < J; j++)
            sum[h][j] = _mm256_setzero_ps();
    for (int64_t p = 0; p < n; p++) {
        for (int j = 0; j < J; j++) {
            __m256 value = load_f16x8(v + p * hd + 8 * j);
            for (int h = 0; h < H; h++)
                sum[h][j] = _mm256_fmadd_ps(_mm256_broadcast_ss(scores + h * ST_ATTN_CHUNK + p), value, sum[h][j]);
        }
    }
    for (int h = 0; h < H; h++)
        for (int j = 0; j < J; j++)
            _mm256_storeu_ps(acc + h * hd + 8 * j, sum[h][j]);
}

static inline __attribute__((always_inline)) void values_h(const int H, const float *scores, const uint16_t *v,
                                                           int64_t hd, int64_t n, float *acc) {
    int64_t i = 0;
    for (; i + 32 <= hd; i += 32)
        values_j(H, 4, scores, v + i, hd, n, acc + i);
    for (; i < hd; i += 8)
        values_j(H, 1, scores, v + i, hd, n, acc + i);
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

/* What attention_many (attention.h) takes: keys and values that are floats. */
enum { KEYS = 4, KEY_ROWS = 3, COLUMNS = 32 };

static inline void widen(const uint16_t *x, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i += 8)
        _mm256_storeu_ps(out + i, load_f16x8(x + i));
}

/* Scores of H rows at KEYS positions, summed as scores_h does. keys: [KEYS][ld]. */
static inline __attribute__((always_inline)) void key_scores_h(const int H, const float *const *q, int64_t hd,
                                                               const float *keys, int64_t ld, float scale,
                                                               float *scores) {
    __m256 sum[KEY_ROWS][KEYS];
    for (int h = 0; h < H; h++)
        for (int p = 0; p < KEYS; p++)
            sum[h][p] = _mm256_setzero_ps();
    for (int64_t i = 0; i < hd; i += 8)
        _Pragma("GCC unroll 4") for (int p = 0; p < KEYS; p++) {
            __m256 key = _mm256_loadu_ps(keys + p * ld + i);
            for (int h = 0; h < H; h++)
                sum[h][p] = _mm256_fmadd_ps(_mm256_loadu_ps(q[h] + i), key, sum[h][p]);
        }
    for (int h = 0; h < H; h++)
        _mm_storeu_ps(scores + h * ST_ATTN_ROW, _mm_mul_ps(sum4x8(sum[h]), _mm_set1_ps(scale)));
}

/* acc[h] (+)= weights[h][p] * values[p] for J times 8 columns and H rows. */
static inline __attribute__((always_inline)) void add_values_j(const int H, const int J, const float *weights,
                                                               const float *values, int64_t n, int first, float *acc,
                                                               int64_t ld) {
    __m256 sum[HEADS][4];
    for (int h = 0; h < H; h++)
        for (int j = 0; j < J; j++)
            sum[h][j] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(acc + h * ld + 8 * j);
    for (int64_t p = 0; p < n; p++)
        for (int j = 0; j < J; j++) {
            __m256 value = _mm256_loadu_ps(values + p * COLUMNS + 8 * j);
            for (int h = 0; h < H; h++)
                sum[h][j] = _mm256_fmadd_ps(_mm256_broadcast_ss(weights + h * ST_ATTN_ROW + p), value, sum[h][j]);
        }
    for (int h = 0; h < H; h++)
        for (int j = 0; j < J; j++)
            _mm256_storeu_ps(acc + h * ld + 8 * j, sum[h][j]);
}

static inline __attribute__((always_inline)) void add_values_h(const int H, const float *weights, const float *values,
                                                               int64_t columns, int64_t n, int first, float *acc,
                                                               int64_t ld) {
    if (columns == COLUMNS)
        add_values_j(H, 4, weights, values, n, first, acc, ld);
    else
        for (int64_t i = 0; i < columns; i += 8)
            add_values_j(H, 1, weights, values + i, n, first, acc + i, ld);
}

#include "attention.h"

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

static void from_f16(const uint16_t *x, float *out, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(out + i, load_f16x8(x + i));
    for (; i < n; i++)
        out[i] = st_f16_to_f32(x[i]);
}

void st_fill_avx2(st_kernels *k) {
    ST_ENTER_MATRICES
    k->quantize = quantize;
    k->activate = st_avx2_activate;
    k->attention = attention;
    k->attention_many = attention_many;
    k->attention_q8 = attention_q8;
    k->rmsnorm = rmsnorm;
    k->dot = dot;
    k->axpy = axpy;
    k->to_f16 = to_f16;
    k->from_f16 = from_f16;
    k->rope = rope;
    k->top_k = top_k;
}
