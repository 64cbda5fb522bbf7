/* How a table's ffn asks for what its next steps read, included by the tables' files. */
#ifndef SMALLTHINKER_AHEAD_H
#define SMALLTHINKER_AHEAD_H

#include "plain.h"
#include "smallthinker/prefetch.h"

#ifndef ST_ASK /* a table may want them nearer */
#define ST_ASK st_prefetch_l2
#endif

/* Runs of lines, asked for in order and in equal parts. A core waits for 16 to 24 lines at most; who asks for more at
 * once is held up, and the computations with him. So a few are asked for between any two of these
 * (docs/notes/2026-11-30-lines-ahead.md). */
typedef struct runs_ahead {
    const uint8_t *p, *end; /* what is left of the run that is being asked for */
    int next, count;        /* runs */
    int lines;              /* of all runs */
    int parts, each;        /* in which they are asked for; lines of a part, rounded down */
    int remainder, carried; /* lines that `each` leaves of all; in so many parts of one, those of the parts so far */
    struct {
        const uint8_t *p, *end;
    } run[32 + 2];
} runs_ahead;

static inline void add_run(runs_ahead *a, const uint8_t *p, int64_t bytes) {
    const uint8_t *line = p - (uintptr_t)p % 64;
    a->run[a->count].p = line;
    a->run[a->count++].end = p + bytes;
    a->lines += (int)((p + bytes - line + 63) / 64);
}

/* More than is left of a run; apart, because it is rare. */
static __attribute__((noinline)) void ask_across(runs_ahead *a, int lines) {
    for (; lines > 0; lines--, a->p += 64) {
        if (a->p >= a->end) {
            if (a->next == a->count)
                return;
            a->p = a->run[a->next].p;
            a->end = a->run[a->next++].end;
        }
        ST_ASK(a->p);
    }
}

/* Asks for the next part. */
static inline void ask_ahead(runs_ahead *a) {
    const uint8_t *p = a->p;
    int lines = a->each;
    a->carried += a->remainder;
    if (a->carried >= a->parts) {
        a->carried -= a->parts;
        lines++;
    }
    if (a->end - p < 64 * lines) {
        ask_across(a, lines);
        return;
    }
    a->p += 64 * lines;
    for (; lines >= 4; lines -= 4, p += 256) {
        ST_ASK(p);
        ST_ASK(p + 64);
        ST_ASK(p + 128);
        ST_ASK(p + 192);
    }
    for (; lines > 0; lines--, p += 64)
        ST_ASK(p);
}

/* The scales of group g of Down; a K type's super-block has a head, which its other groups find in the cache. */
static inline void add_scales(runs_ahead *a, const st_down_view *down, int tiled, int64_t chunks, int64_t g) {
    if (tiled == ST_TILED_Q4_0) {
        add_run(a, down->scales + down->scale_stride * (size_t)g, chunks * 256);
        return;
    }
    int head = tiled == ST_TILED_Q6_K ? ST_DOWN_Q6_K_HEAD : ST_DOWN_K_HEAD;
    int scales = tiled == ST_TILED_Q6_K ? ST_DOWN_Q6_K_SCALES : ST_DOWN_K_SCALES;
    add_run(a, down_k_scales(down, g, head, scales), chunks * scales);
    if (g % 8 == 0 || g % ST_FFN_PART == 0)
        add_run(a, down_k_head(down, g), chunks * head);
}

/* Begins with what n (NULL: nothing) will need at the next stages, to be asked for in so many parts: all that stands
 * together of every neuron that fires (expert.h), and where down is not transposed the group's scales. tiled: the
 * place of its type; chunks: of a line. */
static inline void look_ahead(runs_ahead *a, const st_neurons *n, int tiled, int64_t chunks, int64_t parts) {
    a->p = a->end = (const uint8_t *)a; /* nothing, but not NULL: it is reckoned with */
    a->next = a->count = a->lines = a->carried = 0;
    for (int64_t k = 0; n && k < n->fired; k++)
        add_run(a, n->down.lines + n->down.stride * (size_t)n->index[k], (int64_t)n->down.stride);
    if (n && n->fired && !n->transposed)
        add_scales(a, &n->down, tiled, chunks, n->group);
    a->parts = (int)parts;
    a->each = a->lines / a->parts;
    a->remainder = a->lines % a->parts;
}

#endif
