/* Starts threads with a small stack and without signals. It knows nothing of what they do. */
#define _POSIX_C_SOURCE 200809L
#include "smallthinker/thread_start.h"

#include <errno.h>
#include <signal.h>

static const int OWN_FAULTS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS};

int st_thread_start(pthread_t *thread, void *(*run)(void *), void *arg) {
    pthread_attr_t attributes;
    sigset_t blocked, before;
    int status = pthread_attr_init(&attributes);
    if (status != 0)
        return status;
    (void)pthread_attr_setstacksize(&attributes, ST_THREAD_STACK); /* refused: the default */
    sigfillset(&blocked);
    for (size_t i = 0; i < sizeof OWN_FAULTS / sizeof *OWN_FAULTS; i++)
        sigdelset(&blocked, OWN_FAULTS[i]);
    /* A thread begins with the mask of the one that makes it. */
    status = pthread_sigmask(SIG_SETMASK, &blocked, &before);
    if (status == 0) {
        status = pthread_create(thread, &attributes, run, arg);
        if (status == EINVAL) /* libraries with much thread-local memory, which glibc takes from the stack */
            status = pthread_create(thread, NULL, run, arg);
        (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    pthread_attr_destroy(&attributes);
    return status;
}
