/* One expert's weights as a blob: where gate, up and down stand in it. In memory, in a packed file and in a pager's
 * slot it is the same. Whoever holds blobs aligns and pads them. */
#ifndef SMALLTHINKER_EXPERT_H
#define SMALLTHINKER_EXPERT_H

#include "smallthinker/layout.h"

/* How the three stand there, one after another; see layout.h. */
enum {
    ST_EXPERT_ROWS,  /* GGUF rows, computed with in float */
    ST_EXPERT_TILES, /* all in Tile16: every neuron is computed */
    ST_EXPERT_SPARSE /* silent neurons are skipped: gate in Tile16; then for every neuron, together, its line of Down,
                      * its row of up, where down is transposed its scales, padded to 64 bytes; then the scales of Down.
                      * What a neuron needs is one run of bytes, because memory gives long runs faster (docs/notes). */
};

typedef struct st_expert {
    int64_t d, f;          /* width of the model, neurons */
    int gate, up, down;    /* types */
    int transposed;        /* down is [f][d] in the file: a neuron's weights are one row */
    int layout;            /* ST_EXPERT_... */
    int tiled[3];          /* places of their types' kernels (types.h), where they are not in rows */
    size_t rows[3];        /* bytes of gate, up and down as GGUF rows */
    size_t up_at, down_at; /* where they begin in a blob; gate at 0. Sparse: neuron 0's row, and its line */
    size_t stride;         /* sparse: bytes from one neuron to the next */
    size_t scales_at;      /* sparse: where the scales of down begin */
    size_t scale_stride;   /* sparse: see st_down_view */
    size_t bytes;          /* of a blob, without padding */
    size_t group_bytes;    /* sparse: of the gate's two tiles of 32 neurons, from group to group */
} st_expert;

/* Fills e; pack: sparse where gate has tiles, up Rows and down Down, or Down transposed, and f % 32 == 0; tiles where
 * all have these and down is not transposed; else rows. 0, or -1 where a type cannot be read or the sizes do not fit
 * it. */
int st_expert_init(st_expert *e, int64_t d, int64_t f, int gate, int up, int down, int transposed, int pack);

/* Down of a sparse expert's blob. */
static inline st_down_view st_expert_down(const st_expert *e, const uint8_t *blob) {
    return (st_down_view){blob + e->down_at, blob + e->scales_at, e->stride, e->scale_stride};
}

/* GGUF rows of one expert, e->rows bytes each, to its blob of e->bytes, and back. */
void st_expert_pack(const st_expert *e, const uint8_t *gate, const uint8_t *up, const uint8_t *down, uint8_t *blob);
void st_expert_unpack(const st_expert *e, const uint8_t *blob, uint8_t *gate, uint8_t *up, uint8_t *down);

#endif
