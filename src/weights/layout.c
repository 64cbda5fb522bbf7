/* Permutations between GGUF rows and the layouts of layout.h. Called where weights are set, by the experts
 * (expert.c) and by tests; the forward pass only takes single rows of an embedding from here. */
#include "smallthinker/layout.h"

#include <string.h>

/* Tile16: for each tiled type, one row's block from GGUF to row r of a tile's block, and back. */

static inline void pack_block_q4_0(const uint8_t *block, int r, uint8_t *tile) {
    memcpy(tile + 2 * r, block, 2);
    for (int g = 0; g < 4; g++)
        memcpy(tile + 32 + 64 * g + 4 * r, block + 2 + 4 * g, 4);
}

static inline void unpack_block_q4_0(const uint8_t *tile, int r, uint8_t *block) {
    memcpy(block, tile + 2 * r, 2);
    for (int g = 0; g < 4; g++)
        memcpy(block + 2 + 4 * g, tile + 32 + 64 * g + 4 * r, 4);
}

static inline void pack_block_q8_0(const uint8_t *block, int r, uint8_t *tile) {
    memcpy(tile + 2 * r, block, 2);
    for (int g = 0; g < 8; g++)
        memcpy(tile + 32 + 64 * g + 4 * r, block + 2 + 4 * g, 4);
}

static inline void unpack_block_q8_0(const uint8_t *tile, int r, uint8_t *block) {
    memcpy(block, tile + 2 * r, 2);
    for (int g = 0; g < 8; g++)
        memcpy(block + 2 + 4 * g, tile + 32 + 64 * g + 4 * r, 4);
}

/* Q4_K and Q5_K. In a block of GGUF, the nibbles of blocks 2 * i and 2 * i + 1 of 32 columns share 32 bytes, and bit b
 * of 32 more is the fifth bit of block b's columns. five: bytes of fifth bits, 0 or 32. */

static inline void pack_k(const uint8_t *super, int r, uint8_t *tile, int five) {
    const uint8_t *high = super + 16, *nibbles = high + five;
    uint8_t scale[8], min[8];
    memcpy(tile + 2 * r, super, 2);
    memcpy(tile + 32 + 2 * r, super + 2, 2);
    st_k_scales(super + 4, scale, min);
    for (int b = 0; b < 8; b++)
        tile[64 + 16 * b + r] = (uint8_t)((scale[b] & 15) | min[b] << 4);
    for (int b = 0; b < 4; b++)
        tile[192 + 16 * b + r] =
            (uint8_t)(scale[b] >> 4 | scale[4 + b] >> 4 << 2 | min[b] >> 4 << 4 | min[4 + b] >> 4 << 6);
    tile += ST_TILE_K_HEAD;
    for (int b = 0; b < 8; b++, tile += five ? ST_TILE_Q5_K_BYTES : ST_TILE_Q4_K_BYTES) {
        const uint8_t *block = nibbles + b / 2 * 32;
        for (int i = 0; i < 16; i++) {
            int low = block[i] >> b % 2 * 4 & 15, up = block[16 + i] >> b % 2 * 4 & 15;
            tile[64 * (i / 4) + 4 * r + i % 4] = (uint8_t)(low | up << 4);
        }
        for (int j = 0; five && j < 4; j++) {
            int bits = 0;
            for (int k = 0; k < 8; k++) /* g = k / 2, h = k % 2 */
                bits |= (high[16 * (k % 2) + 4 * (k / 2) + j] >> b & 1) << k;
            tile[256 + 4 * r + j] = (uint8_t)bits;
        }
    }
}

static inline void unpack_k(const uint8_t *tile, int r, uint8_t *super, int five) {
    uint8_t *scales = super + 4, *high = super + 16, *nibbles = high + five;
    memset(super, 0, (size_t)(ST_Q4_K_BYTES + five));
    memcpy(super, tile + 2 * r, 2);
    memcpy(super + 2, tile + 32 + 2 * r, 2);
    for (int b = 0; b < 4; b++) {
        int first = tile[64 + 16 * b + r], last = tile[128 + 16 * b + r], above = tile[192 + 16 * b + r];
        scales[b] = (uint8_t)((first & 15) | (above & 3) << 4 | (above >> 2 & 3) << 6);
        scales[4 + b] = (uint8_t)(first >> 4 | (above >> 4 & 3) << 4 | above >> 6 << 6);
        scales[8 + b] = (uint8_t)last;
    }
    tile += ST_TILE_K_HEAD;
    for (int b = 0; b < 8; b++, tile += five ? ST_TILE_Q5_K_BYTES : ST_TILE_Q4_K_BYTES) {
        uint8_t *block = nibbles + b / 2 * 32;
        for (int i = 0; i < 16; i++) {
            int both = tile[64 * (i / 4) + 4 * r + i % 4];
            block[i] |= (uint8_t)((both & 15) << b % 2 * 4);
            block[16 + i] |= (uint8_t)(both >> 4 << b % 2 * 4);
        }
        for (int j = 0; five && j < 4; j++)
            for (int k = 0; k < 8; k++)
                high[16 * (k % 2) + 4 * (k / 2) + j] |= (uint8_t)((tile[256 + 4 * r + j] >> k & 1) << b);
    }
}

static inline void pack_block_q4_k(const uint8_t *super, int r, uint8_t *tile) { pack_k(super, r, tile, 0); }
static inline void unpack_block_q4_k(const uint8_t *tile, int r, uint8_t *super) { unpack_k(tile, r, super, 0); }
static inline void pack_block_q5_k(const uint8_t *super, int r, uint8_t *tile) { pack_k(super, r, tile, 32); }
static inline void unpack_block_q5_k(const uint8_t *tile, int r, uint8_t *super) { unpack_k(tile, r, super, 32); }

/* Where the low four bits of columns i and 16 + i (i < 16), and the bits above of columns i, 16 + i, 4 + i and 20 + i
 * (i < 4, 8 <= i < 12), of row r stand in a Q6_K block of a tile. */
static int q6_low(int r, int i) { return 32 + 64 * (i / 4) + 4 * r + i % 4; }
static int q6_high(int r, int i) { return 288 + 64 * (i / 8) + 4 * r + i % 4; }

static inline void pack_block_q6_k(const uint8_t *super, int r, uint8_t *tile) {
    memcpy(tile + 2 * r, super + 208, 2);
    tile += 32;
    for (int b = 0; b < ST_SUPER / ST_BLOCK; b++, tile += ST_TILE_Q6_K_BYTES) {
        int half = b / 4, quarter = b % 4;
        uint8_t low[ST_BLOCK], high[ST_BLOCK];
        for (int i = 0; i < ST_BLOCK; i++) {
            low[i] = super[64 * half + 32 * (quarter % 2) + i] >> 4 * (quarter / 2) & 15;
            high[i] = super[128 + 32 * half + i] >> 2 * quarter & 3;
        }
        tile[r] = super[192 + 2 * b];
        tile[16 + r] = super[192 + 2 * b + 1];
        for (int i = 0; i < 16; i++)
            tile[q6_low(r, i)] = (uint8_t)(low[i] | low[16 + i] << 4);
        for (int h = 0; h < 16; h += 8)
            for (int i = h; i < h + 4; i++)
                tile[q6_high(r, i)] = (uint8_t)(high[i] | high[16 + i] << 2 | high[4 + i] << 4 | high[20 + i] << 6);
    }
}

static inline void unpack_block_q6_k(const uint8_t *tile, int r, uint8_t *super) {
    memset(super, 0, ST_Q6_K_BYTES);
    memcpy(super + 208, tile + 2 * r, 2);
    tile += 32;
    for (int b = 0; b < ST_SUPER / ST_BLOCK; b++, tile += ST_TILE_Q6_K_BYTES) {
        int half = b / 4, quarter = b % 4;
        super[192 + 2 * b] = tile[r];
        super[192 + 2 * b + 1] = tile[16 + r];
        for (int i = 0; i < ST_BLOCK; i++) {
            int low = tile[q6_low(r, i % 16)] >> i / 16 * 4 & 15;
            int high = tile[q6_high(r, i % 16)] >> (i % 8 / 4 * 4 + i / 16 * 2) & 3;
            super[64 * half + 32 * (quarter % 2) + i] |= (uint8_t)(low << 4 * (quarter / 2));
            super[128 + 32 * half + i] |= (uint8_t)(high << 2 * quarter);
        }
    }
}

/* The same for tiles t0..t1 and for whole matrices, `blocks` a row; compiled for each type, as they pass gigabytes. */
#define TILE16(NAME, name)                                                                                             \
    static void pack_tiles_##name(const uint8_t *src, int64_t rows, int64_t blocks, uint8_t *dst, int64_t t0,          \
                                  int64_t t1) {                                                                        \
        const int64_t bytes = ST_##NAME##_BYTES;                                                                       \
        for (int64_t row = t0 * ST_TILE_ROWS; row < t1 * ST_TILE_ROWS && row < rows; row++) {                          \
            uint8_t *tile = dst + row / ST_TILE_ROWS * blocks * bytes * ST_TILE_ROWS;                                  \
            for (int64_t b = 0; b < blocks; b++)                                                                       \
                pack_block_##name(src + (row * blocks + b) * bytes, (int)(row % ST_TILE_ROWS),                         \
                                  tile + b * bytes * ST_TILE_ROWS);                                                    \
        }                                                                                                              \
    }                                                                                                                  \
    static void unpack_rows_of_tiles_##name(const uint8_t *src, int64_t row0, int64_t row1, int64_t blocks,            \
                                            uint8_t *dst) {                                                            \
        const int64_t bytes = ST_##NAME##_BYTES;                                                                       \
        for (int64_t row = row0; row < row1; row++) {                                                                  \
            const uint8_t *tile = src + row / ST_TILE_ROWS * blocks * bytes * ST_TILE_ROWS;                            \
            for (int64_t b = 0; b < blocks; b++, dst += bytes)                                                         \
                unpack_block_##name(tile + b * bytes * ST_TILE_ROWS, (int)(row % ST_TILE_ROWS), dst);                  \
        }                                                                                                              \
    }
ST_TILED_TYPES(TILE16)

#define TILE16_OF(NAME, name) [ST_TILED_##NAME] = {pack_tiles_##name, unpack_rows_of_tiles_##name},

static const struct {
    void (*pack)(const uint8_t *src, int64_t rows, int64_t blocks, uint8_t *dst, int64_t t0, int64_t t1);
    void (*unpack)(const uint8_t *src, int64_t row0, int64_t row1, int64_t blocks, uint8_t *dst);
} tile16[ST_TILED_COUNT] = {ST_TILED_TYPES(TILE16_OF)};

/* Any type's block. */
#define BLOCK_MEMBER(NAME, name, number, columns, bytes) uint8_t name[bytes];
union block {
    ST_TYPES(BLOCK_MEMBER)
};

size_t st_tile16_bytes(int type, int64_t rows, int64_t cols) {
    if (rows <= 0 || st_tiled(type) < 0)
        return 0;
    return (size_t)st_tiles(rows) * ST_TILE_ROWS * st_row_bytes(type, cols);
}

void st_pack_tile16(int type, const uint8_t *src, int64_t rows, int64_t cols, uint8_t *dst, int64_t t0, int64_t t1) {
    size_t tile_bytes = st_tile16_bytes(type, ST_TILE_ROWS, cols);
    if (t1 * ST_TILE_ROWS > rows)
        memset(dst + (size_t)(t1 - 1) * tile_bytes, 0, tile_bytes);
    tile16[st_tiled(type)].pack(src, rows, cols / st_type_of(type)->columns, dst, t0, t1);
}

void st_unpack_tile16(int type, const uint8_t *src, int64_t rows, int64_t cols, uint8_t *dst) {
    tile16[st_tiled(type)].unpack(src, 0, rows, cols / st_type_of(type)->columns, dst);
}

void st_dequantize_tile16_row(int type, const uint8_t *tiles, int64_t cols, int64_t row, float *out) {
    const st_type_info *t = st_type_of(type);
    int64_t blocks = cols / t->columns;
    const uint8_t *tile = tiles + (size_t)(row / ST_TILE_ROWS) * st_tile16_bytes(type, ST_TILE_ROWS, cols);
    union block block;
    for (int64_t b = 0; b < blocks; b++, tile += ST_TILE_ROWS * t->bytes, out += t->columns) {
        tile16[st_tiled(type)].unpack(tile, row % ST_TILE_ROWS, row % ST_TILE_ROWS + 1, 1, (uint8_t *)&block);
        t->dequantize((const uint8_t *)&block, 1, out);
    }
}

/* Rows and Down of Q4_0. */

static void pack_rows_q4_0(const uint8_t *src, int64_t rows, int64_t cols, uint8_t *dst, size_t stride) {
    int64_t nb = cols / ST_BLOCK;
    for (int64_t r = 0; r < rows; r++, src += ST_Q4_0_BYTES * nb, dst += stride)
        for (int64_t b = 0; b < nb; b++) {
            memcpy(dst + 2 * b, src + ST_Q4_0_BYTES * b, 2);
            memcpy(dst + 2 * nb + 16 * b, src + ST_Q4_0_BYTES * b + 2, 16);
        }
}

static void unpack_rows_q4_0(const uint8_t *src, size_t stride, int64_t rows, int64_t cols, uint8_t *dst) {
    int64_t nb = cols / ST_BLOCK;
    for (int64_t r = 0; r < rows; r++, src += stride, dst += ST_Q4_0_BYTES * nb)
        for (int64_t b = 0; b < nb; b++) {
            memcpy(dst + ST_Q4_0_BYTES * b, src + 2 * b, 2);
            memcpy(dst + ST_Q4_0_BYTES * b + 2, src + 2 * nb + 16 * b, 16);
        }
}

/* d in whole chunks. */
static size_t padded(int64_t d) { return (size_t)(d + ST_DOWN_CHUNK - 1) / ST_DOWN_CHUNK * ST_DOWN_CHUNK; }

static size_t down_line_bytes_q4_0(int64_t d) { return padded(d) / 2; }

static size_t down_scale_bytes_q4_0(int64_t d) { return padded(d) * 2; }

static size_t transposed_scale_bytes_q4_0(int64_t d) { return padded(d) / 16; }

/* Where output o (0..127) stands in a neuron's 64-byte piece of a line: byte, and 4 for the high nibble. */
static int down_byte(int o) { return (o % 16 / 4) * 16 + (o / 32) * 4 + o % 4; }
static int down_shift(int o) { return o % 32 >= 16 ? 4 : 0; }

static void pack_down_q4_0(const uint8_t *src, int64_t d, int64_t f, uint8_t *lines, uint8_t *scales,
                           const st_down_view *to) {
    int64_t groups = f / ST_BLOCK;
    for (int64_t n = 0; n < f; n++)
        memset(lines + (size_t)n * to->stride, 0, padded(d) / 2);
    for (int64_t g = 0; g < groups; g++)
        memset(scales + (size_t)g * to->scale_stride, 0, padded(d) * 2);
    /* Chunk by chunk and group by group: the 32 pieces of 64 bytes that are written stay in the first-level cache. */
    for (int64_t unit = 0; unit < (int64_t)padded(d) / ST_DOWN_CHUNK * groups; unit++) {
        int64_t first = unit / groups * ST_DOWN_CHUNK, g = unit % groups;
        uint8_t *piece = lines + 32 * to->stride * (size_t)g + first / 2;
        for (int64_t o = first; o < first + ST_DOWN_CHUNK && o < d; o++) {
            const uint8_t *block = src + (o * groups + g) * ST_Q4_0_BYTES;
            uint8_t *column = piece + down_byte((int)(o - first));
            int shift = down_shift((int)(o - first));
            memcpy(scales + (size_t)g * to->scale_stride + 2 * o, block, 2);
            for (size_t i = 0; i < 16; i++) {
                column[i * to->stride] |= (uint8_t)((block[2 + i] & 15) << shift);
                column[(16 + i) * to->stride] |= (uint8_t)(block[2 + i] >> 4 << shift);
            }
        }
    }
}

static void unpack_down_q4_0(const st_down_view *from, int64_t d, int64_t f, uint8_t *dst) {
    int64_t groups = f / ST_BLOCK;
    for (int64_t o = 0; o < d; o++)
        for (int64_t g = 0; g < groups; g++, dst += ST_Q4_0_BYTES) {
            const uint8_t *column = from->lines + 32 * from->stride * (size_t)g + o / ST_DOWN_CHUNK * 64 +
                                    down_byte((int)(o % ST_DOWN_CHUNK));
            int shift = down_shift((int)(o % ST_DOWN_CHUNK));
            memcpy(dst, from->scales + (size_t)g * from->scale_stride + 2 * o, 2);
            for (size_t i = 0; i < 16; i++)
                dst[2 + i] = (uint8_t)((column[i * from->stride] >> shift & 15) |
                                       (column[(16 + i) * from->stride] >> shift & 15) << 4);
        }
}

/* A block's nibble bytes hold outputs j and 16 + j, as the bytes of a line do: four of them move together. */
static size_t transposed_place(int64_t b, int four) { return (size_t)(b / 4 * 64 + 16 * four + b % 4 * 4); }

static void pack_down_transposed_q4_0(const uint8_t *src, int64_t d, int64_t f, uint8_t *lines, uint8_t *scales,
                                      const st_down_view *to) {
    for (int64_t n = 0; n < f; n++, scales += to->scale_stride, lines += to->stride) {
        memset(scales, 0, padded(d) / 16);
        memset(lines, 0, padded(d) / 2);
        for (int64_t b = 0; b < d / ST_BLOCK; b++, src += ST_Q4_0_BYTES) {
            memcpy(scales + 2 * b, src, 2);
            for (int four = 0; four < 4; four++)
                memcpy(lines + transposed_place(b, four), src + 2 + 4 * four, 4);
        }
    }
}

static void unpack_down_transposed_q4_0(const st_down_view *from, int64_t d, int64_t f, uint8_t *dst) {
    const uint8_t *scales = from->scales, *lines = from->lines;
    for (int64_t n = 0; n < f; n++, scales += from->scale_stride, lines += from->stride)
        for (int64_t b = 0; b < d / ST_BLOCK; b++, dst += ST_Q4_0_BYTES) {
            memcpy(dst, scales + 2 * b, 2);
            for (int four = 0; four < 4; four++)
                memcpy(dst + 2 + 4 * four, lines + transposed_place(b, four), 4);
        }
}

/* Rows and Down of the K types. bits: of a code, 4, 5 or 6. */

/* The codes of a super-block's columns, and back into one whose other bits are zero or stay. */
static inline void k_codes(int bits, const uint8_t *super, uint8_t q[ST_SUPER]) {
    for (int b = 0; b < ST_SUPER / ST_BLOCK; b++)
        for (int i = 0; i < ST_BLOCK; i++) {
            int low, above = 0;
            if (bits == 6) {
                low = super[64 * (b / 4) + 32 * (b % 2) + i] >> 4 * (b % 4 / 2) & 15;
                above = super[128 + 32 * (b / 4) + i] >> 2 * (b % 4) & 3;
            } else {
                low = super[(bits == 5 ? 48 : 16) + 32 * (b / 2) + i] >> 4 * (b % 2) & 15;
                above = bits == 5 ? super[16 + i] >> b & 1 : 0;
            }
            q[ST_BLOCK * b + i] = (uint8_t)(low | above << 4);
        }
}

static inline void k_set_codes(int bits, const uint8_t q[ST_SUPER], uint8_t *super) {
    for (int b = 0; b < ST_SUPER / ST_BLOCK; b++)
        for (int i = 0; i < ST_BLOCK; i++) {
            int low = q[ST_BLOCK * b + i] & 15, above = q[ST_BLOCK * b + i] >> 4;
            if (bits == 6) {
                super[64 * (b / 4) + 32 * (b % 2) + i] |= (uint8_t)(low << 4 * (b % 4 / 2));
                super[128 + 32 * (b / 4) + i] |= (uint8_t)(above << 2 * (b % 4));
            } else {
                super[(bits == 5 ? 48 : 16) + 32 * (b / 2) + i] |= (uint8_t)(low << 4 * (b % 2));
                if (bits == 5)
                    super[16 + i] |= (uint8_t)(above << b);
            }
        }
}

static inline int64_t k_bytes(int bits) {
    return bits == 4 ? ST_Q4_K_BYTES : bits == 5 ? ST_Q5_K_BYTES : ST_Q6_K_BYTES;
}

/* Where piece i of the head of super-block s of ns stands in a row of Rows, and in GGUF, and its bytes; 0: no more. */
static inline int k_head_piece(int bits, int i, int64_t s, int64_t ns, int64_t *row, int64_t *super) {
    if (bits == 6) { /* d; scales, which alternate between the halves of a block */
        *row = i == 0 ? 2 * s : 2 * ns + (i - 1) % 2 * 8 * ns + 8 * s + (i - 1) / 2;
        *super = i == 0 ? 208 : 191 + i;
        return i == 0 ? 2 : i <= 16;
    }
    *row = i < 2 ? 2 * (i * ns + s) : 4 * ((i - 1) * ns + s); /* d, dmin; three times four bytes */
    *super = i < 2 ? 2 * i : 4 * (i - 1);
    return i < 2 ? 2 : i < 5 ? 4 : 0;
}

static inline void pack_rows_k(int bits, const uint8_t *src, int64_t rows, int64_t cols, uint8_t *dst, size_t stride) {
    int64_t ns = cols / ST_SUPER, head = bits == 6 ? 18 : 16, from, to;
    for (int64_t r = 0; r < rows; r++, dst += stride) {
        uint8_t *nibbles = dst + head * ns, *above = nibbles + ST_SUPER / 2 * ns;
        for (int64_t s = 0; s < ns; s++, src += k_bytes(bits), nibbles += ST_SUPER / 2, above += 32 * (bits - 4)) {
            uint8_t q[ST_SUPER];
            for (int i = 0, n; (n = k_head_piece(bits, i, s, ns, &to, &from)) > 0; i++)
                memcpy(dst + to, src + from, (size_t)n);
            k_codes(bits, src, q);
            for (int i = 0; i < ST_SUPER / 2; i++) {
                const uint8_t *code = q + i / 16 * ST_BLOCK + i % 16;
                nibbles[i] = (uint8_t)((code[0] & 15) | code[16] << 4);
            }
            for (int i = 0; i < 32 * (bits - 4); i++) {
                const uint8_t *code = q + i / 16 * (bits == 5 ? 128 : 64) + i % 16;
                int byte = 0;
                for (int k = 0; k < (bits == 5 ? 8 : 4); k++)
                    byte |= code[16 * k] >> 4 << (bits - 4) * k;
                above[i] = (uint8_t)byte;
            }
        }
    }
}

static inline void unpack_rows_k(int bits, const uint8_t *src, size_t stride, int64_t rows, int64_t cols,
                                 uint8_t *dst) {
    int64_t ns = cols / ST_SUPER, head = bits == 6 ? 18 : 16, from, to;
    for (int64_t r = 0; r < rows; r++, src += stride) {
        const uint8_t *nibbles = src + head * ns, *above = nibbles + ST_SUPER / 2 * ns;
        for (int64_t s = 0; s < ns; s++, dst += k_bytes(bits), nibbles += ST_SUPER / 2, above += 32 * (bits - 4)) {
            uint8_t q[ST_SUPER];
            memset(dst, 0, (size_t)k_bytes(bits));
            for (int i = 0, n; (n = k_head_piece(bits, i, s, ns, &from, &to)) > 0; i++)
                memcpy(dst + to, src + from, (size_t)n);
            for (int i = 0; i < ST_SUPER; i++)
                q[i] = nibbles[i / 32 * 16 + i % 16] >> i % 32 / 16 * 4 & 15;
            for (int i = 0; bits == 5 && i < ST_SUPER; i++)
                q[i] |= (uint8_t)((above[i / 128 * 16 + i % 16] >> i % 128 / 16 & 1) << 4);
            for (int i = 0; bits == 6 && i < ST_SUPER; i++)
                q[i] |= (uint8_t)((above[i / 64 * 16 + i % 16] >> i % 64 / 16 * 2 & 3) << 4);
            k_set_codes(bits, q, dst);
        }
    }
}

static inline size_t down_line_k(int bits, int64_t d) {
    size_t chunks = padded(d) / ST_DOWN_CHUNK;
    return chunks * 64 + (bits == 4 ? 0 : bits == 5 ? (chunks + 3) / 4 * 64 : (chunks + 1) / 2 * 64);
}

/* Of an eighth of a super-block. */
static inline size_t down_scale_k(int bits, int64_t d) {
    size_t head = bits == 6 ? ST_DOWN_Q6_K_HEAD : ST_DOWN_K_HEAD;
    return padded(d) / ST_DOWN_CHUNK * (head / 8 + (bits == 6 ? ST_DOWN_Q6_K_SCALES : ST_DOWN_K_SCALES));
}

/* Where the bits above output o's nibble stand in a line of dp outputs: byte and shift. */
static inline size_t down_above(int bits, size_t dp, int64_t o, int *shift) {
    size_t chunk = (size_t)o / ST_DOWN_CHUNK, L = (size_t)o % 16 / 4, k = (size_t)o % 4;
    int v = (int)(o % ST_DOWN_CHUNK / 32), h = o % 32 >= 16;
    *shift = bits == 5 ? 2 * v + h : v % 2 * 4 + 2 * h;
    if (bits == 5)
        return dp / 2 + chunk / 4 * 64 + 16 * L + chunk % 4 * 4 + k;
    return dp / 2 + chunk / 2 * 64 + 16 * L + chunk % 2 * 8 + (size_t)v / 2 * 4 + k;
}

/* Scales of output o and super-block s, of whose chunks each group has `chunks`: to Down from a block, and back. */
static inline void pack_down_scales(int bits, const uint8_t *super, size_t chunks, int64_t o, uint8_t *scales) {
    size_t chunk = (size_t)o / ST_DOWN_CHUNK, r = (size_t)o % ST_DOWN_CHUNK;
    if (bits == 6) {
        memcpy(scales + ST_DOWN_Q6_K_HEAD * chunk + 2 * r, super + 208, 2);
        scales += ST_DOWN_Q6_K_HEAD * chunks + ST_DOWN_Q6_K_SCALES * chunk + r;
        for (size_t i = 0; i < 16; i++)
            scales[ST_DOWN_Q6_K_SCALES * chunks * (i / 2) + i % 2 * 128] = super[192 + i];
        return;
    }
    uint8_t scale[8], min[8];
    memcpy(scales + ST_DOWN_K_HEAD * chunk + 2 * r, super, 2);
    memcpy(scales + ST_DOWN_K_HEAD * chunk + 256 + 2 * r, super + 2, 2);
    st_k_scales(super + 4, scale, min);
    scales += ST_DOWN_K_HEAD * chunks + ST_DOWN_K_SCALES * chunk;
    for (int g = 0; g < 8; g++, scales += ST_DOWN_K_SCALES * chunks) {
        scales[r] = (uint8_t)((scale[g] & 15) | min[g] << 4);
        scales[128 + r % 64] |= (uint8_t)((scale[g] >> 4 | min[g] >> 4 << 4) << r / 64 * 2);
    }
}

static inline void unpack_down_scales(int bits, const uint8_t *scales, size_t chunks, int64_t o, uint8_t *super) {
    size_t chunk = (size_t)o / ST_DOWN_CHUNK, r = (size_t)o % ST_DOWN_CHUNK;
    if (bits == 6) {
        memcpy(super + 208, scales + ST_DOWN_Q6_K_HEAD * chunk + 2 * r, 2);
        scales += ST_DOWN_Q6_K_HEAD * chunks + ST_DOWN_Q6_K_SCALES * chunk + r;
        for (size_t i = 0; i < 16; i++)
            super[192 + i] = scales[ST_DOWN_Q6_K_SCALES * chunks * (i / 2) + i % 2 * 128];
        return;
    }
    memcpy(super, scales + ST_DOWN_K_HEAD * chunk + 2 * r, 2);
    memcpy(super + 2, scales + ST_DOWN_K_HEAD * chunk + 256 + 2 * r, 2);
    scales += ST_DOWN_K_HEAD * chunks + ST_DOWN_K_SCALES * chunk;
    uint8_t *packed = super + 4;
    for (int g = 0; g < 8; g++, scales += ST_DOWN_K_SCALES * chunks) {
        int above = scales[128 + r % 64] >> r / 64 * 2, scale = (scales[r] & 15) | (above & 3) << 4;
        int min = scales[r] >> 4 | (above >> 4 & 3) << 4;
        if (g < 4) {
            packed[g] |= (uint8_t)scale;
            packed[4 + g] |= (uint8_t)min;
        } else {
            packed[g - 4] |= (uint8_t)(scale >> 4 << 6);
            packed[g] |= (uint8_t)(min >> 4 << 6);
            packed[4 + g] = (uint8_t)((scale & 15) | (min & 15) << 4);
        }
    }
}

/* Chunk by chunk and super-block by super-block, for the cache. */
static inline void pack_down_k(int bits, const uint8_t *src, int64_t d, int64_t f, uint8_t *lines, uint8_t *scales,
                               const st_down_view *to) {
    int64_t ns = f / ST_SUPER;
    size_t dp = padded(d), chunks = dp / ST_DOWN_CHUNK;
    for (int64_t n = 0; n < f; n++)
        memset(lines + (size_t)n * to->stride, 0, down_line_k(bits, d));
    memset(scales, 0, 8 * to->scale_stride * (size_t)ns);
    for (int64_t unit = 0; unit < (int64_t)chunks * ns; unit++) {
        int64_t first = unit / ns * ST_DOWN_CHUNK, s = unit % ns;
        uint8_t *piece = lines + ST_SUPER * to->stride * (size_t)s;
        for (int64_t o = first; o < first + ST_DOWN_CHUNK && o < d; o++) {
            const uint8_t *super = src + (o * ns + s) * k_bytes(bits);
            uint8_t q[ST_SUPER], *column = piece + first / 2 + down_byte((int)(o - first)), *above = piece;
            int shift = down_shift((int)(o - first)), shift_above = 0;
            if (bits > 4)
                above += down_above(bits, dp, o, &shift_above);
            pack_down_scales(bits, super, chunks, o, scales + 8 * to->scale_stride * (size_t)s);
            k_codes(bits, super, q);
            for (size_t i = 0; i < ST_SUPER; i++) {
                column[i * to->stride] |= (uint8_t)((q[i] & 15) << shift);
                if (bits > 4)
                    above[i * to->stride] |= (uint8_t)(q[i] >> 4 << shift_above);
            }
        }
    }
}

static inline void unpack_down_k(int bits, const st_down_view *from, int64_t d, int64_t f, uint8_t *dst) {
    int64_t ns = f / ST_SUPER;
    size_t dp = padded(d);
    for (int64_t o = 0; o < d; o++)
        for (int64_t s = 0; s < ns; s++, dst += k_bytes(bits)) {
            const uint8_t *piece = from->lines + ST_SUPER * from->stride * (size_t)s, *above = piece;
            const uint8_t *column = piece + o / ST_DOWN_CHUNK * 64 + down_byte((int)(o % ST_DOWN_CHUNK));
            int shift = down_shift((int)(o % ST_DOWN_CHUNK)), shift_above = 0;
            uint8_t q[ST_SUPER];
            if (bits > 4)
                above += down_above(bits, dp, o, &shift_above);
            for (size_t i = 0; i < ST_SUPER; i++) {
                q[i] = column[i * from->stride] >> shift & 15;
                if (bits > 4)
                    q[i] |= (uint8_t)((above[i * from->stride] >> shift_above & ((1 << (bits - 4)) - 1)) << 4);
            }
            memset(dst, 0, (size_t)k_bytes(bits));
            unpack_down_scales(bits, from->scales + 8 * from->scale_stride * (size_t)s, dp / ST_DOWN_CHUNK, o, dst);
            k_set_codes(bits, q, dst);
        }
}

#define SPARSE_K(name, bits)                                                                                           \
    static void pack_rows_##name(const uint8_t *src, int64_t rows, int64_t cols, uint8_t *dst, size_t stride) {        \
        pack_rows_k(bits, src, rows, cols, dst, stride);                                                               \
    }                                                                                                                  \
    static void unpack_rows_##name(const uint8_t *src, size_t stride, int64_t rows, int64_t cols, uint8_t *dst) {      \
        unpack_rows_k(bits, src, stride, rows, cols, dst);                                                             \
    }                                                                                                                  \
    static size_t down_line_bytes_##name(int64_t d) { return down_line_k(bits, d); }                                   \
    static size_t down_scale_bytes_##name(int64_t d) { return down_scale_k(bits, d); }                                 \
    static void pack_down_##name(const uint8_t *src, int64_t d, int64_t f, uint8_t *lines, uint8_t *scales,            \
                                 const st_down_view *to) {                                                             \
        pack_down_k(bits, src, d, f, lines, scales, to);                                                               \
    }                                                                                                                  \
    static void unpack_down_##name(const st_down_view *from, int64_t d, int64_t f, uint8_t *dst) {                     \
        unpack_down_k(bits, from, d, f, dst);                                                                          \
    }
SPARSE_K(q4_k, 4)
SPARSE_K(q5_k, 5)
SPARSE_K(q6_k, 6)

typedef void pack_down_fn(const uint8_t *src, int64_t d, int64_t f, uint8_t *lines, uint8_t *scales,
                          const st_down_view *to);
typedef void unpack_down_fn(const st_down_view *from, int64_t d, int64_t f, uint8_t *dst);

#define SPARSE_OF(NAME, name)                                                                                          \
    [ST_TILED_##NAME] = {pack_rows_##name,        unpack_rows_##name, down_line_bytes_##name,                          \
                         down_scale_bytes_##name, pack_down_##name,   unpack_down_##name},
#define TRANSPOSED_OF(NAME, name)                                                                                      \
    [ST_TILED_##NAME] = {transposed_scale_bytes_##name, pack_down_transposed_##name, unpack_down_transposed_##name},

static const struct {
    void (*pack_rows)(const uint8_t *src, int64_t rows, int64_t cols, uint8_t *dst, size_t stride);
    void (*unpack_rows)(const uint8_t *src, size_t stride, int64_t rows, int64_t cols, uint8_t *dst);
    size_t (*line_bytes)(int64_t d);
    size_t (*scale_bytes)(int64_t d);
    pack_down_fn *pack_down;
    unpack_down_fn *unpack_down;
} sparse[ST_TILED_COUNT] = {ST_SPARSE_TYPES(SPARSE_OF)};

static const struct {
    size_t (*scale_bytes)(int64_t d);
    pack_down_fn *pack_down;
    unpack_down_fn *unpack_down;
} transposed_down[ST_TILED_COUNT] = {ST_TRANSPOSED_TYPES(TRANSPOSED_OF)};

void st_pack_rows(int type, const uint8_t *src, int64_t rows, int64_t cols, uint8_t *dst, size_t stride) {
    sparse[st_tiled(type)].pack_rows(src, rows, cols, dst, stride);
}

void st_unpack_rows(int type, const uint8_t *src, size_t stride, int64_t rows, int64_t cols, uint8_t *dst) {
    sparse[st_tiled(type)].unpack_rows(src, stride, rows, cols, dst);
}

size_t st_down_line_bytes(int type, int64_t d) {
    return d <= 0 || !st_sparse(type) ? 0 : sparse[st_tiled(type)].line_bytes(d);
}

size_t st_down_scale_bytes(int type, int transposed, int64_t d) {
    if (d <= 0 || !st_sparse(type))
        return 0;
    if (!transposed)
        return sparse[st_tiled(type)].scale_bytes(d);
    return transposed_down[st_tiled(type)].scale_bytes ? transposed_down[st_tiled(type)].scale_bytes(d) : 0;
}

void st_pack_down(int type, int transposed, const uint8_t *src, int64_t d, int64_t f, uint8_t *lines, uint8_t *scales,
                  const st_down_view *to) {
    (transposed ? transposed_down[st_tiled(type)].pack_down : sparse[st_tiled(type)].pack_down)(src, d, f, lines,
                                                                                                scales, to);
}

void st_unpack_down(int type, int transposed, const st_down_view *from, int64_t d, int64_t f, uint8_t *dst) {
    (transposed ? transposed_down[st_tiled(type)].unpack_down : sparse[st_tiled(type)].unpack_down)(from, d, f, dst);
}
