/* Random wants, takes and releases against a slow and faulty fake reader, checked byte by byte. Run by
 * tests/test_pager.py, plain and under sanitizers. Prints "ok" or dies. */
#include "smallthinker/pager.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { EXPERTS = 96, SLOTS = 20, BYTES = 4096, ROUNDS = 3000, MOST = 12, TAKERS = 3 };

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "line %d: %s\n", __LINE__, #condition);                                                    \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static atomic_int reads, faults;

/* Expert e is BYTES bytes of value e + 1; one read in eleven fails after half of it. */
static int fake_read(void *source, int64_t offset, size_t size, void *buffer) {
    (void)source;
    int n = atomic_fetch_add(&reads, 1);
    memset(buffer, (int)(offset / BYTES) + 1, size / 2);
    if (n % 7 == 0)
        usleep(300);
    if (n % 11 == 3) {
        atomic_fetch_add(&faults, 1);
        return -1;
    }
    memset((char *)buffer + size / 2, (int)(offset / BYTES) + 1, size - size / 2);
    return 0;
}

struct round {
    st_pager *pager;
    int32_t ids[MOST];
    int n;
    int failed;
};

static void *take_all(void *arg) {
    struct round *round = arg;
    int failed = 0;
    for (int i = 0; i < round->n; i++) {
        const uint8_t *weights = st_pager_take(round->pager, round->ids[i]);
        if (!weights) {
            failed++;
            continue;
        }
        for (int b = 0; b < BYTES; b++)
            CHECK(weights[b] == round->ids[i] + 1);
    }
    return (void *)(intptr_t)failed;
}

static unsigned next_random(unsigned *state) { return *state = *state * 1664525u + 1013904223u, *state >> 8; }

static void run(const char *policy) {
    int64_t offsets[EXPERTS];
    for (int i = 0; i < EXPERTS; i++)
        offsets[i] = (int64_t)i * BYTES;
    uint8_t *memory = aligned_alloc(4096, SLOTS * BYTES);
    st_pager_config config = {fake_read, NULL, EXPERTS, offsets, BYTES, memory, SLOTS, 4, policy};
    struct round round = {.pager = st_pager_create(&config)};
    CHECK(round.pager);
    unsigned state = 1;
    int64_t wanted = 0, failures = 0;
    for (int r = 0; r < ROUNDS; r++) {
        round.n = 1 + (int)(next_random(&state) % MOST);
        for (int i = 0; i < round.n; i++) { /* distinct, the low ids more often */
            int32_t id;
            int again;
            do {
                unsigned a = next_random(&state) % EXPERTS, b = next_random(&state) % EXPERTS;
                id = (int32_t)(a < b ? a : b);
                again = 0;
                for (int j = 0; j < i; j++)
                    again |= round.ids[j] == id;
            } while (again);
            round.ids[i] = id;
        }
        st_pager_want(round.pager, round.ids, NULL, round.n, r);
        pthread_t threads[TAKERS];
        for (int t = 0; t < TAKERS; t++)
            CHECK(pthread_create(&threads[t], NULL, take_all, &round) == 0);
        void *failed[TAKERS];
        for (int t = 0; t < TAKERS; t++)
            pthread_join(threads[t], &failed[t]);
        for (int t = 1; t < TAKERS; t++) /* all takers see the same failures */
            CHECK(failed[t] == failed[0]);
        failures += (intptr_t)failed[0];
        wanted += round.n;
        st_pager_release(round.pager, round.ids, round.n);
    }
    st_pager_stats stats;
    st_pager_get_stats(round.pager, &stats);
    CHECK(stats.hits + stats.misses == wanted);
    CHECK(stats.read_errors == failures && failures > 0);
    CHECK(stats.bytes_read == (stats.misses - stats.read_errors) * BYTES);
    CHECK(stats.hits > wanted / 5 && stats.evictions > 0);
    /* Destroyed with reads in flight. */
    for (int i = 0; i < MOST; i++)
        round.ids[i] = EXPERTS - 1 - i;
    st_pager_want(round.pager, round.ids, NULL, MOST, ROUNDS);
    st_pager_destroy(round.pager);
    free(memory);
}

int main(void) {
    run("frequency");
    run("lru");
    run(NULL);
    st_pager_config unknown = {fake_read, NULL, 1, (int64_t[]){0}, BYTES, NULL, 1, 1, "no such policy"};
    CHECK(!st_pager_create(&unknown));
    puts("ok");
    return 0;
}
