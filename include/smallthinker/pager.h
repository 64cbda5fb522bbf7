/* A fixed number of memory slots for experts that live in a file: asked for ahead, read by I/O threads, pinned
 * while in use. One caller at a time asks and releases; any thread may take. */
#ifndef SMALLTHINKER_PAGER_H
#define SMALLTHINKER_PAGER_H

#include <stddef.h>
#include <stdint.h>

typedef struct st_pager st_pager;

/* Reads exactly size bytes at offset; 0 or a negative status. Called by several threads. */
typedef int (*st_pager_read)(void *source, int64_t offset, size_t size, void *buffer);

typedef struct st_pager_config {
    st_pager_read read;
    void *source;
    int64_t experts;        /* of all layers together; ids are 0 .. experts - 1 */
    const int64_t *offsets; /* of every expert in the file; copied */
    size_t bytes;           /* of one expert, a multiple of 4096 */
    uint8_t *memory;        /* slots * bytes, 4096-aligned; the caller's, must outlive the pager */
    int64_t slots;
    int io_threads;
    const char *policy; /* a name of eviction.c; NULL is the default */
} st_pager_config;

typedef struct st_pager_stats {
    int64_t hits, misses, bytes_read, read_errors, evictions;
    int64_t stall_ns; /* time that takers waited, summed over threads */
} st_pager_stats;

/* NULL where memory or threads cannot be had, or the policy is unknown. */
st_pager *st_pager_create(const st_pager_config *config);
void st_pager_destroy(st_pager *pager); /* NULL is fine; reads in flight are waited for */

/* Pins n distinct experts and starts reading those that are absent. tokens: how many tokens use each (NULL: one).
 * now: the position in time for eviction, in tokens. At most `slots` experts may be pinned at once. */
void st_pager_want(st_pager *pager, const int32_t *ids, const int32_t *tokens, int64_t n, double now);
/* 1 where a wanted expert has arrived (or failed): take will not wait. */
int st_pager_ready(st_pager *pager, int32_t id);
/* The weights of a wanted expert, waiting for them; NULL where the read failed. Valid until release. */
const uint8_t *st_pager_take(st_pager *pager, int32_t id);
/* Unpins what want pinned. A failed expert may be wanted again. */
void st_pager_release(st_pager *pager, const int32_t *ids, int64_t n);

void st_pager_get_stats(st_pager *pager, st_pager_stats *stats);

#endif
