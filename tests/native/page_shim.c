/* Preloaded into a Python process (tests/model/test_page_sizes.py): a system whose pages have FAKE_PAGE bytes. It says
 * so, mappings begin and end on such pages, and what a kernel with them would refuse ends the process with a message.
 * Direct reads must keep to them too where FAKE_DIRECT is set, as on some file systems. For glibc. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

#define NEXT(name)                                                                                                     \
    static __typeof__(&name) next;                                                                                     \
    if (!next)                                                                                                         \
    next = (__typeof__(&name))(uintptr_t)dlsym(RTLD_NEXT, #name)

static size_t page(void) {
    static size_t size;
    if (size == 0)
        size = (size_t)atol(getenv("FAKE_PAGE"));
    return size;
}

static size_t whole(size_t size) { return (size + page() - 1) / page() * page(); }

static void need(int true, const char *what) {
    if (!true) {
        fprintf(stderr, "page_shim: %s\n", what);
        _exit(99);
    }
}

long sysconf(int name) {
    NEXT(sysconf);
    return name == _SC_PAGESIZE ? (long)page() : next(name);
}

int getpagesize(void) { return (int)page(); }

/* A mapping where the system likes, one page of ours larger, and what is too much of it given back. */
#define MAP_FUNCTION(name, offset_type)                                                                                \
    void *name(void *at, size_t size, int protection, int flags, int fd, offset_type offset) {                         \
        NEXT(name);                                                                                                    \
        need(offset % (offset_type)page() == 0, "mmap: offset");                                                       \
        if (flags & MAP_FIXED || size == 0)                                                                            \
            return next(at, size, protection, flags, fd, offset);                                                      \
        uint8_t *room = mmap_real(whole(size) + page());                                                               \
        if (room == MAP_FAILED)                                                                                        \
            return MAP_FAILED;                                                                                         \
        uint8_t *start = (uint8_t *)(((uintptr_t)room + page() - 1) / page() * page());                                \
        void *p = next(start, size, protection, flags | MAP_FIXED, fd, offset);                                        \
        uint8_t *first = p == MAP_FAILED ? room : start, *last = p == MAP_FAILED ? room : start + whole(size);         \
        if (first > room)                                                                                              \
            munmap_real(room, (size_t)(first - room));                                                                 \
        munmap_real(last, (size_t)(room + whole(size) + page() - last));                                               \
        return p;                                                                                                      \
    }

static int munmap_real(void *p, size_t size) {
    static int (*next)(void *, size_t);
    if (!next)
        next = (int (*)(void *, size_t))(uintptr_t)dlsym(RTLD_NEXT, "munmap");
    return size == 0 ? 0 : next(p, size);
}

static void *mmap_real(size_t size) {
    static void *(*next)(void *, size_t, int, int, int, off_t);
    if (!next)
        next = (void *(*)(void *, size_t, int, int, int, off_t))(uintptr_t)dlsym(RTLD_NEXT, "mmap");
    return next(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

MAP_FUNCTION(mmap, off_t)
MAP_FUNCTION(mmap64, off64_t)

int munmap(void *p, size_t size) {
    need((uintptr_t)p % page() == 0, "munmap: address");
    return munmap_real(p, whole(size));
}

int madvise(void *p, size_t size, int advice) {
    NEXT(madvise);
    need((uintptr_t)p % page() == 0, "madvise: address");
    return next(p, whole(size), advice);
}

/* A byte for each page of ours: the first of those that the system has there. */
int mincore(void *p, size_t size, unsigned char *states) {
    NEXT(mincore);
    need((uintptr_t)p % page() == 0, "mincore: address");
    for (size_t i = 0; i < whole(size) / page(); i++) {
        unsigned char state[1];
        if (next((uint8_t *)p + i * page(), 1, state) != 0)
            return -1;
        states[i] = state[0];
    }
    return 0;
}

static int refused(int fd, const void *buffer, size_t size, off64_t offset) {
    if (!getenv("FAKE_DIRECT") || !(fcntl(fd, F_GETFL) & O_DIRECT))
        return 0;
    return (uintptr_t)buffer % page() || size % page() || offset % (off64_t)page();
}

#define READ_FUNCTION(name, offset_type)                                                                               \
    ssize_t name(int fd, void *buffer, size_t size, offset_type offset) {                                              \
        NEXT(name);                                                                                                    \
        if (refused(fd, buffer, size, offset)) {                                                                       \
            errno = EINVAL;                                                                                            \
            return -1;                                                                                                 \
        }                                                                                                              \
        return next(fd, buffer, size, offset);                                                                         \
    }

READ_FUNCTION(pread, off_t)
READ_FUNCTION(pread64, off64_t)
