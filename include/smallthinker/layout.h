/* Layouts of weights and quantised activations as the kernels consume them, and the permutations from and
 * to GGUF rows. One layout serves every instruction set; packing never changes a bit of a weight or a scale,
 * it only moves them. Nothing here computes with weights except st_dequantize_tile16_row. */
#ifndef SMALLTHINKER_LAYOUT_H
#define SMALLTHINKER_LAYOUT_H

#include "smallthinker/types.h"

#define ST_TILE_ROWS 16   /* rows interleaved in one tile */
#define ST_BLOCK 32       /* columns that share a scale in Q4_0 and Q8_0 */
#define ST_DOWN_CHUNK 128 /* outputs of the down projection that stand together */

/* Tile16 takes 16 times the bytes of a row's block (types.h), for every 16 rows and every block. Rows are padded to a
 * multiple of 16 with zero bytes.
 * Tile16, Q4_0: for every 16 rows, for every block of 32 columns, 288 bytes:
 *   uint16 scale[16] (fp16, one a row), then 4 groups g of 64 bytes: byte 4*r + j of group g is byte 4*g + j of
 *   row r's block, so its low nibble is column 4*g + j and its high nibble column 16 + 4*g + j.
 * Tile16, Q8_0: the same with 8 groups of 64 bytes, byte 4*r + j of group g being column 4*g + j: 544 bytes.
 * Tile16, Q4_K: for every 256 columns a head of 256 bytes: uint16 d[16], dmin[16]; 8 times 16 bytes, a row's byte of
 *   block b being the low four bits of its scale and, above them, of its minimum; 4 times 16 bytes, a row's byte b (b <
 *   4) being from its low end the two bits above these of the scales of blocks b and 4 + b and of their minima. Then
 * for each of the 8 blocks of 32 columns the nibbles as in Q4_0: 256 bytes. Tile16, Q5_K: the same, and after each
 * block's nibbles 64 bytes of fifth bits: bit 2*g + h of byte 4*r + j is that of column 16*h + 4*g + j. Tile16, Q6_K:
 * for every 256 columns uint16 d[16], then for each of their 8 blocks of 32 columns 416 bytes: int8 scale[2][16] (of
 * the first and the last 16 columns), the low four bits as in Q4_0, and 2 groups h of 64 bytes with the two bits above:
 * byte 4*r + j of group h holds, from its low end, those of columns 8*h + j, 16 + 8*h + j, 8*h + 4 + j and 16 + 8*h + 4
 * + j. */
enum {
    ST_TILE_Q4_0_BYTES = ST_TILE_ROWS * ST_Q4_0_BYTES,
    ST_TILE_Q8_0_BYTES = ST_TILE_ROWS * ST_Q8_0_BYTES,
    ST_TILE_K_HEAD = 256,                                    /* of 256 columns of Q4_K or Q5_K */
    ST_TILE_Q4_K_BYTES = 256,                                /* of a block of 32 after it */
    ST_TILE_Q5_K_BYTES = 320,                                /* likewise */
    ST_TILE_Q6_K_SUPER_BYTES = ST_TILE_ROWS * ST_Q6_K_BYTES, /* of 256 columns: 32 + 8 * 416 */
    ST_TILE_Q6_K_BYTES = 416,                                /* of a block of 32 */
    ST_SUPER = ST_Q6_K_COLUMNS                               /* columns of a super-block of the K types */
};

/* Rows ("up"; one row is read alone when its neuron fires) take as many bytes a row as in GGUF: a head of scales, the
 * nibbles, and what is above them. nb = cols / 32 blocks, ns = cols / 256 super-blocks.
 * Nibbles: 16 bytes for every block in order: byte i has column i in the low nibble and column 16 + i in the high one.
 * Q4_0: the head is uint16 scale[nb].
 * Q4_K: the head is uint16 d[ns], dmin[ns], then of the 12 bytes that hold a super-block's scales and minima in GGUF
 * the first four of every super-block, the second four and the last four. Q5_K: the same, and after the nibbles 16
 * bytes for every 4 blocks: bit 2*b + h of byte i is the fifth bit of column 16*h + i of block b of these. Q6_K: the
 * head is uint16 d[ns], int8 scale[2][nb] (of the first 16 columns of the blocks, and of the last). After the nibbles
 * 16 bytes for every 2 blocks: byte i holds from its low end the two bits above the nibbles of columns i and 16 + i of
 * the first and of the second. */

/* Down, neuron-major; d padded with zeros to dp, a multiple of 128. Two pieces whose places an st_down_view tells: a
 * line for every neuron, and scales, which are read whole.
 * A line begins with the nibbles, dp/2 bytes, 64 for each chunk of 128 outputs: byte 16*L + 4*v + k of a chunk holds
 * its output 32*v + 4*L + k in the low nibble and output 32*v + 16 + 4*L + k in the high one. The lane order is what
 * interleaving four neurons byte by byte leaves in vector registers of any width. A neuron's line is contiguous because
 * skipping the silent ones then reads long runs: measured on DRAM, 38 % of the rows, two threads: 18 GB/s in runs of 64
 * bytes, 25 in 384.
 * Q5_K: then 64 bytes for every 4 chunks: bit 2*v + h of byte 16*L + 4*c + k is the fifth bit of output 32*v + 16*h +
 * 4*L + k of chunk c of these. Q6_K: then 64 bytes for every 2 chunks: bits 4*(v % 2) + 2*h and the next one of byte
 * 16*L + 8*c + 4*(v / 2) + k are the upper two of that output.
 * Scales, Q4_0: uint16[dp] for every group of 32 neurons.
 * Scales, Q4_K and Q5_K: for every super-block of 8 groups uint16 d[128], dmin[128] for each chunk; then for each
 * group, for each chunk, 192 bytes that hold the six bits of scale[128] and min[128] as the head of Tile16 does
 * (above), of output 16*b + r where it has block b and row r. Scales, Q6_K: for every super-block uint16[dp]; then for
 * each group, for each chunk, int8 scale[2][128], of the first and of the last 16 neurons.
 *
 * Down transposed, Q4_0, of files that quantise a neuron's down along the outputs: as large, and the lines are those
 * of Down; but the scales are uint16[dp/32] for every neuron, its own. */
enum {
    ST_DOWN_K_HEAD = 512,     /* of a chunk of a super-block of Q4_K or Q5_K */
    ST_DOWN_K_SCALES = 192,   /* of a chunk of a group */
    ST_DOWN_Q6_K_HEAD = 256,  /* likewise of Q6_K */
    ST_DOWN_Q6_K_SCALES = 256 /* likewise */
};

typedef struct st_down_view {
    const uint8_t *lines;  /* of neuron 0 */
    const uint8_t *scales; /* of group 0; transposed: of neuron 0 */
    size_t stride;         /* bytes from one neuron's line to the next */
    size_t scale_stride;   /* of one group's, or neuron's, scales; K types: an eighth of a super-block's */
} st_down_view;

/* Activations, Q8_0: 128 columns. q[0][b][i] is column 32*b + i, q[1][b][i] column 32*b + 16 + i.
 * corr[4*b] = -8 * (sum of block b), the other corr are 0; scale[4*b .. 4*b+3] all hold the block's scale.
 * value = scale * q. Columns beyond the row's end are zero with scale zero. */
typedef struct st_q8x4 {
    int8_t q[2][4][16];
    int32_t corr[16];
    float scale[16];
} st_q8x4;

/* The silenced-and-quantised output of 32 neurons of one expert for one token: only neurons whose quantised value is
 * not zero, in ascending order, four at a time. Up to three entries after the used ones, as far as there is room, and
 * whatever a last four needs, repeat the last index with value 0: so fours may begin anywhere. value of neuron index[i]
 * = scale * h[i]. */
typedef struct st_active {
    int8_t h[32];
    uint8_t index[32];
    int32_t corr;     /* -8 * sum of h */
    int32_t corr_low; /* the same of the first 16 neurons only */
    int32_t low;      /* used entries of the first 16 neurons */
    int32_t high;     /* and of the last */
    int32_t quads;    /* used entries / 4, rounded up */
    float scale;
    int32_t count; /* neurons whose gate was positive */
} st_active;

/* The output of 32 neurons of one expert for one token where down is transposed: only those that are not zero, four at
 * a time (padded with the last index and 0). Each block of 32 outputs takes these times its own scales, and quantises
 * the products: so every kernel has integers to multiply in either layout. */
typedef struct st_fired {
    float h[32];
    uint8_t index[32];
    int32_t quads; /* used entries / 4, rounded up */
} st_fired;

/* Tiles that `rows` rows take. */
static inline int64_t st_tiles(int64_t rows) { return (rows + ST_TILE_ROWS - 1) / ST_TILE_ROWS; }

/* Bytes of a matrix in Tile16; 0 where the type has none (types.h) or the shape does not fit. */
size_t st_tile16_bytes(int type, int64_t rows, int64_t cols);
/* Bytes of one neuron's line of Down, and of a group's scales, or transposed a neuron's (K types: an eighth of those of
 * a super-block); 0 where the type has no Down, or none transposed. */
size_t st_down_line_bytes(int type, int64_t d);
size_t st_down_scale_bytes(int type, int transposed, int64_t d);

/* Permutations of a type that has the layout; src and dst must not overlap. Tiles t0..t1 of a matrix (16 rows each). */
void st_pack_tile16(int type, const uint8_t *src, int64_t rows, int64_t cols, uint8_t *dst, int64_t t0, int64_t t1);
void st_unpack_tile16(int type, const uint8_t *src, int64_t rows, int64_t cols, uint8_t *dst);
/* As many bytes a row as in GGUF, `stride` bytes from one to the next. */
void st_pack_rows(int type, const uint8_t *src, int64_t rows, int64_t cols, uint8_t *dst, size_t stride);
void st_unpack_rows(int type, const uint8_t *src, size_t stride, int64_t rows, int64_t cols, uint8_t *dst);
/* GGUF rows [d][f], or [f][d] where transposed, to lines and scales with the strides of `to`, and back. */
void st_pack_down(int type, int transposed, const uint8_t *src, int64_t d, int64_t f, uint8_t *lines, uint8_t *scales,
                  const st_down_view *to);
void st_unpack_down(int type, int transposed, const st_down_view *from, int64_t d, int64_t f, uint8_t *dst);

/* Row r of a Tile16 matrix as floats. */
void st_dequantize_tile16_row(int type, const uint8_t *tiles, int64_t cols, int64_t r, float *out);

#endif
