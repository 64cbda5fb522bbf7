/* What the ARM64 tables share: conversions, and the functions that one file's kernels call in another. Used only by the
 * kernels of this folder. */
#ifndef SMALLTHINKER_ARM_COMMON_H
#define SMALLTHINKER_ARM_COMMON_H

#include "../table.h"

#include <arm_neon.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))

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

/* Enters the operations on floats and on 32 neurons (common.c). */
void st_neon_fill_common(st_kernels *k);
void st_neon_activate(const float *g, const float *up, st_active *out);
/* out[h * hd + i] = by times the sum over the positions p0..p1 of w[h][position] * value, for dimensions i < 32 of a
 * block and all G heads; all give the same integers. w: [G][256], at most ST_Q8_WEIGHT; zero outside p0..p1 as far as
 * the tiles of 16 positions reach that hold it. */
typedef void st_q8_values(const uint8_t *lines, const int16_t *w, int64_t G, int64_t p0, int64_t p1, float by,
                          int64_t hd, float *out);
enum { ST_Q8_WEIGHT = 127 * 256 + 127 }; /* the most that two signed bytes hold */
st_q8_values st_neon_values_q8, st_dotprod_values_q8;
/* attention_q8 of kernels.h; the scores come from the table's own gemm of Q8_0, which gives the same bits in all. */
void st_neon_attention_q8(st_gemm *gemm_q8_0, st_q8_values *values, const st_q8x4 *const *q, int64_t G, int64_t hd,
                          const uint8_t *k, const uint8_t *v, int64_t p0, int64_t p1, float scale, float *scores,
                          float *acc, float *m, float *l);
/* The gemm of dotprod.c by tiled type, for what is left of i8mm's eights. */
extern st_gemm *const st_dotprod_gemm[ST_TILED_COUNT];

#endif
