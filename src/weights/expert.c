/* Where the parts of an expert stand (expert.h), and the way there from GGUF rows. Called by the engine, the packer and
 * the timing of kernels. */
#include "smallthinker/expert.h"

#include <string.h>

static void make_tiles(st_expert *e) {
    e->layout = ST_EXPERT_TILES;
    e->up_at = st_tile16_bytes(e->gate, e->f, e->d);
    e->down_at = e->up_at + st_tile16_bytes(e->up, e->f, e->d);
    e->bytes = e->down_at + st_tile16_bytes(e->down, e->d, e->f);
}

static void make_sparse(st_expert *e) {
    size_t line = st_down_line_bytes(e->down, e->d), row = st_row_bytes(e->up, e->d);
    size_t scales = st_down_scale_bytes(e->down, e->transposed, e->d);
    e->layout = ST_EXPERT_SPARSE;
    e->group_bytes = st_tile16_bytes(e->gate, ST_BLOCK, e->d);
    e->down_at = st_tile16_bytes(e->gate, e->f, e->d);
    e->up_at = e->down_at + line;
    e->stride = (line + row + (e->transposed ? scales : 0) + 63) / 64 * 64;
    e->bytes = e->down_at + (size_t)e->f * e->stride;
    e->scales_at = e->transposed ? e->up_at + row : e->bytes;
    e->scale_stride = e->transposed ? e->stride : scales;
    if (!e->transposed)
        e->bytes += (size_t)(e->f / ST_BLOCK) * scales;
}

int st_expert_init(st_expert *e, int64_t d, int64_t f, int gate, int up, int down, int transposed, int pack) {
    size_t in = st_row_bytes(gate, d), out = transposed ? st_row_bytes(down, d) : st_row_bytes(down, f);
    *e = (st_expert){.d = d,
                     .f = f,
                     .gate = gate,
                     .up = up,
                     .down = down,
                     .transposed = transposed,
                     .tiled = {st_tiled(gate), st_tiled(up), st_tiled(down)}};
    if (f <= 0 || !in || !st_row_bytes(up, d) || !out)
        return -1;
    e->rows[0] = in * (size_t)f;
    e->rows[1] = st_row_bytes(up, d) * (size_t)f;
    e->rows[2] = out * (size_t)(transposed ? f : d);
    e->up_at = e->rows[0];
    e->down_at = e->up_at + e->rows[1];
    e->bytes = e->down_at + e->rows[2];
    if (pack && e->tiled[0] >= 0 && st_sparse(up) && st_down_scale_bytes(down, transposed, d) && f % ST_BLOCK == 0)
        make_sparse(e);
    else if (pack && !transposed && e->tiled[0] >= 0 && e->tiled[1] >= 0 && e->tiled[2] >= 0)
        make_tiles(e);
    return 0;
}

void st_expert_pack(const st_expert *e, const uint8_t *gate, const uint8_t *up, const uint8_t *down, uint8_t *blob) {
    uint8_t *up_to = blob + e->up_at, *down_to = blob + e->down_at;
    if (e->layout == ST_EXPERT_ROWS) {
        memcpy(blob, gate, e->rows[0]);
        memcpy(up_to, up, e->rows[1]);
        memcpy(down_to, down, e->rows[2]);
        return;
    }
    st_pack_tile16(e->gate, gate, e->f, e->d, blob, 0, st_tiles(e->f));
    if (e->layout == ST_EXPERT_TILES) {
        st_pack_tile16(e->up, up, e->f, e->d, up_to, 0, st_tiles(e->f));
        st_pack_tile16(e->down, down, e->d, e->f, down_to, 0, st_tiles(e->d));
    } else {
        st_down_view view = st_expert_down(e, blob);
        size_t used = st_row_bytes(e->up, e->d) + e->up_at - e->down_at;
        for (int64_t n = 0; n < e->f; n++)
            memset(down_to + (size_t)n * e->stride + used, 0, e->stride - used);
        st_pack_rows(e->up, up, e->f, e->d, up_to, e->stride);
        st_pack_down(e->down, e->transposed, down, e->d, e->f, down_to, blob + e->scales_at, &view);
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
        st_down_view view = st_expert_down(e, blob);
        st_unpack_rows(e->up, up_from, e->stride, e->f, e->d, up);
        st_unpack_down(e->down, e->transposed, &view, e->d, e->f, down);
    }
}
