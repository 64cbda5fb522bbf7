/* Rows and Down of Q4_K, Q5_K and Q6_K at 512 bits, and Rows of all for many tokens; included by avx512vnni.c. */

/* Scales and minima of two super-blocks of a row, from ns times the first, second and last four of their bytes
 * (layout.h, Rows). What stands behind a last one is read and not used. */
static inline void k_row_scales(const uint8_t *six, int64_t ns, __m128i *scale, __m128i *min) {
    const __m128i low = _mm_set1_epi8(15), high = _mm_set1_epi8(0x30), both = _mm_set1_epi8(0x3f);
    __m128i first = _mm_loadl_epi64((const __m128i *)six), second = _mm_loadl_epi64((const __m128i *)(six + 4 * ns));
    __m128i last = _mm_loadl_epi64((const __m128i *)(six + 8 * ns));
    __m128i s = _mm_or_si128(_mm_and_si128(last, low), _mm_and_si128(_mm_srli_epi16(first, 2), high));
    __m128i m =
        _mm_or_si128(_mm_and_si128(_mm_srli_epi16(last, 4), low), _mm_and_si128(_mm_srli_epi16(second, 2), high));
    *scale = _mm_unpacklo_epi32(_mm_and_si128(first, both), s);
    *min = _mm_unpacklo_epi32(_mm_and_si128(second, both), m);
}

/* Two fp16 numbers, for eight lanes each. */
static inline __m512 two_f16(const uint8_t *p) {
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    return _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(_mm_cvtph_ps(_mm_loadu_si32(p))));
}

/* -8 times the sums of 16 blocks of x, or of the 8 that are left, from st_q8x4 x[0] on, as floats, times an eighth of
 * their scales: what minima are multiplied by. */
static inline __m512 k_rest(const st_q8x4 *x, int64_t left) {
    const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    const st_q8x4 *y = left > 1 ? x + 2 : x;
    __m512i corr = _mm512_permutex2var_epi32(load512(x[0].corr), lanes, load512(x[1].corr));
    __m512i corr1 = _mm512_permutex2var_epi32(load512(y[0].corr), lanes, load512(y[1].corr));
    __m512 by = _mm512_permutex2var_ps(_mm512_loadu_ps(x[0].scale), lanes, _mm512_loadu_ps(x[1].scale));
    __m512 by1 = _mm512_permutex2var_ps(_mm512_loadu_ps(y[0].scale), lanes, _mm512_loadu_ps(y[1].scale));
    corr = _mm512_mask_mov_epi32(corr, 0xff00, corr1);
    by = _mm512_mask_mov_ps(by, 0xff00, by1);
    return _mm512_mul_ps(_mm512_cvtepi32_ps(corr), _mm512_mul_ps(_mm512_set1_ps(0.125f), by));
}

/* R rows of Q4_K, or of Q5_K (five), times T tokens (out[r * T + t]): two super-blocks a turn, four blocks a step, as
 * rows_q4_0_r. rest: of every token k_rest() of every turn, or NULL. */
static inline __attribute__((always_inline)) void rows_k_r(const int five, const int R, const int T,
                                                           const uint8_t *const *rows, int64_t nb,
                                                           const st_q8x4 *const *x, const __m512 *const *rest,
                                                           float *out) {
    const __m512i nibble = _mm512_set1_epi8(15), fifth = _mm512_set1_epi8(16);
    const __m512i bit = _mm512_setr_epi32(0x01010101, 0x01010101, 0x01010101, 0x01010101, 0x04040404, 0x04040404,
                                          0x04040404, 0x04040404, 0x10101010, 0x10101010, 0x10101010, 0x10101010,
                                          0x40404040, 0x40404040, 0x40404040, 0x40404040);
    int64_t ns = nb / 8;
    __m512 sum[8], less[8];
    for (int i = 0; i < R * T; i++)
        sum[i] = less[i] = _mm512_setzero_ps();
    for (int64_t super = 0; super < ns; super += 2) {
        __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        __mmask16 there = first_lanes(8 * (ns - super));
        __m512 scale[2], min[2];
        for (int r = 0; r < R; r++) {
            __m128i s, m;
            k_row_scales(rows[r] + 4 * (ns + super), ns, &s, &m);
            scale[r] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(s)), two_f16(rows[r] + 2 * super));
            min[r] = _mm512_maskz_mul_ps(there, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(m)),
                                         two_f16(rows[r] + 2 * (ns + super)));
        }
        for (int t = 0; t < T; t++) {
            __m512 by_sum = rest ? rest[t][super / 2] : k_rest(x[t] + 2 * super, ns - super);
            for (int r = 0; r < R; r++)
                less[r * T + t] = _mm512_mask3_fmadd_ps(min[r], by_sum, less[r * T + t], there);
        }
        for (int64_t c = 2 * super; c < 2 * ns && c < 2 * super + 4; c++) {
            __m512i low[2], high[2];
            __m512 s[2];
            for (int r = 0; r < R; r++) {
                __m512i v = load512(rows[r] + 16 * ns + 64 * c);
                low[r] = _mm512_and_si512(v, nibble);
                high[r] = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble);
                if (five) {
                    __m128i above = _mm_loadu_si128((const __m128i *)(rows[r] + 16 * ns + 16 * nb + 16 * c));
                    __m512i bits = _mm512_broadcast_i32x4(above);
                    low[r] = _mm512_mask_add_epi8(low[r], _mm512_test_epi8_mask(bits, bit), low[r], fifth);
                    high[r] = _mm512_mask_add_epi8(high[r], _mm512_test_epi8_mask(bits, _mm512_slli_epi16(bit, 1)),
                                                   high[r], fifth);
                }
                s[r] = _mm512_permutexvar_ps(spread, scale[r]);
            }
            _Pragma("GCC unroll 8") for (int t = 0; t < T; t++) {
                const st_q8x4 *q = x[t] + c;
                __m512i q0 = load512(q->q[0]), q1 = load512(q->q[1]), zero = _mm512_setzero_si512();
                __m512 by = _mm512_loadu_ps(q->scale);
                for (int r = 0; r < R; r++) {
                    __m512i dot = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, low[r], q0), high[r], q1);
                    sum[r * T + t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(s[r], by), sum[r * T + t]);
                }
            }
            spread = _mm512_add_epi32(spread, _mm512_set1_epi32(4));
        }
    }
    for (int i = 0; i < R * T; i++)
        out[i] = _mm512_reduce_add_ps(_mm512_add_ps(sum[i], less[i]));
}

/* The same of Q6_K. Weights are taken as 0..63; 32 times the sums of the activations' halves is taken off again. */
static inline __attribute__((always_inline)) void rows_k6_r(const int R, const int T, const uint8_t *const *rows,
                                                            int64_t nb, const st_q8x4 *const *x, float *out) {
    const __m512i nibble = _mm512_set1_epi8(15), offset = _mm512_set1_epi8(32), pair = _mm512_set1_epi8(0x30);
    const __m512i second = _mm512_setr_epi32(0, 0, 0, 0, 0x00040004, 0x00040004, 0x00040004, 0x00040004, 0, 0, 0, 0,
                                             0x00040004, 0x00040004, 0x00040004, 0x00040004);
    int64_t ns = nb / 8;
    __m512 first[8], last[8];
    for (int i = 0; i < R * T; i++)
        first[i] = last[i] = _mm512_setzero_ps();
    for (int64_t super = 0; super < ns; super += 2) {
        __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        __m512 scale[2][2];
        for (int r = 0; r < R; r++)
            for (int h = 0; h < 2; h++) {
                __m512i s = widen_i8x16(rows[r] + 2 * ns + h * nb + 8 * super);
                scale[r][h] = _mm512_mul_ps(_mm512_cvtepi32_ps(s), two_f16(rows[r] + 2 * super));
            }
        for (int64_t c = 2 * super; c < 2 * ns && c < 2 * super + 4; c++) {
            __m512i low[2], high[2];
            __m512 s0[2], s1[2];
            for (int r = 0; r < R; r++) {
                const uint8_t *nibbles = rows[r] + 18 * ns;
                const __m256i *p = (const __m256i *)(nibbles + 16 * nb + 32 * c);
                __m512i v = load512(nibbles + 64 * c), above = _mm512_castsi256_si512(_mm256_loadu_si256(p));
                above = _mm512_srlv_epi16(_mm512_shuffle_i32x4(above, above, 0x50), second);
                low[r] =
                    _mm512_or_si512(_mm512_and_si512(v, nibble), _mm512_and_si512(_mm512_slli_epi16(above, 4), pair));
                high[r] = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(v, 4), nibble),
                                          _mm512_and_si512(_mm512_slli_epi16(above, 2), pair));
                s0[r] = _mm512_permutexvar_ps(spread, scale[r][0]);
                s1[r] = _mm512_permutexvar_ps(spread, scale[r][1]);
            }
            _Pragma("GCC unroll 8") for (int t = 0; t < T; t++) {
                const st_q8x4 *q = x[t] + c;
                __m512i q0 = load512(q->q[0]), q1 = load512(q->q[1]), zero = _mm512_setzero_si512();
                __m512i less0 = _mm512_dpbusd_epi32(zero, offset, q0), less1 = _mm512_dpbusd_epi32(zero, offset, q1);
                __m512 by = _mm512_loadu_ps(q->scale);
                for (int r = 0; r < R; r++) {
                    __m512i even = _mm512_sub_epi32(_mm512_dpbusd_epi32(zero, low[r], q0), less0);
                    __m512i odd = _mm512_sub_epi32(_mm512_dpbusd_epi32(zero, high[r], q1), less1);
                    int i = r * T + t;
                    first[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(even), _mm512_mul_ps(s0[r], by), first[i]);
                    last[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(odd), _mm512_mul_ps(s1[r], by), last[i]);
                }
            }
            spread = _mm512_add_epi32(spread, _mm512_set1_epi32(4));
        }
    }
    for (int i = 0; i < R * T; i++)
        out[i] = _mm512_reduce_add_ps(_mm512_add_ps(first[i], last[i]));
}

enum { PLAIN = 0 }; /* Q4_0, among the K types' bits */

static inline __attribute__((always_inline)) void rows_of(const int bits, const int R, const int T,
                                                          const uint8_t *const *rows, int64_t nb,
                                                          const st_q8x4 *const *x, const __m512 *const *rest,
                                                          float *out) {
    if (bits == PLAIN)
        rows_q4_0_many(R, T, rows, nb, x, out);
    else if (bits == 6)
        rows_k6_r(R, T, rows, nb, x, out);
    else
        rows_k_r(bits == 5, R, T, rows, nb, x, rest, out);
}

enum { REST_TURNS = 16 }; /* of two super-blocks: in wider rows k_rest() is computed again for each */

/* A row of `bytes` at a time, for the tokens in which it is wanted, eight at a time. */
static inline __attribute__((always_inline)) void up_of_many(const int bits, const int64_t bytes, const uint8_t *w,
                                                             size_t stride, int64_t nb, const st_q8x4 *const *x,
                                                             int64_t n, const uint32_t *fires, float *up) {
    __m512 rest[ST_UP_TOKENS][REST_TURNS];
    int known = (bits == 4 || bits == 5) && nb <= 16 * REST_TURNS;
    for (int64_t t = 0; known && t < n; t++)
        for (int64_t super = 0; super < nb / 8; super += 2)
            rest[t][super / 2] = k_rest(x[t] + 2 * super, nb / 8 - super);
    memset(up, 0, (size_t)n * 32 * sizeof *up);
    for (int r = 0; r < 32; r++) {
        const uint8_t *row = w + stride * (size_t)r;
        if (r < 30 && fires[r + 2])
            prefetch_near(row + 2 * stride, bytes);
        for (uint32_t left = fires[r]; left;) {
            const st_q8x4 *of[8];
            const __m512 *rests[8];
            float value[8];
            int who[8], count = 0;
            for (; left && count < 8; left &= left - 1, count++) {
                who[count] = __builtin_ctz(left);
                of[count] = x[who[count]];
                rests[count] = rest[who[count]];
            }
            const __m512 *const *some = known ? rests : NULL;
            switch (count) {
            case 8: rows_of(bits, 1, 8, &row, nb, of, some, value); break;
            case 7: rows_of(bits, 1, 7, &row, nb, of, some, value); break;
            case 6: rows_of(bits, 1, 6, &row, nb, of, some, value); break;
            case 5: rows_of(bits, 1, 5, &row, nb, of, some, value); break;
            case 4: rows_of(bits, 1, 4, &row, nb, of, some, value); break;
            case 3: rows_of(bits, 1, 3, &row, nb, of, some, value); break;
            case 2: rows_of(bits, 1, 2, &row, nb, of, some, value); break;
            default: rows_of(bits, 1, 1, &row, nb, of, some, value); break;
            }
            for (int i = 0; i < count; i++)
                up[32 * who[i] + r] = value[i];
        }
    }
}

/* Many tokens for the rows of a group, and one for drivers.h. */
#define UP(NAME, name, bits)                                                                                           \
    static ST_UP(up_##name) {                                                                                          \
        int64_t bytes = nb * ST_BLOCK / ST_##NAME##_COLUMNS * ST_##NAME##_BYTES;                                       \
        up_of_many(bits, bytes, w, stride, nb, x, n, fires, up);                                                       \
    }
#define ROWS_K(NAME, name, bits)                                                                                       \
    static inline __attribute__((always_inline)) void rows_##name##_r(const int R, const uint8_t *const *rows,         \
                                                                      int64_t nb, const st_q8x4 *x, float *out) {      \
        rows_of(bits, R, 1, rows, nb, &x, NULL, out);                                                                  \
    }                                                                                                                  \
    UP(NAME, name, bits)
UP(Q4_0, q4_0, PLAIN)
ROWS_K(Q4_K, q4_k, 4)
ROWS_K(Q5_K, q5_k, 5)
ROWS_K(Q6_K, q6_k, 6)

/* 128 outputs of group g's 32 neurons, added to y; c: see down_sums. */
static inline __attribute__((always_inline)) void chunk_k(const int bits, const int c, const st_down_view *down,
                                                          int64_t g, int64_t chunk, const st_active *a, float *y) {
    const uint8_t *lines = down->lines + 32 * down->stride * (size_t)g;
    const uint8_t *above = lines + down->scale_stride / (ST_DOWN_K_HEAD / 8 + ST_DOWN_K_SCALES) * 64 + chunk / 4 * 64;
    const uint8_t *head = down_k_head(down, g) + ST_DOWN_K_HEAD * chunk;
    uint8_t scale[128], min[128];
    __m512i sum[8];
    k_scales(down_k_scales(down, g, ST_DOWN_K_HEAD, ST_DOWN_K_SCALES) + ST_DOWN_K_SCALES * chunk, scale, min);
    for (int i = 0; i < 8; i++)
        sum[i] = _mm512_setzero_si512();
    down_sums(bits, c, lines + 64 * chunk, above, down->stride, a->index, a->quads, a->h, 4, 0, sum);
    __m512 by = _mm512_set1_ps(a->scale), rest = _mm512_set1_ps((float)a->corr * (0.125f * a->scale));
    for (int i = 0; i < 8; i++) {
        __m512 out = _mm512_loadu_ps(y + 16 * i);
        out =
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[i]), _mm512_mul_ps(k_times(head + 32 * i, scale + 16 * i), by), out);
        out = _mm512_fmadd_ps(k_times(head + 256 + 32 * i, min + 16 * i), rest, out);
        _mm512_storeu_ps(y + 16 * i, out);
    }
}

/* The two halves of the 32 neurons have their own scales. Codes are taken as 0..63; 32 times the sum of h is taken off.
 * Sums times scales, and their sum, stay below 1 << 24: exact in floats. */
static inline __attribute__((always_inline)) void chunk_q6_k_c(const int c, const st_down_view *down, int64_t g,
                                                               int64_t chunk, const st_active *a, float *y) {
    const __m128i count = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const uint8_t *lines = down->lines + 32 * down->stride * (size_t)g;
    const uint8_t *above =
        lines + down->scale_stride / (ST_DOWN_Q6_K_HEAD / 8 + ST_DOWN_Q6_K_SCALES) * 64 + chunk / 2 * 64;
    const uint8_t *head = down_k_head(down, g) + ST_DOWN_Q6_K_HEAD * chunk;
    const uint8_t *scale = down_k_scales(down, g, ST_DOWN_Q6_K_HEAD, ST_DOWN_Q6_K_SCALES) + ST_DOWN_Q6_K_SCALES * chunk;
    int8_t low[16]; /* h of the first half; the last quad may have some of the other */
    _mm_storeu_si128((__m128i *)low, _mm_and_si128(_mm_loadu_si128((const __m128i *)a->h),
                                                   _mm_cmpgt_epi8(_mm_set1_epi8((char)a->low), count)));
    __m512 total[8];
    for (int half = 0; half < 2; half++) {
        int first = half ? a->low : 0, quads = ((half ? a->high : a->low) + 3) / 4;
        __m512i sum[8];
        for (int i = 0; i < 8; i++)
            sum[i] = _mm512_set1_epi32(4 * (half ? a->corr - a->corr_low : a->corr_low));
        down_sums(6, c, lines + 64 * chunk, above, down->stride, a->index + first, quads, half ? a->h + first : low, 4,
                  0, sum);
        for (int i = 0; i < 8; i++) {
            __m512 s = _mm512_cvtepi32_ps(widen_i8x16(scale + 128 * half + 16 * i)), dot = _mm512_cvtepi32_ps(sum[i]);
            total[i] = half ? _mm512_fmadd_ps(dot, s, total[i]) : _mm512_mul_ps(dot, s);
        }
    }
    for (int i = 0; i < 8; i++) {
        __m512 by = _mm512_mul_ps(load_f16x16(head + 32 * i), _mm512_set1_ps(a->scale));
        _mm512_storeu_ps(y + 16 * i, _mm512_fmadd_ps(total[i], by, _mm512_loadu_ps(y + 16 * i)));
    }
}

#include "../chunk_k.h"

/* What a chunk of a group of Down has for its outputs, for many tokens: codes[quad] as down_quad gives them for neurons
 * 4
 * * quad on; scales times d, of the first 16 neurons where the halves have their own (which then are without d); minima
 * times dmin, or scales of the last 16. */
typedef struct down_codes {
    __m512i code[8][8];
    __m512 scale[8], other[8], d[8];
} down_codes;

static inline __attribute__((always_inline)) void fill_codes(const int bits, const int c, const st_down_view *down,
                                                             int64_t g, int64_t chunk, down_codes *w) {
    const int head_bytes = bits == 6 ? ST_DOWN_Q6_K_HEAD : ST_DOWN_K_HEAD;
    const int scale_bytes = bits == 6 ? ST_DOWN_Q6_K_SCALES : ST_DOWN_K_SCALES;
    const uint8_t *lines = down->lines + 32 * down->stride * (size_t)g;
    const uint8_t *above =
        lines + down->scale_stride / (size_t)(head_bytes / 8 + scale_bytes) * 64 + chunk / (bits == 6 ? 2 : 4) * 64;
    const uint8_t *head = down_k_head(down, g) + head_bytes * chunk;
    const uint8_t *scales = down_k_scales(down, g, head_bytes, scale_bytes) + scale_bytes * chunk;
    for (int quad = 0; quad < 8; quad++) {
        uint8_t index[4] = {(uint8_t)(4 * quad), (uint8_t)(4 * quad + 1), (uint8_t)(4 * quad + 2),
                            (uint8_t)(4 * quad + 3)};
        down_quad(bits, c, lines + 64 * chunk, above, down->stride, index, w->code[quad]);
    }
    uint8_t scale[128], min[128];
    if (bits != 6)
        k_scales(scales, scale, min);
    for (int i = 0; i < 8; i++) {
        if (bits == 6) {
            w->scale[i] = _mm512_cvtepi32_ps(widen_i8x16(scales + 16 * i));
            w->other[i] = _mm512_cvtepi32_ps(widen_i8x16(scales + 128 + 16 * i));
            w->d[i] = load_f16x16(head + 32 * i);
        } else {
            w->scale[i] = k_times(head + 32 * i, scale + 16 * i);
            w->other[i] = k_times(head + 256 + 32 * i, min + 16 * i);
        }
    }
}

/* h of 32 neurons in order of T tokens times the codes of a chunk, added to their y; the bits of chunk_<type>. */
static inline __attribute__((always_inline)) void codes_times(const int bits, const int T, const down_codes *w,
                                                              const int8_t *const *h, const st_active *const *a,
                                                              float *const *y) {
    __m512i sum[2][8];
    __m512 total[2][8];
    for (int half = 0; half < (bits == 6 ? 2 : 1); half++) {
        for (int t = 0; t < T; t++) {
            int less = bits == 6 ? 4 * (half ? a[t]->corr - a[t]->corr_low : a[t]->corr_low) : 0;
            for (int i = 0; i < 8; i++)
                sum[t][i] = _mm512_set1_epi32(less);
        }
        for (int quad = 4 * half; quad < (bits == 6 ? 4 * half + 4 : 8); quad++)
            for (int i = 0; i < 8; i++)
                for (int t = 0; t < T; t++)
                    sum[t][i] = _mm512_dpbusd_epi32(sum[t][i], w->code[quad][i], broadcast4(h[t] + 4 * quad));
        for (int t = 0; bits == 6 && t < T; t++)
            for (int i = 0; i < 8; i++)
                total[t][i] = half ? _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t][i]), w->other[i], total[t][i])
                                   : _mm512_mul_ps(_mm512_cvtepi32_ps(sum[t][i]), w->scale[i]);
    }
    for (int t = 0; t < T; t++) {
        __m512 by = _mm512_set1_ps(a[t]->scale), rest = _mm512_set1_ps((float)a[t]->corr * (0.125f * a[t]->scale));
        for (int i = 0; i < 8; i++) {
            __m512 out = _mm512_loadu_ps(y[t] + 16 * i);
            if (bits == 6) {
                out = _mm512_fmadd_ps(total[t][i], _mm512_mul_ps(w->d[i], by), out);
            } else {
                out = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t][i]), _mm512_mul_ps(w->scale[i], by), out);
                out = _mm512_fmadd_ps(w->other[i], rest, out);
            }
            _mm512_storeu_ps(y[t] + 16 * i, out);
        }
    }
}

/* Shares i..i+n of `of` of the lines of a group's 32 neurons, `count` chunks from c on. */
static inline void prefetch_group(const int bits, const st_down_view *down, int64_t g, int64_t c, int64_t count,
                                  int64_t i, int64_t n, int64_t of) {
    const uint8_t *lines = down->lines + 32 * down->stride * (size_t)g;
    int64_t in_line = bits == 6 ? ST_DOWN_Q6_K_HEAD / 8 + ST_DOWN_Q6_K_SCALES : ST_DOWN_K_HEAD / 8 + ST_DOWN_K_SCALES;
    int64_t above = (int64_t)down->scale_stride / in_line, piece = bits == 6 ? 2 : 4;
    for (int64_t k = share(32, i, of); k < share(32, i + n, of); k++) {
        const uint8_t *line = lines + down->stride * (size_t)k;
        prefetch_near(line + 64 * c, 64 * count);
        if (bits > 4)
            prefetch_near(line + 64 * (above + c / piece), 64 * ((c + count - 1) / piece - c / piece + 1));
    }
}

enum { MANY_CHUNKS = 3 }; /* computed together for many tokens: 24 KiB of sums */

/* Down for many tokens. Which neurons fire differs from token to token, so that the lines of nearly all are wanted:
 * these are made into codes once, and each token takes all of them. */
static inline __attribute__((always_inline)) void down_many(const int bits, const st_down_view *down, int64_t groups,
                                                            int64_t c0, int64_t c1, const st_active *const *a,
                                                            const float *weight, int64_t n, float *const *y) {
    for (int64_t c = c0; c < c1; c += MANY_CHUNKS) {
        int64_t count = c1 - c < MANY_CHUNKS ? c1 - c : MANY_CHUNKS;
        float total[ST_DOWN_TOKENS][MANY_CHUNKS * ST_DOWN_CHUNK];
        for (int64_t g = 0; g < groups; g++) {
            int8_t h[ST_DOWN_TOKENS][32];
            const int8_t *hs[ST_DOWN_TOKENS];
            const st_active *of[ST_DOWN_TOKENS];
            float *sums[ST_DOWN_TOKENS];
            int64_t used = 0;
            if (g % ST_FFN_PART == 0)
                for (int64_t t = 0; t < n; t++)
                    memset(total[t], 0, (size_t)count * ST_DOWN_CHUNK * sizeof(float));
            for (int64_t t = 0; t < n; t++) {
                const st_active *active = a[t] + g;
                if (!active->quads)
                    continue;
                memset(h[used], 0, 32);
                for (int k = 0; k < active->low + active->high; k++)
                    h[used][active->index[k]] = active->h[k];
                hs[used] = h[used];
                of[used] = active;
                sums[used++] = total[t];
            }
            for (int64_t i = 0; used && i < count; i++) {
                down_codes w;
                switch ((c + i) % (bits == 4 ? 1 : bits == 5 ? 4 : 2)) {
                case 0: fill_codes(bits, 0, down, g, c + i, &w); break;
                case 1: fill_codes(bits, 1, down, g, c + i, &w); break;
                case 2: fill_codes(bits, 2, down, g, c + i, &w); break;
                default: fill_codes(bits, 3, down, g, c + i, &w); break;
                }
                int64_t t = 0;
                for (; t + 2 <= used; t += 2) {
                    prefetch_group(bits, down, g + 1 < groups ? g + 1 : g, c, count, i * used + t, 2, count * used);
                    codes_times(bits, 2, &w, hs + t, of + t, sums + t);
                }
                if (t < used) {
                    prefetch_group(bits, down, g + 1 < groups ? g + 1 : g, c, count, i * used + t, 1, count * used);
                    codes_times(bits, 1, &w, hs + t, of + t, sums + t);
                }
                for (t = 0; t < used; t++)
                    sums[t] += ST_DOWN_CHUNK;
            }
            if ((g + 1) % ST_FFN_PART == 0 || g + 1 == groups)
                for (int64_t t = 0; t < n; t++)
                    for (int64_t i = 0; i < count; i++)
                        add_weighted(weight[t], total[t] + i * ST_DOWN_CHUNK, y[t] + (c - c0 + i) * ST_DOWN_CHUNK);
        }
    }
}
