/* Where the parts of an expert stand (expert.h), and the way there from GGUF rows. Called by the engine, the packer and
 * the timing of kernels. */
#include "smallthinker/expert.h"

#include <string.h>

int st_expert_init(st_expert *e, int64_t d, int64_t f, int gate, int up, int down, int transposed, int pack) {
    size_t in = st_row_bytes(gate, d), out = transposed ? st_row_bytes(down, d) : st_row_bytes(down, f);
    *e = (st_expert){.d = d, .f = f, .gate = gate, .up = up, .down = down, .transposed = transposed, .tiled = -1};
    if (f <= 0 || !in || !st_row_bytes(up, d) || !out)
        return -1;
    e->rows[0] = in * (size_t)f;
    e->rows[1] = st_row_bytes(up, d) * (size_t)f;
    e->rows[2] = out * (size_t)(transposed ? f : d);
    e->up_at = e->rows[0];
    e->bytes = e->rows[2];
    if (pack && gate == up && up == down && st_sparse(gate) && f % ST_BLOCK == 0) {
        e->tiled = st_tiled(gate);
        e->up_at = st_tile16_bytes(gate, f, d);
        e->bytes = st_down_bytes(down, d, f);
        e->group_bytes = st_tile16_bytes(gate, ST_BLOCK, d);
    }
    e->down_at = e->up_at + e->rows[1];
    e->bytes += e->down_at;
    return 0;
}

void st_expert_pack(const st_expert *e, const uint8_t *gate, const uint8_t *up, const uint8_t *down, uint8_t *blob) {
    if (e->tiled < 0) {
        memcpy(blob, gate, e->rows[0]);
        memcpy(blob + e->up_at, up, e->rows[1]);
        memcpy(blob + e->down_at, down, e->rows[2]);
        return;
    }
    st_pack_tile16(e->gate, gate, e->f, e->d, blob, 0, (e->f + ST_TILE_ROWS - 1) / ST_TILE_ROWS);
    st_pack_rows(e->up, up, e->f, e->d, blob + e->up_at);
    st_pack_down(e->down, e->transposed, down, e->d, e->f, blob + e->down_at);
}

void st_expert_unpack(const st_expert *e, const uint8_t *blob, uint8_t *gate, uint8_t *up, uint8_t *down) {
    if (e->tiled < 0) {
        memcpy(gate, blob, e->rows[0]);
        memcpy(up, blob + e->up_at, e->rows[1]);
        memcpy(down, blob + e->down_at, e->rows[2]);
        return;
    }
    st_unpack_tile16(e->gate, blob, e->f, e->d, gate);
    st_unpack_rows(e->up, blob + e->up_at, e->f, e->d, up);
    st_unpack_down(e->down, e->transposed, blob + e->down_at, e->d, e->f, down);
}
