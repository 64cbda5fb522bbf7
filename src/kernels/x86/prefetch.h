/* Software prefetches of the x86 tables: what the next part of a kernel will read, while this part computes. */
#ifndef SMALLTHINKER_X86_PREFETCH_H
#define SMALLTHINKER_X86_PREFETCH_H

#include "smallthinker/kernels.h"
#include "smallthinker/prefetch.h"

/* Bytes of one stream, in two steps: far ahead into the second-level cache, where more requests may wait, and near
 * ahead into the first. A table whose CPUs are quicker without the first step says 0. */
#ifndef PREFETCH_FAR
#define PREFETCH_FAR 4096
#endif
#define PREFETCH_NEAR 2048
#define DOWN_CHUNKS 12 /* chunks of the down projection computed together: 6 KiB of sums */

static inline void prefetch_ahead(const uint8_t *p, int bytes) {
    for (int i = 0; i < bytes; i += 64) {
        if (PREFETCH_FAR)
            st_prefetch_l2(p + PREFETCH_FAR + i);
        st_prefetch_l1(p + PREFETCH_NEAR + i);
    }
}

/* Share i of `of` of the down rows of a group's active neurons, n times 64 bytes of each. lines: the group's first row;
 * line: bytes of a row; index[4 * quads]. A share at a time, between computations: a burst would fill the reorder
 * buffer and stall them. */
static inline void prefetch_neurons(const uint8_t *lines, size_t line, int64_t n, const uint8_t *index, int quads,
                                    int64_t i, int64_t of) {
    for (int64_t k = 4 * quads * i / of; k < 4 * quads * (i + 1) / of; k++)
        for (int64_t j = 0; j < n; j++)
            st_prefetch_l1(lines + line * index[k] + 64 * j);
}

/* Bytes that may start and end anywhere in a cache line, into the second-level cache or into the first. */
static inline void prefetch_far(const uint8_t *p, int64_t bytes) {
    for (const uint8_t *q = p - (uintptr_t)p % 64; q < p + bytes; q += 64)
        st_prefetch_l2(q);
}

static inline void prefetch_near(const uint8_t *p, int64_t bytes) {
    for (const uint8_t *q = p - (uintptr_t)p % 64; q < p + bytes; q += 64)
        st_prefetch_l1(q);
}

#endif
