/* Tiles of Q4_K, Q5_K and Q6_K at 256 bits, included by vec256.h: 16 rows, in two halves, times one to four tokens. */

/* Scales and minima of eight blocks of 16 rows, or of 128 outputs of Down, from the 192 bytes that hold their six bits:
 * a byte each. Two blocks a turn. */
static inline void k_scales(const uint8_t *six, uint8_t scale[128], uint8_t min[128]) {
    const __m256i low = _mm256_set1_epi8(15), high = _mm256_set1_epi8(0x30);
    for (int i = 0; i < 64; i += 32) {
        __m256i first = load256(six + i), last = load256(six + 64 + i), above = load256(six + 128 + i);
        __m256i bits[4] = {_mm256_slli_epi16(above, 4), _mm256_slli_epi16(above, 2), above,
                           _mm256_srli_epi16(above, 2)};
        __m256i four[4] = {first, last, _mm256_srli_epi16(first, 4), _mm256_srli_epi16(last, 4)};
        uint8_t *to[4] = {scale + i, scale + 64 + i, min + i, min + 64 + i};
        for (int j = 0; j < 4; j++)
            _mm256_storeu_si256((__m256i *)to[j],
                                _mm256_or_si256(_mm256_and_si256(four[j], low), _mm256_and_si256(bits[j], high)));
    }
}

/* d times eight bytes: exact, as d has 11 bits and a scale six. */
static inline __m256 k_times(const void *d, const uint8_t *scale) {
    __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)scale));
    return _mm256_mul_ps(load_f16x8(d), _mm256_cvtepi32_ps(wide));
}

/* The fifth bits of the columns in the low (half 0) or high nibbles of group g, as 16 or 0. */
static inline __m256i k_fifth(__m256i bits, int g, int half) {
    const __m256i fifth = _mm256_set1_epi8(16);
    int bit = 2 * g + half;
    return _mm256_and_si256(bit < 4 ? _mm256_slli_epi16(bits, 4 - bit) : _mm256_srli_epi16(bits, bit - 4), fifth);
}

/* N tokens; five: Q5_K, of which four DOTs fit 16 bits (4 x 2 x 31 x 127). The minima are subtracted through -8 times
 * the sums of x, which x carries. */
static inline __attribute__((always_inline)) void tile_k(const int N, const int five, const uint8_t *tile, int64_t nb,
                                                         const st_q8x4 *const *x, int stream, __m256 (*sum)[2]) {
    const __m256i nibble = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
    const int bytes = five ? ST_TILE_Q5_K_BYTES : ST_TILE_Q4_K_BYTES;
    for (int64_t super = 0; super < nb; super += 8) {
        uint8_t scale[128], min[128];
        const uint8_t *head = tile;
        if (stream)
            prefetch_ahead(tile, ST_TILE_K_HEAD);
        k_scales(head + 64, scale, min);
        tile += ST_TILE_K_HEAD;
        for (int b = 0; b < 8; b++, tile += bytes) {
            if (stream)
                prefetch_ahead(tile, bytes);
            for (int h = 0; h < 2; h++) {
                __m256i low[4], high[4];
                __m256 s = k_times(head + 16 * h, scale + 16 * b + 8 * h);
                __m256 m = k_times(head + 32 + 16 * h, min + 16 * b + 8 * h);
                for (int g = 0; g < 4; g++) {
                    __m256i w = load256(tile + 64 * g + 32 * h);
                    low[g] = _mm256_and_si256(w, nibble);
                    high[g] = _mm256_and_si256(_mm256_srli_epi16(w, 4), nibble);
                    if (five) {
                        __m256i bits = load256(tile + 256 + 32 * h);
                        low[g] = _mm256_or_si256(low[g], k_fifth(bits, g, 0));
                        high[g] = _mm256_or_si256(high[g], k_fifth(bits, g, 1));
                    }
                }
                for (int t = 0; t < N; t++) {
                    const st_q8x4 *q = x[t] + (super + b) / 4;
                    int lane = b % 4;
                    float by = q->scale[4 * lane];
                    __m256i even = zero, odd = zero, dot;
                    for (int g = 0; g < 4; g++) {
                        even = DOT(even, low[g], broadcast4(q->q[0][lane] + 4 * g));
                        __m256i *to = five ? &odd : &even;
                        *to = DOT(*to, high[g], broadcast4(q->q[1][lane] + 4 * g));
                    }
                    dot = five ? _mm256_add_epi32(TO_I32(even), TO_I32(odd)) : TO_I32(even);
                    sum[t][h] =
                        _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(s, _mm256_set1_ps(by)), sum[t][h]);
                    sum[t][h] = _mm256_fmadd_ps(m, _mm256_set1_ps((float)q->corr[4 * lane] * (0.125f * by)), sum[t][h]);
                }
            }
        }
    }
}

#define TILE_K(N)                                                                                                      \
    static void tile_q4_k_x##N(const uint8_t *tile, int64_t nb, const st_q8x4 *const *x, int stream,                   \
                               __m256 sum[N][2]) {                                                                     \
        tile_k(N, 0, tile, nb, x, stream, sum);                                                                        \
    }                                                                                                                  \
    static void tile_q5_k_x##N(const uint8_t *tile, int64_t nb, const st_q8x4 *const *x, int stream,                   \
                               __m256 sum[N][2]) {                                                                     \
        tile_k(N, 1, tile, nb, x, stream, sum);                                                                        \
    }
TILE_K(1)
TILE_K(2)
TILE_K(3)
TILE_K(4)

/* Bits 4 and 5 of the columns in the low (high = 0) or high nibbles of group g, from the bytes of their upper bits. */
static inline __m256i q6_upper(__m256i upper, int g, int high) {
    const __m256i bits = _mm256_set1_epi8(0x30);
    switch (2 * (g % 2) + high) {
    case 0: return _mm256_and_si256(_mm256_slli_epi16(upper, 4), bits);
    case 1: return _mm256_and_si256(_mm256_slli_epi16(upper, 2), bits);
    case 2: return _mm256_and_si256(upper, bits);
    default: return _mm256_and_si256(_mm256_srli_epi16(upper, 2), bits);
    }
}

static inline __m256i widen_i8x8(const void *p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)); }

/* Eight rows' weights of one nibble half: sum over 16 columns of (0..63) * x. Two DOTs fit 16 bits: 4 x 63 x 127. */
static inline __m256i q6_dot(const __m256i w[4], const __m256i x[4]) {
    const __m256i zero = _mm256_setzero_si256();
    return _mm256_add_epi32(TO_I32(DOT(DOT(zero, w[0], x[0]), w[1], x[1])),
                            TO_I32(DOT(DOT(zero, w[2], x[2]), w[3], x[3])));
}

/* Weights are taken as 0..63; 32 times the sums of the activations' halves is taken off again. */
#define GEMM_Q6_K(NAME, N)                                                                                             \
    static void NAME(const uint8_t *tile, int64_t nb, const st_q8x4 *const *x, int stream, __m256 sum[N][2]) {         \
        const __m256i nibble = _mm256_set1_epi8(15);                                                                   \
        const __m256i offset[4] = {_mm256_set1_epi8(32), _mm256_set1_epi8(32), _mm256_set1_epi8(32),                   \
                                   _mm256_set1_epi8(32)};                                                              \
        const uint8_t *d = tile;                                                                                       \
        for (int64_t b = 0; b < nb; b++, tile += ST_TILE_Q6_K_BYTES) {                                                 \
            int lane = b % 4;                                                                                          \
            if (b % 8 == 0) {                                                                                          \
                d = tile;                                                                                              \
                tile += 32;                                                                                            \
            }                                                                                                          \
            if (stream)                                                                                                \
                prefetch_ahead(tile, ST_TILE_Q6_K_BYTES);                                                              \
            for (int h = 0; h < 2; h++) {                                                                              \
                __m256i low[4], high[4], s0 = widen_i8x8(tile + 8 * h), s1 = widen_i8x8(tile + 16 + 8 * h);            \
                for (int g = 0; g < 4; g++) {                                                                          \
                    __m256i w = load256(tile + 32 + 64 * g + 32 * h);                                                  \
                    __m256i upper = load256(tile + 288 + 64 * (g / 2) + 32 * h);                                       \
                    low[g] = _mm256_or_si256(_mm256_and_si256(w, nibble), q6_upper(upper, g, 0));                      \
                    high[g] =                                                                                          \
                        _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(w, 4), nibble), q6_upper(upper, g, 1));     \
                }                                                                                                      \
                for (int t = 0; t < N; t++) {                                                                          \
                    const st_q8x4 *q = x[t] + b / 4;                                                                   \
                    __m256i x0[4], x1[4];                                                                              \
                    for (int g = 0; g < 4; g++) {                                                                      \
                        x0[g] = broadcast4(q->q[0][lane] + 4 * g);                                                     \
                        x1[g] = broadcast4(q->q[1][lane] + 4 * g);                                                     \
                    }                                                                                                  \
                    __m256i even = _mm256_sub_epi32(q6_dot(low, x0), q6_dot(offset, x0));                              \
                    __m256i odd = _mm256_sub_epi32(q6_dot(high, x1), q6_dot(offset, x1));                              \
                    __m256i dot = _mm256_add_epi32(_mm256_mullo_epi32(even, s0), _mm256_mullo_epi32(odd, s1));         \
                    __m256 s = _mm256_mul_ps(load_f16x8(d + 16 * h), _mm256_set1_ps(q->scale[4 * lane]));              \
                    sum[t][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), s, sum[t][h]);                                \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

GEMM_Q6_K(tile_q6_k_x1, 1)
GEMM_Q6_K(tile_q6_k_x2, 2)
GEMM_Q6_K(tile_q6_k_x3, 3)
GEMM_Q6_K(tile_q6_k_x4, 4)
