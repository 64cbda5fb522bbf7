/* A team of threads that runs one function together (fork/join), with barriers and dynamic claiming of work
 * inside. Waiting spins for a moment, then sleeps. One team serves one caller at a time. */
#ifndef SMALLTHINKER_THREADS_H
#define SMALLTHINKER_THREADS_H

#include <stdint.h>

typedef struct st_team st_team;
typedef void (*st_team_fn)(void *arg, int tid);

/* n >= 1 threads, the caller of st_team_run included. NULL where threads cannot be had. */
st_team *st_team_create(int n);
void st_team_destroy(st_team *team); /* NULL is fine */
int st_team_size(const st_team *team);

/* Runs fn(arg, tid) for every tid in 0..n-1 and returns when all have returned; the caller is tid 0. */
void st_team_run(st_team *team, st_team_fn fn, void *arg);

/* Inside fn only: waits for all threads; what they wrote before is visible after. Also resets the claim. */
void st_team_barrier(st_team *team);

/* Inside fn only: takes the next `count` units of the phase between two barriers; returns the first one
 * taken. The caller stops at its own total. */
int64_t st_team_claim(st_team *team, int64_t count);

#endif
