/* Q4_0, Q8_0 and F16 from floats, as docs/formats.md and the GGUF specification define them. Loops over the 32 weights
 * of a block are written so that compilers vectorise them for any instruction set; sums have a fixed order. */
#include "smallthinker/quantize.h"

#include <math.h>
#include <string.h>

#include "smallthinker/layout.h"
#include "smallthinker/status.h"

enum { INFINITE = 0x7f800000, HALF_INFINITE = 0x7c00 };

/* 32 weights as floats. Returns the bits of their largest magnitude: above INFINITE for a NaN. */
static int32_t load(float *restrict x, int src_type, const void *src, int64_t first) {
    int32_t bits[ST_BLOCK], most = 0;
    if (src_type == ST_BF16) {
        uint16_t half[ST_BLOCK];
        memcpy(half, (const uint8_t *)src + 2 * first, sizeof half);
        for (int i = 0; i < ST_BLOCK; i++)
            bits[i] = (int32_t)((uint32_t)half[i] << 16);
    } else {
        memcpy(bits, (const uint8_t *)src + 4 * first, sizeof bits);
    }
    memcpy(x, bits, sizeof bits);
    for (int i = 0; i < ST_BLOCK; i++) {
        int32_t magnitude = bits[i] & INT32_MAX;
        most = magnitude > most ? magnitude : most;
    }
    return most;
}

static float of_bits(int32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* Writes a scale; returns whether fp16 can hold it. */
static int store_scale(uint8_t *dst, float d) {
    uint16_t half = st_f32_to_f16(d);
    memcpy(dst, &half, 2);
    return (half & HALF_INFINITE) != HALF_INFINITE;
}

/* 1/d; 0 where d is 0, and where 1/d is infinite (d is below what fp16 tells from 0). */
static float inverse(float d) {
    float id = d != 0 ? 1 / d : 0;
    return id - id == 0 ? id : 0;
}

/* The scale that the element of largest magnitude decides. */
static float plain_scale(const float *x, int32_t most) {
    float largest = of_bits(most);
    for (int i = ST_BLOCK - 1; i >= 0; i--) /* the first of equal magnitudes decides the sign */
        largest = x[i] == of_bits(most) || x[i] == -of_bits(most) ? x[i] : largest;
    return largest / -8;
}

/* The codes 0..15 nearest to x * id + 8, for |x * id| below 2^30. */
static void round_to_codes(int32_t *restrict q, const float *restrict x, float id) {
    for (int i = 0; i < ST_BLOCK; i++) {
        float scaled = x[i] * id;
        int32_t rounded = (int32_t)(scaled + 8.5f);
        rounded = rounded < 0 ? 0 : rounded;
        q[i] = rounded > 15 ? 15 : rounded;
    }
}

static int store_q4_0(uint8_t *restrict dst, const int32_t *restrict q, float d) {
    for (int i = 0; i < ST_BLOCK / 2; i++)
        dst[2 + i] = (uint8_t)(q[i] | q[i + ST_BLOCK / 2] << 4);
    return store_scale(dst, d);
}

static int block_q4_0(uint8_t *restrict dst, const float *restrict x, int32_t most) {
    float d = plain_scale(x, most);
    int32_t q[ST_BLOCK];
    round_to_codes(q, x, inverse(d));
    return store_q4_0(dst, q, d);
}

static int block_q8_0(uint8_t *restrict dst, const float *restrict x, int32_t most) {
    float d = of_bits(most) / 127, id = inverse(d);
    int32_t q[ST_BLOCK];
    for (int i = 0; i < ST_BLOCK; i++) {
        float scaled = x[i] * id, magnitude = fabsf(scaled);
        int32_t whole = (int32_t)magnitude, bits;
        whole += (int32_t)(2 * (magnitude - (float)whole));
        memcpy(&bits, &scaled, 4);
        q[i] = (whole ^ bits >> 31) - (bits >> 31);
    }
    for (int i = 0; i < ST_BLOCK; i++)
        dst[2 + i] = (uint8_t)q[i];
    return store_scale(dst, d);
}

static int to_f16(uint8_t *dst, int src_type, const void *src, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float x;
        if (src_type == ST_BF16) {
            uint16_t half;
            memcpy(&half, (const uint8_t *)src + 2 * i, 2);
            x = of_bits((int32_t)((uint32_t)half << 16));
        } else {
            memcpy(&x, (const uint8_t *)src + 4 * i, 4);
        }
        if (!store_scale(dst + 2 * i, x))
            return ST_ERR_UNSUPPORTED;
    }
    return ST_OK;
}

int st_quantize(int type, uint8_t *dst, int src_type, const void *src, int64_t n) {
    if ((src_type != ST_F32 && src_type != ST_BF16) || n < 0)
        return ST_ERR_ARGUMENT;
    if (type == ST_F16)
        return to_f16(dst, src_type, src, n);
    if ((type != ST_Q4_0 && type != ST_Q8_0) || n % ST_BLOCK)
        return ST_ERR_ARGUMENT;
    size_t bytes = st_row_bytes(type, ST_BLOCK);
    for (int64_t first = 0; first < n; first += ST_BLOCK, dst += bytes) {
        float x[ST_BLOCK];
        int32_t most = load(x, src_type, src, first);
        if (most >= INFINITE || !(type == ST_Q4_0 ? block_q4_0(dst, x, most) : block_q8_0(dst, x, most)))
            return ST_ERR_UNSUPPORTED;
    }
    return ST_OK;
}

/* ---------------------------------------------------------------- Q4_0 by least error */

enum { LANES = 8, REFITS = 2 };

/* Largest magnitude over scale, tried with both signs: where the least error of blocks from a normal distribution, and
 * of those with outliers, was found; more of them gained under 0.5 %. */
static const float RATIOS[] = {6.0f, 6.75f, 7.25f, 7.75f, 8.0f, 8.5f, 9.25f, 10.0f};
enum { N_RATIOS = sizeof RATIOS / sizeof *RATIOS };

static float as_stored(float d) { return st_f16_to_f32(st_f32_to_f16(d)); }

static float total(const float *lane) {
    return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

/* Codes of x with scale d, and the sum of weight * (x - d * (q - 8))^2. */
static float coded(int32_t *restrict q, const float *restrict x, const float *restrict weight, float d) {
    float lane[LANES] = {0};
    round_to_codes(q, x, inverse(d));
    for (int i = 0; i < ST_BLOCK; i += LANES)
        for (int k = 0; k < LANES; k++) {
            float e = x[i + k] - d * (float)(q[i + k] - 8);
            lane[k] += weight[i + k] * e * e;
        }
    return total(lane);
}

/* The scale with the least weighted error for these codes. */
static float refitted(const int32_t *restrict q, const float *restrict x, const float *restrict weight) {
    float product[LANES] = {0}, square[LANES] = {0};
    for (int i = 0; i < ST_BLOCK; i += LANES)
        for (int k = 0; k < LANES; k++) {
            float code = (float)(q[i + k] - 8), weighted = weight[i + k] * code;
            product[k] += weighted * x[i + k];
            square[k] += weighted * code;
        }
    float below = total(square);
    return below > 0 ? total(product) / below : 0;
}

/* The scale, as fp16 holds it, with the least weighted error that was found; never a larger one than the plain scale's.
 * Infinite where fp16 cannot hold that. */
static float best_scale(const float *x, const float *weight) {
    int32_t bits[ST_BLOCK], q[ST_BLOCK], most = 0;
    memcpy(bits, x, sizeof bits);
    for (int i = 0; i < ST_BLOCK; i++) {
        int32_t magnitude = bits[i] & INT32_MAX;
        most = magnitude > most ? magnitude : most;
    }
    float best = as_stored(plain_scale(x, most)), least = coded(q, x, weight, best), magnitude = of_bits(most);
    if (best - best != 0 || best == 0)
        return best;
    for (int i = 0; i < 2 * N_RATIOS; i++) {
        float d = as_stored((i < N_RATIOS ? magnitude : -magnitude) / RATIOS[i % N_RATIOS]);
        float error = d - d == 0 && d != 0 ? coded(q, x, weight, d) : INFINITY;
        best = error < least ? d : best;
        least = error < least ? error : least;
    }
    for (int i = 0; i < REFITS; i++) {
        coded(q, x, weight, best);
        float d = as_stored(refitted(q, x, weight));
        float error = d - d == 0 && d != 0 ? coded(q, x, weight, d) : INFINITY;
        if (!(error < least))
            break;
        best = d, least = error;
    }
    return best;
}

/* One block of a row. x: its 32 weights, which become what is left of them (the errors of their codes) where the errors
 * are fed back; feedback: [32][stride], its block on the diagonal, or NULL. Returns whether fp16 can hold the scale. */
static int best_block(uint8_t *restrict dst, float *restrict x, const float *weight, const float *feedback,
                      int64_t stride) {
    int32_t q[ST_BLOCK];
    float d = best_scale(x, weight), id = inverse(d);
    round_to_codes(q, x, id);
    for (int j = 0; feedback && j < ST_BLOCK; j++) {
        float scaled = x[j] * id + 8.5f; /* may be anything here: errors were added */
        q[j] = !(scaled >= 1) ? 0 : scaled >= 15 ? 15 : (int32_t)scaled;
        x[j] -= d * (float)(q[j] - 8);
        for (int k = j + 1; k < ST_BLOCK; k++)
            x[k] -= x[j] * feedback[j * stride + k];
    }
    return store_q4_0(dst, q, d);
}

/* n weights as floats; returns whether all are finite. */
static int load_all(float *x, int src_type, const void *src, int64_t first, int64_t n) {
    for (int64_t i = 0; i < n; i += ST_BLOCK)
        if (load(x + i, src_type, src, first + i) >= INFINITE)
            return 0;
    return 1;
}

int st_quantize_q4_0_rows(uint8_t *dst, int src_type, const void *src, int64_t rows, int64_t cols, const float *weight,
                          const float *feedback, float *work) {
    size_t row_bytes = st_row_bytes(ST_Q4_0, cols), bytes = st_row_bytes(ST_Q4_0, ST_BLOCK);
    if ((src_type != ST_F32 && src_type != ST_BF16) || rows < 0 || row_bytes == 0)
        return ST_ERR_ARGUMENT;
    for (int64_t first = 0; first < rows; first += ST_QUANTIZE_ROWS) {
        int64_t n = rows - first < ST_QUANTIZE_ROWS ? rows - first : ST_QUANTIZE_ROWS;
        if (!load_all(work, src_type, src, first * cols, n * cols))
            return ST_ERR_UNSUPPORTED;
        for (int64_t c = 0; c < cols;
             c += ST_BLOCK) /* a block of all rows: its part of `feedback` stays in the cache */
            for (int64_t i = 0; i < n; i++) {
                float *x = work + i * cols;
                uint8_t *block = dst + (size_t)(first + i) * row_bytes + (size_t)(c / ST_BLOCK) * bytes;
                if (!best_block(block, x + c, weight + c, feedback ? feedback + c * cols + c : NULL, cols))
                    return ST_ERR_UNSUPPORTED;
                for (int64_t j = c; feedback && j < c + ST_BLOCK; j++)
                    for (int64_t k = c + ST_BLOCK; k < cols; k++)
                        x[k] -= x[j] * feedback[j * cols + k];
            }
    }
    return ST_OK;
}
