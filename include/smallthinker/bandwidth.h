/* Reads memory and does nothing else: the yardstick that kernels and decode are measured against. */
#ifndef SMALLTHINKER_BANDWIDTH_H
#define SMALLTHINKER_BANDWIDTH_H

#include <stddef.h>
#include <stdint.h>

/* Reads every byte of p[bytes] once, in the widest loads of this CPU, and returns their exclusive or (so that no
 * compiler drops the loads). p: 64-byte aligned. bytes: a multiple of streams * ST_READ_STEP. streams >= 1: that
 * many equal pieces are read in turns, a step of each. ahead: bytes of software prefetch, 0 for none; prefetches
 * may run past the end, which is harmless. */
#define ST_READ_STEP 256
uint64_t st_read_memory(const uint8_t *p, size_t bytes, int streams, size_t ahead);

#endif
