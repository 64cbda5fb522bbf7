/* Permutations between GGUF rows and the packed layouts of packed.h, and dequantisation of single rows.
 * Called by the loader and the packer; the forward pass uses only the row dequantisers. */
#include "smallthinker/packed.h"

#include <string.h>

enum { Q4_0_BYTES = 18, Q4_1_BYTES = 20, Q8_0_BYTES = 34, Q6_K_BYTES = 210 };

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

size_t st_row_bytes(int type, int64_t cols) {
    if (cols <= 0)
        return 0;
    size_t n = (size_t)cols;
    switch (type) {
    case ST_F32: return 4 * n;
    case ST_F16:
    case ST_BF16: return 2 * n;
    case ST_Q4_0: return n % ST_BLOCK ? 0 : n / ST_BLOCK * Q4_0_BYTES;
    case ST_Q4_1: return n % ST_BLOCK ? 0 : n / ST_BLOCK * Q4_1_BYTES;
    case ST_Q8_0: return n % ST_BLOCK ? 0 : n / ST_BLOCK * Q8_0_BYTES;
    case ST_Q6_K: return n % ST_SUPER ? 0 : n / ST_SUPER * Q6_K_BYTES;
    default: return 0;
    }
}

static size_t tile_block_bytes(int type) {
    return type == ST_Q4_0 ? ST_TILE_Q4_0_BYTES : type == ST_Q8_0 ? ST_TILE_Q8_0_BYTES : 0;
}

size_t st_tile16_bytes(int type, int64_t rows, int64_t cols) {
    if (rows <= 0 || cols <= 0 || cols % (type == ST_Q6_K ? ST_SUPER : ST_BLOCK))
        return 0;
    if (type == ST_Q6_K)
        return (size_t)((rows + ST_TILE_ROWS - 1) / ST_TILE_ROWS) * (size_t)(cols / ST_SUPER) *
               ST_TILE_Q6_K_SUPER_BYTES;
    return (size_t)((rows + ST_TILE_ROWS - 1) / ST_TILE_ROWS) * (size_t)(cols / ST_BLOCK) * tile_block_bytes(type);
}

/* Bytes of one neuron's row: two outputs a byte, d padded to whole chunks. */
static size_t down_line_bytes(int64_t d) {
    return (size_t)((d + ST_DOWN_CHUNK - 1) / ST_DOWN_CHUNK) * (ST_DOWN_CHUNK / 2);
}

size_t st_down_bytes(int64_t d, int64_t f) {
    if (d <= 0 || f <= 0 || f % ST_BLOCK)
        return 0;
    return down_line_bytes(d) * ((size_t)f / ST_BLOCK * 4 + (size_t)f);
}

/* Where column i (0..31) of row r stands in a Q6_K block of a tile: its low four bits, and the two above. */
static uint8_t *q6_low(uint8_t *block, int r, int i) { return block + 32 + 64 * (i % 16 / 4) + 4 * r + i % 4; }
static uint8_t *q6_high(uint8_t *block, int r, int i) { return block + 288 + 64 * (i % 16 / 8) + 4 * r + i % 4; }
static int q6_high_shift(int i) { return i % 8 / 4 * 4 + i / 16 * 2; }

/* One row's super-block from GGUF to its place in a tile, which starts out as zeros, or back. */
static void pack_q6_k(const uint8_t *super, int r, uint8_t *out) {
    memcpy(out + 2 * r, super + 208, 2);
    out += 32;
    for (int b = 0; b < ST_SUPER / ST_BLOCK; b++, out += ST_TILE_Q6_K_BYTES) {
        int half = b / 4, quarter = b % 4;
        out[r] = super[192 + 2 * b];
        out[16 + r] = super[192 + 2 * b + 1];
        for (int i = 0; i < ST_BLOCK; i++) {
            int low = super[64 * half + 32 * (quarter % 2) + i] >> 4 * (quarter / 2) & 15;
            int high = super[128 + 32 * half + i] >> 2 * quarter & 3;
            *q6_low(out, r, i) |= (uint8_t)(low << i / 16 * 4);
            *q6_high(out, r, i) |= (uint8_t)(high << q6_high_shift(i));
        }
    }
}

static void unpack_q6_k(const uint8_t *in, int r, uint8_t *super) {
    memset(super, 0, Q6_K_BYTES);
    memcpy(super + 208, in + 2 * r, 2);
    in += 32;
    for (int b = 0; b < ST_SUPER / ST_BLOCK; b++, in += ST_TILE_Q6_K_BYTES) {
        int half = b / 4, quarter = b % 4;
        super[192 + 2 * b] = in[r];
        super[192 + 2 * b + 1] = in[16 + r];
        for (int i = 0; i < ST_BLOCK; i++) {
            int low = *q6_low((uint8_t *)in, r, i) >> i / 16 * 4 & 15;
            int high = *q6_high((uint8_t *)in, r, i) >> q6_high_shift(i) & 3;
            super[64 * half + 32 * (quarter % 2) + i] |= (uint8_t)(low << 4 * (quarter / 2));
            super[128 + 32 * half + i] |= (uint8_t)(high << 2 * quarter);
        }
    }
}

static void pack_tile16_q6_k(const uint8_t *src, int64_t rows, int64_t cols, uint8_t *dst, int64_t t0, int64_t t1) {
    int64_t supers = cols / ST_SUPER;
    memset(dst + t0 * supers * ST_TILE_Q6_K_SUPER_BYTES, 0, (size_t)((t1 - t0) * supers * ST_TILE_Q6_K_SUPER_BYTES));
    for (int64_t row = t0 * ST_TILE_ROWS; row < t1 * ST_TILE_ROWS && row < rows; row++)
        for (int64_t i = 0; i < supers; i++)
            pack_q6_k(src + (row * supers + i) * Q6_K_BYTES, (int)(row % ST_TILE_ROWS),
                      dst + (row / ST_TILE_ROWS * supers + i) * ST_TILE_Q6_K_SUPER_BYTES);
}

void st_pack_tile16(int type, const uint8_t *src, int64_t rows, int64_t cols, uint8_t *dst, int64_t t0, int64_t t1) {
    if (type == ST_Q6_K) {
        pack_tile16_q6_k(src, rows, cols, dst, t0, t1);
        return;
    }
    size_t row_bytes = st_row_bytes(type, cols), tile_bytes = tile_block_bytes(type);
    size_t block_bytes = row_bytes / (size_t)(cols / ST_BLOCK);
    int groups = type == ST_Q4_0 ? 4 : 8;
    int64_t nb = cols / ST_BLOCK;
    for (int64_t t = t0; t < t1; t++) {
        uint8_t *tile = dst + (size_t)(t * nb) * tile_bytes;
        if ((t + 1) * ST_TILE_ROWS > rows)
            memset(tile, 0, (size_t)nb * tile_bytes);
        for (int r = 0; r < ST_TILE_ROWS && t * ST_TILE_ROWS + r < rows; r++) {
            const uint8_t *row = src + (size_t)(t * ST_TILE_ROWS + r) * row_bytes;
            uint8_t *out = tile;
            for (int64_t b = 0; b < nb; b++, row += block_bytes, out += tile_bytes) {
                memcpy(out + 2 * r, row, 2);
                for (int g = 0; g < groups; g++)
                    memcpy(out + 32 + 64 * g + 4 * r, row + 2 + 4 * g, 4);
            }
        }
    }
}

void st_unpack_tile16(int type, const uint8_t *src, int64_t rows, int64_t cols, uint8_t *dst) {
    if (type == ST_Q6_K) {
        for (int64_t row = 0, supers = cols / ST_SUPER; row < rows; row++)
            for (int64_t i = 0; i < supers; i++)
                unpack_q6_k(src + (row / ST_TILE_ROWS * supers + i) * ST_TILE_Q6_K_SUPER_BYTES,
                            (int)(row % ST_TILE_ROWS), dst + (row * supers + i) * Q6_K_BYTES);
        return;
    }
    size_t row_bytes = st_row_bytes(type, cols), tile_bytes = tile_block_bytes(type);
    size_t block_bytes = row_bytes / (size_t)(cols / ST_BLOCK);
    int groups = type == ST_Q4_0 ? 4 : 8;
    int64_t nb = cols / ST_BLOCK;
    for (int64_t row = 0; row < rows; row++) {
        int64_t r = row % ST_TILE_ROWS;
        const uint8_t *in = src + (size_t)(row / ST_TILE_ROWS * nb) * tile_bytes;
        uint8_t *out = dst + (size_t)row * row_bytes;
        for (int64_t b = 0; b < nb; b++, in += tile_bytes, out += block_bytes) {
            memcpy(out, in + 2 * r, 2);
            for (int g = 0; g < groups; g++)
                memcpy(out + 2 + 4 * g, in + 32 + 64 * g + 4 * r, 4);
        }
    }
}

void st_pack_rows_q4_0(const uint8_t *src, int64_t rows, int64_t cols, uint8_t *dst) {
    int64_t nb = cols / ST_BLOCK;
    for (int64_t r = 0; r < rows; r++, src += Q4_0_BYTES * nb, dst += Q4_0_BYTES * nb)
        for (int64_t b = 0; b < nb; b++) {
            memcpy(dst + 2 * b, src + Q4_0_BYTES * b, 2);
            memcpy(dst + 2 * nb + 16 * b, src + Q4_0_BYTES * b + 2, 16);
        }
}

void st_unpack_rows_q4_0(const uint8_t *src, int64_t rows, int64_t cols, uint8_t *dst) {
    int64_t nb = cols / ST_BLOCK;
    for (int64_t r = 0; r < rows; r++, src += Q4_0_BYTES * nb, dst += Q4_0_BYTES * nb)
        for (int64_t b = 0; b < nb; b++) {
            memcpy(dst + Q4_0_BYTES * b, src + 2 * b, 2);
            memcpy(dst + Q4_0_BYTES * b + 2, src + 2 * nb + 16 * b, 16);
        }
}

/* Where output o (0..127) stands in a neuron's 64-byte line: byte, and 4 for the high nibble. */
static int down_byte(int o) { return (o % 16 / 4) * 16 + (o / 32) * 4 + o % 4; }
static int down_shift(int o) { return o % 32 >= 16 ? 4 : 0; }

/* Where neuron n stands in a Q4_0 block of 18 bytes, and 4 for the high nibble. */
static int block_byte(int n) { return 2 + n % 16; }
static int block_shift(int n) { return n % ST_BLOCK >= 16 ? 4 : 0; }

void st_pack_down_q4_0(const uint8_t *src, int64_t d, int64_t f, uint8_t *dst) {
    int64_t groups = f / ST_BLOCK;
    size_t line = down_line_bytes(d);
    uint8_t *lines = dst + (size_t)groups * line * 4;
    memset(dst, 0, st_down_bytes(d, f));
    /* Chunk by chunk and group by group: the 32 pieces of 64 bytes that are written stay in the first-level cache. */
    for (int64_t unit = 0; unit < (int64_t)(line / 64) * groups; unit++) {
        int64_t first = unit / groups * ST_DOWN_CHUNK, g = unit % groups;
        uint8_t *piece = lines + 32 * line * (size_t)g + first / 2;
        for (int64_t o = first; o < first + ST_DOWN_CHUNK && o < d; o++) {
            const uint8_t *block = src + (o * groups + g) * Q4_0_BYTES;
            uint8_t *column = piece + down_byte((int)(o - first));
            int shift = down_shift((int)(o - first));
            memcpy(dst + (size_t)g * line * 4 + 2 * o, block, 2);
            for (size_t i = 0; i < 16; i++) {
                column[i * line] |= (uint8_t)((block[2 + i] & 15) << shift);
                column[(16 + i) * line] |= (uint8_t)(block[2 + i] >> 4 << shift);
            }
        }
    }
}

void st_unpack_down_q4_0(const uint8_t *src, int64_t d, int64_t f, uint8_t *dst) {
    int64_t groups = f / ST_BLOCK;
    size_t line = down_line_bytes(d);
    const uint8_t *lines = src + (size_t)groups * line * 4;
    memset(dst, 0, (size_t)(d * groups * Q4_0_BYTES));
    for (int64_t o = 0; o < d; o++, dst += groups * Q4_0_BYTES) {
        const uint8_t *column = lines + o / ST_DOWN_CHUNK * 64 + down_byte((int)(o % ST_DOWN_CHUNK));
        int shift = down_shift((int)(o % ST_DOWN_CHUNK));
        for (int64_t g = 0; g < groups; g++)
            memcpy(dst + g * Q4_0_BYTES, src + (size_t)g * line * 4 + 2 * o, 2);
        for (int64_t n = 0; n < f; n++, column += line) {
            int i = (int)(n % ST_BLOCK);
            dst[n / ST_BLOCK * Q4_0_BYTES + block_byte(i)] |= (uint8_t)((*column >> shift & 15) << block_shift(i));
        }
    }
}

/* A block's nibble bytes hold outputs j and 16 + j, as the bytes of a line do: four of them move together. */
static size_t transposed_place(int64_t b, int four) { return (size_t)(b / 4 * 64 + 16 * four + b % 4 * 4); }

void st_pack_down_transposed_q4_0(const uint8_t *src, int64_t d, int64_t f, uint8_t *dst) {
    size_t line = down_line_bytes(d);
    uint8_t *scales = dst, *lines = dst + (size_t)f / ST_BLOCK * line * 4;
    memset(dst, 0, st_down_bytes(d, f));
    for (int64_t n = 0; n < f; n++, scales += line / 8, lines += line)
        for (int64_t b = 0; b < d / ST_BLOCK; b++, src += Q4_0_BYTES) {
            memcpy(scales + 2 * b, src, 2);
            for (int four = 0; four < 4; four++)
                memcpy(lines + transposed_place(b, four), src + 2 + 4 * four, 4);
        }
}

void st_unpack_down_transposed_q4_0(const uint8_t *src, int64_t d, int64_t f, uint8_t *dst) {
    size_t line = down_line_bytes(d);
    const uint8_t *scales = src, *lines = src + (size_t)f / ST_BLOCK * line * 4;
    for (int64_t n = 0; n < f; n++, scales += line / 8, lines += line)
        for (int64_t b = 0; b < d / ST_BLOCK; b++, dst += Q4_0_BYTES) {
            memcpy(dst, scales + 2 * b, 2);
            for (int four = 0; four < 4; four++)
                memcpy(dst + 2 + 4 * four, lines + transposed_place(b, four), 4);
        }
}

static void dequantize_q6_k(const uint8_t *row, int64_t cols, float *out) {
    /* 256 weights: 128 bytes of low nibbles, 64 of high bit pairs, 16 int8 scales, fp16 super-scale. */
    for (int64_t b = 0; b < cols / ST_SUPER; b++, row += Q6_K_BYTES) {
        const int8_t *scales = (const int8_t *)row + 192;
        float d = load_f16(row + 208);
        for (int i = 0; i < ST_SUPER; i++) {
            int half = i / 128, quarter = i % 128 / 32, lane = i % 32;
            int low = row[64 * half + 32 * (quarter % 2) + lane] >> 4 * (quarter / 2) & 15;
            int high = row[128 + 32 * half + lane] >> 2 * quarter & 3;
            *out++ = d * (float)scales[i / 16] * (float)((low | high << 4) - 32);
        }
    }
}

void st_dequantize_row(int type, const uint8_t *row, int64_t cols, float *out) {
    int64_t nb = cols / ST_BLOCK;
    switch (type) {
    case ST_F32: memcpy(out, row, 4 * (size_t)cols); break;
    case ST_F16:
        for (int64_t i = 0; i < cols; i++)
            out[i] = load_f16(row + 2 * i);
        break;
    case ST_BF16:
        for (int64_t i = 0; i < cols; i++) {
            uint32_t bits = (uint32_t)load_u16(row + 2 * i) << 16;
            memcpy(out + i, &bits, 4);
        }
        break;
    case ST_Q4_0:
        for (int64_t b = 0; b < nb; b++, row += Q4_0_BYTES, out += ST_BLOCK) {
            float d = load_f16(row);
            for (int i = 0; i < 16; i++) {
                out[i] = d * (float)((row[2 + i] & 15) - 8);
                out[16 + i] = d * (float)((row[2 + i] >> 4) - 8);
            }
        }
        break;
    case ST_Q4_1:
        for (int64_t b = 0; b < nb; b++, row += Q4_1_BYTES, out += ST_BLOCK) {
            float d = load_f16(row), m = load_f16(row + 2);
            for (int i = 0; i < 16; i++) {
                out[i] = d * (float)(row[4 + i] & 15) + m;
                out[16 + i] = d * (float)(row[4 + i] >> 4) + m;
            }
        }
        break;
    case ST_Q8_0:
        for (int64_t b = 0; b < nb; b++, row += Q8_0_BYTES, out += ST_BLOCK) {
            float d = load_f16(row);
            for (int i = 0; i < ST_BLOCK; i++)
                out[i] = d * (float)(int8_t)row[2 + i];
        }
        break;
    case ST_Q6_K: dequantize_q6_k(row, cols, out); break;
    }
}

void st_dequantize_tile16_row(int type, const uint8_t *tiles, int64_t cols, int64_t row, float *out) {
    if (type == ST_Q6_K) {
        uint8_t super[Q6_K_BYTES];
        for (int64_t i = 0, supers = cols / ST_SUPER; i < supers; i++) {
            unpack_q6_k(tiles + (row / ST_TILE_ROWS * supers + i) * ST_TILE_Q6_K_SUPER_BYTES, (int)(row % ST_TILE_ROWS),
                        super);
            dequantize_q6_k(super, ST_SUPER, out + i * ST_SUPER);
        }
        return;
    }
    int64_t nb = cols / ST_BLOCK, r = row % ST_TILE_ROWS;
    size_t tile_bytes = tile_block_bytes(type);
    const uint8_t *in = tiles + (size_t)(row / ST_TILE_ROWS * nb) * tile_bytes;
    for (int64_t b = 0; b < nb; b++, in += tile_bytes, out += ST_BLOCK) {
        float d = load_f16(in + 2 * r);
        for (int i = 0; i < ST_BLOCK; i++) {
            int j = type == ST_Q4_0 ? i % 16 : i;
            uint8_t byte = in[32 + 64 * (j / 4) + 4 * r + j % 4];
            int q = type == ST_Q4_0 ? (byte >> (i / 16 * 4) & 15) - 8 : (int8_t)byte;
            out[i] = d * (float)q;
        }
    }
}
