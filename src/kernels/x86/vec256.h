/* The integer products of the 256-bit tables, included by avx2.c and avxvnni.c. The includer defines, for unsigned
 * bytes u times signed bytes s summed over one block of 32 columns:
 *   DOT(sum, u, s)    sum += u * s, at most 8 times with u <= 15 before TO_I32
 *   DOTS(bits)        how often with u of so many bits
 *   TO_I32(sum)       eight 32-bit sums of four neighbouring products each
 *   DOT_SIGNED(w, s)  eight 32-bit sums of signed w times signed s (|w|, |s| <= 128, s != -128) */
#include "../ahead.h"
#include "../heads.h"
#include "../plain.h"
#include "../table.h"
#include "prefetch.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

static inline __m256i load256(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }

static inline __m256i broadcast4(const int8_t *p) {
    int32_t v;
    memcpy(&v, p, 4);
    return _mm256_set1_epi32(v);
}

static inline __m256 load_f16x8(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }

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

/* tile_<type>_x<N>: nb blocks of a tile (K types: whole super-blocks) for N tokens, added to sum; half h is rows
 * 8h..8h+7. stream: it comes from memory, and what follows is prefetched. */
static void tile_q4_0_x1(const uint8_t *tile, int64_t nb, const st_q8x4 *const *x, int stream, __m256 total[1][2]) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256 sum[2] = {total[0][0], total[0][1]};
    for (int64_t b = 0; b < nb; b++, tile += ST_TILE_Q4_0_BYTES) {
        const st_q8x4 *q = x[0] + b / 4;
        int lane = b % 4;
        __m256i acc[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        if (stream)
            prefetch_ahead(tile, ST_TILE_Q4_0_BYTES);
        for (int g = 0; g < 4; g++) {
            __m256i even = broadcast4(q->q[0][lane] + 4 * g), odd = broadcast4(q->q[1][lane] + 4 * g);
            for (int h = 0; h < 2; h++) {
                __m256i w = load256(tile + 32 + 64 * g + 32 * h);
                acc[h] = DOT(acc[h], _mm256_and_si256(w, nibble), even);
                acc[h] = DOT(acc[h], _mm256_and_si256(_mm256_srli_epi16(w, 4), nibble), odd);
            }
        }
        for (int h = 0; h < 2; h++) {
            __m256i dot = _mm256_add_epi32(TO_I32(acc[h]), _mm256_set1_epi32(q->corr[4 * lane]));
            __m256 s = _mm256_mul_ps(load_f16x8(tile + 16 * h), _mm256_set1_ps(q->scale[4 * lane]));
            sum[h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), s, sum[h]);
        }
    }
    total[0][0] = sum[0];
    total[0][1] = sum[1];
}

#define GEMM_Q4_0(NAME, N)                                                                                             \
    static void NAME(const uint8_t *tile, int64_t nb, const st_q8x4 *const *x, int stream, __m256 sum[N][2]) {         \
        const __m256i nibble = _mm256_set1_epi8(15);                                                                   \
        for (int64_t b = 0; b < nb; b++, tile += ST_TILE_Q4_0_BYTES) {                                                 \
            int lane = b % 4;                                                                                          \
            if (stream)                                                                                                \
                prefetch_ahead(tile, ST_TILE_Q4_0_BYTES);                                                              \
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
    static void NAME(const uint8_t *tile, int64_t nb, const st_q8x4 *const *x, int stream, __m256 sum[N][2]) {         \
        for (int64_t b = 0; b < nb; b++, tile += ST_TILE_Q8_0_BYTES) {                                                 \
            int lane = b % 4;                                                                                          \
            if (stream)                                                                                                \
                prefetch_ahead(tile, ST_TILE_Q8_0_BYTES);                                                              \
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

GEMM_Q4_0(tile_q4_0_x2, 2)
GEMM_Q4_0(tile_q4_0_x3, 3)
GEMM_Q4_0(tile_q4_0_x4, 4)
GEMM_Q8_0(tile_q8_0_x1, 1)
GEMM_Q8_0(tile_q8_0_x2, 2)
GEMM_Q8_0(tile_q8_0_x3, 3)
GEMM_Q8_0(tile_q8_0_x4, 4)

#include "tile_k_256.h"

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
#define GEMM(NAME, name)                                                                                               \
    static ST_GEMM(gemm_##name) {                                                                                      \
        for (int64_t tile = t0; tile < t1; tile++) {                                                                   \
            const uint8_t *p = w + tile * nb * ST_TILE_BYTES(NAME);                                                    \
            float *out = y + (tile - t0) * ST_TILE_ROWS;                                                               \
            __m256 sum[4][2];                                                                                          \
            for (int64_t t = 0, step; t < n; t += step) {                                                              \
                step = n - t >= 4 ? 4 : n - t;                                                                         \
                memset(sum, 0, sizeof sum);                                                                            \
                switch (step) {                                                                                        \
                case 4: tile_##name##_x4(p, nb, x + t, t == 0, sum); break;                                            \
                case 3: tile_##name##_x3(p, nb, x + t, t == 0, sum); break;                                            \
                case 2: tile_##name##_x2(p, nb, x + t, t == 0, sum); break;                                            \
                default: tile_##name##_x1(p, nb, x + t, t == 0, sum); break;                                           \
                }                                                                                                      \
                for (int64_t i = 0; i < step; i++)                                                                     \
                    store_rows(sum[i], rows - tile * ST_TILE_ROWS, out + (t + i) * ldy);                               \
            }                                                                                                          \
        }                                                                                                              \
    }

ST_TILED_TYPES(GEMM)

/* The scales of eight blocks of a row for the steps of two that read them: even ones, then odd ones; step i has number
 * i four times, and number i of the others four times, as DOT leaves four sums a block. */
static inline __m256 even_then_odd(__m256 eight) {
    return _mm256_permutevar8x32_ps(eight, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
}

static inline __m256 scales_of_step(__m256 scales, int i) { return _mm256_permutevar_ps(scales, _mm256_set1_epi32(i)); }

/* Blocks b .. b + 7 of R rows, or where they are not whole those that there are, added to sum: two blocks (32 nibble
 * bytes) a step. Unrolled and without a question whether they are whole, a row takes three quarters of the time. */
static inline __attribute__((always_inline)) void rows_q4_0_eight(const int R, const int whole,
                                                                  const uint8_t *const *rows, int64_t nb, int64_t b,
                                                                  const st_q8x4 *x, __m256 sum[2]) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256 d[2];
    for (int r = 0; r < R; r++) {
        uint16_t last[8] = {0};
        if (!whole)
            memcpy(last, rows[r] + 2 * b, (size_t)(2 * (nb - b)));
        d[r] = even_then_odd(load_f16x8(whole ? rows[r] + 2 * b : (const uint8_t *)last));
    }
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
        if (!whole && b + 2 * i >= nb)
            break;
        const st_q8x4 *q = x + b / 4 + i / 2;
        int lane = 2 * (i % 2), both = whole || b + 2 * i + 1 < nb;
        __m256i q0 = load256(q->q[0][lane]), q1 = load256(q->q[1][lane]), corr = load256(q->corr + 4 * lane);
        __m256 scale = _mm256_loadu_ps(q->scale + 4 * lane);
        for (int r = 0; r < R; r++) {
            const uint8_t *p = rows[r] + 2 * nb + 16 * (b + 2 * i);
            __m256i v = both ? load256(p) : _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)p));
            __m256i acc = DOT(_mm256_setzero_si256(), _mm256_and_si256(v, nibble), q0);
            acc = DOT(acc, _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble), q1);
            acc = _mm256_add_epi32(TO_I32(acc), corr);
            __m256 s = _mm256_mul_ps(scales_of_step(d[r], i), scale);
            sum[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc), s, sum[r]);
        }
    }
}

/* One or two rows, which share the reads of x: `rows` and `out` have R entries. */
static inline __attribute__((always_inline)) void rows_q4_0_r(const int R, const uint8_t *const *rows, int64_t nb,
                                                              const st_q8x4 *x, float *out) {
    __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t b = 0;
    for (; b + 8 <= nb; b += 8)
        rows_q4_0_eight(R, 1, rows, nb, b, x, sum);
    if (b < nb)
        rows_q4_0_eight(R, 0, rows, nb, b, x, sum);
    for (int r = 0; r < R; r++)
        out[r] = sum8(sum[r]);
}

/* Half (32 bytes of the lines) of 128 outputs of some of a group's neurons, codes of `bits` bits: out[i] are the sums
 * of outputs 16 * i + 8 * half and the seven after it. lines: of the group's first neuron, from the chunk's nibbles of
 * this half on; above: from the half on of the 64 bytes that hold the bits above them, with place `c` of the chunk
 * within these. h: what the codes of a quad's four neurons are multiplied by in outputs 32 * v .. 32 * v + 31 stands at
 * per_quad
 * * quad + per_block * v. */
static inline __attribute__((always_inline)) void down_sums(const int bits, const int c, const uint8_t *lines,
                                                            const uint8_t *above, size_t line, const uint8_t *index,
                                                            int quads, const int8_t *h, int per_quad, int per_block,
                                                            __m256i out[8]) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i sum[8];
    for (int i = 0; i < 8; i++)
        sum[i] = _mm256_setzero_si256();
    if (bits > 4)
        for (int i = 0; i < 8; i++)
            out[i] = _mm256_setzero_si256();
    for (int n = 1; quads > 0; quads--, n++, index += 4, h += per_quad) {
        __m256i l0 = load256(lines + line * index[0]), l1 = load256(lines + line * index[1]);
        __m256i l2 = load256(lines + line * index[2]), l3 = load256(lines + line * index[3]);
        __m256i a0 = _mm256_unpacklo_epi8(l0, l1), a1 = _mm256_unpackhi_epi8(l0, l1);
        __m256i b0 = _mm256_unpacklo_epi8(l2, l3), b1 = _mm256_unpackhi_epi8(l2, l3);
        __m256i v[4] = {_mm256_unpacklo_epi16(a0, b0), _mm256_unpackhi_epi16(a0, b0), _mm256_unpacklo_epi16(a1, b1),
                        _mm256_unpackhi_epi16(a1, b1)};
        __m256i high[2];
        if (bits > 4) {
            int half = bits == 5 ? c / 2 : c;
            l0 = load256(above + line * index[0]), l1 = load256(above + line * index[1]);
            l2 = load256(above + line * index[2]), l3 = load256(above + line * index[3]);
            a0 = half ? _mm256_unpackhi_epi8(l0, l1) : _mm256_unpacklo_epi8(l0, l1);
            b0 = half ? _mm256_unpackhi_epi8(l2, l3) : _mm256_unpacklo_epi8(l2, l3);
            high[0] = bits == 5 && c % 2 ? _mm256_unpackhi_epi16(a0, b0) : _mm256_unpacklo_epi16(a0, b0);
            high[1] = bits == 5 ? high[0] : _mm256_unpackhi_epi16(a0, b0);
        }
        for (int i = 0; i < 4; i++) {
            __m256i four = broadcast4(h + i * per_block);
            __m256i first = _mm256_and_si256(v[i], nibble), last = _mm256_and_si256(_mm256_srli_epi16(v[i], 4), nibble);
            if (bits == 5) {
                first = _mm256_or_si256(first, k_fifth(high[0], i, 0));
                last = _mm256_or_si256(last, k_fifth(high[0], i, 1));
            } else if (bits == 6) {
                first = _mm256_or_si256(first, q6_upper(high[i / 2], i, 0));
                last = _mm256_or_si256(last, q6_upper(high[i / 2], i, 1));
            }
            sum[2 * i] = DOT(sum[2 * i], first, four);
            sum[2 * i + 1] = DOT(sum[2 * i + 1], last, four);
        }
        if (bits > 4 && n % DOTS(bits) == 0)
            for (int i = 0; i < 8; i++) {
                out[i] = _mm256_add_epi32(out[i], TO_I32(sum[i]));
                sum[i] = _mm256_setzero_si256();
            }
    }
    for (int i = 0; i < 8; i++)
        out[i] = bits > 4 ? _mm256_add_epi32(out[i], TO_I32(sum[i])) : TO_I32(sum[i]);
}

static inline void add_scaled(__m256i sum, int32_t start, __m256 scale, float *y) {
    sum = _mm256_add_epi32(sum, _mm256_set1_epi32(start));
    _mm256_storeu_ps(y, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, _mm256_loadu_ps(y)));
}

/* 128 outputs of group g's 32 neurons, added to y. */
static void chunk_q4_0(const st_down_view *down, int64_t g, int64_t chunk, const st_active *a, float *y) {
    const uint8_t *lines = down->lines + 32 * down->stride * (size_t)g + 64 * chunk;
    const uint8_t *scales = down->scales + down->scale_stride * (size_t)g + 256 * chunk;
    for (int half = 0; half < 2; half++, lines += 32, scales += 16, y += 8) {
        __m256i sum[8];
        down_sums(4, 0, lines, lines, down->stride, a->index, a->quads, a->h, 4, 0, sum);
        for (int i = 0; i < 8; i++)
            add_scaled(sum[i], a->corr, _mm256_mul_ps(load_f16x8(scales + 32 * i), _mm256_set1_ps(a->scale)),
                       y + 16 * i);
    }
}

/* The same over Down transposed. w: of the chunk's first block on. */
static inline void transposed_chunk(const uint8_t *lines, size_t line, const st_fired *a, const block_weights *w,
                                    int first, float *y) {
    for (int half = 0; half < 2; half++, lines += 32, y += 8) {
        __m256i sum[8];
        down_sums(4, 0, lines, lines, line, a->index, a->quads, w->h[0][first], sizeof w->h[0], 4, sum);
        for (int i = 0; i < 8; i++)
            add_scaled(sum[i], w->corr[first + i / 2], _mm256_set1_ps(w->scale[first + i / 2]), y + 16 * i);
    }
}

/* The low byte of each of four lanes, in one. */
static inline __m256i four_bytes(const __m256i q[4]) {
    const __m256i byte = _mm256_set1_epi32(0xff);
    __m256i low = _mm256_or_si256(_mm256_and_si256(q[0], byte), _mm256_slli_epi32(_mm256_and_si256(q[1], byte), 8));
    __m256i high = _mm256_or_si256(_mm256_and_si256(q[2], byte), _mm256_slli_epi32(q[3], 8));
    return _mm256_or_si256(low, _mm256_slli_epi32(high, 16));
}

/* Weights of 8 blocks, or of the 4 that are left, in lanes `lane` and following of w. Absolute values order as
 * integers, NaN above all. What is no number within range is converted to 1 << 31: byte 0. */
static inline void weigh_blocks8(const uint8_t *scales, size_t stride, int64_t count, const st_fired *a, int lane,
                                 block_weights *w) {
    const __m256i absolute = _mm256_set1_epi32(0x7fffffff), ones = _mm256_set1_epi16(1);
    const __m256 most = _mm256_set1_ps(127);
    __m256 product[32];
    __m256i top = _mm256_setzero_si256(), sum = top;
    for (int k = 0; k < 4 * a->quads; k++) {
        const __m128i *p = (const __m128i *)(scales + stride * a->index[k]);
        __m128i d = count >= 8 ? _mm_loadu_si128(p) : _mm_loadl_epi64(p);
        product[k] = _mm256_mul_ps(_mm256_cvtph_ps(d), _mm256_set1_ps(a->h[k]));
        top = _mm256_max_epi32(top, _mm256_and_si256(_mm256_castps_si256(product[k]), absolute));
    }
    __m256 amax = _mm256_castsi256_ps(top), inverse = _mm256_div_ps(most, amax);
    for (int k = 0; k < 4 * a->quads; k += 4) {
        __m256i q[4];
        for (int j = 0; j < 4; j++)
            q[j] = _mm256_cvtps_epi32(_mm256_mul_ps(product[k + j], inverse));
        __m256i four = four_bytes(q);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(8), four), ones));
        _mm256_storeu_si256((__m256i *)w->h[k / 4][lane], four);
    }
    _mm256_storeu_si256((__m256i *)(w->corr + lane), _mm256_sub_epi32(_mm256_setzero_si256(), sum));
    _mm256_storeu_ps(w->scale + lane, _mm256_div_ps(amax, most));
}

/* The weights of the first `count` blocks, a multiple of 4, at most 16 of them. scales: of the group's first neuron,
 * `stride` bytes a neuron. */
static inline void weigh_blocks(const uint8_t *scales, size_t stride, int64_t count, const st_fired *a,
                                block_weights *w) {
    weigh_blocks8(scales, stride, count, a, 0, w);
    if (count > 8)
        weigh_blocks8(scales + 16, stride, count - 8, a, 8, w);
}

static inline void add_weighted(float weight, const float *total, float *y) {
    for (int i = 0; i < ST_DOWN_CHUNK; i += 8)
        _mm256_storeu_ps(y + i,
                         _mm256_fmadd_ps(_mm256_set1_ps(weight), _mm256_loadu_ps(total + i), _mm256_loadu_ps(y + i)));
}

#include "attention_q8_256.h"

#include "sparse_k_256.h"

typedef __m256 tile_sum[2];
#include "drivers.h"
