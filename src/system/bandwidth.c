/* The memory-read yardstick of `bench`, `doctor` and `make bench`. The forward pass never calls it. */
#include "smallthinker/bandwidth.h"

#include "smallthinker/prefetch.h"

/* One reader per vector width. Four sums, so that the loads do not wait for one another. */
#define READER(NAME, TARGET, WIDTH)                                                                                    \
    TARGET static uint64_t NAME(const uint8_t *p, size_t piece, int streams, size_t ahead) {                           \
        typedef uint64_t vec __attribute__((vector_size(WIDTH), may_alias));                                           \
        vec sum[4] = {{0}};                                                                                            \
        for (size_t at = 0; at < piece; at += ST_READ_STEP)                                                            \
            for (int s = 0; s < streams; s++) {                                                                        \
                const uint8_t *q = p + (size_t)s * piece + at;                                                         \
                for (size_t i = 0; ahead && i < ST_READ_STEP; i += 64)                                                 \
                    st_prefetch_l1(q + ahead + i);                                                                     \
                for (size_t i = 0; i < ST_READ_STEP / WIDTH; i++)                                                      \
                    sum[i % 4] ^= ((const vec *)q)[i];                                                                 \
            }                                                                                                          \
        sum[0] ^= sum[1] ^ sum[2] ^ sum[3];                                                                            \
        uint64_t result = 0;                                                                                           \
        for (size_t i = 0; i < WIDTH / 8; i++)                                                                         \
            result ^= sum[0][i];                                                                                       \
        return result;                                                                                                 \
    }

READER(read_16, , 16)
#if defined(__x86_64__)
READER(read_32, __attribute__((target("avx2"))), 32)
READER(read_64, __attribute__((target("avx512f"))), 64)
#endif

uint64_t st_read_memory(const uint8_t *p, size_t bytes, int streams, size_t ahead) {
    size_t piece = bytes / (size_t)streams;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f"))
        return read_64(p, piece, streams, ahead);
    if (__builtin_cpu_supports("avx2"))
        return read_32(p, piece, streams, ahead);
#endif
    return read_16(p, piece, streams, ahead);
}
