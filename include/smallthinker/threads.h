/* A team of threads that runs one function together (fork/join), with barriers and shared-out work inside. Each thread
 * gets a contiguous range of a phase's units, so that it streams through memory; one that is done early takes units
 * from the end of another's range. Waiting spins for a moment, then sleeps. One team serves one caller at a time. */
#ifndef SMALLTHINKER_THREADS_H
#define SMALLTHINKER_THREADS_H

#include <stdint.h>

typedef struct st_team st_team;
typedef void (*st_team_fn)(void *arg, int tid);

/* n >= 1 threads, the caller of st_team_run included. cpus[n]: thread t stays on CPU cpus[t], the caller while it runs
 * (Linux; ignored elsewhere and where the system refuses); NULL: they run where the system puts them. NULL where
 * threads cannot be had. */
st_team *st_team_create(int n, const int *cpus);
/* NULL is fine. In the child of a fork it only frees memory. */
void st_team_destroy(st_team *team);

/* Between runs: the next ones are of the first `size` threads, 1..n; the others sleep. st_team_size: that number, at
 * first n, and in what follows n. */
void st_team_resize(st_team *team, int size);
int st_team_size(const st_team *team);

/* Runs fn(arg, tid) for every tid in 0..n-1 and returns when all have returned; the caller is tid 0. units: of the
 * first phase, below 2^31. */
void st_team_run(st_team *team, st_team_fn fn, void *arg, int64_t units);

/* Nanoseconds that threads of the last run slept at barriers, all together: longer than they spin, they wait for one
 * that has no CPU, or for what it waits for. */
int64_t st_team_slept(const st_team *team);

/* Inside fn only: waits for all threads; what they wrote before is visible after. Then the next phase begins, with
 * `units` units of work (the same number from every thread), thread t's share being units * t / n .. units * (t + 1) /
 * n. */
void st_team_barrier(st_team *team, int64_t units);

/* Inside fn only: the next unit for thread tid, or -1 where none is left in this phase. Every unit is given once. */
int64_t st_team_next(st_team *team, int tid);

/* Inside fn only, and from one thread: takes back the units of this phase that no thread has begun. After the next
 * barrier, and after st_team_run where fn has none left, st_team_stopped is 1 until the next st_team_run: the same for
 * every thread, so that all can return from fn. */
void st_team_stop(st_team *team);
int st_team_stopped(const st_team *team);

#endif
