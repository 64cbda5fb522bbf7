/* Rows and Down of Q4_K, Q5_K and Q6_K at 256 bits, included by vec256.h. */

/* Scales and minima of a super-block of a row, from the ns times first, second and last four of their bytes (layout.h,
 * Rows). */
static inline void k_row_scales(const uint8_t *six, int64_t ns, __m128i *scale, __m128i *min) {
    const __m128i low = _mm_set1_epi8(15), high = _mm_set1_epi8(0x30), both = _mm_set1_epi8(0x3f);
    __m128i first = _mm_loadu_si32(six), second = _mm_loadu_si32(six + 4 * ns), last = _mm_loadu_si32(six + 8 * ns);
    __m128i s = _mm_or_si128(_mm_and_si128(last, low), _mm_and_si128(_mm_srli_epi16(first, 2), high));
    __m128i m =
        _mm_or_si128(_mm_and_si128(_mm_srli_epi16(last, 4), low), _mm_and_si128(_mm_srli_epi16(second, 2), high));
    *scale = _mm_unpacklo_epi32(_mm_and_si128(first, both), s);
    *min = _mm_unpacklo_epi32(_mm_and_si128(second, both), m);
}

static inline __m256 one_f16(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return _mm256_cvtph_ps(_mm_set1_epi16((short)h));
}

/* R rows of Q4_K, or of Q5_K (five): a super-block a turn, two blocks a step, as rows_q4_0_r. The minima are subtracted
 * through -8 times the sums of x, which stand in every fourth lane. */
static inline __attribute__((always_inline)) void rows_k_r(const int five, const int R, const uint8_t *const *rows,
                                                           int64_t nb, const st_q8x4 *x, float *out) {
    const __m256i nibble = _mm256_set1_epi8(15), fifth = _mm256_set1_epi8(16);
    int64_t ns = nb / 8;
    __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()}, less[2] = {sum[0], sum[0]};
    for (int64_t super = 0; super < ns; super++) {
        __m256 scale[2], min[2];
        for (int r = 0; r < R; r++) {
            __m128i s, m;
            k_row_scales(rows[r] + 4 * (ns + super), ns, &s, &m);
            __m256 times = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(s)),
                   off = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(m));
            scale[r] = even_then_odd(_mm256_mul_ps(times, one_f16(rows[r] + 2 * super)));
            min[r] = even_then_odd(_mm256_mul_ps(off, one_f16(rows[r] + 2 * (ns + super))));
        }
        _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
            const st_q8x4 *q = x + 2 * super + i / 2;
            int lane = 2 * (i % 2);
            int64_t b = 8 * super + 2 * i;
            __m256i q0 = load256(q->q[0][lane]), q1 = load256(q->q[1][lane]);
            __m256 by = _mm256_loadu_ps(q->scale + 4 * lane);
            __m256 rest = _mm256_mul_ps(_mm256_cvtepi32_ps(load256(q->corr + 4 * lane)),
                                        _mm256_mul_ps(_mm256_set1_ps(0.125f), by));
            for (int r = 0; r < R; r++) {
                __m256i v = load256(rows[r] + 16 * ns + 16 * b);
                __m256i low = _mm256_and_si256(v, nibble), high = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
                if (five) {
                    const __m128i *above = (const __m128i *)(rows[r] + 16 * ns + 16 * nb + b / 4 * 16);
                    __m256i bits = _mm256_srli_epi16(_mm256_broadcastsi128_si256(_mm_loadu_si128(above)), 2 * lane);
                    __m256i one = _mm256_blend_epi32(_mm256_slli_epi16(bits, 4), _mm256_slli_epi16(bits, 2), 0xf0);
                    __m256i two = _mm256_blend_epi32(_mm256_slli_epi16(bits, 3), _mm256_slli_epi16(bits, 1), 0xf0);
                    low = _mm256_or_si256(low, _mm256_and_si256(one, fifth));
                    high = _mm256_or_si256(high, _mm256_and_si256(two, fifth));
                }
                __m256i dot = TO_I32(DOT(DOT(_mm256_setzero_si256(), low, q0), high, q1));
                __m256 s = _mm256_mul_ps(scales_of_step(scale[r], i), by);
                sum[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), s, sum[r]);
                less[r] = _mm256_fmadd_ps(scales_of_step(min[r], i), rest, less[r]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        out[r] = sum8(_mm256_add_ps(sum[r], less[r]));
}

/* R rows of Q6_K. Weights are taken as 0..63; 32 times the sums of the activations' halves is taken off again. */
static inline __attribute__((always_inline)) void rows_q6_k_r(const int R, const uint8_t *const *rows, int64_t nb,
                                                              const st_q8x4 *x, float *out) {
    const __m256i nibble = _mm256_set1_epi8(15), offset = _mm256_set1_epi8(32), pair = _mm256_set1_epi8(0x30);
    int64_t ns = nb / 8;
    __m256 first[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()}, last[2] = {first[0], first[0]};
    for (int64_t super = 0; super < ns; super++) {
        __m256 scale[2][2];
        for (int r = 0; r < R; r++)
            for (int h = 0; h < 2; h++) {
                __m256 eight = _mm256_cvtepi32_ps(widen_i8x8(rows[r] + 2 * ns + h * nb + 8 * super));
                scale[r][h] = even_then_odd(_mm256_mul_ps(eight, one_f16(rows[r] + 2 * super)));
            }
        _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
            const st_q8x4 *q = x + 2 * super + i / 2;
            int lane = 2 * (i % 2);
            int64_t b = 8 * super + 2 * i;
            __m256i q0 = load256(q->q[0][lane]), q1 = load256(q->q[1][lane]), zero = _mm256_setzero_si256();
            __m256i less0 = TO_I32(DOT(zero, offset, q0)), less1 = TO_I32(DOT(zero, offset, q1));
            __m256 by = _mm256_loadu_ps(q->scale + 4 * lane);
            for (int r = 0; r < R; r++) {
                const uint8_t *nibbles = rows[r] + 18 * ns;
                __m256i v = load256(nibbles + 16 * b);
                __m256i above =
                    _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(nibbles + 16 * nb + b / 2 * 16)));
                __m256i one = _mm256_blend_epi32(_mm256_slli_epi16(above, 4), above, 0xf0);
                __m256i two = _mm256_blend_epi32(_mm256_slli_epi16(above, 2), _mm256_srli_epi16(above, 2), 0xf0);
                __m256i low = _mm256_or_si256(_mm256_and_si256(v, nibble), _mm256_and_si256(one, pair));
                __m256i high =
                    _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(v, 4), nibble), _mm256_and_si256(two, pair));
                __m256i even = _mm256_sub_epi32(TO_I32(DOT(zero, low, q0)), less0);
                __m256i odd = _mm256_sub_epi32(TO_I32(DOT(zero, high, q1)), less1);
                first[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(even), _mm256_mul_ps(scales_of_step(scale[r][0], i), by),
                                           first[r]);
                last[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(odd), _mm256_mul_ps(scales_of_step(scale[r][1], i), by),
                                          last[r]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        out[r] = sum8(_mm256_add_ps(first[r], last[r]));
}

static inline __attribute__((always_inline)) void rows_q4_k_r(const int R, const uint8_t *const *rows, int64_t nb,
                                                              const st_q8x4 *x, float *out) {
    rows_k_r(0, R, rows, nb, x, out);
}

static inline __attribute__((always_inline)) void rows_q5_k_r(const int R, const uint8_t *const *rows, int64_t nb,
                                                              const st_q8x4 *x, float *out) {
    rows_k_r(1, R, rows, nb, x, out);
}

/* 128 outputs of group g's 32 neurons, added to y; c: see down_sums. */
static inline __attribute__((always_inline)) void chunk_k(const int bits, const int c, const st_down_view *down,
                                                          int64_t g, int64_t chunk, const st_active *a, float *y) {
    const uint8_t *lines = down->lines + 32 * down->stride * (size_t)g;
    const uint8_t *above = lines + down->scale_stride / (ST_DOWN_K_HEAD / 8 + ST_DOWN_K_SCALES) * 64 + chunk / 4 * 64;
    const uint8_t *head = down_k_head(down, g) + ST_DOWN_K_HEAD * chunk;
    uint8_t scale[128], min[128];
    k_scales(down_k_scales(down, g, ST_DOWN_K_HEAD, ST_DOWN_K_SCALES) + ST_DOWN_K_SCALES * chunk, scale, min);
    __m256 by = _mm256_set1_ps(a->scale), rest = _mm256_set1_ps((float)a->corr * (0.125f * a->scale));
    for (int half = 0; half < 2; half++) {
        __m256i sum[8];
        down_sums(bits, c, lines + 64 * chunk + 32 * half, above + 32 * half, down->stride, a->index, a->quads, a->h, 4,
                  0, sum);
        for (int i = 0; i < 8; i++) {
            int o = 16 * i + 8 * half;
            __m256 out = _mm256_loadu_ps(y + o), s = _mm256_mul_ps(k_times(head + 2 * o, scale + o), by);
            out = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[i]), s, out);
            _mm256_storeu_ps(y + o, _mm256_fmadd_ps(k_times(head + 256 + 2 * o, min + o), rest, out));
        }
    }
}

/* The two halves of the 32 neurons have their own scales. Codes are taken as 0..63; 32 times the sum of h is taken off.
 * Sums times scales, and their sum, stay below 1 << 24: exact in floats. */
static inline __attribute__((always_inline)) void chunk_q6_k_c(const int c, const st_down_view *down, int64_t g,
                                                               int64_t chunk, const st_active *a, float *y) {
    const __m128i count = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const uint8_t *lines = down->lines + 32 * down->stride * (size_t)g + 64 * chunk;
    const uint8_t *above = down->lines + 32 * down->stride * (size_t)g +
                           down->scale_stride / (ST_DOWN_Q6_K_HEAD / 8 + ST_DOWN_Q6_K_SCALES) * 64 + chunk / 2 * 64;
    const uint8_t *head = down_k_head(down, g) + ST_DOWN_Q6_K_HEAD * chunk;
    const uint8_t *scale = down_k_scales(down, g, ST_DOWN_Q6_K_HEAD, ST_DOWN_Q6_K_SCALES) + ST_DOWN_Q6_K_SCALES * chunk;
    int8_t low[16]; /* h of the first half; the last quad may have some of the other */
    _mm_storeu_si128((__m128i *)low, _mm_and_si128(_mm_loadu_si128((const __m128i *)a->h),
                                                   _mm_cmpgt_epi8(_mm_set1_epi8((char)a->low), count)));
    __m256i less0 = _mm256_set1_epi32(4 * a->corr_low), less1 = _mm256_set1_epi32(4 * (a->corr - a->corr_low));
    for (int half = 0; half < 2; half++, lines += 32, above += 32) {
        __m256i sum0[8], sum1[8];
        down_sums(6, c, lines, above, down->stride, a->index, (a->low + 3) / 4, low, 4, 0, sum0);
        down_sums(6, c, lines, above, down->stride, a->index + a->low, (a->high + 3) / 4, a->h + a->low, 4, 0, sum1);
        for (int i = 0; i < 8; i++) {
            int o = 16 * i + 8 * half;
            __m256 s0 = _mm256_cvtepi32_ps(widen_i8x8(scale + o)), s1 = _mm256_cvtepi32_ps(widen_i8x8(scale + 128 + o));
            __m256 total = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(sum0[i], less0)), s0);
            total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(sum1[i], less1)), s1, total);
            __m256 by = _mm256_mul_ps(load_f16x8(head + 2 * o), _mm256_set1_ps(a->scale));
            _mm256_storeu_ps(y + o, _mm256_fmadd_ps(total, by, _mm256_loadu_ps(y + o)));
        }
    }
}

#include "../chunk_k.h"
