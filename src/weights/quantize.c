/* Q4_0, Q8_0 and F16 from floats, as docs/formats.md and the GGUF specification define them. Loops over the 32 weights
 * of a block are written so that compilers vectorise them for any instruction set; nothing here sums. */
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

static int block_q4_0(uint8_t *restrict dst, const float *restrict x, int32_t most) {
    float largest = of_bits(most);
    int32_t q[ST_BLOCK];
    for (int i = ST_BLOCK - 1; i >= 0; i--) /* the first of equal magnitudes decides the sign */
        largest = x[i] == of_bits(most) || x[i] == -of_bits(most) ? x[i] : largest;
    float d = largest / -8, id = inverse(d);
    for (int i = 0; i < ST_BLOCK; i++) {
        float scaled = x[i] * id;
        int32_t rounded = (int32_t)(scaled + 8.5f);
        q[i] = rounded > 15 ? 15 : rounded;
    }
    for (int i = 0; i < ST_BLOCK / 2; i++)
        dst[2 + i] = (uint8_t)(q[i] | q[i + ST_BLOCK / 2] << 4);
    return store_scale(dst, d);
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
