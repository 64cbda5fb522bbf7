/* Preloaded into a Python process (tests/support/faults.py): system calls on the files of one folder, and allocations,
 * mappings and threads of one shared object, fail, stall or come back short at their n-th call. It counts what that
 * object has not given back, too. For glibc. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* In the order of KINDS in faults.py. DIRECT is an open with O_DIRECT, which counts as OPEN too. */
enum { OPEN, DIRECT, READ, WRITE, RESERVE, TRUNCATE, SYNC, RENAME, ALLOC, MAP, THREAD, N_KINDS };
/* What a call does instead of its work; a positive number is an errno. */
enum { SHORT = -1, END = -2, STALL = -3 };
enum { STALL_MS = 30, LIVE = 1 << 16, BLOCK = 4096 };

static struct {
    atomic_int kind, action;
    atomic_long first, last; /* calls that do so, counted from 1 */
} fault;
static struct {
    atomic_int action, per_million;
    atomic_long done;
} rain[N_KINDS];
static atomic_ullong drawn;
static atomic_long calls[N_KINDS];
static atomic_int counting;
static uintptr_t core_start, core_end;
static char folder[4096];

/* Addresses that the shared object has allocated or mapped and nobody has given back, and their sizes (0: none). */
static struct {
    uintptr_t at;
    size_t size;
} live[LIVE];
static atomic_long live_count, live_bytes;
static pthread_mutex_t live_mutex = PTHREAD_MUTEX_INITIALIZER;

void *__libc_malloc(size_t size);
void *__libc_calloc(size_t count, size_t size);
void *__libc_memalign(size_t align, size_t size);
void __libc_free(void *p);

#define NEXT(name)                                                                                                     \
    static __typeof__(&name) next;                                                                                     \
    if (!next)                                                                                                         \
    next = (__typeof__(&name))(uintptr_t)dlsym(RTLD_NEXT, #name)

static int from_core(const void *caller) { return (uintptr_t)caller >= core_start && (uintptr_t)caller < core_end; }
#define BY_CORE from_core(__builtin_return_address(0))

static int in_folder(const char *path) { return folder[0] && strncmp(path, folder, strlen(folder)) == 0; }

static int of_folder(int fd) {
    char link[64], path[sizeof folder];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0)
        return 0;
    path[size] = 0;
    return in_folder(path);
}

/* What chance has for a call: its kind's action, or nothing. The numbers are splitmix64's. */
static int rained(int kind) {
    int chance = atomic_load(&rain[kind].per_million);
    if (chance == 0)
        return 0;
    uint64_t x = atomic_fetch_add(&drawn, UINT64_C(0x9e3779b97f4a7c15));
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    if ((x ^ x >> 31) % 1000000 >= (uint64_t)chance)
        return 0;
    atomic_fetch_add(&rain[kind].done, 1);
    return atomic_load(&rain[kind].action);
}

/* Counts a call; what it is to do instead of its work: 0 nothing. */
static int count(int kind) {
    if (!atomic_load(&counting))
        return 0;
    long n = atomic_fetch_add(&calls[kind], 1) + 1;
    int named = kind == atomic_load(&fault.kind) && n >= atomic_load(&fault.first) && n <= atomic_load(&fault.last);
    int action = named ? atomic_load(&fault.action) : rained(kind);
    if (action == STALL) {
        struct timespec pause = {0, STALL_MS * 1000000L};
        nanosleep(&pause, NULL);
        return 0;
    }
    return action;
}

static void born(void *p, size_t size) {
    pthread_mutex_lock(&live_mutex);
    size_t i = ((uintptr_t)p >> 4) % LIVE;
    while (live[i].at)
        i = (i + 1) % LIVE;
    live[i].at = (uintptr_t)p;
    live[i].size = size;
    atomic_fetch_add(&live_count, 1);
    atomic_fetch_add(&live_bytes, (long)size);
    pthread_mutex_unlock(&live_mutex);
}

static void died(void *p) {
    if (!p || atomic_load(&live_count) == 0)
        return;
    pthread_mutex_lock(&live_mutex);
    size_t i = ((uintptr_t)p >> 4) % LIVE;
    while (live[i].at && live[i].at != (uintptr_t)p)
        i = (i + 1) % LIVE;
    if (live[i].at) {
        atomic_fetch_sub(&live_count, 1);
        atomic_fetch_sub(&live_bytes, (long)live[i].size);
        live[i].at = 0;
        for (size_t j = (i + 1) % LIVE; live[j].at; j = (j + 1) % LIVE) { /* those behind it stay reachable */
            size_t home = (live[j].at >> 4) % LIVE;
            if ((j - home + LIVE) % LIVE >= (j - i + LIVE) % LIVE) {
                live[i] = live[j];
                live[j].at = 0;
                i = j;
            }
        }
    }
    pthread_mutex_unlock(&live_mutex);
}

/* ---- what faults.py calls ---- */

/* start, end: where the shared object's code is. path: of the folder. */
void fault_scope(uintptr_t start, uintptr_t end, const char *path) {
    core_start = start;
    core_end = end;
    snprintf(folder, sizeof folder, "%s", path);
}

/* Counts from 0 again; calls first..last of a kind (-1: none) do `action`. */
void fault_arm(int kind, long first, long last, int action) {
    atomic_store(&counting, 0);
    for (int i = 0; i < N_KINDS; i++)
        atomic_store(&calls[i], 0);
    atomic_store(&fault.kind, kind);
    atomic_store(&fault.first, first);
    atomic_store(&fault.last, last);
    atomic_store(&fault.action, action);
    atomic_store(&counting, 1);
}

/* While it counts, calls of a kind do `action` by chance, so many of a million. How many did since the last such call.
 */
long fault_rain(int kind, int action, int per_million) {
    atomic_store(&rain[kind].action, action);
    atomic_store(&rain[kind].per_million, per_million);
    return atomic_exchange(&rain[kind].done, 0);
}

void fault_disarm(void) { atomic_store(&counting, 0); }
long fault_calls(int kind) { return atomic_load(&calls[kind]); }
long fault_live(void) { return atomic_load(&live_count); }
long fault_live_bytes(void) { return atomic_load(&live_bytes); }

/* ---- files ---- */

static int refused(const char *path, int flags) {
    if (!in_folder(path))
        return 0;
    int action = count(OPEN);
    if (action == 0 && flags & O_DIRECT)
        action = count(DIRECT);
    return action;
}

#define OPEN_FUNCTION(name, parameters, arguments)                                                                     \
    int name parameters {                                                                                              \
        NEXT(name);                                                                                                    \
        mode_t mode = 0;                                                                                               \
        if (flags & (O_CREAT | O_TMPFILE)) {                                                                           \
            va_list rest;                                                                                              \
            va_start(rest, flags);                                                                                     \
            mode = va_arg(rest, mode_t);                                                                               \
            va_end(rest);                                                                                              \
        }                                                                                                              \
        int action = refused(path, flags);                                                                             \
        if (action > 0) {                                                                                              \
            errno = action;                                                                                            \
            return -1;                                                                                                 \
        }                                                                                                              \
        return next arguments;                                                                                         \
    }

OPEN_FUNCTION(open, (const char *path, int flags, ...), (path, flags, mode))
OPEN_FUNCTION(open64, (const char *path, int flags, ...), (path, flags, mode))
OPEN_FUNCTION(openat, (int at, const char *path, int flags, ...), (at, path, flags, mode))
OPEN_FUNCTION(openat64, (int at, const char *path, int flags, ...), (at, path, flags, mode))

/* A transfer of `size` bytes; less where it comes back short. Direct reads end on a block. */
#define TRANSFER(kind, size)                                                                                           \
    if (of_folder(fd)) {                                                                                               \
        int action = count(kind);                                                                                      \
        if (action == END)                                                                                             \
            return 0;                                                                                                  \
        if (action == SHORT && size > BLOCK)                                                                           \
            size = BLOCK;                                                                                              \
        else if (action == SHORT && size > 1 && !(fcntl(fd, F_GETFL) & O_DIRECT))                                      \
            size /= 2;                                                                                                 \
        if (action > 0) {                                                                                              \
            errno = action;                                                                                            \
            return -1;                                                                                                 \
        }                                                                                                              \
    }

ssize_t read(int fd, void *buffer, size_t size) {
    NEXT(read);
    TRANSFER(READ, size)
    return next(fd, buffer, size);
}

ssize_t write(int fd, const void *buffer, size_t size) {
    NEXT(write);
    TRANSFER(WRITE, size)
    return next(fd, buffer, size);
}

#define PLACED(name, result, kind, constness, offset_type)                                                             \
    result name(int fd, constness void *buffer, size_t size, offset_type offset) {                                     \
        NEXT(name);                                                                                                    \
        TRANSFER(kind, size)                                                                                           \
        return next(fd, buffer, size, offset);                                                                         \
    }

PLACED(pread, ssize_t, READ, , off_t)
PLACED(pread64, ssize_t, READ, , off64_t)
PLACED(pwrite, ssize_t, WRITE, const, off_t)
PLACED(pwrite64, ssize_t, WRITE, const, off64_t)

/* Of one buffer only: all that the library uses. */
#define VECTORED(name, offset_type)                                                                                    \
    ssize_t name(int fd, const struct iovec *parts, int n, offset_type offset) {                                       \
        NEXT(name);                                                                                                    \
        struct iovec part = parts[0];                                                                                  \
        if (n == 1) {                                                                                                  \
            TRANSFER(READ, part.iov_len)                                                                               \
        }                                                                                                              \
        return n == 1 ? next(fd, &part, 1, offset) : next(fd, parts, n, offset);                                       \
    }

VECTORED(preadv, off_t)
VECTORED(preadv64, off64_t)

#define STATUS_FUNCTION(name, kind, parameters, arguments, ours)                                                       \
    int name parameters {                                                                                              \
        NEXT(name);                                                                                                    \
        int action = (ours) ? count(kind) : 0;                                                                         \
        if (action > 0) {                                                                                              \
            errno = action;                                                                                            \
            return -1;                                                                                                 \
        }                                                                                                              \
        return next arguments;                                                                                         \
    }

STATUS_FUNCTION(fsync, SYNC, (int fd), (fd), of_folder(fd))
STATUS_FUNCTION(ftruncate, TRUNCATE, (int fd, off_t size), (fd, size), of_folder(fd))
STATUS_FUNCTION(ftruncate64, TRUNCATE, (int fd, off64_t size), (fd, size), of_folder(fd))
STATUS_FUNCTION(rename, RENAME, (const char *from, const char *to), (from, to), in_folder(from))
STATUS_FUNCTION(renameat, RENAME, (int a, const char *from, int b, const char *to), (a, from, b, to), in_folder(from))

#define RESERVE_FUNCTION(name, offset_type)                                                                            \
    int name(int fd, offset_type offset, offset_type size) {                                                           \
        NEXT(name);                                                                                                    \
        int action = of_folder(fd) ? count(RESERVE) : 0;                                                               \
        return action > 0 ? action : next(fd, offset, size); /* returns its errno */                                   \
    }

RESERVE_FUNCTION(posix_fallocate, off_t)
RESERVE_FUNCTION(posix_fallocate64, off64_t)

/* ---- memory and threads of the shared object ---- */

static int no_memory(void) {
    if (count(ALLOC) <= 0)
        return 0;
    errno = ENOMEM;
    return 1;
}

void *malloc(size_t size) {
    if (!BY_CORE)
        return __libc_malloc(size);
    void *p = no_memory() ? NULL : __libc_malloc(size);
    if (p)
        born(p, size);
    return p;
}

void *calloc(size_t n, size_t size) {
    if (!BY_CORE)
        return __libc_calloc(n, size);
    void *p = no_memory() ? NULL : __libc_calloc(n, size);
    if (p)
        born(p, n * size);
    return p;
}

void *aligned_alloc(size_t align, size_t size) {
    int ours = BY_CORE;
    void *p = ours && no_memory() ? NULL : __libc_memalign(align, size);
    if (ours && p)
        born(p, size);
    return p;
}

int posix_memalign(void **result, size_t align, size_t size) {
    int ours = BY_CORE;
    void *p = ours && no_memory() ? NULL : __libc_memalign(align, size);
    if (!p)
        return ENOMEM;
    if (ours)
        born(p, size);
    *result = p;
    return 0;
}

void free(void *p) {
    died(p);
    __libc_free(p);
}

#define MAP_FUNCTION(name, offset_type)                                                                                \
    void *name(void *at, size_t size, int protection, int flags, int fd, offset_type offset) {                         \
        NEXT(name);                                                                                                    \
        int ours = BY_CORE, action = ours || (fd >= 0 && of_folder(fd)) ? count(MAP) : 0;                              \
        if (action > 0) {                                                                                              \
            errno = action;                                                                                            \
            return MAP_FAILED;                                                                                         \
        }                                                                                                              \
        void *p = next(at, size, protection, flags, fd, offset);                                                       \
        if (ours && p != MAP_FAILED)                                                                                   \
            born(p, size);                                                                                             \
        return p;                                                                                                      \
    }

MAP_FUNCTION(mmap, off_t)
MAP_FUNCTION(mmap64, off64_t)

int munmap(void *p, size_t size) {
    NEXT(munmap);
    died(p);
    return next(p, size);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *arg) {
    NEXT(pthread_create);
    int action = BY_CORE ? count(THREAD) : 0;
    return action > 0 ? action : next(thread, attributes, run, arg); /* returns its errno */
}
