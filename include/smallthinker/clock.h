/* Time that only passes: for waits, and for what takes how long. */
#ifndef SMALLTHINKER_CLOCK_H
#define SMALLTHINKER_CLOCK_H

#include <stdint.h>
#include <time.h>

static inline int64_t st_nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

#endif
