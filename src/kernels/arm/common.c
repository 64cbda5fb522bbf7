/* The operations on floats and on 32 neurons, in the NEON that every ARM64 CPU has. All ARM64 tables use them. */
#include "common.h"

#include "../heads.h"
#include "../plain.h"

#include "smallthinker/kv.h"

#include <math.h>
#include <string.h>

/* exp for x <= 0: 2^n times a degree-6 polynomial on [-ln2/2, ln2/2] (Taylor terms; error below 2e-7 there). */
static inline float32x4_t exp4(float32x4_t x) {
    x = vmaxq_f32(x, vdupq_n_f32(-87.0f)); /* the result there is below 2e-38: nothing to add to 1 */
    float32x4_t n = vrndnq_f32(vmulq_n_f32(x, 1.44269504f));
    float32x4_t r = vfmsq_f32(x, n, vdupq_n_f32(0.693359375f));
    r = vfmsq_f32(r, n, vdupq_n_f32(-2.12194440e-4f));
    float32x4_t p = vdupq_n_f32(1.0f / 720);
    p = vfmaq_f32(vdupq_n_f32(1.0f / 120), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f / 24), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f / 6), p, r);
    p = vfmaq_f32(vdupq_n_f32(0.5f), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f), p, r);
    int32x4_t e = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
    return vmulq_f32(p, vreinterpretq_f32_s32(e));
}

/* Largest |x| of 32 floats; NaN where one is NaN (the hardware's maximum passes it on). */
static inline float amax32(const float32x4_t x[8]) {
    float32x4_t m = vabsq_f32(x[0]);
    for (int i = 1; i < 8; i++)
        m = vmaxq_f32(m, vabsq_f32(x[i]));
    return vmaxvq_f32(m);
}

/* 32 floats times inverse, rounded to bytes in order; zero where the product is no number within +-127. */
static inline int8x16x2_t round32(const float32x4_t x[8], float inverse) {
    int16x4_t q[8];
    for (int i = 0; i < 8; i++) {
        float32x4_t v = vmulq_n_f32(x[i], inverse);
        uint32x4_t ok = vcaltq_f32(v, vdupq_n_f32(127.25f));
        q[i] = vmovn_s32(vandq_s32(vcvtnq_s32_f32(v), vreinterpretq_s32_u32(ok)));
    }
    int8x16x2_t bytes;
    for (int i = 0; i < 2; i++)
        bytes.val[i] = vcombine_s8(vmovn_s16(vcombine_s16(q[4 * i], q[4 * i + 1])),
                                   vmovn_s16(vcombine_s16(q[4 * i + 2], q[4 * i + 3])));
    return bytes;
}

static inline int sum_bytes(int8x16x2_t q) { return vaddlvq_s8(q.val[0]) + vaddlvq_s8(q.val[1]); }

static void quantize(const float *x, int64_t cols, st_q8x4 *out) {
    for (int64_t b = 0; b < cols / ST_BLOCK; b++, x += ST_BLOCK) {
        st_q8x4 *quad = out + b / 4;
        int lane = b % 4;
        if (lane == 0)
            memset(quad, 0, sizeof *quad);
        float32x4_t v[8];
        for (int i = 0; i < 8; i++)
            v[i] = vld1q_f32(x + 4 * i);
        float amax = amax32(v);
        int8x16x2_t q = round32(v, amax > 0 ? 127 / amax : 0);
        vst1q_s8(quad->q[0][lane], q.val[0]);
        vst1q_s8(quad->q[1][lane], q.val[1]);
        quad->corr[4 * lane] = -8 * sum_bytes(q);
        vst1q_f32(quad->scale + 4 * lane, vdupq_n_f32(amax / 127));
    }
}

/* Bit 4 * i is set where byte i is not zero. */
static inline uint64_t nonzero_bytes(int8x16_t q) {
    uint16x8_t mask = vreinterpretq_u16_u8(vtstq_s8(q, q));
    return vget_lane_u64(vreinterpret_u64_u8(vshrn_n_u16(mask, 4)), 0) & 0x1111111111111111;
}

void st_neon_activate(const float *g, const float *up, st_active *out) {
    float32x4_t h[8];
    int32x4_t fires = vdupq_n_s32(0);
    memset(out, 0, sizeof *out);
    for (int i = 0; i < 8; i++) {
        float32x4_t gate = vld1q_f32(g + 4 * i);
        uint32x4_t on = vmvnq_u32(vclezq_f32(gate)); /* a NaN gate is passed on, not hidden */
        fires = vsubq_s32(fires, vreinterpretq_s32_u32(on));
        float32x4_t product = vmulq_f32(gate, vld1q_f32(up + 4 * i));
        h[i] = vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(product), on));
    }
    out->count = vaddvq_s32(fires);
    if (out->count == 0)
        return;
    float amax = amax32(h);
    int8x16x2_t q = round32(h, amax > 0 ? 127 / amax : 0);
    int8_t bytes[32];
    int n = 0;
    out->corr_low = -8 * vaddlvq_s8(q.val[0]);
    for (int half = 0; half < 2; half++) {
        vst1q_s8(bytes + 16 * half, q.val[half]);
        for (uint64_t used = nonzero_bytes(q.val[half]); used; used &= used - 1) {
            int i = 16 * half + __builtin_ctzll(used) / 4;
            out->index[n] = (uint8_t)i;
            out->h[n++] = bytes[i];
        }
        if (half == 0)
            out->low = n;
    }
    out->high = n - out->low;
    if (n == 0 && !(amax <= 0)) /* only NaN or infinity: keep one entry so that the scale is seen */
        n = out->low = 1;
    out->corr = -8 * sum_bytes(q);
    out->quads = (n + 3) / 4;
    for (int i = n; n > 0 && i < 4 * out->quads + 3 && i < 32; i++)
        out->index[i] = out->index[n - 1];
    out->scale = amax / 127;
}

/* 8 keys or values in float. */
static inline void widen8(const uint16_t *x, float32x4_t out[2]) {
    float16x8_t halves = vreinterpretq_f16_u16(vld1q_u16(x));
    out[0] = vcvt_f32_f16(vget_low_f16(halves));
    out[1] = vcvt_high_f32_f16(halves);
}

enum { HEADS = 8 }; /* query heads at most that share the reading and widening of a key or value */

/* Scores of N heads at P <= 2 positions, which share the reading of the queries. N and P are constants wherever this is
 * inlined; a score's sum depends on neither. */
ALWAYS_INLINE void score_positions(const int N, const int P, const float *q, int64_t hd, const uint16_t *k, float scale,
                                   float *scores) {
    float32x4_t sum[HEADS][2];
    for (int h = 0; h < N; h++)
        sum[h][0] = sum[h][1] = vdupq_n_f32(0);
    for (int64_t i = 0; i < hd; i += 8) {
        float32x4_t key[2][2];
        for (int p = 0; p < P; p++)
            widen8(k + p * hd + i, key[p]);
        for (int h = 0; h < N; h++)
            for (int j = 0; j < 2; j++) {
                float32x4_t query = vld1q_f32(q + h * hd + i + 4 * j);
                for (int p = 0; p < P; p++)
                    sum[h][p] = vfmaq_f32(sum[h][p], query, key[p][j]);
            }
    }
    for (int h = 0; h < N; h++)
        for (int p = 0; p < P; p++)
            scores[h * ST_ATTN_CHUNK + p] = vaddvq_f32(sum[h][p]) * scale;
}

ALWAYS_INLINE void score_heads(const int N, const float *q, int64_t hd, const uint16_t *k, int64_t n, float scale,
                               float *scores) {
    int64_t p = 0;
    for (; p + 2 <= n; p += 2)
        score_positions(N, 2, q, hd, k + p * hd, scale, scores + p);
    if (p < n)
        score_positions(N, 1, q, hd, k + p * hd, scale, scores + p);
}

/* scores[0..n) -> exp(score - max); returns their sum. Lanes past n count nothing. */
static float softmax_chunk(float *s, int64_t n, float *max) {
    int64_t padded = (n + 3) / 4 * 4;
    for (int64_t p = n; p < padded; p++)
        s[p] = -INFINITY;
    float32x4_t m = vdupq_n_f32(-INFINITY), sum = vdupq_n_f32(0);
    for (int64_t p = 0; p < padded; p += 4)
        m = vmaxq_f32(m, vld1q_f32(s + p));
    *max = vmaxvq_f32(m);
    m = vdupq_n_f32(*max);
    for (int64_t p = 0; p < padded; p += 4) {
        float32x4_t score = vld1q_f32(s + p), e = exp4(vsubq_f32(score, m));
        if (p + 4 > n)
            e = vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(e), vceqq_f32(score, vdupq_n_f32(-INFINITY))));
        vst1q_f32(s + p, e);
        sum = vaddq_f32(sum, e);
    }
    return vaddvq_f32(sum);
}

enum { VALUE_ROWS = 32 }; /* rows of v that stay in the first cache (8 KiB at head size 128) while all columns pass */

/* acc[N][hd] += exp(score) * v of `rows` positions. Positions are added one after the other. */
ALWAYS_INLINE void add_values(const int N, const float *scores, int64_t hd, const uint16_t *v, int64_t rows,
                              float *acc) {
    for (int64_t i = 0; i < hd; i += 8) {
        float32x4_t sum[HEADS][2], value[2];
        for (int h = 0; h < N; h++)
            for (int j = 0; j < 2; j++)
                sum[h][j] = vld1q_f32(acc + h * hd + i + 4 * j);
        int64_t p = 0;
#define ADD(weights, lane)                                                                                             \
    widen8(v + (p + (lane)) * hd + i, value);                                                                          \
    for (int h = 0; h < N; h++)                                                                                        \
        for (int j = 0; j < 2; j++)                                                                                    \
            sum[h][j] = vfmaq_laneq_f32(sum[h][j], value[j], weights, lane);
        for (; p + 4 <= rows; p += 4) {
            float32x4_t four[HEADS];
            for (int h = 0; h < N; h++)
                four[h] = vld1q_f32(scores + h * ST_ATTN_CHUNK + p);
            ADD(four[h], 0) ADD(four[h], 1) ADD(four[h], 2) ADD(four[h], 3)
        }
        for (; p < rows; p++) {
            ADD(vld1q_dup_f32(scores + h * ST_ATTN_CHUNK + p), 0)
        }
#undef ADD
        for (int h = 0; h < N; h++)
            for (int j = 0; j < 2; j++)
                vst1q_f32(acc + h * hd + i + 4 * j, sum[h][j]);
    }
}

ALWAYS_INLINE void attend_heads(const int N, const float *q, int64_t hd, const uint16_t *k, const uint16_t *v,
                                int64_t n, float scale, float *scores, float *acc, float *m, float *l) {
    score_heads(N, q, hd, k, n, scale, scores);
    for (int h = 0; h < N; h++)
        l[h] = softmax_chunk(scores + h * ST_ATTN_CHUNK, n, m + h);
    memset(acc, 0, (size_t)(N * hd) * sizeof *acc);
    for (int64_t p = 0; p < n; p += VALUE_ROWS)
        add_values(N, scores + p, hd, v + p * hd, n - p < VALUE_ROWS ? n - p : VALUE_ROWS, acc);
}

/* A head's sums do not depend on its neighbours. */
static ST_ATTENTION(attention) {
#define STEP(h, H)                                                                                                     \
    attend_heads(H, q + h * hd, hd, k, v, n, scale, scores + h * ST_ATTN_CHUNK, acc + h * hd, m + h, l + h)
    EACH_GROUP(HEADS, G, STEP)
#undef STEP
}

static ST_ATTENTION_MANY(attention_many) {
    attention_each(attention, q, ldq, n, G, hd, k, v, p0, p1, scale, scratch, acc, m, l);
}

/* All ones in the lanes of four positions from p that are in p0..p1. */
static inline uint32x4_t lanes_q8(int64_t p, int64_t p0, int64_t p1) {
    static const int32_t steps[4] = {0, 1, 2, 3};
    int32x4_t at = vaddq_s32(vdupq_n_s32((int32_t)p), vld1q_s32(steps));
    return vandq_u32(vcgeq_s32(at, vdupq_n_s32((int32_t)p0)), vcltq_s32(at, vdupq_n_s32((int32_t)p1)));
}

static inline float32x4_t keep(float32x4_t x, uint32x4_t lanes) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), lanes));
}

/* s[p0..p1) = (s + rest) * scale -> exp(score - max), zero for the rest of the tiles touched; returns their sum.
 * The hardware's maximum passes NaN on. */
static float softmax_q8(float *s, const float *rest, int64_t p0, int64_t p1, float scale, float *max) {
    const float32x4_t none = vdupq_n_f32(-INFINITY);
    float32x4_t m = none, sum = vdupq_n_f32(0);
    int64_t start = p0 / 16 * 16, end = (p1 + 15) / 16 * 16;
    for (int64_t p = start; p < end; p += 4) {
        float32x4_t x = vmulq_n_f32(vaddq_f32(vld1q_f32(s + p), vld1q_f32(rest + p)), scale);
        x = vbslq_f32(lanes_q8(p, p0, p1), x, none);
        vst1q_f32(s + p, x);
        m = vmaxq_f32(m, x);
    }
    *max = vmaxvq_f32(m);
    m = vdupq_n_f32(*max);
    for (int64_t p = start; p < end; p += 4) {
        float32x4_t e = keep(exp4(vsubq_f32(vld1q_f32(s + p), m)), lanes_q8(p, p0, p1));
        vst1q_f32(s + p, e);
        sum = vaddq_f32(sum, e);
    }
    return vaddvq_f32(sum);
}

/* w[G][256] = scores times the block's scales, in ST_Q8_WEIGHTs of the largest scale, which is returned. */
static float weights_q8(const uint8_t *scales, const float *scores, int64_t G, int64_t p0, int64_t p1, int16_t *w) {
    float by[ST_ATTN_CHUNK];
    int64_t start = p0 / 16 * 16, end = (p1 + 15) / 16 * 16;
    float32x4_t most = vdupq_n_f32(0);
    for (int64_t p = start; p < end; p += 4) {
        float32x4_t d = keep(load_f16x4(scales + 2 * p), lanes_q8(p, p0, p1));
        most = vmaxq_f32(most, d);
        vst1q_f32(by + p, d);
    }
    float top = vmaxvq_f32(most), inverse = top > 0 ? ST_Q8_WEIGHT / top : 0;
    for (int64_t p = start; p < end; p += 8) {
        float32x4_t f0 = vmulq_n_f32(vld1q_f32(by + p), inverse), f1 = vmulq_n_f32(vld1q_f32(by + p + 4), inverse);
        for (int64_t h = 0; h < G; h++) {
            const float *s = scores + h * ST_ATTN_CHUNK + p;
            int16x4_t e0 = vqmovn_s32(vcvtnq_s32_f32(vmulq_f32(vld1q_f32(s), f0)));
            int16x4_t e1 = vqmovn_s32(vcvtnq_s32_f32(vmulq_f32(vld1q_f32(s + 4), f1)));
            vst1q_s16(w + h * ST_ATTN_CHUNK + p, vcombine_s16(e0, e1));
        }
    }
    return top;
}

/* sum[8] += 32 dimensions of one position, widened in x, times lane `lane` of w. */
#define ADD_POSITION(sum, x, w, lane)                                                                                  \
    for (int i = 0; i < 4; i++) {                                                                                      \
        sum[2 * i] = vmlal_lane_s16(sum[2 * i], vget_low_s16(x[i]), w, lane);                                          \
        sum[2 * i + 1] = vmlal_high_lane_s16(sum[2 * i + 1], x[i], w, lane);                                           \
    }

/* The two positions of a line of values: 32 dimensions of the even one, and of the odd one. */
static inline void widen_line(const uint8_t *line, int16x8_t even[4], int16x8_t odd[4]) {
    for (int i = 0; i < 2; i++) {
        int8x16x2_t v = vld2q_s8((const int8_t *)line + 32 * i);
        even[2 * i] = vmovl_s8(vget_low_s8(v.val[0]));
        even[2 * i + 1] = vmovl_high_s8(v.val[0]);
        odd[2 * i] = vmovl_s8(vget_low_s8(v.val[1]));
        odd[2 * i + 1] = vmovl_high_s8(v.val[1]);
    }
}

/* For H heads (one or two), which share the widening; four positions a turn. */
ALWAYS_INLINE void values_q8(const int H, const uint8_t *lines, const int16_t *w, int64_t p0, int64_t p1, float by,
                             int64_t hd, float *out) {
    int32x4_t sum[2][8];
    for (int h = 0; h < H; h++)
        for (int i = 0; i < 8; i++)
            sum[h][i] = vdupq_n_s32(0);
    for (int64_t p = p0 / 4 * 4; p < p1; p += 4) {
        int16x8_t even[4], odd[4];
        widen_line(lines + 32 * p, even, odd);
        for (int h = 0; h < H; h++) {
            int16x4_t four = vld1_s16(w + h * ST_ATTN_CHUNK + p);
            ADD_POSITION(sum[h], even, four, 0)
            ADD_POSITION(sum[h], odd, four, 1)
        }
        widen_line(lines + 32 * p + 64, even, odd);
        for (int h = 0; h < H; h++) {
            int16x4_t four = vld1_s16(w + h * ST_ATTN_CHUNK + p);
            ADD_POSITION(sum[h], even, four, 2)
            ADD_POSITION(sum[h], odd, four, 3)
        }
    }
    for (int h = 0; h < H; h++)
        for (int i = 0; i < 8; i++)
            vst1q_f32(out + h * hd + 4 * i, vmulq_n_f32(vcvtq_f32_s32(sum[h][i]), by));
}

void st_neon_values_q8(const uint8_t *lines, const int16_t *w, int64_t G, int64_t p0, int64_t p1, float by, int64_t hd,
                       float *out) {
#define STEP(h, H) values_q8(H, lines, w + h * ST_ATTN_CHUNK, p0, p1, by, hd, out + h * hd)
    EACH_GROUP(2, G, STEP)
#undef STEP
}

void st_neon_attention_q8(st_gemm *gemm_q8_0, st_q8_values *values, const st_q8x4 *const *q, int64_t G, int64_t hd,
                          const uint8_t *k, const uint8_t *v, int64_t p0, int64_t p1, float scale, float *scores,
                          float *acc, float *m, float *l) {
    int64_t t0 = p0 / ST_TILE_ROWS;
    int16_t *w = (int16_t *)(scores + G * ST_ATTN_CHUNK);
    gemm_q8_0(k, ST_ATTN_CHUNK, hd / ST_BLOCK, t0, (p1 + ST_TILE_ROWS - 1) / ST_TILE_ROWS, q, 2 * G,
              scores + t0 * ST_TILE_ROWS, ST_ATTN_CHUNK);
    for (int64_t h = 0; h < G; h++)
        l[h] = softmax_q8(scores + h * ST_ATTN_CHUNK, scores + (G + h) * ST_ATTN_CHUNK, p0, p1, scale, m + h);
    for (int64_t b = 0; b < hd / ST_BLOCK; b++, v += ST_KV_Q8_BLOCK_BYTES) {
        float by = weights_q8(v, scores, G, p0, p1, w) / ST_Q8_WEIGHT;
        values(v + 2 * ST_ATTN_CHUNK, w, G, p0, p1, by, hd, acc + b * ST_BLOCK);
    }
}

static float dot(const float *a, const float *b, int64_t n) {
    float32x4_t s0 = vdupq_n_f32(0), s1 = s0, s2 = s0, s3 = s0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        s0 = vfmaq_f32(s0, vld1q_f32(a + i), vld1q_f32(b + i));
        s1 = vfmaq_f32(s1, vld1q_f32(a + i + 4), vld1q_f32(b + i + 4));
        s2 = vfmaq_f32(s2, vld1q_f32(a + i + 8), vld1q_f32(b + i + 8));
        s3 = vfmaq_f32(s3, vld1q_f32(a + i + 12), vld1q_f32(b + i + 12));
    }
    float sum = vaddvq_f32(vaddq_f32(vaddq_f32(s0, s1), vaddq_f32(s2, s3)));
    for (; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

static void rmsnorm(const float *x, const float *w, int64_t n, float eps, float *out) {
    float scale = 1 / sqrtf(dot(x, x, n) / (float)n + eps);
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
        vst1q_f32(out + i, vmulq_f32(vmulq_n_f32(vld1q_f32(x + i), scale), vld1q_f32(w + i)));
    for (; i < n; i++)
        out[i] = x[i] * scale * w[i];
}

static void axpy(float a, const float *x, float *y, int64_t n) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
        vst1q_f32(y + i, vfmaq_n_f32(vld1q_f32(y + i), vld1q_f32(x + i), a));
    for (; i < n; i++)
        y[i] += a * x[i];
}

static void to_f16(const float *x, uint16_t *out, int64_t n) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
        vst1_u16(out + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(x + i))));
    for (; i < n; i++)
        out[i] = st_f32_to_f16(x[i]);
}

static void from_f16(const uint16_t *x, float *out, int64_t n) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
        vst1q_f32(out + i, load_f16x4(x + i));
    for (; i < n; i++)
        out[i] = st_f16_to_f32(x[i]);
}

void st_neon_fill_common(st_kernels *k) {
    k->quantize = quantize;
    k->activate = st_neon_activate;
    k->attention = attention;
    k->attention_many = attention_many;
    k->rmsnorm = rmsnorm;
    k->dot = dot;
    k->axpy = axpy;
    k->to_f16 = to_f16;
    k->from_f16 = from_f16;
    k->rope = rope;
    k->top_k = top_k;
}
