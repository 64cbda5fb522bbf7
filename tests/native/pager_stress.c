/* Random wants, reads ahead, takes and releases against a slow and faulty fake reader, checked byte by byte. Run by
 * tests/engine/test_native.py, plain and under sanitizers. Prints "ok" or dies. */
#include "smallthinker/clock.h"
#include "smallthinker/crc32.h"
#include "smallthinker/pager.h"

#include "check.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { EXPERTS = 96, SLOTS = 20, BYTES = 16384, PIECE = 4096, ROUNDS = 800, MOST = 12, AHEAD = 10, TAKERS = 3 };

static atomic_int reads, faults;
static atomic_llong bytes; /* of reads that did not fail */

/* Expert e is BYTES bytes of value e + 1; one read in eleven fails after half of it. */
static int fake_read(void *source, int64_t offset, size_t size, void *buffer) {
    (void)source;
    int n = atomic_fetch_add(&reads, 1);
    memset(buffer, (int)(offset / BYTES) + 1, size / 2);
    atomic_fetch_add(&bytes, (long long)size);
    if (n % 7 == 0)
        usleep(300);
    if (n % 11 == 3) {
        atomic_fetch_add(&faults, 1);
        atomic_fetch_sub(&bytes, (long long)size);
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

/* n distinct ids, the low ones more often. */
static void draw(unsigned *state, int32_t *ids, int n) {
    for (int i = 0; i < n; i++) {
        int again;
        do {
            unsigned a = next_random(state) % EXPERTS, b = next_random(state) % EXPERTS;
            ids[i] = (int32_t)(a < b ? a : b);
            again = 0;
            for (int j = 0; j < i; j++)
                again |= ids[j] == ids[i];
        } while (again);
    }
}

/* Half of the guesses come true: the next round's ids are taken from the list of reads ahead. */
static void run(int io_threads, int ahead, int64_t give_way_ns) {
    int64_t offsets[EXPERTS];
    for (int i = 0; i < EXPERTS; i++)
        offsets[i] = (int64_t)i * BYTES;
    uint8_t *memory = aligned_alloc(4096, SLOTS * BYTES);
    st_pager_config config = {fake_read, NULL,       EXPERTS, EXPERTS, offsets,     BYTES, memory,
                              SLOTS,     io_threads, NULL,    PIECE,   give_way_ns, NULL,  NULL};
    struct round round = {.pager = st_pager_create(&config)};
    CHECK(round.pager);
    atomic_store(&bytes, 0);
    unsigned state = 1;
    int64_t wanted = 0, failures = 0;
    int32_t guesses[MOST + AHEAD];
    draw(&state, guesses, MOST + AHEAD);
    for (int r = 0; r < ROUNDS; r++) {
        round.n = 1 + (int)(next_random(&state) % MOST);
        memcpy(round.ids, guesses, sizeof round.ids); /* distinct, as the guesses are */
        if (next_random(&state) % 2)
            draw(&state, round.ids, round.n);
        st_pager_want(round.pager, round.ids, NULL, round.n, 1);
        draw(&state, guesses, MOST + AHEAD);
        if (ahead)
            st_pager_ahead(round.pager, guesses, (int)(next_random(&state) % (AHEAD + 1)));
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
        if (r % 3 == 0)
            usleep(200); /* compute: reads ahead go on meanwhile */
        st_pager_release(round.pager, round.ids, round.n);
        if (r % 20 == 15) /* reads ahead are in progress now and then */
            st_pager_resize(round.pager, SLOTS - 6);
        if (r % 20 == 19)
            st_pager_resize(round.pager, SLOTS);
    }
    st_pager_ahead(round.pager, NULL, 0);
    st_pager_stats stats;
    st_pager_get_stats(round.pager, &stats);
    CHECK(stats.hits + stats.ahead_hits + stats.misses == wanted);
    CHECK(failures > 0 && stats.evictions > 0);
    CHECK(stats.hits > 0 && stats.hits + stats.ahead_hits > wanted / 5); /* how many of each depends on the machine */
    CHECK((stats.ahead_hits > wanted / 20) == ahead && (stats.bytes_wasted > 0) == ahead);
    CHECK(stats.predicted_right <= stats.predicted && (stats.predicted_right > 0) == ahead);
    if (!ahead)
        CHECK(stats.read_errors == failures && stats.bytes_read == (stats.misses - stats.read_errors) * BYTES);
    /* Destroyed with reads in flight. */
    for (int i = 0; i < MOST; i++)
        round.ids[i] = EXPERTS - 1 - i;
    st_pager_want(round.pager, round.ids, NULL, MOST, 1);
    st_pager_ahead(round.pager, (int32_t[]){0, 1, 2, 3}, 4);
    int64_t before = atomic_load(&bytes);
    st_pager_destroy(round.pager);
    CHECK(stats.bytes_read <= before);
    free(memory);
}

/* A read error reaches whoever wants the expert, and the next try succeeds: nothing partial is ever handed out. */
static int broken;
static int read_or_fail(void *source, int64_t offset, size_t size, void *buffer) {
    (void)source;
    if (broken)
        return -1;
    memset(buffer, (int)(offset / BYTES) + 1, size);
    return 0;
}

static void recover(void) {
    int64_t offsets[2] = {0, BYTES};
    uint8_t *memory = aligned_alloc(4096, 2 * BYTES);
    st_pager_config config = {read_or_fail, NULL, 2, 2, offsets, BYTES, memory, 2, 1, NULL, PIECE, 0, NULL, NULL};
    st_pager *pager = st_pager_create(&config);
    int32_t both[2] = {0, 1};
    broken = 1;
    st_pager_want(pager, both, NULL, 2, 1);
    CHECK(!st_pager_take(pager, 0) && !st_pager_take(pager, 1));
    st_pager_release(pager, both, 2);
    broken = 0;
    st_pager_want(pager, both, NULL, 2, 1);
    CHECK(st_pager_take(pager, 1)[BYTES - 1] == 2 && st_pager_take(pager, 0)[0] == 1);
    st_pager_release(pager, both, 2);
    st_pager_destroy(pager);
    free(memory);
}

/* A wrong checksum is a failed read until the bytes are right; what was right once is not looked at again. */
static void check(void) {
    int64_t offset = 0;
    uint32_t wrong = 1, right;
    uint8_t *memory = aligned_alloc(4096, BYTES);
    CHECK(st_crc32((const uint8_t *)"123456789", 9) == 0xCBF43926u); /* the check value of CRC-32's catalogues */
    memset(memory, 1, BYTES);
    right = st_crc32(memory, BYTES);
    for (int good = 0; good < 2; good++) {
        st_pager_config config = {read_or_fail,           NULL,  1, 1,    &offset, BYTES, memory, 1, 1,
                                  good ? &right : &wrong, PIECE, 0, NULL, NULL};
        st_pager *pager = st_pager_create(&config);
        CHECK(pager);
        for (int i = 0; i < 2; i++) {
            st_pager_want(pager, (int32_t[]){0}, NULL, 1, 1);
            CHECK(!st_pager_take(pager, 0) == !good);
            st_pager_release(pager, (int32_t[]){0}, 1);
        }
        st_pager_stats stats;
        st_pager_get_stats(pager, &stats);
        CHECK(stats.read_errors == (good ? 0 : 2));
        st_pager_destroy(pager);
    }
    free(memory);
}

/* What a profile names is read into free slots without being asked for, the most used first. */
static void warm(void) {
    int64_t offsets[8];
    for (int i = 0; i < 8; i++)
        offsets[i] = (int64_t)i * BYTES;
    uint8_t *memory = aligned_alloc(4096, 3 * BYTES), resident[8];
    st_pager_config config = {read_or_fail, NULL, 8, 8, offsets, BYTES, memory, 3, 1, NULL, PIECE, 0, NULL, NULL};
    st_pager *pager = st_pager_create(&config);
    st_pager_warm(pager, (int32_t[]){5, 2, 7, 1}, (double[]){9, 8, 7, 6}, 4);
    do {
        usleep(100);
        st_pager_get_resident(pager, resident);
    } while (resident[5] + resident[2] + resident[7] < 3);
    st_pager_want(pager, (int32_t[]){1}, NULL, 1, 1); /* used 6 times before, and now: 2 and 5 outlive 7 ... */
    CHECK(st_pager_take(pager, 1)[0] == 2);
    st_pager_get_resident(pager, resident);
    CHECK(resident[5] && resident[2] && !resident[7]);
    double uses[8];
    st_pager_get_uses(pager, uses);
    CHECK(uses[5] > 8.9 && uses[5] < 9 && uses[1] > 6.9 && uses[1] < 7 && uses[0] == 0); /* a token later */
    st_pager_destroy(pager);
    free(memory);
}

/* Of what a profile names, fewer slots keep the most used before anything has been wanted. A step that does not reach a
 * layer, as one that is cancelled, is no time for its experts. */
static void warm_layers(void) {
    int64_t offsets[4] = {0, BYTES, 2 * BYTES, 3 * BYTES};
    uint8_t *memory = aligned_alloc(4096, 3 * BYTES), resident[4];
    st_pager_config config = {read_or_fail, NULL, 4, 2, offsets, BYTES, memory, 3, 1, NULL, PIECE, 0, NULL, NULL};
    st_pager *pager = st_pager_create(&config);
    st_pager_warm(pager, (int32_t[]){0, 1, 3}, (double[]){7, 8, 9}, 3); /* into the slots in this order */
    do {
        usleep(100);
        st_pager_get_resident(pager, resident);
    } while (resident[0] + resident[1] + resident[3] < 3);
    st_pager_resize(pager, 2);
    st_pager_get_resident(pager, resident);
    CHECK(!resident[0] && resident[1] && resident[3]);
    st_pager_want(pager, (int32_t[]){1}, NULL, 1, 512);
    st_pager_release(pager, (int32_t[]){1}, 1);
    double uses[4];
    st_pager_get_uses(pager, uses);
    CHECK(uses[1] < 1 && uses[3] > 8.9);
    st_pager_destroy(pager);
    free(memory);
}

/* Fewer slots keep the most used experts, whose bytes move; more slots take new ones. */
static void resize(void) {
    int64_t offsets[6];
    for (int i = 0; i < 6; i++)
        offsets[i] = (int64_t)i * BYTES;
    uint8_t *memory = aligned_alloc(4096, 4 * BYTES), resident[6];
    st_pager_config config = {read_or_fail, NULL, 6, 6, offsets, BYTES, memory, 4, 1, NULL, PIECE, 0, NULL, NULL};
    st_pager *pager = st_pager_create(&config);
    for (int32_t i = 0; i < 4; i++) { /* expert i in slot i, used 1, 2, 3, 4 times */
        st_pager_want(pager, &i, &(int32_t){i + 1}, 1, 4);
        CHECK(st_pager_take(pager, i));
        st_pager_release(pager, &i, 1);
    }
    st_pager_resize(pager, 2);
    memset(memory + 2 * BYTES, 99, 2 * BYTES);
    st_pager_get_resident(pager, resident);
    CHECK(!resident[0] && !resident[1] && resident[2] && resident[3]);
    int32_t both[2] = {3, 2};
    st_pager_want(pager, both, NULL, 2, 1);
    for (int i = 0; i < 2; i++)
        for (int b = 0; b < BYTES; b++)
            CHECK(st_pager_take(pager, both[i])[b] == both[i] + 1);
    st_pager_release(pager, both, 2);
    st_pager_stats stats;
    st_pager_get_stats(pager, &stats);
    CHECK(stats.hits == 2 && stats.misses == 4);
    for (int b = 2 * BYTES; b < 4 * BYTES; b++)
        CHECK(memory[b] == 99); /* given back, it is not touched */
    st_pager_resize(pager, 3);
    st_pager_want(pager, (int32_t[]){5}, NULL, 1, 1);
    CHECK(st_pager_take(pager, 5)[0] == 6);
    st_pager_get_resident(pager, resident);
    CHECK(resident[2] && resident[3] && resident[5]);
    st_pager_destroy(pager);
    free(memory);
}

/* A storage that hangs for a second: takers wait for it, and nothing is lost or handed out early. */
static atomic_int hang;
static int read_after_a_pause(void *source, int64_t offset, size_t size, void *buffer) {
    if (atomic_exchange(&hang, 0))
        usleep(1000000);
    return read_or_fail(source, offset, size, buffer);
}

static void stall(void) {
    int64_t offsets[4] = {0, BYTES, 2 * BYTES, 3 * BYTES};
    uint8_t *memory = aligned_alloc(4096, 3 * BYTES);
    st_pager_config config = {read_after_a_pause, NULL, 4, 4, offsets, BYTES, memory, 3, 1, NULL, PIECE, 0, NULL, NULL};
    st_pager *pager = st_pager_create(&config);
    atomic_store(&hang, 1);
    st_pager_ahead(pager, (int32_t[]){3}, 1); /* the read ahead hangs, and the wanted ones stand behind it */
    int32_t ids[2] = {0, 2};
    int64_t begun = st_nanoseconds();
    st_pager_want(pager, ids, NULL, 2, 1);
    CHECK(st_pager_take(pager, 2)[0] == 3 && st_pager_take(pager, 0)[BYTES - 1] == 1);
    int64_t since = st_pager_since_arrival(pager); /* the hang comes before the arrival, and does not count */
    CHECK(since >= 0 && since < st_nanoseconds() - begun - 500000000);
    st_pager_release(pager, ids, 2);
    begun = st_nanoseconds();
    st_pager_want(pager, ids, NULL, 2, 1); /* both are there: counted from here on */
    since = st_pager_since_arrival(pager);
    CHECK(since >= 0 && since <= st_nanoseconds() - begun);
    st_pager_release(pager, ids, 2);
    st_pager_stats stats;
    st_pager_get_stats(pager, &stats);
    CHECK(stats.stall_ns > 500000000 && stats.read_errors == 0);
    st_pager_destroy(pager);
    free(memory);
}

/* Waiting for a while, and being interrupted, before a read that takes as long as one likes. */
static atomic_int closed;
static int read_when_open(void *source, int64_t offset, size_t size, void *buffer) {
    while (atomic_load(&closed))
        usleep(100);
    return read_or_fail(source, offset, size, buffer);
}

static void waiting(int first) {
    enum { SHORT = 2000000 };
    const int64_t LONG = INT64_C(60000000000);
    int64_t offsets[3] = {0, BYTES, 2 * BYTES};
    uint8_t *memory = aligned_alloc(4096, 3 * BYTES);
    st_pager_config config = {read_when_open, NULL, 3, 3, offsets, BYTES, memory, 3, 1, NULL, PIECE, 0, NULL, NULL};
    st_pager *pager = st_pager_create(&config);
    int32_t ids[2] = {1, 2};
    if (!first) { /* the pager knows how long a read takes */
        st_pager_want(pager, (int32_t[]){0}, NULL, 1, 1);
        CHECK(st_pager_take(pager, 0));
        st_pager_release(pager, (int32_t[]){0}, 1);
    }
    atomic_store(&closed, 1);
    st_pager_want(pager, ids, NULL, 2, 1); /* one is being read, the other waits its turn */
    for (int i = 0; i < 2; i++)
        CHECK(!st_pager_wait(pager, ids[i], SHORT));
    st_pager_interrupt(pager, 1);
    for (int i = 0; i < 2; i++) /* take will not wait: nor does wait, and it says so */
        CHECK(st_pager_wait(pager, ids[i], LONG) && !st_pager_take(pager, ids[i]));
    st_pager_interrupt(pager, 0);
    CHECK(!st_pager_wait(pager, ids[1], SHORT));
    atomic_store(&closed, 0);
    for (int i = 1; i >= 0; i--)
        CHECK(st_pager_wait(pager, ids[i], LONG) && st_pager_take(pager, ids[i])[0] == ids[i] + 1);
    st_pager_release(pager, ids, 2);
    st_pager_destroy(pager);
    free(memory);
}

static atomic_llong taken_away;
static int64_t stolen(void) { return atomic_load(&taken_away); }

/* How long takers look follows what was taken away since the last time that it was asked. */
static void looking(void) {
    int64_t offsets[3] = {0, BYTES, 2 * BYTES}, near[3] = {0};
    uint8_t *memory = aligned_alloc(4096, 3 * BYTES);
    st_pager_config config = {read_or_fail, NULL, 3, 3, offsets, BYTES, memory, 3, 1, NULL, PIECE, 0, stolen, NULL};
    st_pager *pager = st_pager_create(&config);
    st_pager_stats stats;
    st_pager_get_stats(pager, &stats);
    int64_t before = stats.near_ns, last = before;
    for (int i = 0; i < 3; i++) {
        atomic_fetch_add(&taken_away, i == 1 ? 0 : 500000000);
        usleep(1100000); /* it is asked once a second */
        st_pager_want(pager, &i, NULL, 1, 1);
        CHECK(st_pager_take(pager, i));
        st_pager_release(pager, &i, 1);
        do { /* the answer comes after the read */
            usleep(1000);
            st_pager_get_stats(pager, &stats);
        } while (stats.near_ns == last);
        near[i] = last = stats.near_ns;
    }
    CHECK(near[0] < before && near[1] == before && near[2] == near[0]);
    st_pager_destroy(pager);
    free(memory);
}

/* Memory that is slower to come than an expert is to read: wanted experts evict rather than take it, until nothing may
 * go; and in time all slots are filled, also with what had to go. */
enum { LARGE = 1 << 20, MANY = 40, LAYER = 8, LAYERS = 8 };
static atomic_int gate;

/* As the system is slow: the thread computes meanwhile. */
static void write_slowly(uint8_t *memory, size_t size) {
    int64_t begun = st_nanoseconds();
    while (st_nanoseconds() - begun < 4000000)
        ;
    while (atomic_load(&gate))
        usleep(100);
    memset(memory, 0, size);
}

static int read_large(void *source, int64_t offset, size_t size, void *buffer) {
    (void)source;
    memset(buffer, (int)(offset / LARGE) + 1, size);
    return 0;
}

static void use(st_pager *pager, int32_t first, int32_t n) {
    int32_t ids[MANY] = {0};
    for (int32_t i = 0; i < n; i++)
        ids[i] = first + i;
    st_pager_want(pager, ids, NULL, n, 1);
    for (int32_t i = 0; i < n; i++) {
        const uint8_t *weights = st_pager_take(pager, ids[i]);
        CHECK(weights && weights[0] == ids[i] + 1 && weights[LARGE - 1] == ids[i] + 1);
    }
    st_pager_release(pager, ids, n);
}

static void await_free(st_pager *pager, int64_t slots) {
    st_pager_stats stats;
    do {
        usleep(100);
        st_pager_get_stats(pager, &stats);
    } while (stats.free_slots != slots);
}

static int64_t evictions(st_pager *pager) {
    st_pager_stats stats;
    st_pager_get_stats(pager, &stats);
    return stats.evictions;
}

/* How many of n experts are in memory. */
static int held(st_pager *pager, int first, int n) {
    uint8_t resident[LAYERS * LAYER];
    int count = 0;
    st_pager_get_resident(pager, resident);
    for (int i = first; i < first + n; i++)
        count += resident[i];
    return count;
}

static void *open_gate(void *arg) {
    usleep(20000);
    atomic_store(&gate, 0);
    return arg;
}

static void slow_memory(void) {
    int64_t offsets[LAYERS * LAYER];
    double uses[LAYER] = {0};
    int32_t first[LAYER];
    uint8_t *memory = aligned_alloc(4096, (size_t)MANY * LARGE);
    for (int32_t i = 0; i < LAYERS * LAYER; i++)
        offsets[i] = (int64_t)i * LARGE;
    for (int32_t i = 0; i < LAYER; i++)
        first[i] = i;
    st_pager_config config = {read_large, NULL, LAYERS * LAYER, LAYER, offsets, LARGE, memory,
                              MANY,       1,    NULL,           LARGE, 0,       NULL,  write_slowly};
    st_pager *pager = st_pager_create(&config);
    await_free(pager, LAYER); /* as many as it keeps free */
    st_pager_warm(pager, first, uses, LAYER);
    while (held(pager, 0, LAYER) < LAYER)
        usleep(100);
    await_free(pager, LAYER);
    use(pager, LAYER, LAYER); /* 16 MB read by now: that is enough to compare */
    await_free(pager, LAYER);
    atomic_store(&gate, 1);
    use(pager, 2 * LAYER, LAYER); /* the last that the writer has made free */
    CHECK(evictions(pager) == 0);
    use(pager, 3 * LAYER, LAYER); /* 15 are new, and one is being written to */
    CHECK(evictions(pager) == LAYER && held(pager, 0, LAYER) == 0 && held(pager, 3 * LAYER, LAYER) == LAYER);
    use(pager, 4 * LAYER, 30); /* more than were written to: nothing may go in the end */
    CHECK(evictions(pager) == LAYER + 3 * LAYER && held(pager, 4 * LAYER, 30) == 30);
    atomic_store(&gate, 0);
    while (held(pager, 0, LAYER) < LAYER)
        usleep(100);
    st_pager_resize(pager, 30); /* those beyond are never written to again, also where the writer is in one of them */
    st_pager_resize(pager, MANY);
    atomic_store(&gate, 1);
    usleep(20000);
    pthread_t opener;
    CHECK(pthread_create(&opener, NULL, open_gate, NULL) == 0);
    st_pager_resize(pager, 30);
    memset(memory + (size_t)30 * LARGE, 99, (size_t)(MANY - 30) * LARGE);
    usleep(20000);
    for (size_t b = (size_t)30 * LARGE; b < (size_t)MANY * LARGE; b += 4096)
        CHECK(memory[b] == 99);
    pthread_join(opener, NULL);
    st_pager_destroy(pager);
    free(memory);
}

int main(void) {
    run(4, 0, 0);
    run(4, 1, 0);
    run(2, 1, 1000000);
    run(1, 1, 0);
    recover();
    check();
    warm();
    warm_layers();
    resize();
    slow_memory();
    stall();
    waiting(0);
    waiting(1);
    looking();
    puts("ok");
    return 0;
}
