/* Tiles of Q4_K, Q5_K and Q6_K at 512 bits, included by avx512vnni.c: 16 rows times one to eight tokens. */

/* Scales and minima of eight blocks of 16 rows, or of 128 outputs of Down, from the 192 bytes that hold their six bits:
 * a byte each. */
static inline void k_scales(const uint8_t *six, uint8_t scale[128], uint8_t min[128]) {
    const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8(0x30);
    __m512i first = load512(six), last = load512(six + 64), above = load512(six + 128);
    enum { OR_AND = 0xf8 }; /* ternary logic: a | b & c */
    _mm512_storeu_si512(
        scale, _mm512_ternarylogic_epi32(_mm512_and_si512(first, low), _mm512_slli_epi16(above, 4), high, OR_AND));
    _mm512_storeu_si512(
        scale + 64, _mm512_ternarylogic_epi32(_mm512_and_si512(last, low), _mm512_slli_epi16(above, 2), high, OR_AND));
    first = _mm512_and_si512(_mm512_srli_epi16(first, 4), low);
    last = _mm512_and_si512(_mm512_srli_epi16(last, 4), low);
    _mm512_storeu_si512(min, _mm512_ternarylogic_epi32(first, above, high, OR_AND));
    _mm512_storeu_si512(min + 64, _mm512_ternarylogic_epi32(last, _mm512_srli_epi16(above, 2), high, OR_AND));
}

/* d times 16 bytes: exact, as d has 11 bits and a scale six. */
static inline __m512 k_times(const void *d, const uint8_t *scale) {
    __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)scale));
    return _mm512_mul_ps(load_f16x16(d), _mm512_cvtepi32_ps(wide));
}

/* The fifth bits of the columns in the low (half 0) or high nibbles of group g, as 16 or 0. */
static inline __m512i k_fifth(__m512i bits, int g, int half) {
    const __m512i fifth = _mm512_set1_epi8(16);
    int bit = 2 * g + half;
    return _mm512_and_si512(
        bit < 4 ? _mm512_slli_epi16(bits, (unsigned)(4 - bit)) : _mm512_srli_epi16(bits, (unsigned)(bit - 4)), fifth);
}

/* N tokens; five: Q5_K. The minima are subtracted through -8 times the sums of x, which x carries. */
static inline __attribute__((always_inline)) void tile_k(const int N, const int five, const uint8_t *tile, int64_t nb,
                                                         const st_q8x4 *const *x, int stream, __m512 *total) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const int bytes = five ? ST_TILE_Q5_K_BYTES : ST_TILE_Q4_K_BYTES;
    __m512 sum[8];
    _Pragma("GCC unroll 8") for (int t = 0; t < N; t++) sum[t] = total[t];
    for (int64_t super = 0; super < nb; super += 8) {
        uint8_t scale[128], min[128];
        const uint8_t *head = tile;
        if (stream)
            prefetch_ahead(tile, ST_TILE_K_HEAD);
        k_scales(head + 64, scale, min);
        tile += ST_TILE_K_HEAD;
        for (int b = 0; b < 8; b++, tile += bytes) {
            __m512i low[4], high[4];
            if (stream)
                prefetch_ahead(tile, bytes);
            __m512 s = k_times(head, scale + 16 * b), m = k_times(head + 32, min + 16 * b);
            for (int g = 0; g < 4; g++) {
                __m512i w = load512(tile + 64 * g);
                low[g] = _mm512_and_si512(w, nibble);
                high[g] = _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble);
                if (five) {
                    __m512i bits = load512(tile + 256);
                    low[g] = _mm512_or_si512(low[g], k_fifth(bits, g, 0));
                    high[g] = _mm512_or_si512(high[g], k_fifth(bits, g, 1));
                }
            }
            _Pragma("GCC unroll 8") for (int t = 0; t < N; t++) {
                const st_q8x4 *q = x[t] + (super + b) / 4;
                int lane = b % 4;
                float by = q->scale[4 * lane];
                __m512i even = _mm512_setzero_si512(), odd = even;
                for (int g = 0; g < 4; g++) {
                    even = _mm512_dpbusd_epi32(even, low[g], broadcast4(q->q[0][lane] + 4 * g));
                    odd = _mm512_dpbusd_epi32(odd, high[g], broadcast4(q->q[1][lane] + 4 * g));
                }
                sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(even, odd)),
                                         _mm512_mul_ps(s, _mm512_set1_ps(by)), sum[t]);
                sum[t] = _mm512_fmadd_ps(m, _mm512_set1_ps((float)q->corr[4 * lane] * (0.125f * by)), sum[t]);
            }
        }
    }
    _Pragma("GCC unroll 8") for (int t = 0; t < N; t++) total[t] = sum[t];
}

#define TILE_K(N)                                                                                                      \
    static void tile_q4_k_x##N(const uint8_t *tile, int64_t nb, const st_q8x4 *const *x, int stream, __m512 *total) {  \
        tile_k(N, 0, tile, nb, x, stream, total);                                                                      \
    }                                                                                                                  \
    static void tile_q5_k_x##N(const uint8_t *tile, int64_t nb, const st_q8x4 *const *x, int stream, __m512 *total) {  \
        tile_k(N, 1, tile, nb, x, stream, total);                                                                      \
    }
TILE_K(1)
TILE_K(2)
TILE_K(3)
TILE_K(4)
TILE_K(8)

/* Bits 4 and 5 of the columns in the low (high = 0) or high nibbles of group g, from the bytes of their upper bits. */
static inline __m512i q6_upper(__m512i upper, int g, int high) {
    const __m512i bits = _mm512_set1_epi8(0x30);
    switch (2 * (g % 2) + high) {
    case 0: return _mm512_and_si512(_mm512_slli_epi16(upper, 4), bits);
    case 1: return _mm512_and_si512(_mm512_slli_epi16(upper, 2), bits);
    case 2: return _mm512_and_si512(upper, bits);
    default: return _mm512_and_si512(_mm512_srli_epi16(upper, 2), bits);
    }
}

static inline __m512i widen_i8x16(const void *p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }

/* Weights are taken as 0..63; 32 times the sums of the activations' halves is taken off again. */
#define TILE_Q6_K(NAME, N)                                                                                             \
    static void NAME(const uint8_t *tile, int64_t nb, const st_q8x4 *const *x, int stream, __m512 *total) {            \
        const __m512i nibble = _mm512_set1_epi8(15), offset = _mm512_set1_epi8(32);                                    \
        __m512 sum[N], d = _mm512_setzero_ps();                                                                        \
        for (int t = 0; t < N; t++)                                                                                    \
            sum[t] = total[t];                                                                                         \
        for (int64_t b = 0; b < nb; b++, tile += ST_TILE_Q6_K_BYTES) {                                                 \
            int lane = b % 4;                                                                                          \
            __m512i low[4], high[4];                                                                                   \
            if (b % 8 == 0) {                                                                                          \
                d = load_f16x16(tile);                                                                                 \
                tile += 32;                                                                                            \
            }                                                                                                          \
            if (stream)                                                                                                \
                prefetch_ahead(tile, ST_TILE_Q6_K_BYTES);                                                              \
            __m512i s0 = widen_i8x16(tile), s1 = widen_i8x16(tile + 16);                                               \
            for (int g = 0; g < 4; g++) {                                                                              \
                __m512i w = load512(tile + 32 + 64 * g), upper = load512(tile + 288 + 64 * (g / 2));                   \
                low[g] = _mm512_or_si512(_mm512_and_si512(w, nibble), q6_upper(upper, g, 0));                          \
                high[g] = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(w, 4), nibble), q6_upper(upper, g, 1));   \
            }                                                                                                          \
            _Pragma("GCC unroll 8") for (int t = 0; t < N; t++) {                                                      \
                const st_q8x4 *q = x[t] + b / 4;                                                                       \
                __m512i even = _mm512_setzero_si512(), odd = even, even32 = even, odd32 = even;                        \
                for (int g = 0; g < 4; g++) {                                                                          \
                    __m512i x0 = broadcast4(q->q[0][lane] + 4 * g), x1 = broadcast4(q->q[1][lane] + 4 * g);            \
                    even = _mm512_dpbusd_epi32(even, low[g], x0);                                                      \
                    odd = _mm512_dpbusd_epi32(odd, high[g], x1);                                                       \
                    even32 = _mm512_dpbusd_epi32(even32, offset, x0);                                                  \
                    odd32 = _mm512_dpbusd_epi32(odd32, offset, x1);                                                    \
                }                                                                                                      \
                __m512i dot = _mm512_add_epi32(_mm512_mullo_epi32(_mm512_sub_epi32(even, even32), s0),                 \
                                               _mm512_mullo_epi32(_mm512_sub_epi32(odd, odd32), s1));                  \
                __m512 s = _mm512_mul_ps(d, _mm512_set1_ps(q->scale[4 * lane]));                                       \
                sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), s, sum[t]);                                          \
            }                                                                                                          \
        }                                                                                                              \
        for (int t = 0; t < N; t++)                                                                                    \
            total[t] = sum[t];                                                                                         \
    }

TILE_Q6_K(tile_q6_k_x1, 1)
TILE_Q6_K(tile_q6_k_x2, 2)
TILE_Q6_K(tile_q6_k_x3, 3)
TILE_Q6_K(tile_q6_k_x4, 4)
TILE_Q6_K(tile_q6_k_x8, 8)
