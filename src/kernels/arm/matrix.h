/* The integer matrix kernels, included by neon.c and dotprod.c. The includer says how many TOKENS share one unpacking
 * of the weights, and defines how bytes are multiplied. Nibbles are 0..15; the offset of 8 is in `start` = -8 * sum(x):
 *   columns, load_columns(q, lane)     32 quantised columns of one token
 *   sum4                               running sums of four outputs (rows of a tile, outputs of a down line)
 *   FIRST(start, w, x, i)              begins a sum: rows r < 4 of w[4 * r + j] * (column 4 * i + j of x)
 *   NEXT(sum, w, x, i)                 adds such a product, at most seven times
 *   EMPTY(start), NEXT_SAME(.., w, h)  the same for four values h that are repeated in every 32-bit lane
 *   total4(sum, start)                 the four sums, start included once
 *   row_sum, row_dot(corr, low, high, x0, x1), row_total(acc, corr)
 *                                      whole rows: one block of one row; then four rows' sums. corr: {start, 0, 0, 0}
 *   row_half(w, x), wide_total(acc)    the same of 16 columns, and of codes of up to six bits
 *   wide4(sum, start)                  total4 of codes of up to six bits
 *   sum8, ZERO8, dot8(sum, w0, w1, x, i), total8(sum)
 *                                      signed bytes (Q8_0): w0 as in NEXT for i, w1 for i + 1
 * Integer sums are exact and what follows them is one code, so the tables agree bit for bit.
 *
 * Hardware prefetchers follow tiles, which stand in order; rows and lines, which skip silent neurons, are asked for
 * ahead. The distance of one step is reasoned, not measured: no board was at hand. */
#include "common.h"

#define ST_ASK st_prefetch_l1 /* nothing else asks for them again */
#include "../ahead.h"
#include "../plain.h"

#include <math.h>
#include <string.h>

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif

/* The inner steps: Q times four rows of one block of a tile, from row 4 * quad on, times block `lane` of N tokens,
 * added to sum[t][i]. Q and N are constants wherever this is inlined, so that sums stay in registers. */
ALWAYS_INLINE void block_q4_0(const int Q, const int N, const uint8_t *tile, int quad, const st_q8x4 *const *x,
                              int lane, float32x4_t sum[TOKENS][4]) {
    const uint8x16_t nibble = vdupq_n_u8(15);
    UNROLL for (int i = 0; i < Q; i++) {
        int8x16_t low[4], high[4];
        float32x4_t scale = load_f16x4(tile + 8 * (quad + i));
        UNROLL for (int g = 0; g < 4; g++) {
            uint8x16_t w = vld1q_u8(tile + 32 + 64 * g + 16 * (quad + i));
            low[g] = vreinterpretq_s8_u8(vandq_u8(w, nibble));
            high[g] = vreinterpretq_s8_u8(vshrq_n_u8(w, 4));
        }
        UNROLL for (int t = 0; t < N; t++) {
            columns c = load_columns(x[t], lane);
            int32x4_t start = vld1q_dup_s32(x[t]->corr + 4 * lane);
            sum4 acc = FIRST(start, low[0], c, 0);
            acc = NEXT(acc, high[0], c, 4);
            acc = NEXT(acc, low[1], c, 1);
            acc = NEXT(acc, high[1], c, 5);
            acc = NEXT(acc, low[2], c, 2);
            acc = NEXT(acc, high[2], c, 6);
            acc = NEXT(acc, low[3], c, 3);
            acc = NEXT(acc, high[3], c, 7);
            float32x4_t s = vmulq_n_f32(scale, x[t]->scale[4 * lane]);
            sum[t][i] = vfmaq_f32(sum[t][i], vcvtq_f32_s32(total4(acc, start)), s);
        }
    }
}

ALWAYS_INLINE void block_q8_0(const int Q, const int N, const uint8_t *tile, int quad, const st_q8x4 *const *x,
                              int lane, float32x4_t sum[TOKENS][4]) {
    UNROLL for (int i = 0; i < Q; i++) {
        int8x16_t w[8];
        float32x4_t scale = load_f16x4(tile + 8 * (quad + i));
        UNROLL for (int g = 0; g < 8; g++) w[g] = vld1q_s8((const int8_t *)tile + 32 + 64 * g + 16 * (quad + i));
        UNROLL for (int t = 0; t < N; t++) {
            columns c = load_columns(x[t], lane);
            sum8 acc = dot8(ZERO8, w[0], w[1], c, 0);
            acc = dot8(acc, w[2], w[3], c, 2);
            acc = dot8(acc, w[4], w[5], c, 4);
            acc = dot8(acc, w[6], w[7], c, 6);
            float32x4_t s = vmulq_n_f32(scale, x[t]->scale[4 * lane]);
            sum[t][i] = vfmaq_f32(sum[t][i], vcvtq_f32_s32(total8(acc)), s);
        }
    }
}

/* nb blocks of a tile, added to total[t][i][r]: rows 4 * (quad + i) + r. Four blocks share one st_q8x4. */
#define QUADS(TYPE, BYTES)                                                                                             \
    ALWAYS_INLINE void quads_##TYPE(const int Q, const int N, const uint8_t *tile, int64_t nb, int quad,               \
                                    const st_q8x4 *const *x, float32x4_t total[TOKENS][4]) {                           \
        const st_q8x4 *q[TOKENS];                                                                                      \
        float32x4_t sum[TOKENS][4];                                                                                    \
        for (int t = 0; t < N; t++) {                                                                                  \
            q[t] = x[t];                                                                                               \
            for (int i = 0; i < Q; i++)                                                                                \
                sum[t][i] = total[t][i];                                                                               \
        }                                                                                                              \
        for (; nb > 0; nb -= 4) {                                                                                      \
            for (int lane = 0; lane < 4 && lane < nb; lane++, tile += BYTES)                                           \
                block_##TYPE(Q, N, tile, quad, q, lane, sum);                                                          \
            for (int t = 0; t < N; t++)                                                                                \
                q[t]++;                                                                                                \
        }                                                                                                              \
        for (int t = 0; t < N; t++)                                                                                    \
            for (int i = 0; i < Q; i++)                                                                                \
                total[t][i] = sum[t][i];                                                                               \
    }

QUADS(q4_0, ST_TILE_Q4_0_BYTES)
QUADS(q8_0, ST_TILE_Q8_0_BYTES)

#include "tile_k.h"

/* One token takes a tile's 16 rows together, as they stand in memory. TOKENS of them take four rows at a time: then the
 * sums of all fit the registers, and the tile is in the first cache after the first quarter. */
#define GEMM(NAME, name)                                                                                               \
    static ST_GEMM(gemm_##name) {                                                                                      \
        for (int64_t tile = t0; tile < t1; tile++) {                                                                   \
            const uint8_t *p = w + tile * nb * ST_TILE_BYTES(NAME);                                                    \
            float *out = y + (tile - t0) * ST_TILE_ROWS;                                                               \
            int64_t count = rows - tile * ST_TILE_ROWS, t = 0;                                                         \
            for (; t + TOKENS <= n; t += TOKENS) {                                                                     \
                float32x4_t sum[4][TOKENS][4];                                                                         \
                memset(sum, 0, sizeof sum);                                                                            \
                for (int quad = 0; quad < 4; quad++)                                                                   \
                    quads_##name(1, TOKENS, p, nb, quad, x + t, sum[quad]);                                            \
                for (int i = 0; i < TOKENS; i++) {                                                                     \
                    float32x4_t row[4] = {sum[0][i][0], sum[1][i][0], sum[2][i][0], sum[3][i][0]};                     \
                    store_rows(row, count, out + (t + i) * ldy);                                                       \
                }                                                                                                      \
            }                                                                                                          \
            for (; t < n; t++) {                                                                                       \
                float32x4_t sum[TOKENS][4];                                                                            \
                memset(sum, 0, sizeof *sum);                                                                           \
                quads_##name(4, 1, p, nb, 0, x + t, sum);                                                              \
                store_rows(sum[0], count, out + t * ldy);                                                              \
            }                                                                                                          \
        }                                                                                                              \
    }

/* Scales b .. b + 3 of four rows (fp16, as stored) -> scale[block][row]. */
static inline void transpose_scales(const uint8_t *const row[4], int64_t b, float32x4_t scale[4]) {
    uint16x4_t d[4];
    for (int j = 0; j < 4; j++)
        d[j] = vld1_u16((const uint16_t *)row[j] + b);
    uint32x2_t a0 = vreinterpret_u32_u16(vzip1_u16(d[0], d[1])), a1 = vreinterpret_u32_u16(vzip2_u16(d[0], d[1]));
    uint32x2_t b0 = vreinterpret_u32_u16(vzip1_u16(d[2], d[3])), b1 = vreinterpret_u32_u16(vzip2_u16(d[2], d[3]));
    scale[0] = vcvt_f32_f16(vreinterpret_f16_u32(vzip1_u32(a0, b0)));
    scale[1] = vcvt_f32_f16(vreinterpret_f16_u32(vzip2_u32(a0, b0)));
    scale[2] = vcvt_f32_f16(vreinterpret_f16_u32(vzip1_u32(a1, b1)));
    scale[3] = vcvt_f32_f16(vreinterpret_f16_u32(vzip2_u32(a1, b1)));
}

/* One block of 32 columns of four rows, added to sum. nibbles: byte offset of the block within a row. */
ALWAYS_INLINE float32x4_t row_block(float32x4_t sum, const uint8_t *const row[4], int64_t nibbles, const st_q8x4 *q,
                                    const int lane, float32x4_t scale) {
    const uint8x16_t nibble = vdupq_n_u8(15);
    int8x16_t x0 = vld1q_s8(q->q[0][lane]), x1 = vld1q_s8(q->q[1][lane]);
    int32x4_t corr = vld1q_s32(q->corr + 4 * lane);
    row_sum acc[4];
    for (int j = 0; j < 4; j++) {
        uint8x16_t w = vld1q_u8(row[j] + nibbles);
        int8x16_t low = vreinterpretq_s8_u8(vandq_u8(w, nibble)), high = vreinterpretq_s8_u8(vshrq_n_u8(w, 4));
        acc[j] = row_dot(corr, low, high, x0, x1);
    }
    return vfmaq_f32(sum, vcvtq_f32_s32(row_total(acc, corr)), vmulq_f32(scale, vld1q_f32(q->scale + 4 * lane)));
}

/* Four rows at a time, the last one repeated where n is no multiple: a row's result does not depend on its company.
 * Reading four scales past the end of a row's scales reads its nibbles, which are as long. */
static ST_ROWS(rows_q4_0) {
    for (int64_t k = 0; k < n; k += 4) {
        const uint8_t *row[4];
        for (int64_t j = 0; j < 4; j++)
            row[j] = w + stride * (size_t)index[k + j < n ? k + j : n - 1];
        for (int64_t j = k + 4; j < k + 8 && j < n; j++)
            for (int64_t i = 0; i < nb * 18; i += 64)
                st_prefetch_l1(w + stride * (size_t)index[j] + i);
        float32x4_t sum = vdupq_n_f32(0), scale[4];
        int64_t b = 0, nibbles = 2 * nb;
        for (; b + 4 <= nb; b += 4, nibbles += 64) {
            transpose_scales(row, b, scale);
            sum = row_block(sum, row, nibbles, x + b / 4, 0, scale[0]);
            sum = row_block(sum, row, nibbles + 16, x + b / 4, 1, scale[1]);
            sum = row_block(sum, row, nibbles + 32, x + b / 4, 2, scale[2]);
            sum = row_block(sum, row, nibbles + 48, x + b / 4, 3, scale[3]);
        }
        if (b < nb)
            transpose_scales(row, b, scale);
        for (int lane = 0; b < nb; b++, lane++, nibbles += 16)
            sum = row_block(sum, row, nibbles, x + b / 4, lane, scale[lane]);
        for (int64_t j = 0; j < 4 && k + j < n; j++)
            out[k + j] = sum[j];
    }
}

/* Lane L (16 bytes) of the lines of some of a group's neurons, codes of `bits` bits (6: less 32): sums of 2 x 4 x 4
 * outputs, [2 * v + high], which begin at start[v]. lines: of the group's first neuron, from the lane on; above: from
 * the lane on of the 64 bytes that hold the bits above the nibbles, with place `c` of the chunk within these. h: what
 * the codes of a quad's four neurons are multiplied by in outputs 32 * v .. 32 * v + 31 stands at per_quad * quad +
 * per_block
 * * v. At most 8 quads, of 6 bits 4. */
ALWAYS_INLINE void down_sums(const int bits, const int c, const uint8_t *lines, const uint8_t *above, size_t line,
                             const uint8_t *index, int quads, const int8_t *h, int per_quad, int per_block,
                             const int32x4_t start[4], int32x4_t out[8]) {
    const uint8x16_t nibble = vdupq_n_u8(15), fifth = vdupq_n_u8(16), pair = vdupq_n_u8(0x30);
    sum4 sum[8];
    for (int i = 0; i < 8; i++)
        sum[i] = EMPTY(start[i / 2]);
    for (; quads > 0; quads--, index += 4, h += per_quad) {
        uint8x16_t l0 = vld1q_u8(lines + line * index[0]), l1 = vld1q_u8(lines + line * index[1]);
        uint8x16_t l2 = vld1q_u8(lines + line * index[2]), l3 = vld1q_u8(lines + line * index[3]);
        uint16x8_t a0 = vreinterpretq_u16_u8(vzip1q_u8(l0, l1)), a1 = vreinterpretq_u16_u8(vzip2q_u8(l0, l1));
        uint16x8_t b0 = vreinterpretq_u16_u8(vzip1q_u8(l2, l3)), b1 = vreinterpretq_u16_u8(vzip2q_u8(l2, l3));
        uint16x8_t v[4] = {vzip1q_u16(a0, b0), vzip2q_u16(a0, b0), vzip1q_u16(a1, b1), vzip2q_u16(a1, b1)};
        uint8x16_t upper[2] = {nibble, nibble};
        if (bits > 4) {
            int half = bits == 5 ? c / 2 : c;
            l0 = vld1q_u8(above + line * index[0]), l1 = vld1q_u8(above + line * index[1]);
            l2 = vld1q_u8(above + line * index[2]), l3 = vld1q_u8(above + line * index[3]);
            a0 = vreinterpretq_u16_u8(half ? vzip2q_u8(l0, l1) : vzip1q_u8(l0, l1));
            b0 = vreinterpretq_u16_u8(half ? vzip2q_u8(l2, l3) : vzip1q_u8(l2, l3));
            upper[0] = vreinterpretq_u8_u16(bits == 5 && c % 2 ? vzip2q_u16(a0, b0) : vzip1q_u16(a0, b0));
            upper[1] = bits == 5 ? upper[0] : vreinterpretq_u8_u16(vzip2q_u16(a0, b0));
        }
        UNROLL for (int i = 0; i < 4; i++) {
            int8x16_t four = vreinterpretq_s8_s32(vld1q_dup_s32((const int32_t *)(h + i * per_block)));
            uint8x16_t w = vreinterpretq_u8_u16(v[i]), first = vandq_u8(w, nibble), last = vshrq_n_u8(w, 4);
            if (bits == 5) { /* bits 2 * i and 2 * i + 1 of a byte, moved to bit 4 */
                first = vorrq_u8(first, vandq_u8(vshlq_u8(upper[0], vdupq_n_s8((int8_t)(4 - 2 * i))), fifth));
                last = vorrq_u8(last, vandq_u8(vshlq_u8(upper[0], vdupq_n_s8((int8_t)(3 - 2 * i))), fifth));
            } else if (bits == 6) { /* bits 4 * (i % 2) and 4 * (i % 2) + 2 and the next ones, moved to bit 4 */
                uint8x16_t u = upper[i / 2];
                first = vorrq_u8(first, vandq_u8(vshlq_u8(u, vdupq_n_s8((int8_t)(4 - i % 2 * 4))), pair));
                last = vorrq_u8(last, vandq_u8(vshlq_u8(u, vdupq_n_s8((int8_t)(2 - i % 2 * 4))), pair));
            }
            int8x16_t low = vreinterpretq_s8_u8(first), high = vreinterpretq_s8_u8(last);
            if (bits == 6) {
                low = vsubq_s8(low, vdupq_n_s8(32));
                high = vsubq_s8(high, vdupq_n_s8(32));
            }
            sum[2 * i] = NEXT_SAME(sum[2 * i], low, four);
            sum[2 * i + 1] = NEXT_SAME(sum[2 * i + 1], high, four);
        }
    }
    for (int i = 0; i < 8; i++)
        out[i] = bits == 4 ? total4(sum[i], start[i / 2]) : wide4(sum[i], start[i / 2]);
}

/* 16 bytes (lane) of a chunk's 64: 32 outputs of one group, total[8] += scale * (sum over the active neurons). */
ALWAYS_INLINE void down_lane(const uint8_t *lines, size_t line, const uint8_t *scales, const st_active *a, int lane,
                             float32x4_t total[8]) {
    int32x4_t dot[8], start = vdupq_n_s32(a->corr), starts[4] = {start, start, start, start};
    down_sums(4, 0, lines + 16 * lane, lines, line, a->index, a->quads, a->h, 4, 0, starts, dot);
    for (int i = 0; i < 8; i++)
        total[i] =
            vfmaq_f32(total[i], vcvtq_f32_s32(dot[i]), vmulq_n_f32(load_f16x4(scales + 8 * lane + 32 * i), a->scale));
}

/* The rows of a group's active neurons, n chunks of 64 bytes of each. */
static inline void prefetch_neurons(const uint8_t *lines, size_t line, int64_t n, const uint8_t *index, int quads) {
    for (int k = 0; k < 4 * quads; k++)
        for (int64_t i = 0; i < n; i++)
            st_prefetch_l1(lines + line * index[k] + 64 * i);
}

/* 128 outputs; n chunks of each line are asked for ahead. */
static void down_chunk(const st_down_view *down, int64_t chunk, int64_t groups, int64_t n, const st_active *a,
                       float weight, float *y) {
    const uint8_t *lines = down->lines + 64 * chunk, *scales = down->scales + 2 * ST_DOWN_CHUNK * chunk;
    size_t line = down->stride;
    for (int lane = 0; lane < 4; lane++) {
        float32x4_t total[8];
        for (int64_t g = 0; g < groups; g++) {
            if (g % ST_FFN_PART == 0)
                memset(total, 0, sizeof total);
            if (lane == 0 && g + 1 < groups)
                prefetch_neurons(lines + line * 32 * (size_t)(g + 1), line, n, a[g + 1].index, a[g + 1].quads);
            if (a[g].quads)
                down_lane(lines + line * 32 * (size_t)g, line, scales + (size_t)g * down->scale_stride, a + g, lane,
                          total);
            if ((g + 1) % ST_FFN_PART == 0 || g + 1 == groups)
                for (int i = 0; i < 8; i++) {
                    float *out = y + 16 * i + 4 * lane;
                    vst1q_f32(out, vfmaq_n_f32(vld1q_f32(out), total[i], weight));
                }
        }
    }
}

static ST_DOWN(down_q4_0) {
    (void)d;
    for (int64_t t = 0; t < n; t++)
        for (int64_t c = c0; c < c1; c++)
            down_chunk(down, c, groups, c == c0 ? c1 - c0 : 0, a[t], weight[t], y[t] + (c - c0) * ST_DOWN_CHUNK);
}

#include "sparse_k.h"

/* Where down is transposed, the first 4 blocks of w; scales: theirs of the group's first neuron, `stride` bytes a
 * neuron. Absolute values order as integers, NaN above all. NaN is converted to 0. */
static void weigh_blocks4(const uint8_t *scales, size_t stride, const st_fired *a, block_weights *w) {
    const float32x4_t most = vdupq_n_f32(127);
    float32x4_t product[32];
    int32x4_t top = vdupq_n_s32(0), sum = top;
    for (int k = 0; k < 4 * a->quads; k++) {
        product[k] = vmulq_n_f32(load_f16x4(scales + stride * a->index[k]), a->h[k]);
        top = vmaxq_s32(top, vreinterpretq_s32_f32(vabsq_f32(product[k])));
    }
    float32x4_t amax = vreinterpretq_f32_s32(top), inverse = vdivq_f32(most, amax);
    uint32x4_t finite = vcaltq_f32(inverse, vdupq_n_f32(INFINITY));
    inverse = vreinterpretq_f32_u32(vandq_u32(finite, vreinterpretq_u32_f32(inverse)));
    for (int k = 0; k < 4 * a->quads; k += 4) {
        int32x4_t q[4], byte = vdupq_n_s32(255);
        for (int j = 0; j < 4; j++) {
            q[j] = vcvtnq_s32_f32(vmulq_f32(product[k + j], inverse));
            sum = vaddq_s32(sum, q[j]);
        }
        int32x4_t low = vorrq_s32(vandq_s32(q[0], byte), vshlq_n_s32(vandq_s32(q[1], byte), 8));
        int32x4_t high = vorrq_s32(vandq_s32(q[2], byte), vshlq_n_s32(q[3], 8));
        vst1q_s32((int32_t *)w->h[k / 4], vorrq_s32(low, vshlq_n_s32(high, 16)));
    }
    vst1q_s32(w->corr, vnegq_s32(vshlq_n_s32(sum, 3)));
    vst1q_f32(w->scale, vdivq_f32(amax, most));
}

/* 128 outputs of one group where down is transposed, added to y. lines, scales: of the chunk, of the first neuron. */
static void transposed_chunk(const uint8_t *lines, size_t line, const uint8_t *scales, size_t scale_stride,
                             const st_fired *a, float *y) {
    block_weights w;
    int32x4_t start[4];
    weigh_blocks4(scales, scale_stride, a, &w);
    for (int v = 0; v < 4; v++)
        start[v] = vdupq_n_s32(w.corr[v]);
    for (int lane = 0; lane < 4; lane++) {
        int32x4_t dot[8];
        down_sums(4, 0, lines + 16 * lane, lines, line, a->index, a->quads, w.h[0][0], sizeof w.h[0], 4, start, dot);
        for (int i = 0; i < 8; i++) {
            float *out = y + 16 * i + 4 * lane;
            vst1q_f32(out, vfmaq_n_f32(vld1q_f32(out), vcvtq_f32_s32(dot[i]), w.scale[i / 2]));
        }
    }
}

static ST_DOWN_TRANSPOSED(down_transposed_q4_0) {
    (void)d;
    size_t line = down->stride;
    for (int64_t c = c0; c < c1; c++, y += ST_DOWN_CHUNK) {
        const uint8_t *lines = down->lines + c * 64;
        float total[ST_DOWN_CHUNK];
        for (int64_t g = 0; g < groups; g++, lines += 32 * line) {
            if (g % ST_FFN_PART == 0)
                memset(total, 0, sizeof total);
            if (c == c0 && g + 1 < groups)
                prefetch_neurons(lines + 32 * line, line, c1 - c0, a[g + 1].index, a[g + 1].quads);
            if (a[g].quads)
                transposed_chunk(lines, line, down->scales + 32 * down->scale_stride * (size_t)g + 8 * c,
                                 down->scale_stride, a + g, total);
            if ((g + 1) % ST_FFN_PART == 0 || g + 1 == groups)
                for (int i = 0; i < ST_DOWN_CHUNK; i += 4)
                    vst1q_f32(y + i, vfmaq_n_f32(vld1q_f32(y + i), vld1q_f32(total + i), weight));
        }
    }
}

/* 128 outputs of the 32 neurons n where down is transposed, added to their y. */
static void chunk_transposed(const st_neurons *n, int64_t chunk) {
    const st_down_view *down = &n->down;
    transposed_chunk(down->lines + 32 * down->stride * (size_t)n->group + 64 * chunk, down->stride,
                     down->scales + 32 * down->scale_stride * (size_t)n->group + 8 * chunk, down->scale_stride,
                     &n->output, n->y + ST_DOWN_CHUNK * chunk);
}

/* 128 outputs of group g's 32 neurons, added to y. */
static void chunk_q4_0(const st_down_view *down, int64_t g, int64_t chunk, const st_active *a, float *y) {
    const uint8_t *lines = down->lines + 32 * down->stride * (size_t)g + 64 * chunk;
    const uint8_t *scales = down->scales + 2 * ST_DOWN_CHUNK * chunk + down->scale_stride * (size_t)g;
    for (int lane = 0; lane < 4; lane++) {
        float32x4_t total[8];
        for (int i = 0; i < 8; i++)
            total[i] = vld1q_f32(y + 4 * lane + 16 * i);
        down_lane(lines, down->stride, scales, a, lane, total);
        for (int i = 0; i < 8; i++)
            vst1q_f32(y + 4 * lane + 16 * i, total[i]);
    }
}

GEMM(Q4_0, q4_0)
GEMM(Q8_0, q8_0)

/* Blocks of a tile for one token, added to sum. */
static void tile_q4_0(const uint8_t *tile, int64_t nb, const st_q8x4 *x, float32x4_t sum[4]) {
    quads_q4_0(4, 1, tile, nb, 0, &x, (float32x4_t(*)[4])sum);
}

static void tile_q8_0(const uint8_t *tile, int64_t nb, const st_q8x4 *x, float32x4_t sum[4]) {
    quads_q8_0(4, 1, tile, nb, 0, &x, (float32x4_t(*)[4])sum);
}

enum { GATE_STEP = 8 }; /* blocks of a gate tile between parts of up; whole st_q8x4, whole super-blocks */

/* What ffn needs of each type. */
#define GATE_OF(NAME, name) [ST_TILED_##NAME] = {tile_##name, ST_TILE_BYTES(NAME)},
#define UP_OF(NAME, name) [ST_TILED_##NAME] = rows_##name,
#define CHUNK_OF(NAME, name) [ST_TILED_##NAME] = chunk_##name,
static const struct {
    void (*tile)(const uint8_t *tile, int64_t nb, const st_q8x4 *x, float32x4_t sum[4]);
    int64_t bytes; /* of a block of a tile, on average */
} gate_of[ST_TILED_COUNT] = {ST_TILED_TYPES(GATE_OF)};
static st_rows *const up_of[ST_TILED_COUNT] = {ST_SPARSE_TYPES(UP_OF)};
static void (*const chunk_of[ST_TILED_COUNT])(const st_down_view *down, int64_t g, int64_t chunk, const st_active *a,
                                              float *y) = {ST_SPARSE_TYPES(CHUNK_OF)};

/* A tile's blocks come from memory in order; four rows of up at a time, chunks of down and the prefetches of stage[1]
 * go between them, so that the one's arithmetic covers the other's waiting. As on x86; not measured on a board. */
static ST_FFN(ffn) {
    st_neurons *gate = stage[0], *ahead = stage[1], *up = stage[2], *down = stage[3];
    int64_t chunks = (nb * ST_BLOCK + ST_DOWN_CHUNK - 1) / ST_DOWN_CHUNK;
    int64_t tile_bytes = gate_of[tiled[0]].bytes;
    int64_t steps = 2 * ((nb + GATE_STEP - 1) / GATE_STEP), step = 0;
    int64_t fours = up ? (up->fired + 3) / 4 : 0, quads = 0;
    if (down)
        quads = down->transposed ? down->output.quads : down->active.quads;
    int64_t todo = quads ? chunks : 0;
    float value[32], spread[32];
    runs_ahead next;
    look_ahead(&next, ahead, tiled[2], chunks, 3 * steps);
    for (int tile = 0; tile < 2; tile++) {
        float32x4_t sum[4];
        memset(sum, 0, sizeof sum);
        for (int64_t b = 0; b < nb; b += GATE_STEP, step++) {
            if (gate)
                gate_of[tiled[0]].tile(gate->gate + (tile * nb + b) * tile_bytes,
                                       nb - b < GATE_STEP ? nb - b : GATE_STEP, gate->x + b / 4, sum);
            ask_ahead(&next);
            if (up) {
                int64_t k0 = 4 * share(fours, step, steps), k1 = 4 * share(fours, step + 1, steps);
                up_of[tiled[1]](up->up, up->up_stride, nb, up->index + k0, (k1 < up->fired ? k1 : up->fired) - k0,
                                up->x, value + k0);
            }
            ask_ahead(&next);
            for (int64_t c = share(todo, step, steps); c < share(todo, step + 1, steps); c++) {
                if (down->transposed)
                    chunk_transposed(down, c);
                else
                    chunk_of[tiled[2]](&down->down, down->group, c, &down->active, down->y + ST_DOWN_CHUNK * c);
            }
            ask_ahead(&next);
        }
        if (gate)
            store_rows(sum, ST_TILE_ROWS, gate->g + 16 * tile);
    }
    if (gate)
        st_neurons_choose(gate);
    if (up && up->transposed) {
        st_neurons_multiply(up, value, &up->output);
    } else if (up) {
        st_neurons_spread(up, value, spread);
        st_neon_activate(up->g, spread, &up->active);
    }
}
