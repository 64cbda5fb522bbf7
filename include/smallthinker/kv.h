/* Layout of a KV cache page: ST_ATTN_CHUNK positions of one layer, for every KV head its keys, then its values.
 * The engine owns the pages; the attention kernels read them. F16: keys and values are [256][hd] fp16. */
#ifndef SMALLTHINKER_KV_H
#define SMALLTHINKER_KV_H

#include "smallthinker/kernels.h"

/* What a user may ask for: X(name, type of layers that see the whole context, type of window layers), largest first,
 * which is the order "auto" tries them in. Window layers do not grow with the context: their precision is cheap. */
#define ST_KV_KINDS(X)                                                                                                 \
    X("f16", F16, F16)                                                                                                 \
    X("q8_0", Q8_0, F16)                                                                                               \
    X("q8_0-all", Q8_0, Q8_0)

typedef struct st_kv_kind {
    const char *name;
    int full, window; /* ST_F16 or ST_Q8_0 */
} st_kv_kind;

/* The kinds in order; NULL past the last. */
const st_kv_kind *st_kv_kind_at(int i);

/* Q8_0 (blocks of 32 dimensions of one position share an fp16 scale), nb = hd / 32:
 *   keys:   Tile16 of Q8_0 (layout.h), a position being a row, so that a gemm can make the scores.
 *   values: per block of dimensions uint16 scale[256] (fp16, one a position), then 128 lines of 64 bytes: byte
 *           2*i + j of line p is dimension i of the block at position 2*p + j. Two positions side by side are what
 *           the 16-bit pair products of every instruction set take. */
#define ST_KV_Q8_BLOCK_BYTES (ST_ATTN_CHUNK * (2 + ST_BLOCK))

/* Bytes of the keys, or of the values, of one KV head in a page. type: ST_F16 or ST_Q8_0; 0 where hd does not fit. */
size_t st_kv_head_bytes(int type, int64_t hd);

/* Write one position: x holds hd dimensions, quantised by the table's quantize; scales are rounded to fp16. */
void st_kv_store_q8_key(const st_q8x4 *x, int64_t hd, int64_t position, uint8_t *keys);
void st_kv_store_q8_value(const st_q8x4 *x, int64_t hd, int64_t position, uint8_t *values);

/* rest[hd] = x minus what its quantised form q stands for, in 254ths of q's scales: 254 * q + rest has eight bits more
 * than q. */
void st_kv_query_rest(const float *x, const st_q8x4 *q, int64_t hd, st_q8x4 *rest);

#endif
