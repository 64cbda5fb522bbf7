/* What the ARM64 tables share: conversions, and the operations that no later instruction set makes faster (common.c,
 * dotprod.c), which a table of constants has to name as functions. Used only by the kernels of this folder. */
#ifndef SMALLTHINKER_ARM_COMMON_H
#define SMALLTHINKER_ARM_COMMON_H

#include "smallthinker/kernels.h"

#include <arm_neon.h>

static inline float32x4_t load_f16x4(const void *p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)p)));
}

/* Stores up to 16 rows of one token. */
static inline void store_rows(const float32x4_t sum[4], int64_t count, float *y) {
    if (count >= ST_TILE_ROWS) {
        for (int i = 0; i < 4; i++)
            vst1q_f32(y + 4 * i, sum[i]);
    } else {
        float all[ST_TILE_ROWS];
        for (int i = 0; i < 4; i++)
            vst1q_f32(all + 4 * i, sum[i]);
        for (int64_t r = 0; r < count; r++)
            y[r] = all[r];
    }
}

void st_neon_quantize(const float *x, int64_t cols, st_q8x4 *out);
void st_neon_activate(const float *g, const float *up, st_active *out);
void st_neon_attention(const float *q, int64_t G, int64_t hd, const uint16_t *k, const uint16_t *v, int64_t n,
                       float scale, float *scores, float *acc, float *m, float *l);
typedef void gemm_fn(const uint8_t *w, int64_t rows, int64_t nb, int64_t t0, int64_t t1, const st_q8x4 *const *x,
                     int64_t n, float *y, int64_t ldy);
/* attention_q8 of kernels.h; the scores come from the table's own gemm_q8_0, which gives the same bits in all. */
void st_neon_attention_q8(gemm_fn *gemm_q8_0, const st_q8x4 *const *q, int64_t G, int64_t hd, const uint8_t *k,
                          const uint8_t *v, int64_t p0, int64_t p1, float scale, float *scores, float *acc, float *m,
                          float *l);
void st_neon_rmsnorm(const float *x, const float *w, int64_t n, float eps, float *out);
float st_neon_dot(const float *a, const float *b, int64_t n);
void st_neon_axpy(float a, const float *x, float *y, int64_t n);
void st_neon_to_f16(const float *x, uint16_t *out, int64_t n);
void st_neon_from_f16(const uint16_t *x, float *out, int64_t n);
void st_neon_rope(float *v, const float *cosine, const float *sine, int64_t half);
void st_neon_top_k(const float *x, int64_t n, int64_t k, int32_t *keys, int32_t *ids);

void st_dotprod_gemm_q4_0(const uint8_t *w, int64_t rows, int64_t nb, int64_t t0, int64_t t1, const st_q8x4 *const *x,
                          int64_t n, float *y, int64_t ldy);
void st_dotprod_gemm_q8_0(const uint8_t *w, int64_t rows, int64_t nb, int64_t t0, int64_t t1, const st_q8x4 *const *x,
                          int64_t n, float *y, int64_t ldy);
void st_dotprod_gemm_q6_k(const uint8_t *w, int64_t rows, int64_t nb, int64_t t0, int64_t t1, const st_q8x4 *const *x,
                          int64_t n, float *y, int64_t ldy);
void st_dotprod_rows_q4_0(const uint8_t *w, int64_t nb, const int32_t *index, int64_t n, const st_q8x4 *x, float *out);
void st_dotprod_ffn_q4_0(int64_t nb, int64_t groups, st_neurons *const stage[4]);
void st_dotprod_down_q4_0(const uint8_t *down, int64_t d, int64_t groups, int64_t c0, int64_t c1, const st_active *a,
                          float weight, float *y);
void st_dotprod_down_transposed_q4_0(const uint8_t *down, int64_t d, int64_t groups, int64_t c0, int64_t c1,
                                     const st_fired *a, float weight, float *y);

#endif
