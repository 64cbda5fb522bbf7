/* Tiles of Q4_K, Q5_K and Q6_K, included by matrix.h. One token at a time. */

/* Four bytes of scales of rows 4 * quad on, 0..63, times d: exact, as d has 11 bits and a scale six. */
static inline float32x4_t k_times(const uint8_t *d, uint8x16_t scales, int quad) {
    uint8_t bytes[16];
    vst1q_u8(bytes, scales);
    uint32_t four;
    memcpy(&four, bytes + 4 * quad, 4);
    uint16x8_t wide = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)));
    return vmulq_f32(load_f16x4(d + 8 * quad), vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide))));
}

/* Block b of a tile of Q4_K or Q5_K (five), rows 4 * quad .. 4 * quad + 3: sum of the products with block `lane` of x.
 * Four products of each half fit the 16 bits of NEON in Q5_K (8 x 31 x 127), all of them in Q4_K. */
ALWAYS_INLINE int32x4_t block_k(const int five, const uint8_t *block, int quad, columns c) {
    const uint8x16_t nibble = vdupq_n_u8(15), fifth = vdupq_n_u8(16);
    const int32x4_t zero = vdupq_n_s32(0);
    int8x16_t low[4], high[4];
    uint8x16_t bits = five ? vld1q_u8(block + 256 + 16 * quad) : nibble;
    UNROLL for (int g = 0; g < 4; g++) {
        uint8x16_t w = vld1q_u8(block + 64 * g + 16 * quad), first = vandq_u8(w, nibble), last = vshrq_n_u8(w, 4);
        if (five) { /* bits 2 * g and 2 * g + 1 of a byte, moved to bit 4 */
            first = vorrq_u8(first, vandq_u8(vshlq_u8(bits, vdupq_n_s8((int8_t)(4 - 2 * g))), fifth));
            last = vorrq_u8(last, vandq_u8(vshlq_u8(bits, vdupq_n_s8((int8_t)(3 - 2 * g))), fifth));
        }
        low[g] = vreinterpretq_s8_u8(first);
        high[g] = vreinterpretq_s8_u8(last);
    }
    sum4 a = FIRST(zero, low[0], c, 0);
    a = NEXT(a, low[1], c, 1);
    a = NEXT(a, low[2], c, 2);
    a = NEXT(a, low[3], c, 3);
    if (!five) {
        a = NEXT(a, high[0], c, 4);
        a = NEXT(a, high[1], c, 5);
        a = NEXT(a, high[2], c, 6);
        return total4(NEXT(a, high[3], c, 7), zero);
    }
    sum4 b = FIRST(zero, high[0], c, 4);
    b = NEXT(b, high[1], c, 5);
    b = NEXT(b, high[2], c, 6);
    return vaddq_s32(total4(a, zero), total4(NEXT(b, high[3], c, 7), zero));
}

/* The minima are subtracted through -8 times the sums of x, which x carries. */
ALWAYS_INLINE void tile_k(const int five, const uint8_t *tile, int64_t nb, const st_q8x4 *x, float32x4_t sum[4]) {
    const uint8x16_t nibble = vdupq_n_u8(15), pair = vdupq_n_u8(0x30);
    for (int64_t super = 0; super < nb; super += 8) {
        const uint8_t *head = tile;
        tile += ST_TILE_K_HEAD;
        for (int b = 0; b < 8; b++, tile += five ? ST_TILE_Q5_K_BYTES : ST_TILE_Q4_K_BYTES) {
            const st_q8x4 *q = x + (super + b) / 4;
            columns c = load_columns(q, b % 4);
            uint8x16_t both = vld1q_u8(head + 64 + 16 * b), above = vld1q_u8(head + 192 + b % 4 * 16);
            uint8x16_t of_min = b < 4 ? above : vshrq_n_u8(above, 2), of_scale = vshlq_n_u8(above, 4);
            if (b >= 4)
                of_scale = vshlq_n_u8(above, 2);
            uint8x16_t scales = vorrq_u8(vandq_u8(both, nibble), vandq_u8(of_scale, pair));
            uint8x16_t minima = vorrq_u8(vshrq_n_u8(both, 4), vandq_u8(of_min, pair));
            float by = q->scale[b % 4 * 4], rest = (float)q->corr[b % 4 * 4] * (0.125f * by);
            UNROLL for (int i = 0; i < 4; i++) {
                float32x4_t s = vmulq_n_f32(k_times(head, scales, i), by);
                sum[i] = vfmaq_f32(sum[i], vcvtq_f32_s32(block_k(five, tile, i, c)), s);
                sum[i] = vfmaq_n_f32(sum[i], k_times(head + 32, minima, i), rest);
            }
        }
    }
}

#define GEMM_K(name, five)                                                                                             \
    static void tile_##name(const uint8_t *tile, int64_t nb, const st_q8x4 *x, float32x4_t sum[4]) {                   \
        tile_k(five, tile, nb, x, sum);                                                                                \
    }                                                                                                                  \
    static ST_GEMM(gemm_##name) {                                                                                      \
        for (int64_t tile = t0; tile < t1; tile++)                                                                     \
            for (int64_t t = 0; t < n; t++) {                                                                          \
                int64_t bytes = ST_TILE_K_HEAD + 8 * (five ? ST_TILE_Q5_K_BYTES : ST_TILE_Q4_K_BYTES);                 \
                float32x4_t sum[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};                 \
                tile_##name(w + tile * (nb / 8) * bytes, nb, x[t], sum);                                               \
                store_rows(sum, rows - tile * ST_TILE_ROWS, y + t * ldy + (tile - t0) * ST_TILE_ROWS);                 \
            }                                                                                                          \
    }
GEMM_K(q4_k, 0)
GEMM_K(q5_k, 1)

/* One Q6_K block of rows 4 * quad .. 4 * quad + 3 times block `lane` of x: the two halves' sums times their scales.
 * With weights of at most 32, four products of each half fit the 16 bits of NEON: 8 x 32 x 127 = 32512. */
ALWAYS_INLINE int32x4_t block_q6_k(const uint8_t *block, int quad, const st_q8x4 *x, int lane) {
    const uint8x16_t nibble = vdupq_n_u8(15), pair = vdupq_n_u8(0x30);
    const int8x16_t offset = vdupq_n_s8(32);
    const int32x4_t zero = vdupq_n_s32(0);
    columns c = load_columns(x, lane);
    int8x16_t first[4], last[4];
    UNROLL for (int g = 0; g < 4; g++) {
        uint8x16_t w = vld1q_u8(block + 32 + 64 * g + 16 * quad),
                   bits = vld1q_u8(block + 288 + 64 * (g / 2) + 16 * quad);
        uint8x16_t of_first = g % 2 ? bits : vshlq_n_u8(bits, 4),
                   of_last = g % 2 ? vshrq_n_u8(bits, 2) : vshlq_n_u8(bits, 2);
        first[g] = vsubq_s8(vreinterpretq_s8_u8(vorrq_u8(vandq_u8(w, nibble), vandq_u8(of_first, pair))), offset);
        last[g] = vsubq_s8(vreinterpretq_s8_u8(vorrq_u8(vshrq_n_u8(w, 4), vandq_u8(of_last, pair))), offset);
    }
    sum4 a = FIRST(zero, first[0], c, 0), b = FIRST(zero, last[0], c, 4);
    a = NEXT(a, first[1], c, 1);
    b = NEXT(b, last[1], c, 5);
    a = NEXT(a, first[2], c, 2);
    b = NEXT(b, last[2], c, 6);
    a = NEXT(a, first[3], c, 3);
    b = NEXT(b, last[3], c, 7);
    int32_t packed[2];
    memcpy(packed, block + 4 * quad, 4);
    memcpy(packed + 1, block + 16 + 4 * quad, 4);
    int16x8_t scale = vmovl_s8(vreinterpret_s8_s32(vld1_s32(packed)));
    int32x4_t scaled = vmulq_s32(total4(a, zero), vmovl_s16(vget_low_s16(scale)));
    return vmlaq_s32(scaled, total4(b, zero), vmovl_s16(vget_high_s16(scale)));
}

static void tile_q6_k(const uint8_t *tile, int64_t nb, const st_q8x4 *x, float32x4_t sum[4]) {
    for (int64_t b = 0; b < nb; b++) {
        const uint8_t *super = tile + b / 8 * ST_TILE_Q6_K_SUPER_BYTES;
        const st_q8x4 *q = x + b / 4;
        UNROLL for (int i = 0; i < 4; i++) {
            int32x4_t dot = block_q6_k(super + 32 + b % 8 * ST_TILE_Q6_K_BYTES, i, q, b % 4);
            float32x4_t d = load_f16x4(super + 8 * i);
            sum[i] = vfmaq_f32(sum[i], vcvtq_f32_s32(dot), vmulq_n_f32(d, q->scale[b % 4 * 4]));
        }
    }
}

/* One token at a time: Q6_K is the head of ordinary files, which a prompt asks for its last token only. */
static ST_GEMM(gemm_q6_k) {
    for (int64_t tile = t0; tile < t1; tile++)
        for (int64_t t = 0; t < n; t++) {
            float32x4_t sum[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
            tile_q6_k(w + tile * (nb / 8) * ST_TILE_Q6_K_SUPER_BYTES, nb, x[t], sum);
            store_rows(sum, rows - tile * ST_TILE_ROWS, y + t * ldy + (tile - t0) * ST_TILE_ROWS);
        }
}
