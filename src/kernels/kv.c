/* The kinds of KV cache, and positions written into their pages (kv.h). Called by the forward pass, once per token,
 * layer and KV head; but for what a query's rounding leaves, it only moves bytes. */
#include "smallthinker/kv.h"

#include <string.h>

#define KIND(name, full, window) {name, ST_##full, ST_##window},

const st_kv_kind *st_kv_kind_at(int i) {
    static const st_kv_kind kinds[] = {ST_KV_KINDS(KIND)};
    return i >= 0 && i < (int)(sizeof kinds / sizeof kinds[0]) ? kinds + i : NULL;
}

size_t st_kv_head_bytes(int type, int64_t hd) {
    if (type == ST_F16)
        return (size_t)hd * ST_ATTN_CHUNK * 2;
    return type == ST_Q8_0 && hd % ST_BLOCK == 0 ? (size_t)(hd / ST_BLOCK) * ST_KV_Q8_BLOCK_BYTES : 0;
}

static void store_scale(const st_q8x4 *x, int64_t b, uint8_t *dst) {
    uint16_t scale = st_f32_to_f16(x[b / 4].scale[b % 4 * 4]);
    memcpy(dst, &scale, 2);
}

void st_kv_store_q8_key(const st_q8x4 *x, int64_t hd, int64_t position, uint8_t *keys) {
    int64_t nb = hd / ST_BLOCK, row = position % ST_TILE_ROWS;
    uint8_t *block = keys + position / ST_TILE_ROWS * nb * ST_TILE_Q8_0_BYTES;
    for (int64_t b = 0; b < nb; b++, block += ST_TILE_Q8_0_BYTES) {
        store_scale(x, b, block + 2 * row);
        for (int g = 0; g < 8; g++)
            memcpy(block + 32 + 64 * g + 4 * row, x[b / 4].q[g / 4][b % 4] + g % 4 * 4, 4);
    }
}

void st_kv_store_q8_value(const st_q8x4 *x, int64_t hd, int64_t position, uint8_t *values) {
    for (int64_t b = 0; b < hd / ST_BLOCK; b++, values += ST_KV_Q8_BLOCK_BYTES) {
        uint8_t *line = values + 2 * ST_ATTN_CHUNK + position / 2 * 64 + position % 2;
        store_scale(x, b, values + 2 * position);
        for (int i = 0; i < ST_BLOCK; i++)
            line[2 * i] = (uint8_t)x[b / 4].q[i / 16][b % 4][i % 16];
    }
}

void st_kv_query_rest(const float *x, const st_q8x4 *q, int64_t hd, st_q8x4 *rest) {
    const float whole = 12582912; /* 1.5 * 2^23: adding it rounds to nearest even */
    for (int64_t b = 0; b < hd / ST_BLOCK; b++, x += ST_BLOCK) {
        const st_q8x4 *from = q + b / 4;
        st_q8x4 *to = rest + b / 4;
        int64_t lane = b % 4;
        if (lane == 0)
            memset(to, 0, sizeof *to);
        float scale = from->scale[4 * lane], by = scale / 254;
        int32_t sum = 0;
        for (int i = 0; i < ST_BLOCK; i++) {
            float left = (x[i] - scale * (float)from->q[i / 16][lane][i % 16]) / by;
            float up = left + whole; /* by itself: the sum must lose its fraction */
            int8_t byte = left > -127.5f && left < 127.5f ? (int8_t)(up - whole) : 0; /* NaN: by is 0 or no number */
            to->q[i / 16][lane][i % 16] = byte;
            sum += byte;
        }
        to->corr[4 * lane] = -8 * sum;
        for (int i = 0; i < 4; i++)
            to->scale[4 * lane + i] = by;
    }
}
