/* The table of tensor types (types.h) and, for each that can be read, its dequantiser: GGUF rows to floats. Called by
 * the loader for sizes, and by the forward pass for rows that have no faster layout. */
#include "smallthinker/types.h"

#include <string.h>

float st_f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 0x1f, mantissa = h & 0x3ff, bits;
    if (exponent == 0) { /* zero and denormals: mantissa * 2^-24 is exact */
        float f = (float)mantissa * 0x1p-24f;
        return sign ? -f : f;
    }
    bits = exponent == 31 ? sign | 0x7f800000 | mantissa << 13 : sign | (exponent + 112) << 23 | mantissa << 13;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

uint16_t st_f32_to_f16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000)
        return (uint16_t)(sign | 0x7e00 | (bits >> 13 & 0x3ff)); /* NaN keeps its top payload bits */
    if (bits >= 0x477ff000)
        return sign | 0x7c00; /* 65520 and above round to infinity */
    if (bits < 0x38800000) {  /* below 2^-14: a denormal, whole multiples of 2^-24 */
        float a;
        memcpy(&a, &bits, 4);
        a += 0.5f; /* float spacing at 0.5 is 2^-24: the addition rounds to nearest even */
        uint32_t m;
        memcpy(&m, &a, 4);
        return (uint16_t)(sign | (m - 0x3f000000));
    }
    bits += 0xfff + (bits >> 13 & 1);
    return (uint16_t)(sign | ((bits - 0x38000000) >> 13));
}

static uint16_t load_u16(const uint8_t *p) {
    uint16_t v;
    memcpy(&v, p, 2);
    return v;
}

static float load_f16(const uint8_t *p) { return st_f16_to_f32(load_u16(p)); }

/* The dequantisers: `blocks` whole blocks of a row as floats. */

static void dequantize_f32(const uint8_t *row, int64_t blocks, float *out) { memcpy(out, row, 4 * (size_t)blocks); }

static void dequantize_f16(const uint8_t *row, int64_t blocks, float *out) {
    for (int64_t i = 0; i < blocks; i++)
        out[i] = load_f16(row + 2 * i);
}

static void dequantize_bf16(const uint8_t *row, int64_t blocks, float *out) {
    for (int64_t i = 0; i < blocks; i++) {
        uint32_t bits = (uint32_t)load_u16(row + 2 * i) << 16;
        memcpy(out + i, &bits, 4);
    }
}

static void dequantize_q4_0(const uint8_t *row, int64_t blocks, float *out) {
    for (int64_t b = 0; b < blocks; b++, row += ST_Q4_0_BYTES, out += 32) {
        float d = load_f16(row);
        for (int i = 0; i < 16; i++) {
            out[i] = d * (float)((row[2 + i] & 15) - 8);
            out[16 + i] = d * (float)((row[2 + i] >> 4) - 8);
        }
    }
}

static void dequantize_q4_1(const uint8_t *row, int64_t blocks, float *out) {
    for (int64_t b = 0; b < blocks; b++, row += ST_Q4_1_BYTES, out += 32) {
        float d = load_f16(row), m = load_f16(row + 2);
        for (int i = 0; i < 16; i++) {
            out[i] = d * (float)(row[4 + i] & 15) + m;
            out[16 + i] = d * (float)(row[4 + i] >> 4) + m;
        }
    }
}

static void dequantize_q8_0(const uint8_t *row, int64_t blocks, float *out) {
    for (int64_t b = 0; b < blocks; b++, row += ST_Q8_0_BYTES, out += 32) {
        float d = load_f16(row);
        for (int i = 0; i < 32; i++)
            out[i] = d * (float)(int8_t)row[2 + i];
    }
}

static uint32_t load_u32(const uint8_t *p) {
    uint32_t v;
    memcpy(&v, p, 4);
    return v;
}

/* 32 weights: fp16 scale, in Q5_1 fp16 minimum, a fifth bit for every weight, 16 bytes of nibbles. */

static void dequantize_q5_0(const uint8_t *row, int64_t blocks, float *out) {
    for (int64_t b = 0; b < blocks; b++, row += ST_Q5_0_BYTES, out += 32) {
        float d = load_f16(row);
        uint32_t high = load_u32(row + 2);
        for (int i = 0; i < 32; i++) {
            int low = row[6 + i % 16] >> i / 16 * 4 & 15;
            out[i] = d * (float)((low | (int)(high >> i & 1) << 4) - 16);
        }
    }
}

static void dequantize_q5_1(const uint8_t *row, int64_t blocks, float *out) {
    for (int64_t b = 0; b < blocks; b++, row += ST_Q5_1_BYTES, out += 32) {
        float d = load_f16(row), m = load_f16(row + 2);
        uint32_t high = load_u32(row + 4);
        for (int i = 0; i < 32; i++) {
            int low = row[8 + i % 16] >> i / 16 * 4 & 15;
            out[i] = d * (float)(low | (int)(high >> i & 1) << 4) + m;
        }
    }
}

/* 256 weights: 16 bytes of scale and minimum of 16 weights each, 4 bits the two; 64 bytes of bit pairs; fp16 scales of
 * the scales and of the minima. */
static void dequantize_q2_k(const uint8_t *row, int64_t blocks, float *out) {
    for (int64_t b = 0; b < blocks; b++, row += ST_Q2_K_BYTES) {
        float d = load_f16(row + 80), dmin = load_f16(row + 82);
        for (int i = 0; i < 256; i++) {
            int scales = row[i / 16], q = row[16 + i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3;
            *out++ = d * (float)(scales & 15) * (float)q - dmin * (float)(scales >> 4);
        }
    }
}

/* 256 weights: 32 bytes of high bits, 64 of bit pairs, 12 of six-bit scales (8 of low nibbles, 4 of bit pairs), fp16
 * super-scale. */
static void dequantize_q3_k(const uint8_t *row, int64_t blocks, float *out) {
    for (int64_t b = 0; b < blocks; b++, row += ST_Q3_K_BYTES) {
        const uint8_t *scales = row + 96;
        float d = load_f16(row + 108);
        for (int i = 0; i < 256; i++) {
            int s = i / 16, scale = (scales[s % 8] >> s / 8 * 4 & 15) | (scales[8 + s % 4] >> s / 4 * 2 & 3) << 4;
            int low = row[32 + i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3, high = row[i % 32] >> i / 32 & 1;
            *out++ = d * (float)(scale - 32) * (float)((low | high << 2) - 4);
        }
    }
}

void st_k_scales(const uint8_t *packed, uint8_t scale[8], uint8_t min[8]) {
    for (int i = 0; i < 4; i++) {
        scale[i] = packed[i] & 63;
        min[i] = packed[4 + i] & 63;
        scale[4 + i] = (uint8_t)((packed[8 + i] & 15) | packed[i] >> 6 << 4);
        min[4 + i] = (uint8_t)(packed[8 + i] >> 4 | packed[4 + i] >> 6 << 4);
    }
}

/* 256 weights: fp16 scales of the scales and of the minima; eight of each (st_k_scales); in Q5_K 32 bytes of high bits;
 * 128 bytes of nibbles. */

static void dequantize_q4_k(const uint8_t *row, int64_t blocks, float *out) {
    for (int64_t b = 0; b < blocks; b++, row += ST_Q4_K_BYTES) {
        float d = load_f16(row), dmin = load_f16(row + 2);
        uint8_t scale[8], min[8];
        st_k_scales(row + 4, scale, min);
        for (int i = 0; i < 256; i++) {
            int q = row[16 + i / 64 * 32 + i % 32] >> i % 64 / 32 * 4 & 15;
            *out++ = d * (float)scale[i / 32] * (float)q - dmin * (float)min[i / 32];
        }
    }
}

static void dequantize_q5_k(const uint8_t *row, int64_t blocks, float *out) {
    for (int64_t b = 0; b < blocks; b++, row += ST_Q5_K_BYTES) {
        float d = load_f16(row), dmin = load_f16(row + 2);
        uint8_t scale[8], min[8];
        st_k_scales(row + 4, scale, min);
        for (int i = 0; i < 256; i++) {
            int low = row[48 + i / 64 * 32 + i % 32] >> i % 64 / 32 * 4 & 15, high = row[16 + i % 32] >> i / 32 & 1;
            *out++ = d * (float)scale[i / 32] * (float)(low | high << 4) - dmin * (float)min[i / 32];
        }
    }
}

/* What a nibble of IQ4_NL and IQ4_XS stands for: the table of the format. */
static const int8_t nonlinear[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

static void dequantize_iq4_nl(const uint8_t *row, int64_t blocks, float *out) {
    for (int64_t b = 0; b < blocks; b++, row += ST_IQ4_NL_BYTES, out += 32) {
        float d = load_f16(row);
        for (int i = 0; i < 32; i++)
            out[i] = d * (float)nonlinear[row[2 + i % 16] >> i / 16 * 4 & 15];
    }
}

/* 256 weights: fp16 super-scale, eight six-bit scales (bit pairs of all in two bytes, four bytes of low nibbles), 128
 * bytes of nibbles. */
static void dequantize_iq4_xs(const uint8_t *row, int64_t blocks, float *out) {
    for (int64_t b = 0; b < blocks; b++, row += ST_IQ4_XS_BYTES) {
        float d = load_f16(row);
        for (int i = 0; i < 256; i++) {
            int s = i / 32, low = row[4 + s / 2] >> s % 2 * 4 & 15, high = load_u16(row + 2) >> 2 * s & 3;
            float scale = d * (float)((low | high << 4) - 32);
            *out++ = scale * (float)nonlinear[row[8 + 16 * s + i % 16] >> i % 32 / 16 * 4 & 15];
        }
    }
}

/* 256 weights: 128 bytes of low nibbles, 64 of high bit pairs, 16 int8 scales, fp16 super-scale. */
static void dequantize_q6_k(const uint8_t *row, int64_t blocks, float *out) {
    for (int64_t b = 0; b < blocks; b++, row += ST_Q6_K_BYTES) {
        const int8_t *scales = (const int8_t *)row + 192;
        float d = load_f16(row + 208);
        for (int i = 0; i < 256; i++) {
            int half = i / 128, quarter = i % 128 / 32, lane = i % 32;
            int low = row[64 * half + 32 * (quarter % 2) + lane] >> 4 * (quarter / 2) & 15;
            int high = row[128 + 32 * half + lane] >> 2 * quarter & 3;
            *out++ = d * (float)scales[i / 16] * (float)((low | high << 4) - 32);
        }
    }
}

#define TYPE_NAMED(NAME, number) [number] = {#NAME, 0, 0, NULL},
#define TYPE_READ(NAME, name, number, columns, bytes) [number] = {#NAME, columns, bytes, dequantize_##name},
#define TILED_INDEX(NAME, name) [ST_##NAME] = 1 + ST_TILED_##NAME,
#define SPARSE_FLAG(NAME, name) [ST_##NAME] = 1,

static const st_type_info types[ST_TYPE_NUMBERS] = {ST_OTHER_TYPES(TYPE_NAMED) ST_TYPES(TYPE_READ)};
static const signed char tiled_plus_one[ST_TYPE_NUMBERS] = {ST_TILED_TYPES(TILED_INDEX)};
static const signed char sparse[ST_TYPE_NUMBERS] = {ST_SPARSE_TYPES(SPARSE_FLAG)};

const st_type_info *st_type_of(int number) {
    return number >= 0 && number < ST_TYPE_NUMBERS && types[number].name ? types + number : NULL;
}

int st_tiled(int type) { return st_type_of(type) ? tiled_plus_one[type] - 1 : -1; }

int st_sparse(int type) { return st_type_of(type) && sparse[type]; }

size_t st_row_bytes(int type, int64_t cols) {
    const st_type_info *t = st_type_of(type);
    if (cols <= 0 || !t || !t->bytes || cols % t->columns)
        return 0;
    return (size_t)(cols / t->columns) * (size_t)t->bytes;
}

void st_dequantize_row(int type, const uint8_t *row, int64_t cols, float *out) {
    const st_type_info *t = st_type_of(type);
    if (t && t->dequantize)
        t->dequantize(row, cols / t->columns, out);
}
