/* Thread team: fork/join with a short spin, then sleep. Used by the forward pass; it never touches weights and
 * knows nothing of what it runs. */
#define _GNU_SOURCE /* pthread_setaffinity_np */
#include "smallthinker/threads.h"

#include "smallthinker/clock.h"
#include "smallthinker/thread_start.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define ST_PAUSE() _mm_pause()
#elif defined(__aarch64__) || (defined(__ARM_ARCH) && __ARM_ARCH >= 7)
#define ST_PAUSE() __asm__ __volatile__("yield" ::: "memory")
#else
#define ST_PAUSE() ((void)0)
#endif

/* About 100 us of spinning: longer than any phase's imbalance, far shorter than a person's typing pause. */
enum { SPIN_LIMIT = 4000 };
enum { SIZE_BITS = 16, SIZE_MASK = (1 << SIZE_BITS) - 1 };

/* A number that counts up, and who waits for the next one. Those who wait for a run are not woken by its barriers. */
typedef struct gate {
    _Alignas(64) _Atomic uint64_t count;
    atomic_int sleepers;
    pthread_cond_t changed;
} gate;

struct st_team {
    int n;                   /* threads */
    int size;                /* of them, those that run: the first ones */
    struct st_range *ranges; /* one a thread: what is left of its share of the phase */
    _Alignas(64) atomic_int arrived;
    gate barrier;
    gate run;              /* runs so far << 16 | size of the last one, so that nobody takes one's size for another's */
    _Atomic int64_t slept; /* nanoseconds */
    atomic_int quit;
    int stopping, stopped; /* the second is the first as it stood at the last barrier: the same for all threads */
    st_team_fn fn;
    void *arg;
    pthread_mutex_t mutex;
    pthread_t *threads;
    struct st_member *members;
    int *cpus; /* [n] or NULL */
    int started;
    pid_t process; /* that has the threads: a fork's child does not */
};

/* Units first..end-1 as first << 32 | end: the owner takes from the front, others from the back. */
struct st_range {
    _Alignas(64) _Atomic uint64_t units;
};

struct st_member {
    st_team *team;
    int tid;
};

/* Waits until the gate's count differs from old; returns what it is then. slept: NULL, or what takes the time beyond
 * spinning. */
static uint64_t wait_change(st_team *team, gate *g, uint64_t old, _Atomic int64_t *slept) {
    for (int i = 0; i < SPIN_LIMIT; i++) {
        uint64_t now = atomic_load_explicit(&g->count, memory_order_acquire);
        if (now != old)
            return now;
        ST_PAUSE();
    }
    int64_t began = slept ? st_nanoseconds() : 0;
    uint64_t now;
    pthread_mutex_lock(&team->mutex);
    atomic_fetch_add(&g->sleepers, 1);
    while ((now = atomic_load(&g->count)) == old)
        pthread_cond_wait(&g->changed, &team->mutex);
    atomic_fetch_sub(&g->sleepers, 1);
    pthread_mutex_unlock(&team->mutex);
    if (slept)
        atomic_fetch_add_explicit(slept, st_nanoseconds() - began, memory_order_relaxed);
    return now;
}

static void announce(st_team *team, gate *g, uint64_t count) {
    atomic_store(&g->count, count);
    if (atomic_load(&g->sleepers) > 0) {
        /* Taking the lock orders us after a sleeper's last look at the count. */
        pthread_mutex_lock(&team->mutex);
        pthread_cond_broadcast(&g->changed);
        pthread_mutex_unlock(&team->mutex);
    }
}

static void deal(st_team *team, int64_t units) {
    for (int i = 0; i < team->size; i++) {
        uint64_t first = (uint64_t)(units * i / team->size), end = (uint64_t)(units * (i + 1) / team->size);
        atomic_store_explicit(&team->ranges[i].units, first << 32 | end, memory_order_relaxed);
    }
}

static void barrier(st_team *team, int64_t units, _Atomic int64_t *slept) {
    uint64_t before = atomic_load_explicit(&team->barrier.count, memory_order_relaxed);
    int last = team->size - 1; /* read before the others may go on, and the team be resized */
    if (atomic_fetch_add(&team->arrived, 1) == last) {
        atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
        team->stopped = team->stopping;
        deal(team, units);
        announce(team, &team->barrier, before + 1);
    } else {
        wait_change(team, &team->barrier, before, slept);
    }
}

void st_team_barrier(st_team *team, int64_t units) { barrier(team, units, &team->slept); }

int64_t st_team_next(st_team *team, int tid) {
    for (int i = 0; i < team->size; i++) {
        struct st_range *range = &team->ranges[(tid + i) % team->size];
        uint64_t old = atomic_load_explicit(&range->units, memory_order_relaxed);
        while ((old >> 32) < (old & UINT32_MAX)) {
            uint64_t left = i == 0 ? old + (UINT64_C(1) << 32) : old - 1;
            if (atomic_compare_exchange_weak_explicit(&range->units, &old, left, memory_order_relaxed,
                                                      memory_order_relaxed))
                return (int64_t)(i == 0 ? old >> 32 : left & UINT32_MAX);
        }
    }
    return -1;
}

#if defined(__linux__)
typedef cpu_set_t affinity;

/* Puts the calling thread on one CPU; `before` (or NULL) is where it was allowed. 0 where the system refuses. */
static int stay_on(int cpu, affinity *before) {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET((size_t)cpu, &one);
    if (before && pthread_getaffinity_np(pthread_self(), sizeof *before, before) != 0)
        return 0;
    return pthread_setaffinity_np(pthread_self(), sizeof one, &one) == 0;
}

static void go_back(const affinity *before) { pthread_setaffinity_np(pthread_self(), sizeof *before, before); }
#else
typedef int affinity;

static int stay_on(int cpu, affinity *before) {
    (void)cpu, (void)before;
    return 0;
}

static void go_back(const affinity *before) { (void)before; }
#endif

static void announce_run(st_team *team) {
    uint64_t runs = (atomic_load_explicit(&team->run.count, memory_order_relaxed) >> SIZE_BITS) + 1;
    announce(team, &team->run, runs << SIZE_BITS | (uint64_t)team->size);
}

static void *member_main(void *arg) {
    struct st_member *member = arg;
    st_team *team = member->team;
    uint64_t seen = 0;
    if (team->cpus)
        stay_on(team->cpus[member->tid], NULL);
    for (;;) {
        seen = wait_change(team, &team->run, seen, NULL);
        if (atomic_load(&team->quit))
            return NULL;
        if (member->tid >= (int)(seen & SIZE_MASK))
            continue;
        team->fn(team->arg, member->tid);
        barrier(team, 0, NULL); /* the caller may go on before it could count */
    }
}

void st_team_run(st_team *team, st_team_fn fn, void *arg, int64_t units) {
    affinity before;
    int moved = team->cpus && stay_on(team->cpus[0], &before);
    team->fn = fn;
    team->arg = arg;
    team->stopping = team->stopped = 0;
    atomic_store_explicit(&team->slept, 0, memory_order_relaxed);
    deal(team, units);
    if (team->size > 1)
        announce_run(team);
    fn(arg, 0);
    st_team_barrier(team, 0);
    if (moved)
        go_back(&before);
}

void st_team_stop(st_team *team) {
    team->stopping = 1;
    for (int i = 0; i < team->size; i++)
        atomic_store_explicit(&team->ranges[i].units, 0, memory_order_relaxed);
}

int st_team_stopped(const st_team *team) { return team->stopped; }

int st_team_size(const st_team *team) { return team->size; }

void st_team_resize(st_team *team, int size) { team->size = size; }

int64_t st_team_slept(const st_team *team) { return atomic_load_explicit(&team->slept, memory_order_relaxed); }

static void release(st_team *team) {
    free(team->threads);
    free(team->members);
    free(team->ranges);
    free(team->cpus);
    free(team);
}

static int init_conditions(st_team *team) {
    if (pthread_cond_init(&team->barrier.changed, NULL) != 0)
        return -1;
    if (pthread_cond_init(&team->run.changed, NULL) == 0)
        return 0;
    pthread_cond_destroy(&team->barrier.changed);
    return -1;
}

st_team *st_team_create(int n, const int *cpus) {
    if (n < 1)
        return NULL;
    st_team *team = aligned_alloc(64, (sizeof(st_team) + 63) / 64 * 64);
    if (!team)
        return NULL;
    *team = (st_team){.n = n, .size = n, .process = getpid()};
    team->threads = calloc((size_t)n, sizeof *team->threads);
    team->members = calloc((size_t)n, sizeof *team->members);
    team->ranges = aligned_alloc(64, (size_t)n * sizeof *team->ranges);
    team->cpus = cpus ? malloc((size_t)n * sizeof *cpus) : NULL;
    if (team->cpus)
        memcpy(team->cpus, cpus, (size_t)n * sizeof *cpus);
    if (!team->threads || !team->members || !team->ranges || (cpus && !team->cpus) ||
        pthread_mutex_init(&team->mutex, NULL) != 0) {
        release(team);
        return NULL;
    }
    if (init_conditions(team) != 0) {
        pthread_mutex_destroy(&team->mutex);
        release(team);
        return NULL;
    }
    deal(team, 0);
    for (int i = 1; i < n; i++) {
        team->members[i] = (struct st_member){team, i};
        if (st_thread_start(&team->threads[i], member_main, &team->members[i]) != 0) {
            st_team_destroy(team);
            return NULL;
        }
        team->started++;
    }
    return team;
}

void st_team_destroy(st_team *team) {
    if (!team)
        return;
    if (team->process != getpid()) { /* its threads are not here, and its lock may be held for ever */
        release(team);
        return;
    }
    atomic_store(&team->quit, 1);
    announce_run(team);
    for (int i = 1; i <= team->started; i++)
        pthread_join(team->threads[i], NULL);
    pthread_cond_destroy(&team->barrier.changed);
    pthread_cond_destroy(&team->run.changed);
    pthread_mutex_destroy(&team->mutex);
    release(team);
}
