/* NEON with dot products (Cortex-A55, A76: Raspberry Pi 5, RK3588): four byte products are added to a 32-bit lane in
 * one instruction. */
#include "common.h"

typedef int32x4_t sum4;
typedef struct columns {
    int8x16_t q[2];
} columns;

static inline columns load_columns(const st_q8x4 *q, int lane) {
    return (columns){{vld1q_s8(q->q[0][lane]), vld1q_s8(q->q[1][lane])}};
}

#define FIRST(start, w, x, i) vdotq_laneq_s32(start, w, (x).q[(i) / 4], (i) % 4)
#define NEXT(sum, w, x, i) vdotq_laneq_s32(sum, w, (x).q[(i) / 4], (i) % 4)
#define EMPTY(start) (start)
#define NEXT_SAME(sum, w, h) vdotq_s32(sum, w, h)
#define total4(sum, start) (sum)

typedef int32x4_t row_sum;

static inline row_sum row_dot(int32x4_t corr, int8x16_t low, int8x16_t high, int8x16_t x0, int8x16_t x1) {
    return vdotq_s32(vdotq_s32(corr, low, x0), high, x1);
}

static inline int32x4_t row_total(const row_sum acc[4], int32x4_t corr) {
    (void)corr;
    return vpaddq_s32(vpaddq_s32(acc[0], acc[1]), vpaddq_s32(acc[2], acc[3]));
}

static inline row_sum row_half(int8x16_t w, int8x16_t x) { return vdotq_s32(vdupq_n_s32(0), w, x); }

static inline int32x4_t wide_total(const row_sum acc[4]) { return row_total(acc, vdupq_n_s32(0)); }
#define wide4(sum, start) total4(sum, start)

typedef int32x4_t sum8;
#define ZERO8 vdupq_n_s32(0)
#define dot8(sum, w0, w1, x, i) NEXT(NEXT(sum, w0, x, i), w1, x, (i) + 1)
#define total8(sum) (sum)

#define TOKENS 8
#include "matrix.h"

static ST_ATTENTION_Q8(attention_q8) {
    st_neon_attention_q8(gemm_q8_0, q, G, hd, k, v, p0, p1, scale, scores, acc, m, l);
}

#define GEMM_OF(NAME, name) [ST_TILED_##NAME] = gemm_##name,
st_gemm *const st_dotprod_gemm[ST_TILED_COUNT] = {ST_TILED_TYPES(GEMM_OF)};

void st_fill_dotprod(st_kernels *k) {
    ST_ENTER_MATRICES
    k->attention_q8 = attention_q8;
}
