/* Rows and Down of Q4_K, Q5_K and Q6_K, included by matrix.h. */

/* Four by four: out[i] has element i of each. */
static inline void transpose4(const float32x4_t in[4], float32x4_t out[4]) {
    float32x4_t a = vzip1q_f32(in[0], in[2]), b = vzip2q_f32(in[0], in[2]);
    float32x4_t c = vzip1q_f32(in[1], in[3]), d = vzip2q_f32(in[1], in[3]);
    out[0] = vzip1q_f32(a, c);
    out[1] = vzip2q_f32(a, c);
    out[2] = vzip1q_f32(b, d);
    out[3] = vzip2q_f32(b, d);
}

static inline float one_f16(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))), 0);
}

/* d times four bytes, which may be signed. */
static inline float32x4_t times_u8(uint16x4_t wide, float d) { return vmulq_n_f32(vcvtq_f32_u32(vmovl_u16(wide)), d); }
static inline float32x4_t times_s8(int16x4_t wide, float d) { return vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(wide)), d); }

/* Scales times d and minima times dmin of super-block s of four rows (layout.h, Rows): [block][row]. */
static inline void k_row_scales(const uint8_t *const row[4], int64_t ns, int64_t s, float32x4_t scale[8],
                                float32x4_t min[8]) {
    float32x4_t s0[4], s1[4], m0[4], m1[4];
    for (int j = 0; j < 4; j++) {
        const uint8_t *six = row[j] + 4 * (ns + s);
        uint8_t packed[12], of_scale[8], of_min[8];
        for (int i = 0; i < 3; i++)
            memcpy(packed + 4 * i, six + 4 * ns * i, 4);
        for (int i = 0; i < 4; i++) {
            of_scale[i] = packed[i] & 63;
            of_min[i] = packed[4 + i] & 63;
            of_scale[4 + i] = (uint8_t)((packed[8 + i] & 15) | packed[i] >> 6 << 4);
            of_min[4 + i] = (uint8_t)(packed[8 + i] >> 4 | packed[4 + i] >> 6 << 4);
        }
        float d = one_f16(row[j] + 2 * s), dmin = one_f16(row[j] + 2 * (ns + s));
        uint16x8_t wide = vmovl_u8(vld1_u8(of_scale)), wide_min = vmovl_u8(vld1_u8(of_min));
        s0[j] = times_u8(vget_low_u16(wide), d);
        s1[j] = times_u8(vget_high_u16(wide), d);
        m0[j] = times_u8(vget_low_u16(wide_min), dmin);
        m1[j] = times_u8(vget_high_u16(wide_min), dmin);
    }
    transpose4(s0, scale);
    transpose4(s1, scale + 4);
    transpose4(m0, min);
    transpose4(m1, min + 4);
}

/* The rows of four neurons, from k on; the last one repeated, the next four asked for ahead. */
static inline void four_rows(const uint8_t *w, size_t stride, int64_t bytes, const int32_t *index, int64_t k, int64_t n,
                             const uint8_t *row[4]) {
    for (int64_t j = 0; j < 4; j++)
        row[j] = w + stride * (size_t)index[k + j < n ? k + j : n - 1];
    for (int64_t j = k + 4; j < k + 8 && j < n; j++)
        for (int64_t i = 0; i < bytes; i += 64)
            st_prefetch_l1(w + stride * (size_t)index[j] + i);
}

/* Four rows at a time, as rows_q4_0. The minima are subtracted through -8 times the sums of x, which x carries. */
ALWAYS_INLINE void rows_k(const int five, const uint8_t *w, size_t stride, int64_t nb, const int32_t *index, int64_t n,
                          const st_q8x4 *x, float *out) {
    const uint8x16_t nibble = vdupq_n_u8(15), fifth = vdupq_n_u8(16);
    const int32x4_t zero = vdupq_n_s32(0);
    int64_t ns = nb / 8;
    for (int64_t k = 0; k < n; k += 4) {
        const uint8_t *row[4];
        float32x4_t sum = vdupq_n_f32(0);
        four_rows(w, stride, nb * (five ? 22 : 18), index, k, n, row);
        for (int64_t s = 0; s < ns; s++) {
            float32x4_t scale[8], min[8];
            k_row_scales(row, ns, s, scale, min);
            UNROLL for (int b = 0; b < 8; b++) {
                const st_q8x4 *q = x + 2 * s + b / 4;
                const int lane = b % 4;
                int8x16_t x0 = vld1q_s8(q->q[0][lane]), x1 = vld1q_s8(q->q[1][lane]);
                float by = q->scale[4 * lane], rest = (float)q->corr[4 * lane] * (0.125f * by);
                row_sum acc[4];
                for (int j = 0; j < 4; j++) {
                    uint8x16_t v = vld1q_u8(row[j] + 16 * ns + 128 * s + 16 * b);
                    uint8x16_t low = vandq_u8(v, nibble), high = vshrq_n_u8(v, 4);
                    if (five) { /* bits 2 * lane and 2 * lane + 1 of a byte, moved to bit 4 */
                        uint8x16_t bits = vld1q_u8(row[j] + 16 * ns + 16 * nb + 32 * s + b / 4 * 16);
                        low = vorrq_u8(low, vandq_u8(vshlq_u8(bits, vdupq_n_s8((int8_t)(4 - 2 * lane))), fifth));
                        high = vorrq_u8(high, vandq_u8(vshlq_u8(bits, vdupq_n_s8((int8_t)(3 - 2 * lane))), fifth));
                    }
                    acc[j] = row_dot(zero, vreinterpretq_s8_u8(low), vreinterpretq_s8_u8(high), x0, x1);
                }
                sum = vfmaq_f32(sum, vcvtq_f32_s32(wide_total(acc)), vmulq_n_f32(scale[b], by));
                sum = vfmaq_n_f32(sum, min[b], rest);
            }
        }
        for (int64_t j = 0; j < 4 && k + j < n; j++)
            out[k + j] = sum[j];
    }
}

static ST_ROWS(rows_q4_k) { rows_k(0, w, stride, nb, index, n, x, out); }

static ST_ROWS(rows_q5_k) { rows_k(1, w, stride, nb, index, n, x, out); }

/* Scales of one half of the blocks of super-block s of four rows, times d: [block][row]. */
static inline void q6_row_scales(const uint8_t *const row[4], int64_t ns, int64_t s, int half, float32x4_t scale[8]) {
    float32x4_t s0[4], s1[4];
    for (int j = 0; j < 4; j++) {
        int16x8_t wide = vmovl_s8(vld1_s8((const int8_t *)row[j] + 2 * ns + 8 * (half * ns + s)));
        float d = one_f16(row[j] + 2 * s);
        s0[j] = times_s8(vget_low_s16(wide), d);
        s1[j] = times_s8(vget_high_s16(wide), d);
    }
    transpose4(s0, scale);
    transpose4(s1, scale + 4);
}

static ST_ROWS(rows_q6_k) {
    const uint8x16_t nibble = vdupq_n_u8(15), pair = vdupq_n_u8(0x30);
    const int8x16_t offset = vdupq_n_s8(32);
    int64_t ns = nb / 8;
    for (int64_t k = 0; k < n; k += 4) {
        const uint8_t *row[4];
        float32x4_t sum = vdupq_n_f32(0);
        four_rows(w, stride, ns * ST_Q6_K_BYTES, index, k, n, row);
        for (int64_t s = 0; s < ns; s++) {
            float32x4_t scale[8], other[8];
            q6_row_scales(row, ns, s, 0, scale);
            q6_row_scales(row, ns, s, 1, other);
            UNROLL for (int b = 0; b < 8; b++) {
                const st_q8x4 *q = x + 2 * s + b / 4;
                const int lane = b % 4;
                int8x16_t x0 = vld1q_s8(q->q[0][lane]), x1 = vld1q_s8(q->q[1][lane]);
                row_sum even[4], odd[4];
                for (int j = 0; j < 4; j++) {
                    const uint8_t *nibbles = row[j] + 18 * ns;
                    uint8x16_t v = vld1q_u8(nibbles + 128 * s + 16 * b);
                    uint8x16_t above = vld1q_u8(nibbles + 16 * nb + 64 * s + b / 2 * 16);
                    uint8x16_t one = b % 2 ? above : vshlq_n_u8(above, 4);
                    uint8x16_t two = b % 2 ? vshrq_n_u8(above, 2) : vshlq_n_u8(above, 2);
                    uint8x16_t low = vorrq_u8(vandq_u8(v, nibble), vandq_u8(one, pair));
                    uint8x16_t high = vorrq_u8(vshrq_n_u8(v, 4), vandq_u8(two, pair));
                    even[j] = row_half(vsubq_s8(vreinterpretq_s8_u8(low), offset), x0);
                    odd[j] = row_half(vsubq_s8(vreinterpretq_s8_u8(high), offset), x1);
                }
                float by = q->scale[4 * lane];
                sum = vfmaq_f32(sum, vcvtq_f32_s32(wide_total(even)), vmulq_n_f32(scale[b], by));
                sum = vfmaq_f32(sum, vcvtq_f32_s32(wide_total(odd)), vmulq_n_f32(other[b], by));
            }
        }
        for (int64_t j = 0; j < 4 && k + j < n; j++)
            out[k + j] = sum[j];
    }
}

/* Scales and minima of 128 outputs, from the 192 bytes that hold their six bits: a byte each. */
static inline void k_scales(const uint8_t *six, uint8_t scale[128], uint8_t min[128]) {
    const uint8x16_t low = vdupq_n_u8(15), high = vdupq_n_u8(0x30);
    for (int i = 0; i < 64; i += 16) {
        uint8x16_t first = vld1q_u8(six + i), last = vld1q_u8(six + 64 + i), above = vld1q_u8(six + 128 + i);
        vst1q_u8(scale + i, vorrq_u8(vandq_u8(first, low), vandq_u8(vshlq_n_u8(above, 4), high)));
        vst1q_u8(scale + 64 + i, vorrq_u8(vandq_u8(last, low), vandq_u8(vshlq_n_u8(above, 2), high)));
        vst1q_u8(min + i, vorrq_u8(vshrq_n_u8(first, 4), vandq_u8(above, high)));
        vst1q_u8(min + 64 + i, vorrq_u8(vshrq_n_u8(last, 4), vandq_u8(vshrq_n_u8(above, 2), high)));
    }
}

/* d times four scales: exact. */
static inline float32x4_t times4(const uint8_t *d, const uint8_t *scale) {
    uint32_t four;
    memcpy(&four, scale, 4);
    uint16x8_t wide = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)));
    return vmulq_f32(load_f16x4(d), vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide))));
}

static inline float32x4_t widen4(const uint8_t *scale) {
    uint32_t four;
    memcpy(&four, scale, 4);
    int16x8_t wide = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}

/* 128 outputs of group g's 32 neurons, added to y; c: see down_sums. */
ALWAYS_INLINE void chunk_k(const int bits, const int c, const st_down_view *down, int64_t g, int64_t chunk,
                           const st_active *a, float *y) {
    const uint8_t *lines = down->lines + 32 * down->stride * (size_t)g;
    const uint8_t *above = lines + down->scale_stride / (ST_DOWN_K_HEAD / 8 + ST_DOWN_K_SCALES) * 64 + chunk / 4 * 64;
    const uint8_t *head = down_k_head(down, g) + ST_DOWN_K_HEAD * chunk;
    const int32x4_t start[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
    float rest = (float)a->corr * (0.125f * a->scale);
    uint8_t scale[128], min[128];
    k_scales(down_k_scales(down, g, ST_DOWN_K_HEAD, ST_DOWN_K_SCALES) + ST_DOWN_K_SCALES * chunk, scale, min);
    for (int lane = 0; lane < 4; lane++) {
        int32x4_t dot[8];
        down_sums(bits, c, lines + 64 * chunk + 16 * lane, above + 16 * lane, down->stride, a->index, a->quads, a->h, 4,
                  0, start, dot);
        for (int i = 0; i < 8; i++) {
            int o = 16 * i + 4 * lane;
            float32x4_t s = vmulq_n_f32(times4(head + 2 * o, scale + o), a->scale);
            float32x4_t out = vfmaq_f32(vld1q_f32(y + o), vcvtq_f32_s32(dot[i]), s);
            vst1q_f32(y + o, vfmaq_n_f32(out, times4(head + 256 + 2 * o, min + o), rest));
        }
    }
}

/* The two halves of the 32 neurons have their own scales. Sums times scales, and their sum, stay below 1 << 24: exact
 * in floats. */
ALWAYS_INLINE void chunk_q6_k_c(const int c, const st_down_view *down, int64_t g, int64_t chunk, const st_active *a,
                                float *y) {
    const uint8_t *lines = down->lines + 32 * down->stride * (size_t)g;
    const uint8_t *above =
        lines + down->scale_stride / (ST_DOWN_Q6_K_HEAD / 8 + ST_DOWN_Q6_K_SCALES) * 64 + chunk / 2 * 64;
    const uint8_t *head = down_k_head(down, g) + ST_DOWN_Q6_K_HEAD * chunk;
    const uint8_t *scale = down_k_scales(down, g, ST_DOWN_Q6_K_HEAD, ST_DOWN_Q6_K_SCALES) + ST_DOWN_Q6_K_SCALES * chunk;
    const int32x4_t start[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
    int8_t low[16] = {0}; /* h of the first half; the last quad may have some of the other */
    memcpy(low, a->h, (size_t)a->low);
    for (int lane = 0; lane < 4; lane++) {
        const uint8_t *l = lines + 64 * chunk + 16 * lane, *u = above + 16 * lane;
        int32x4_t first[8], last[8];
        down_sums(6, c, l, u, down->stride, a->index, (a->low + 3) / 4, low, 4, 0, start, first);
        down_sums(6, c, l, u, down->stride, a->index + a->low, (a->high + 3) / 4, a->h + a->low, 4, 0, start, last);
        for (int i = 0; i < 8; i++) {
            int o = 16 * i + 4 * lane;
            float32x4_t total = vmulq_f32(vcvtq_f32_s32(first[i]), widen4(scale + o));
            total = vfmaq_f32(total, vcvtq_f32_s32(last[i]), widen4(scale + 128 + o));
            float32x4_t by = vmulq_n_f32(load_f16x4(head + 2 * o), a->scale);
            vst1q_f32(y + o, vfmaq_f32(vld1q_f32(y + o), total, by));
        }
    }
}

#include "../chunk_k.h"

#define DOWN_K(name)                                                                                                   \
    static ST_DOWN(down_##name) {                                                                                      \
        (void)d;                                                                                                       \
        for (int64_t t = 0; t < n; t++)                                                                                \
            for (int64_t c = c0; c < c1; c++) {                                                                        \
                float total[ST_DOWN_CHUNK], *out = y[t] + (c - c0) * ST_DOWN_CHUNK;                                    \
                for (int64_t g = 0; g < groups; g++) {                                                                 \
                    const st_active *next = a[t] + g + 1;                                                              \
                    if (g % ST_FFN_PART == 0)                                                                          \
                        memset(total, 0, sizeof total);                                                                \
                    if (c == c0 && g + 1 < groups)                                                                     \
                        prefetch_neurons(down->lines + down->stride * 32 * (size_t)(g + 1) + 64 * c, down->stride,     \
                                         c1 - c0, next->index, next->quads);                                           \
                    if (a[t][g].quads)                                                                                 \
                        chunk_##name(down, g, c, a[t] + g, total);                                                     \
                    if ((g + 1) % ST_FFN_PART == 0 || g + 1 == groups)                                                 \
                        for (int i = 0; i < ST_DOWN_CHUNK; i += 4)                                                     \
                            vst1q_f32(out + i, vfmaq_n_f32(vld1q_f32(out + i), vld1q_f32(total + i), weight[t]));      \
                }                                                                                                      \
            }                                                                                                          \
    }
DOWN_K(q4_k)
DOWN_K(q5_k)
DOWN_K(q6_k)
