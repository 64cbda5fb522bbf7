/* Weights on their way from GGUF rows in a file into the kernels' layouts, in pieces. Each piece is read and packed by
 * itself, so that all threads of a team can share the work. */
#ifndef SMALLTHINKER_LOAD_H
#define SMALLTHINKER_LOAD_H

#include "smallthinker/expert.h"
#include "smallthinker/threads.h"

#include <stddef.h>
#include <stdint.h>

/* What whole rows of a matrix become: tiles of 16, sparse rows, or the same bytes (which may be anything then). */
enum { ST_AS_TILES, ST_AS_ROWS, ST_AS_COPY };

typedef struct st_piece {
    const st_expert *expert; /* one whole expert; NULL: rows of a matrix */
    int fd[3];               /* where the bytes are: of the matrix [0], of the expert's gate, up and down */
    int64_t offset[3];
    size_t bytes[3]; /* 0 where there is no such part */
    int as, type;    /* of rows: ST_AS_..., and their type, number and columns */
    int64_t rows, cols;
    uint8_t *to; /* the expert's blob, or where these rows begin */
} st_piece;

enum { ST_LOADED = -1, ST_LOAD_INTERRUPTED = -2 };

/* Bytes of room that each thread of the team needs to read any of n pieces into. */
size_t st_load_room(const st_piece *pieces, int64_t n);
/* Reads and packs n pieces on a team's threads. room: of every thread, one after the other. interrupted: asked every
 * ask_ns nanoseconds, between pieces, on the calling thread, whether to stop. ST_LOADED, ST_LOAD_INTERRUPTED, or the
 * number of a piece that could not be read; some of the others were not read then. */
int64_t st_load(st_team *team, const st_piece *pieces, int64_t n, uint8_t *room, int (*interrupted)(void *caller),
                void *caller, int64_t ask_ns);

#endif
