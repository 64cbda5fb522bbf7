/* src/system/threads.c: every unit given once, nothing before a barrier missed after it, work stolen from who is late,
 * teams made and ended in loops. Run by tests/engine/test_native.py, plain and under sanitizers. Prints "ok" or dies.
 */
#define _GNU_SOURCE
#include "smallthinker/threads.h"

#include "check.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

static int threads_left = -1; /* thread creations that still succeed; -1: all */

static int scarce_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *arg) {
    if (threads_left == 0)
        return 11; /* EAGAIN */
    threads_left -= threads_left > 0;
    return pthread_create(thread, attributes, start, arg);
}

#define pthread_create scarce_create
#include "../../src/system/thread_start.c"
#include "../../src/system/threads.c"
#undef pthread_create

enum { MOST_UNITS = 200, PHASES = 12, MOST_THREADS = 8 };

struct job {
    st_team *team;
    int units[PHASES + 1];
    int late;                     /* the thread that sleeps before a barrier now and then; -1: none */
    int seen[PHASES][MOST_UNITS]; /* how often each unit was given: plain memory, guarded by barriers alone */
    int64_t worked[MOST_THREADS]; /* units of each thread */
    int64_t checked[MOST_THREADS];
};

/* Each phase: take units, then look at what all the others have written. */
static void phases(void *arg, int tid) {
    struct job *job = arg;
    for (int p = 0; p < PHASES; p++) {
        int64_t u;
        while ((u = st_team_next(job->team, tid)) >= 0) {
            CHECK(u < job->units[p]);
            job->seen[p][u]++;
            job->worked[tid]++;
        }
        if (tid == job->late && p % 5 == 0)
            usleep(2000); /* long enough for the others to fall asleep */
        st_team_barrier(job->team, job->units[p + 1]);
        for (int i = 0; i < job->units[p]; i++)
            CHECK(job->seen[p][i] == 1);
        job->checked[tid]++;
    }
}

static void run_phases(int threads, int rounds) {
    st_team *team = st_team_create(threads, NULL);
    CHECK(team && st_team_size(team) == threads);
    struct job *job = calloc(1, sizeof *job);
    CHECK(job);
    for (int r = 0; r < rounds; r++) {
        memset(job, 0, sizeof *job);
        job->team = team;
        int size = r % 3 == 0 ? threads : 1 + r * 5 % threads; /* the others sleep */
        st_team_resize(team, size);
        CHECK(st_team_size(team) == size);
        job->late = r % 4 == 3 ? r % size : -1;
        int64_t units = 0, worked = 0;
        for (int p = 0; p < PHASES; p++) /* none, fewer than threads, and many */
            units += job->units[p] = p % 3 == 0 ? (r + p) % 3 : (r * 31 + p * 57) % MOST_UNITS;
        if (r % 8 == 7)
            usleep(1000); /* the members sleep when the run begins */
        st_team_run(team, phases, job, job->units[0]);
        for (int t = 0; t < threads; t++) {
            CHECK(job->checked[t] == (t < size ? PHASES : 0));
            worked += job->worked[t];
        }
        CHECK(job->late < 0 || size == 1 || st_team_slept(team) > 0);
        CHECK(worked == units);
    }
    free(job);
    st_team_destroy(team);
}

/* Thread 0 takes nothing until the others have taken all, its own share too. */
struct theft {
    st_team *team;
    atomic_int taken;
    int given[MOST_UNITS];
};

static void steal(void *arg, int tid) {
    struct theft *theft = arg;
    while (tid == 0 && atomic_load(&theft->taken) < MOST_UNITS)
        sched_yield();
    int64_t u;
    while ((u = st_team_next(theft->team, tid)) >= 0) {
        CHECK(tid != 0);
        theft->given[u]++;
        atomic_fetch_add(&theft->taken, 1);
    }
}

static void stealing(int threads) {
    struct theft theft = {.team = st_team_create(threads, NULL)};
    CHECK(theft.team);
    st_team_run(theft.team, steal, &theft, MOST_UNITS);
    for (int i = 0; i < MOST_UNITS; i++)
        CHECK(theft.given[i] == 1);
    st_team_destroy(theft.team);
}

static void count(void *arg, int tid) { ((int *)arg)[tid]++; }

static void making_and_ending(void) {
    CHECK(!st_team_create(0, NULL) && !st_team_create(-1, NULL));
    st_team_destroy(NULL);
    for (int i = 0; i < 200; i++) {
        int threads = 1 + i % MOST_THREADS, ran[MOST_THREADS] = {0};
        st_team *team = st_team_create(threads, NULL);
        CHECK(team);
        for (int r = 0; r < i % 3; r++) /* some end before they ever ran */
            st_team_run(team, count, ran, 0);
        st_team_destroy(team);
        for (int t = 0; t < MOST_THREADS; t++)
            CHECK(ran[t] == (t < threads ? i % 3 : 0));
    }
    for (threads_left = 0; threads_left < 4;) { /* a system without threads left: all that was made is ended */
        int left = threads_left;
        CHECK(!st_team_create(MOST_THREADS, NULL));
        threads_left = left + 1;
    }
    threads_left = -1;
}

/* The caller is on the named CPU while it runs, and afterwards where it was. */
static void pinning(void) {
#if defined(__linux__)
    cpu_set_t before, after;
    CHECK(sched_getaffinity(0, sizeof before, &before) == 0);
    int cpu = 0, ran[2] = {0};
    while (!CPU_ISSET(cpu, &before))
        cpu++;
    st_team *team = st_team_create(2, (int[]){cpu, cpu});
    CHECK(team);
    st_team_run(team, count, ran, 0);
    CHECK(ran[0] == 1 && ran[1] == 1);
    CHECK(sched_getaffinity(0, sizeof after, &after) == 0 && CPU_EQUAL(&before, &after));
    st_team_destroy(team);
#endif
}

int main(void) {
    for (int threads = 1; threads <= 5; threads++)
        run_phases(threads, 60);
    for (int threads = 2; threads <= 4; threads++)
        stealing(threads);
    making_and_ending();
    pinning();
    puts("ok");
    return 0;
}
