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

typedef int32x4_t sum8;
#define ZERO8 vdupq_n_s32(0)
#define dot8(sum, w0, w1, x, i) NEXT(NEXT(sum, w0, x, i), w1, x, (i) + 1)
#define total8(sum) (sum)

#define TOKENS 8
#define MATRIX_LINKAGE
#define GEMM_Q4_0 st_dotprod_gemm_q4_0
#define GEMM_Q8_0 st_dotprod_gemm_q8_0
#define GEMM_Q6_K st_dotprod_gemm_q6_k
#define ROWS_Q4_0 st_dotprod_rows_q4_0
#define FFN_Q4_0 st_dotprod_ffn_q4_0
#define DOWN_Q4_0 st_dotprod_down_q4_0
#define DOWN_TRANSPOSED_Q4_0 st_dotprod_down_transposed_q4_0
#include "matrix.h"

static void attention_q8(const st_q8x4 *const *q, int64_t G, int64_t hd, const uint8_t *k, const uint8_t *v, int64_t p0,
                         int64_t p1, float scale, float *scores, float *acc, float *m, float *l) {
    st_neon_attention_q8(st_dotprod_gemm_q8_0, q, G, hd, k, v, p0, p1, scale, scores, acc, m, l);
}

const st_kernels st_kernels_dotprod = {
    .name = "dotprod",
    .quantize = st_neon_quantize,
    .gemm_q4_0 = st_dotprod_gemm_q4_0,
    .gemm_q8_0 = st_dotprod_gemm_q8_0,
    .gemm_q6_k = st_dotprod_gemm_q6_k,
    .rows_q4_0 = st_dotprod_rows_q4_0,
    .ffn_q4_0 = st_dotprod_ffn_q4_0,
    .down_q4_0 = st_dotprod_down_q4_0,
    .down_transposed_q4_0 = st_dotprod_down_transposed_q4_0,
    .activate = st_neon_activate,
    .attention = st_neon_attention,
    .attention_q8 = attention_q8,
    .rmsnorm = st_neon_rmsnorm,
    .dot = st_neon_dot,
    .axpy = st_neon_axpy,
    .to_f16 = st_neon_to_f16,
    .from_f16 = st_neon_from_f16,
    .rope = st_neon_rope,
    .top_k = st_neon_top_k,
};
