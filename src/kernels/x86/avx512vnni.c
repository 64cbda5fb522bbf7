/* AVX-512 with VNNI: the matrix kernels, attention, dot, RoPE and top-k at 512 bits. The rest it has from the AVX2
 * table, which every CPU of this table can run. */
#include "../ahead.h"
#include "../heads.h"
#include "../plain.h"
#include "../table.h"
#include "prefetch.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

static inline __m512i load512(const void *p) { return _mm512_loadu_si512(p); }

static inline __m512i broadcast4(const int8_t *p) {
    int32_t v;
    memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
}

static inline __m512 load_f16x16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }

static inline __mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1); }

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

/* tile_<type>_x<N>: nb blocks of a tile (K types: whole super-blocks) for N tokens, added to total. stream: it comes
 * from memory, and what follows is prefetched. */
static void tile_q4_0_x1(const uint8_t *tile, int64_t nb, const st_q8x4 *const *x, int stream, __m512 *total) {
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512 sum = total[0];
    for (int64_t b = 0; b < nb; b++, tile += ST_TILE_Q4_0_BYTES) {
        const st_q8x4 *q = x[0] + b / 4;
        int lane = b % 4;
        __m512i even = _mm512_set1_epi32(q->corr[4 * lane]), odd = _mm512_setzero_si512();
        if (stream)
            prefetch_ahead(tile, ST_TILE_Q4_0_BYTES);
        for (int g = 0; g < 4; g++) {
            __m512i w = load512(tile + 32 + 64 * g);
            even = _mm512_dpbusd_epi32(even, _mm512_and_si512(w, nibble), broadcast4(q->q[0][lane] + 4 * g));
            odd = _mm512_dpbusd_epi32(odd, _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble),
                                      broadcast4(q->q[1][lane] + 4 * g));
        }
        __m512 s = _mm512_mul_ps(load_f16x16(tile), _mm512_set1_ps(q->scale[4 * lane]));
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(even, odd)), s, sum);
    }
    total[0] = sum;
}

static inline void store_rows(const __m512 sum[1], int64_t count, float *y) {
    _mm512_mask_storeu_ps(y, first_lanes(count), sum[0]);
}

/* The sum starts at -8 * sum(x), so that nibbles 0..15 need no offset. Weights are unpacked once for N tokens. */
#define TILE_Q4_0(NAME, N)                                                                                             \
    static void NAME(const uint8_t *tile, int64_t nb, const st_q8x4 *const *x, int stream, __m512 *total) {            \
        const __m512i nibble = _mm512_set1_epi8(15);                                                                   \
        __m512 sum[N];                                                                                                 \
        for (int t = 0; t < N; t++)                                                                                    \
            sum[t] = total[t];                                                                                         \
        for (int64_t b = 0; b < nb; b++, tile += ST_TILE_Q4_0_BYTES) {                                                 \
            int lane = b % 4;                                                                                          \
            __m512i low[4], high[4];                                                                                   \
            if (stream)                                                                                                \
                prefetch_ahead(tile, ST_TILE_Q4_0_BYTES);                                                              \
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
    static void NAME(const uint8_t *tile, int64_t nb, const st_q8x4 *const *x, int stream, __m512 *total) {            \
        const __m512i flip = _mm512_set1_epi8(-128);                                                                   \
        __m512 sum[N];                                                                                                 \
        for (int t = 0; t < N; t++)                                                                                    \
            sum[t] = total[t];                                                                                         \
        for (int64_t b = 0; b < nb; b++, tile += ST_TILE_Q8_0_BYTES) {                                                 \
            int lane = b % 4;                                                                                          \
            __m512i u[8];                                                                                              \
            if (stream)                                                                                                \
                prefetch_ahead(tile, ST_TILE_Q8_0_BYTES);                                                              \
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

TILE_Q4_0(tile_q4_0_x2, 2)
TILE_Q4_0(tile_q4_0_x3, 3)
TILE_Q4_0(tile_q4_0_x4, 4)
TILE_Q4_0(tile_q4_0_x8, 8)
TILE_Q8_0(tile_q8_0_x1, 1)
TILE_Q8_0(tile_q8_0_x2, 2)
TILE_Q8_0(tile_q8_0_x3, 3)
TILE_Q8_0(tile_q8_0_x4, 4)
TILE_Q8_0(tile_q8_0_x8, 8)

#include "tile_k_512.h"

/* A tile's weights stay in the first cache levels while it serves all tokens, eight at a time. */
#define GEMM(NAME, name)                                                                                               \
    static ST_GEMM(gemm_##name) {                                                                                      \
        for (int64_t tile = t0; tile < t1; tile++) {                                                                   \
            const uint8_t *p = w + tile * nb * ST_TILE_BYTES(NAME);                                                    \
            float *out = y + (tile - t0) * ST_TILE_ROWS;                                                               \
            __m512 sum[8];                                                                                             \
            for (int64_t t = 0, step; t < n; t += step) {                                                              \
                step = n - t >= 8 ? 8 : n - t >= 4 ? 4 : n - t;                                                        \
                memset(sum, 0, sizeof sum);                                                                            \
                switch (step) {                                                                                        \
                case 8: tile_##name##_x8(p, nb, x + t, t == 0, sum); break;                                            \
                case 4: tile_##name##_x4(p, nb, x + t, t == 0, sum); break;                                            \
                case 3: tile_##name##_x3(p, nb, x + t, t == 0, sum); break;                                            \
                case 2: tile_##name##_x2(p, nb, x + t, t == 0, sum); break;                                            \
                default: tile_##name##_x1(p, nb, x + t, t == 0, sum); break;                                           \
                }                                                                                                      \
                for (int64_t i = 0; i < step; i++)                                                                     \
                    store_rows(sum + i, rows - tile * ST_TILE_ROWS, out + (t + i) * ldy);                              \
            }                                                                                                          \
        }                                                                                                              \
    }

ST_TILED_TYPES(GEMM)

/* R rows times T tokens (out[r * T + t]): four blocks (64 nibble bytes) a step, sixteen scales a turn; each block
 * leaves 4 sums, which the replicated scales fit. Rows share the reads of x, and tokens the unpacked rows. */
static inline __attribute__((always_inline)) void rows_q4_0_many(const int R, const int T, const uint8_t *const *rows,
                                                                 int64_t nb, const st_q8x4 *const *x, float *out) {
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512 sum[8];
    for (int i = 0; i < R * T; i++)
        sum[i] = _mm512_setzero_ps();
    for (int64_t b = 0; b < nb; b += 16) {
        __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        __m512 d[2];
        for (int r = 0; r < R; r++)
            d[r] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(nb - b), rows[r] + 2 * b));
        for (int64_t c = b; c < nb && c < b + 16; c += 4) {
            __mmask16 mask = first_lanes(4 * (nb - c));
            __m512i low[2], high[2];
            __m512 s[2];
            for (int r = 0; r < R; r++) {
                __m512i v = _mm512_maskz_loadu_epi32(mask, rows[r] + 2 * nb + 16 * c);
                low[r] = _mm512_and_si512(v, nibble);
                high[r] = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble);
                s[r] = _mm512_permutexvar_ps(spread, d[r]);
            }
            _Pragma("GCC unroll 8") for (int t = 0; t < T; t++) {
                const st_q8x4 *q = x[t] + c / 4;
                __m512i q0 = load512(q->q[0]), q1 = load512(q->q[1]), corr = load512(q->corr);
                __m512 scale = _mm512_loadu_ps(q->scale);
                for (int r = 0; r < R; r++) {
                    __m512i dot = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(corr, low[r], q0), high[r], q1);
                    sum[r * T + t] =
                        _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(s[r], scale), sum[r * T + t]);
                }
            }
            spread = _mm512_add_epi32(spread, _mm512_set1_epi32(4));
        }
    }
    for (int i = 0; i < R * T; i++)
        out[i] = _mm512_reduce_add_ps(sum[i]);
}

static inline __attribute__((always_inline)) void rows_q4_0_r(const int R, const uint8_t *const *rows, int64_t nb,
                                                              const st_q8x4 *x, float *out) {
    rows_q4_0_many(R, 1, rows, nb, &x, out);
}

/* Codes of `bits` bits that four neurons have for 128 outputs: code[2 * v] of outputs 32 * v on, four bytes an output,
 * code[2 * v + 1] of outputs 32 * v + 16 on. lines: of the group's first neuron, from the chunk's nibbles on; above:
 * from the 64 bytes on that hold the bits above them, with place `c` of the chunk within these. */
static inline __attribute__((always_inline)) void down_quad(const int bits, const int c, const uint8_t *lines,
                                                            const uint8_t *above, size_t line, const uint8_t index[4],
                                                            __m512i code[8]) {
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i l0 = load512(lines + line * index[0]), l1 = load512(lines + line * index[1]);
    __m512i l2 = load512(lines + line * index[2]), l3 = load512(lines + line * index[3]);
    __m512i a0 = _mm512_unpacklo_epi8(l0, l1), a1 = _mm512_unpackhi_epi8(l0, l1);
    __m512i b0 = _mm512_unpacklo_epi8(l2, l3), b1 = _mm512_unpackhi_epi8(l2, l3);
    __m512i v[4] = {_mm512_unpacklo_epi16(a0, b0), _mm512_unpackhi_epi16(a0, b0), _mm512_unpacklo_epi16(a1, b1),
                    _mm512_unpackhi_epi16(a1, b1)};
    __m512i high[2];
    if (bits > 4) {
        int half = bits == 5 ? c / 2 : c;
        l0 = load512(above + line * index[0]), l1 = load512(above + line * index[1]);
        l2 = load512(above + line * index[2]), l3 = load512(above + line * index[3]);
        a0 = half ? _mm512_unpackhi_epi8(l0, l1) : _mm512_unpacklo_epi8(l0, l1);
        b0 = half ? _mm512_unpackhi_epi8(l2, l3) : _mm512_unpacklo_epi8(l2, l3);
        high[0] = bits == 5 && c % 2 ? _mm512_unpackhi_epi16(a0, b0) : _mm512_unpacklo_epi16(a0, b0);
        high[1] = bits == 5 ? high[0] : _mm512_unpackhi_epi16(a0, b0);
    }
    for (int i = 0; i < 4; i++) {
        code[2 * i] = _mm512_and_si512(v[i], nibble);
        code[2 * i + 1] = _mm512_and_si512(_mm512_srli_epi16(v[i], 4), nibble);
        for (int h = 0; bits > 4 && h < 2; h++)
            code[2 * i + h] =
                _mm512_or_si512(code[2 * i + h], bits == 5 ? k_fifth(high[0], i, h) : q6_upper(high[i / 2], i, h));
    }
}

/* 128 outputs of some of a group's neurons, added to sum[8]. lines, above: see down_quad. h: what the codes of a quad's
 * four neurons are multiplied by in outputs 32 * v .. 32 * v + 31 stands at per_quad * quad + per_block * v. */
static inline __attribute__((always_inline)) void down_sums(const int bits, const int c, const uint8_t *lines,
                                                            const uint8_t *above, size_t line, const uint8_t *index,
                                                            int quads, const int8_t *h, int per_quad, int per_block,
                                                            __m512i sum[8]) {
    for (; quads > 0; quads--, index += 4, h += per_quad) {
        __m512i code[8];
        down_quad(bits, c, lines, above, line, index, code);
        for (int i = 0; i < 8; i++)
            sum[i] = _mm512_dpbusd_epi32(sum[i], code[i], broadcast4(h + i / 2 * per_block));
    }
}

static inline void add_scaled(__m512i sum, __m512 scale, float *y) {
    _mm512_storeu_ps(y, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, _mm512_loadu_ps(y)));
}

/* 128 outputs of group g's 32 neurons, added to y. */
static void chunk_q4_0(const st_down_view *down, int64_t g, int64_t chunk, const st_active *a, float *y) {
    const uint8_t *lines = down->lines + 32 * down->stride * (size_t)g + 64 * chunk;
    const uint8_t *scales = down->scales + down->scale_stride * (size_t)g + 256 * chunk;
    __m512i sum[8];
    for (int i = 0; i < 8; i++)
        sum[i] = _mm512_set1_epi32(a->corr);
    down_sums(4, 0, lines, lines, down->stride, a->index, a->quads, a->h, 4, 0, sum);
    for (int i = 0; i < 8; i++)
        add_scaled(sum[i], _mm512_mul_ps(load_f16x16(scales + 32 * i), _mm512_set1_ps(a->scale)), y + 16 * i);
}

/* The same over Down transposed. w: of the chunk's first block on. */
static inline void transposed_chunk(const uint8_t *lines, size_t line, const st_fired *a, const block_weights *w,
                                    int first, float *y) {
    __m512i sum[8];
    for (int i = 0; i < 8; i++)
        sum[i] = _mm512_set1_epi32(w->corr[first + i / 2]);
    down_sums(4, 0, lines, lines, line, a->index, a->quads, w->h[0][first], sizeof w->h[0], 4, sum);
    for (int i = 0; i < 8; i++)
        add_scaled(sum[i], _mm512_set1_ps(w->scale[first + i / 2]), y + 16 * i);
}

enum { PICK = 0xca }; /* ternary logic: bits of the second where the first's are set, else of the third */

/* The low byte of each of four lanes, in one. */
static inline __m512i four_bytes(const __m512i q[4]) {
    const __m512i byte = _mm512_set1_epi32(0xff), pair = _mm512_set1_epi32(0xffff);
    __m512i low = _mm512_ternarylogic_epi32(byte, q[0], _mm512_slli_epi32(q[1], 8), PICK);
    __m512i high = _mm512_ternarylogic_epi32(byte, q[2], _mm512_slli_epi32(q[3], 8), PICK);
    return _mm512_ternarylogic_epi32(pair, low, _mm512_slli_epi32(high, 16), PICK);
}

/* The weights of the first `count` blocks, at most 16. scales: of the group's first neuron, `stride` bytes a neuron.
 * Absolute values order as integers, NaN above all. What is no number within range is converted to 1 << 31: byte 0. */
static inline void weigh_blocks(const uint8_t *scales, size_t stride, int64_t count, const st_fired *a,
                                block_weights *w) {
    const __m512i absolute = _mm512_set1_epi32(0x7fffffff);
    const __m512 most = _mm512_set1_ps(127);
    const __mmask16 mask = first_lanes(count);
    __m512 product[32];
    __m512i top = _mm512_setzero_si512(), sum = top;
    for (int k = 0; k < 4 * a->quads; k++) {
        __m256i d = _mm256_maskz_loadu_epi16(mask, scales + stride * a->index[k]);
        product[k] = _mm512_mul_ps(_mm512_cvtph_ps(d), _mm512_set1_ps(a->h[k]));
        top = _mm512_max_epi32(top, _mm512_and_si512(_mm512_castps_si512(product[k]), absolute));
    }
    __m512 amax = _mm512_castsi512_ps(top), inverse = _mm512_div_ps(most, amax);
    for (int k = 0; k < 4 * a->quads; k += 4) {
        __m512i q[4];
        for (int j = 0; j < 4; j++)
            q[j] = _mm512_cvtps_epi32(_mm512_mul_ps(product[k + j], inverse));
        __m512i four = four_bytes(q);
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(8), four);
        _mm512_storeu_si512(w->h[k / 4], four);
    }
    _mm512_storeu_si512(w->corr, _mm512_sub_epi32(_mm512_setzero_si512(), sum));
    _mm512_storeu_ps(w->scale, _mm512_div_ps(amax, most));
}

static inline void add_weighted(float weight, const float *total, float *y) {
    for (int i = 0; i < ST_DOWN_CHUNK; i += 16)
        _mm512_storeu_ps(y + i,
                         _mm512_fmadd_ps(_mm512_set1_ps(weight), _mm512_loadu_ps(total + i), _mm512_loadu_ps(y + i)));
}

enum {
    HEADS = 6,        /* query heads that share a key or value: 24 sums, of 32 registers */
    VALUES_AHEAD = 16 /* positions whose values are asked into the first-level cache before their turn */
};

/* a's and b's even lanes plus their odd ones, within 128 bits. */
static inline __m512 hadd16(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}

/* a's low half plus its high half, and b's. */
static inline __m512 fold16(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}

/* Lane i = the sum of the lanes of a[i]: halves first, then neighbours. */
static inline __m256 sum8x16(const __m512 a[8]) {
    __m512 low = hadd16(fold16(a[0], a[4]), fold16(a[1], a[5])), high = hadd16(fold16(a[2], a[6]), fold16(a[3], a[7]));
    __m512 s = hadd16(low, high); /* quarters of 0 to 3, twice, and of 4 to 7 */
    return _mm512_castps512_ps256(_mm512_add_ps(_mm512_shuffle_f32x4(s, s, 0x88), _mm512_shuffle_f32x4(s, s, 0xdd)));
}

enum { WHOLE = 0xffff }; /* the mask of 16 lanes */

/* 16 dimensions of H heads and four keys, added to their sums. A mask that is known to be WHOLE costs nothing. */
static inline __attribute__((always_inline)) void score_step(const int H, const float *q, int64_t hd,
                                                             const uint16_t *const key[4], __mmask16 mask,
                                                             __m512 sum[HEADS * 4]) {
    __m512 wide[4];
    _Pragma("GCC unroll 4") for (int p = 0; p < 4; p++) wide[p] = _mm512_cvtph_ps(
        mask == WHOLE ? _mm256_loadu_si256((const __m256i *)key[p]) : _mm256_maskz_loadu_epi16(mask, key[p]));
    _Pragma("GCC unroll 8") for (int h = 0; h < H; h++, q += hd) {
        __m512 query = mask == WHOLE ? _mm512_loadu_ps(q) : _mm512_maskz_loadu_ps(mask, q);
        _Pragma("GCC unroll 4") for (int p = 0; p < 4; p++) sum[4 * h + p] =
            _mm512_fmadd_ps(query, wide[p], sum[4 * h + p]);
    }
}

/* Scores of H heads at four positions (the last one repeated beyond n); each key is read and widened once. */
static inline __attribute__((always_inline)) void scores_h(const int H, const float *q, int64_t hd, const uint16_t *k,
                                                           int64_t n, float scale, float *scores) {
    __m512 sum[HEADS * 4];
    const uint16_t *key[4];
    for (int i = 0; i < HEADS * 4; i++) /* all of them: an odd head is folded with the next one's */
        sum[i] = _mm512_setzero_ps();
    for (int p = 0; p < 4; p++)
        key[p] = k + (p < n ? p : n - 1) * hd;
    int64_t i = 0;
    for (; i + 16 <= hd; i += 16) {
        score_step(H, q + i, hd, key, WHOLE, sum);
        for (int p = 0; p < 4; p++)
            key[p] += 16;
    }
    if (i < hd)
        score_step(H, q + i, hd, key, first_lanes(hd - i), sum);
    __mmask8 mask = (__mmask8)first_lanes(n < 4 ? n : 4);
    for (int h = 0; h < H; h += 2) {
        __m256 both = _mm256_mul_ps(sum8x16(sum + 4 * h), _mm256_set1_ps(scale));
        _mm_mask_storeu_ps(scores + h * ST_ATTN_CHUNK, mask, _mm256_castps256_ps128(both));
        if (h + 1 < H)
            _mm_mask_storeu_ps(scores + (h + 1) * ST_ATTN_CHUNK, mask, _mm256_extractf128_ps(both, 1));
    }
}

/* acc[h] = sum over n positions of scores[h][p] * v[p], 64 columns of H heads at a time. */
static inline __attribute__((always_inline)) void values_h(const int H, const float *scores, const uint16_t *v,
                                                           int64_t hd, int64_t n, float *acc) {
    for (int64_t i = 0; i < hd; i += 64) {
        const uint16_t *columns = v + i;
        __m512 sum[HEADS][4];
        __mmask16 mask[4];
        for (int j = 0; j < 4; j++) {
            mask[j] = hd - i - 16 * j <= 0 ? 0 : first_lanes(hd - i - 16 * j);
            for (int h = 0; h < H; h++)
                sum[h][j] = _mm512_setzero_ps();
        }
        for (int64_t p = 0; p < n; p++, columns += hd) {
            __m512 value[4];
            st_prefetch_l1((const uint8_t *)(columns + VALUES_AHEAD * hd));
            st_prefetch_l1((const uint8_t *)(columns + VALUES_AHEAD * hd + 32));
            for (int j = 0; j < 4; j++)
                value[j] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask[j], columns + 16 * j));
            for (int h = 0; h < H; h++) {
                __m512 s = _mm512_set1_ps(scores[h * ST_ATTN_CHUNK + p]);
                for (int j = 0; j < 4; j++)
                    sum[h][j] = _mm512_fmadd_ps(s, value[j], sum[h][j]);
            }
        }
        for (int h = 0; h < H; h++)
            for (int j = 0; j < 4; j++)
                _mm512_mask_storeu_ps(acc + h * hd + i + 16 * j, mask[j], sum[h][j]);
    }
}

/* scores[0..n) -> exp(score - max); returns their sum. */
static float softmax_chunk(float *s, int64_t n, float *max) {
    __m512 m = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (int64_t p = 0; p < n; p += 16) {
        __mmask16 mask = first_lanes(n - p);
        m = _mm512_mask_max_ps(m, mask, m, _mm512_maskz_loadu_ps(mask, s + p));
    }
    *max = _mm512_reduce_max_ps(m);
    m = _mm512_set1_ps(*max);
    for (int64_t p = 0; p < n; p += 16) {
        __mmask16 mask = first_lanes(n - p);
        __m512 e = _mm512_maskz_mov_ps(mask, exp16(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, s + p), m)));
        _mm512_mask_storeu_ps(s + p, mask, e);
        sum = _mm512_add_ps(sum, e);
    }
    return _mm512_reduce_add_ps(sum);
}

/* What attention_many (attention.h) takes: keys and values that are floats. */
enum { KEYS = 8, KEY_ROWS = 3, COLUMNS = 64 };

static inline void widen(const uint16_t *x, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i += 16) {
        __mmask16 mask = first_lanes(n - i);
        _mm512_mask_storeu_ps(out + i, mask, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, x + i)));
    }
}

/* Scores of H rows at KEYS positions. keys: [KEYS][ld], zero from hd to ld. */
static inline __attribute__((always_inline)) void key_scores_h(const int H, const float *const *q, int64_t hd,
                                                               const float *keys, int64_t ld, float scale,
                                                               float *scores) {
    __m512 sum[KEY_ROWS][KEYS];
    for (int h = 0; h < H; h++)
        for (int p = 0; p < KEYS; p++)
            sum[h][p] = _mm512_setzero_ps();
    for (int64_t i = 0; i < hd; i += 16) {
        __m512 query[KEY_ROWS];
        for (int h = 0; h < H; h++)
            query[h] = _mm512_maskz_loadu_ps(first_lanes(hd - i), q[h] + i);
        _Pragma("GCC unroll 8") for (int p = 0; p < KEYS; p++) {
            __m512 key = _mm512_loadu_ps(keys + p * ld + i);
            for (int h = 0; h < H; h++)
                sum[h][p] = _mm512_fmadd_ps(query[h], key, sum[h][p]);
        }
    }
    for (int h = 0; h < H; h++)
        _mm256_storeu_ps(scores + h * ST_ATTN_ROW, _mm256_mul_ps(sum8x16(sum[h]), _mm256_set1_ps(scale)));
}

/* acc[h] (+)= weights[h][p] * values[p] for up to 64 columns of H rows. */
static inline __attribute__((always_inline)) void add_values_h(const int H, const float *weights, const float *values,
                                                               int64_t columns, int64_t n, int first, float *acc,
                                                               int64_t ld) {
    __m512 sum[HEADS][4];
    __mmask16 mask[4];
    for (int j = 0; j < 4; j++) {
        mask[j] = columns - 16 * j <= 0 ? 0 : first_lanes(columns - 16 * j);
        for (int h = 0; h < H; h++)
            sum[h][j] = first ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask[j], acc + h * ld + 16 * j);
    }
    for (int64_t p = 0; p < n; p++) {
        __m512 value[4];
        for (int j = 0; j < 4; j++)
            value[j] = _mm512_maskz_loadu_ps(mask[j], values + p * COLUMNS + 16 * j);
        for (int h = 0; h < H; h++) {
            __m512 s = _mm512_set1_ps(weights[h * ST_ATTN_ROW + p]);
            for (int j = 0; j < 4; j++)
                sum[h][j] = _mm512_fmadd_ps(s, value[j], sum[h][j]);
        }
    }
    for (int h = 0; h < H; h++)
        for (int j = 0; j < 4; j++)
            _mm512_mask_storeu_ps(acc + h * ld + 16 * j, mask[j], sum[h][j]);
}

#include "attention.h"
#include "attention_q8_512.h"

#include "sparse_k_512.h"

typedef __m512 tile_sum;
#include "drivers.h"

/* From how many tokens on all neurons' codes are made once for all: below, most lines are wanted by none. */
enum { MANY_TOKENS = 4 };

#define DOWN_MANY(name, bits)                                                                                          \
    static ST_DOWN(down_many_##name) {                                                                                 \
        if (n < MANY_TOKENS)                                                                                           \
            down_##name(down, d, groups, c0, c1, a, weight, n, y);                                                     \
        else                                                                                                           \
            down_many(bits, down, groups, c0, c1, a, weight, n, y);                                                    \
    }
DOWN_MANY(q4_k, 4)
DOWN_MANY(q5_k, 5)
DOWN_MANY(q6_k, 6)

#define ENTER_MANY(NAME, name)                                                                                         \
    k->up[ST_TILED_##NAME] = up_##name;                                                                                \
    k->down[ST_TILED_##NAME] = down_many_##name;

static float dot(const float *a, const float *b, int64_t n) {
    __m512 s0 = _mm512_setzero_ps(), s1 = s0;
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        s0 = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), s0);
        s1 = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 16), _mm512_loadu_ps(b + i + 16), s1);
    }
    for (; i < n; i += 16) {
        __mmask16 mask = first_lanes(n - i);
        s0 = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, a + i), _mm512_maskz_loadu_ps(mask, b + i), s0);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(s0, s1));
}

void st_fill_avx512vnni(st_kernels *k) {
    ST_ENTER_MATRICES
    k->up[ST_TILED_Q4_0] = up_q4_0;
    ENTER_MANY(Q4_K, q4_k)
    ENTER_MANY(Q5_K, q5_k)
    ENTER_MANY(Q6_K, q6_k)
    k->attention = attention;
    k->attention_many = attention_many;
    k->attention_q8 = attention_q8;
    k->dot = dot;
    k->rope = rope;
    k->top_k = top_k;
}
