/* How the library starts its own threads, of the team and for reads. */
#ifndef SMALLTHINKER_THREAD_START_H
#define SMALLTHINKER_THREAD_START_H

#include <pthread.h>

/* Bytes of such a thread's stack, of which less than 32 KiB are used: docs/reliability.md. */
#define ST_THREAD_STACK (256 << 10)

/* As pthread_create without attributes, but with a stack of ST_THREAD_STACK bytes, whatever the system's or the
 * process's default is, and with all signals blocked except those of the thread's own faults: handlers run in the
 * threads of the program, and a signal that these block and wait for is not taken here. Returns 0 or an errno. */
int st_thread_start(pthread_t *thread, void *(*run)(void *), void *arg);

#endif
