/* Where the parts of an expert stand (expert.h), and the way there from GGUF rows. Called by the engine, the packer and
 * the timing of kernels. */
#include "smallthinker/expert.h"

#include <string.h>

int st_expert_init(st_expert *e, int64_t d, int64_t f, int gate, int up, int down, int transposed, int pack) {
    size_t in = st_row_bytes(gate, d), out = transposed ? st_row_bytes(down, d) : st_row_bytes(down, f);
    *e = (st_expert){.d = d, .f = f, .gate = gate, .up = up, .down = down, .transposed = transposed};
    if (f <= 0 || !in || !st_row_bytes(up, d) || !out)
        return -1;
    e->rows[0] = in * (size_t)f;
    e->rows[1] = st_row_bytes(up, d) * (size_t)f;
    e->rows[2] = out * (size_t)(transposed ? f : d);
    size_t bytes[3] = {e->rows[0], e->rows[1], e->rows[2]};
    for (int i = 0; i < 3; i++)
        e->tiled[i] = st_tiled(i == 0 ? gate : i == 1 ? up : down);
    if (pack && gate == up && up == down && st_sparse(gate) && f % ST_BLOCK == 0) {
        e->layout = ST_EXPERT_SPARSE;
        bytes[0] = st_tile16_bytes(gate, f, d);
        bytes[2] = st_down_bytes(down, d, f);
        e->group_bytes = st_tile16_bytes(gate, ST_BLOCK, d);
    } else if (pack && !transposed && e->tiled[0] >= 0 && e->tiled[1] >= 0 && e->tiled[2] >= 0) {
        e->layout = ST_EXPERT_TILES;
        bytes[0] = st_tile16_bytes(gate, f, d);
        bytes[1] = st_tile16_bytes(up, f, d);
        bytes[2] = st_tile16_bytes(down, d, f);
    }
    e->up_at = bytes[0];
    e->down_at = e->up_at + bytes[1];
    e->bytes = e->down_at + bytes[2];
    return 0;
}

/* Tiles that `rows` rows take. */
static int64_t tiles(int64_t rows) { return (rows + ST_TILE_ROWS - 1) / ST_TILE_ROWS; }

void st_expert_pack(const st_expert *e, const uint8_t *gate, const uint8_t *up, const uint8_t *down, uint8_t *blob) {
    uint8_t *up_to = blob + e->up_at, *down_to = blob + e->down_at;
    if (e->layout == ST_EXPERT_ROWS) {
        memcpy(blob, gate, e->rows[0]);
        memcpy(up_to, up, e->rows[1]);
        memcpy(down_to, down, e->rows[2]);
        return;
    }
    st_pack_tile16(e->gate, gate, e->f, e->d, blob, 0, tiles(e->f));
    if (e->layout == ST_EXPERT_TILES) {
        st_pack_tile16(e->up, up, e->f, e->d, up_to, 0, tiles(e->f));
        st_pack_tile16(e->down, down, e->d, e->f, down_to, 0, tiles(e->d));
    } else {
        st_pack_rows(e->up, up, e->f, e->d, up_to);
        st_pack_down(e->down, e->transposed, down, e->d, e->f, down_to);
    }
}

void st_expert_unpack(const st_expert *e, const uint8_t *blob, uint8_t *gate, uint8_t *up, uint8_t *down) {
    const uint8_t *up_from = blob + e->up_at, *down_from = blob + e->down_at;
    if (e->layout == ST_EXPERT_ROWS) {
        memcpy(gate, blob, e->rows[0]);
        memcpy(up, up_from, e->rows[1]);
        memcpy(down, down_from, e->rows[2]);
        return;
    }
    st_unpack_tile16(e->gate, blob, e->f, e->d, gate);
    if (e->layout == ST_EXPERT_TILES) {
        st_unpack_tile16(e->up, up_from, e->f, e->d, up);
        st_unpack_tile16(e->down, down_from, e->d, e->f, down);
    } else {
        st_unpack_rows(e->up, up_from, e->f, e->d, up);
        st_unpack_down(e->down, e->transposed, down_from, e->d, e->f, down);
    }
}
