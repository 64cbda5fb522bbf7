/* NEON of every ARM64 CPU (Cortex-A53, A72: Raspberry Pi 3 and 4): byte products are summed in 16 bits and widened
 * once a block: 8 x 2 x 15 x 127 = 30480 fits. */
#include "common.h"

/* Four outputs, two a half: [output][two partial sums of 4 columns each] before the pairs are added. */
typedef struct sum4 {
    int16x8_t low, high;
} sum4;
typedef struct columns {
    int8x16_t q[8]; /* four columns each, repeated */
} columns;

/* x, which holds the same four bytes four times. clang would see that its halves are alike, multiply the upper half of
 * w by the lower half of x, and need an instruction more for each product to move w down: hidden from it here. */
static inline int8x16_t repeated(int32x4_t x) {
    __asm__("" : "+w"(x));
    return vreinterpretq_s8_s32(x);
}

static inline columns load_columns(const st_q8x4 *q, int lane) {
    int32x4_t a = vreinterpretq_s32_s8(vld1q_s8(q->q[0][lane])), b = vreinterpretq_s32_s8(vld1q_s8(q->q[1][lane]));
    return (columns){{repeated(vdupq_laneq_s32(a, 0)), repeated(vdupq_laneq_s32(a, 1)), repeated(vdupq_laneq_s32(a, 2)),
                      repeated(vdupq_laneq_s32(a, 3)), repeated(vdupq_laneq_s32(b, 0)), repeated(vdupq_laneq_s32(b, 1)),
                      repeated(vdupq_laneq_s32(b, 2)), repeated(vdupq_laneq_s32(b, 3))}};
}

static inline sum4 multiply(int8x16_t w, int8x16_t x) {
    return (sum4){vmull_s8(vget_low_s8(w), vget_low_s8(x)), vmull_high_s8(w, x)};
}

static inline sum4 multiply_add(sum4 sum, int8x16_t w, int8x16_t x) {
    return (sum4){vmlal_s8(sum.low, vget_low_s8(w), vget_low_s8(x)), vmlal_high_s8(sum.high, w, x)};
}

static inline int32x4_t total4(sum4 sum, int32x4_t start) { return vpadalq_s16(start, vpaddq_s16(sum.low, sum.high)); }

#define FIRST(start, w, x, i) multiply(w, (x).q[i])
#define NEXT(sum, w, x, i) multiply_add(sum, w, (x).q[i])
#define EMPTY(start) ((sum4){vdupq_n_s16(0), vdupq_n_s16(0)})
#define NEXT_SAME(sum, w, h) multiply_add(sum, w, h)

typedef int16x8_t row_sum; /* of four products each: at most 7620 */

static inline row_sum row_dot(int32x4_t corr, int8x16_t low, int8x16_t high, int8x16_t x0, int8x16_t x1) {
    (void)corr;
    sum4 sum = multiply_add(multiply(low, x0), high, x1);
    return vaddq_s16(sum.low, sum.high);
}

static inline int32x4_t row_total(const row_sum acc[4], int32x4_t corr) {
    int16x8_t pairs = vpaddq_s16(vpaddq_s16(acc[0], acc[1]), vpaddq_s16(acc[2], acc[3]));
    return vpadalq_s16(vdupq_laneq_s32(corr, 0), pairs);
}

static inline row_sum row_half(int8x16_t w, int8x16_t x) {
    sum4 sum = multiply(w, x);
    return vaddq_s16(sum.low, sum.high);
}

static inline int32x4_t wide_total(const row_sum acc[4]) {
    return vpaddq_s32(vpaddq_s32(vpaddlq_s16(acc[0]), vpaddlq_s16(acc[1])),
                      vpaddq_s32(vpaddlq_s16(acc[2]), vpaddlq_s16(acc[3])));
}

static inline int32x4_t wide4(sum4 sum, int32x4_t start) {
    return vaddq_s32(start, vpaddq_s32(vpaddlq_s16(sum.low), vpaddlq_s16(sum.high)));
}

/* Signed bytes: two products fit 16 bits (2 x 128 x 127 = 32512). */
typedef struct sum8 {
    int32x4_t low, high;
} sum8;
#define ZERO8 ((sum8){vdupq_n_s32(0), vdupq_n_s32(0)})

static inline sum8 dot8(sum8 sum, int8x16_t w0, int8x16_t w1, columns c, const int i) {
    sum4 two = multiply_add(multiply(w0, c.q[i]), w1, c.q[i + 1]);
    return (sum8){vpadalq_s16(sum.low, two.low), vpadalq_s16(sum.high, two.high)};
}

static inline int32x4_t total8(sum8 sum) { return vpaddq_s32(sum.low, sum.high); }

#define TOKENS 4
#include "matrix.h"

static ST_ATTENTION_Q8(attention_q8) {
    st_neon_attention_q8(gemm_q8_0, st_neon_values_q8, q, G, hd, k, v, p0, p1, scale, scores, acc, m, l);
}

void st_fill_neon(st_kernels *k) {
    st_neon_fill_common(k);
    ST_ENTER_MATRICES
    k->attention_q8 = attention_q8;
}
