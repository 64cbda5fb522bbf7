/* NEON with 8-bit matrix products (newer phones and servers): two rows times two tokens, eight columns, in one
 * instruction. For prompts; a single token, and whatever is left of eight, takes the dot-product kernels, whose
 * results are the same bits. */
#include "common.h"

enum { TOKENS = 8, PAIRS = TOKENS / 2, MAX_BLOCKS = 128 }; /* interleaved tokens take 384 bytes a block of the stack */

/* One block of eight tokens: q[pair][i] holds columns 8 * i .. 8 * i + 7 of both tokens of a pair. */
typedef struct block8 {
    int8x16_t q[PAIRS][4];
    int32_t corr[PAIRS][4]; /* token 0, 1, 0, 1 */
    float scale[PAIRS][4];
} block8;

static void interleave(const st_q8x4 *const *x, int64_t nb, block8 *out) {
    for (int64_t b = 0; b < nb; b++, out++)
        for (int p = 0; p < PAIRS; p++) {
            const st_q8x4 *x0 = x[2 * p] + b / 4, *x1 = x[2 * p + 1] + b / 4;
            int lane = b % 4;
            for (int i = 0; i < 4; i++)
                out->q[p][i] =
                    vcombine_s8(vld1_s8(x0->q[i / 2][lane] + i % 2 * 8), vld1_s8(x1->q[i / 2][lane] + i % 2 * 8));
            for (int j = 0; j < 4; j++) {
                out->corr[p][j] = (j % 2 ? x1 : x0)->corr[4 * lane];
                out->scale[p][j] = (j % 2 ? x1 : x0)->scale[4 * lane];
            }
        }
}

/* Rows 4 * quad .. 4 * quad + 3 of one tile times eight tokens: total[pair][half][2 * (row % 2) + token]. */
static void quad_q4_0(const uint8_t *tile, int64_t nb, int quad, const block8 *x, float32x4_t total[PAIRS][2]) {
    const uint8x16_t nibble = vdupq_n_u8(15);
    float32x4_t sum[PAIRS][2];
    for (int p = 0; p < PAIRS; p++)
        sum[p][0] = sum[p][1] = vdupq_n_f32(0);
    for (int64_t b = 0; b < nb; b++, x++, tile += ST_TILE_Q4_0_BYTES) {
        int8x16_t w[2][4]; /* [half][eight columns]: two rows each */
        for (int i = 0; i < 2; i++) {
            uint32x4_t g0 = vreinterpretq_u32_u8(vld1q_u8(tile + 32 + 16 * quad + 128 * i));
            uint32x4_t g1 = vreinterpretq_u32_u8(vld1q_u8(tile + 32 + 16 * quad + 128 * i + 64));
            uint8x16_t v[2] = {vreinterpretq_u8_u32(vzip1q_u32(g0, g1)), vreinterpretq_u8_u32(vzip2q_u32(g0, g1))};
            for (int h = 0; h < 2; h++) {
                w[h][i] = vreinterpretq_s8_u8(vandq_u8(v[h], nibble));
                w[h][2 + i] = vreinterpretq_s8_u8(vshrq_n_u8(v[h], 4));
            }
        }
        float32x4_t d = load_f16x4(tile + 8 * quad), scale[2] = {vzip1q_f32(d, d), vzip2q_f32(d, d)};
        for (int p = 0; p < PAIRS; p++)
            for (int h = 0; h < 2; h++) {
                int32x4_t dot = vld1q_s32(x->corr[p]);
                for (int i = 0; i < 4; i++)
                    dot = vmmlaq_s32(dot, w[h][i], x->q[p][i]);
                sum[p][h] = vfmaq_f32(sum[p][h], vcvtq_f32_s32(dot), vmulq_f32(scale[h], vld1q_f32(x->scale[p])));
            }
    }
    for (int p = 0; p < PAIRS; p++)
        for (int h = 0; h < 2; h++)
            total[p][h] = sum[p][h];
}

static void quad_q8_0(const uint8_t *tile, int64_t nb, int quad, const block8 *x, float32x4_t total[PAIRS][2]) {
    float32x4_t sum[PAIRS][2];
    for (int p = 0; p < PAIRS; p++)
        sum[p][0] = sum[p][1] = vdupq_n_f32(0);
    for (int64_t b = 0; b < nb; b++, x++, tile += ST_TILE_Q8_0_BYTES) {
        int8x16_t w[2][4];
        for (int i = 0; i < 4; i++) {
            int32x4_t g0 = vreinterpretq_s32_u8(vld1q_u8(tile + 32 + 16 * quad + 128 * i));
            int32x4_t g1 = vreinterpretq_s32_u8(vld1q_u8(tile + 32 + 16 * quad + 128 * i + 64));
            w[0][i] = vreinterpretq_s8_s32(vzip1q_s32(g0, g1));
            w[1][i] = vreinterpretq_s8_s32(vzip2q_s32(g0, g1));
        }
        float32x4_t d = load_f16x4(tile + 8 * quad), scale[2] = {vzip1q_f32(d, d), vzip2q_f32(d, d)};
        for (int p = 0; p < PAIRS; p++)
            for (int h = 0; h < 2; h++) {
                int32x4_t dot = vdupq_n_s32(0);
                for (int i = 0; i < 4; i++)
                    dot = vmmlaq_s32(dot, w[h][i], x->q[p][i]);
                sum[p][h] = vfmaq_f32(sum[p][h], vcvtq_f32_s32(dot), vmulq_f32(scale[h], vld1q_f32(x->scale[p])));
            }
    }
    for (int p = 0; p < PAIRS; p++)
        for (int h = 0; h < 2; h++)
            total[p][h] = sum[p][h];
}

/* Eight tokens are interleaved once for all tiles of the call. */
#define GEMM(NAME, name)                                                                                               \
    static ST_GEMM(gemm_##name) {                                                                                      \
        block8 blocks[MAX_BLOCKS];                                                                                     \
        int64_t t = 0;                                                                                                 \
        for (; t + TOKENS <= n && nb <= MAX_BLOCKS; t += TOKENS) {                                                     \
            interleave(x + t, nb, blocks);                                                                             \
            for (int64_t tile = t0; tile < t1; tile++) {                                                               \
                float32x4_t sum[4][PAIRS][2];                                                                          \
                for (int quad = 0; quad < 4; quad++)                                                                   \
                    quad_##name(w + tile * nb * ST_TILE_BYTES(NAME), nb, quad, blocks, sum[quad]);                     \
                for (int i = 0; i < TOKENS; i++) {                                                                     \
                    float32x4_t row[4];                                                                                \
                    for (int quad = 0; quad < 4; quad++) {                                                             \
                        float32x4_t *s = sum[quad][i / 2];                                                             \
                        row[quad] = i % 2 ? vuzp2q_f32(s[0], s[1]) : vuzp1q_f32(s[0], s[1]);                           \
                    }                                                                                                  \
                    store_rows(row, rows - tile * ST_TILE_ROWS, y + (t + i) * ldy + (tile - t0) * ST_TILE_ROWS);       \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        if (t < n)                                                                                                     \
            st_dotprod_gemm[ST_TILED_##NAME](w, rows, nb, t0, t1, x + t, n - t, y + t * ldy, ldy);                     \
    }

GEMM(Q4_0, q4_0)
GEMM(Q8_0, q8_0)

static ST_ATTENTION_Q8(attention_q8) {
    st_neon_attention_q8(gemm_q8_0, st_dotprod_values_q8, q, G, hd, k, v, p0, p1, scale, scores, acc, m, l);
}

void st_fill_i8mm(st_kernels *k) {
    ST_ENTER_GEMM(Q4_0, q4_0)
    ST_ENTER_GEMM(Q8_0, q8_0)
    k->attention_q8 = attention_q8;
}
