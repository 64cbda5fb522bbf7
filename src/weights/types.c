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
