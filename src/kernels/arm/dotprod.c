/* NEON with dot products (Cortex-A55, A76: Raspberry Pi 5, RK3588): four byte products are added to a 32-bit lane in
 * one instruction. */
#include "common.h"

#include "../heads.h"

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

/* The signed bytes of w[16 * n]: w = 256 * high + low. */
static void split_weights(const int16_t *w, int64_t n, int8_t *high, int8_t *low) {
    for (int64_t p = 0; p < 16 * n; p += 16) {
        int16x8_t w0 = vld1q_s16(w + p), w1 = vld1q_s16(w + p + 8), half = vdupq_n_s16(128);
        vst1q_s8(high + p, vshrn_high_n_s16(vshrn_n_s16(vaddq_s16(w0, half), 8), vaddq_s16(w1, half), 8));
        vst1q_s8(low + p, vuzp1q_s8(vreinterpretq_s8_s16(w0), vreinterpretq_s8_s16(w1)));
    }
}

/* sum[4] += 16 dimensions of four positions times their weights, which are lane `lane` of w. */
#define ADD_FOUR(sum, x, w, lane)                                                                                      \
    for (int i = 0; i < 4; i++)                                                                                        \
        (sum)[i] = vdotq_laneq_s32((sum)[i], (x)[i], w, lane);

/* Half a block, 16 dimensions, for H heads (one or two); 16 positions a turn. Two lines of two positions each are put
 * together, so that a lane of 32 bits has a dimension at four of them. high, low: [H][256]. */
ALWAYS_INLINE void half_values_q8(const int H, const uint8_t *lines, const int8_t *high, const int8_t *low, int64_t p0,
                                  int64_t p1, float by, int64_t hd, float *out) {
    int32x4_t sum[2][2][4];
    for (int h = 0; h < 2 * H; h++)
        for (int i = 0; i < 4; i++)
            sum[h / 2][h % 2][i] = vdupq_n_s32(0);
    for (int64_t p = p0 / 16 * 16; p < p1; p += 16) {
        int8x16_t w[2][2];
        for (int h = 0; h < H; h++) {
            w[h][0] = vld1q_s8(high + h * ST_ATTN_CHUNK + p);
            w[h][1] = vld1q_s8(low + h * ST_ATTN_CHUNK + p);
        }
#define STEP(lane)                                                                                                     \
    {                                                                                                                  \
        const int16_t *a = (const int16_t *)(lines + 32 * p + 128 * (lane)), *b = a + 32;                              \
        int8x16_t x[4];                                                                                                \
        for (int i = 0; i < 2; i++) {                                                                                  \
            int16x8_t first = vld1q_s16(a + 8 * i), second = vld1q_s16(b + 8 * i);                                     \
            x[2 * i] = vreinterpretq_s8_s16(vzip1q_s16(first, second));                                                \
            x[2 * i + 1] = vreinterpretq_s8_s16(vzip2q_s16(first, second));                                            \
        }                                                                                                              \
        for (int h = 0; h < H; h++) {                                                                                  \
            ADD_FOUR(sum[h][0], x, w[h][0], lane)                                                                      \
            ADD_FOUR(sum[h][1], x, w[h][1], lane)                                                                      \
        }                                                                                                              \
    }
        STEP(0) STEP(1) STEP(2) STEP(3)
#undef STEP
    }
    for (int h = 0; h < H; h++)
        for (int i = 0; i < 4; i++) {
            int32x4_t total = vaddq_s32(vshlq_n_s32(sum[h][0][i], 8), sum[h][1][i]);
            vst1q_f32(out + h * hd + 4 * i, vmulq_n_f32(vcvtq_f32_s32(total), by));
        }
}

/* A block of 32 dimensions for H heads (one or two). */
ALWAYS_INLINE void values_q8(const int H, const uint8_t *lines, const int16_t *w, int64_t p0, int64_t p1, float by,
                             int64_t hd, float *out) {
    int8_t high[2 * ST_ATTN_CHUNK], low[2 * ST_ATTN_CHUNK];
    int64_t first = p0 / 16 * 16, turns = (p1 - first + 15) / 16;
    for (int64_t at = first; at < H * ST_ATTN_CHUNK; at += ST_ATTN_CHUNK)
        split_weights(w + at, turns, high + at, low + at);
    for (int half = 0; half < 2; half++)
        half_values_q8(H, lines + 32 * half, high, low, p0, p1, by, hd, out + 16 * half);
}

void st_dotprod_values_q8(const uint8_t *lines, const int16_t *w, int64_t G, int64_t p0, int64_t p1, float by,
                          int64_t hd, float *out) {
#define STEP(h, H) values_q8(H, lines, w + h * ST_ATTN_CHUNK, p0, p1, by, hd, out + h * hd)
    EACH_GROUP(2, G, STEP)
#undef STEP
}

static ST_ATTENTION_Q8(attention_q8) {
    st_neon_attention_q8(gemm_q8_0, st_dotprod_values_q8, q, G, hd, k, v, p0, p1, scale, scores, acc, m, l);
}

#define GEMM_OF(NAME, name) [ST_TILED_##NAME] = gemm_##name,
st_gemm *const st_dotprod_gemm[ST_TILED_COUNT] = {ST_TILED_TYPES(GEMM_OF)};

void st_fill_dotprod(st_kernels *k) {
    ST_ENTER_MATRICES
    k->attention_q8 = attention_q8;
}
