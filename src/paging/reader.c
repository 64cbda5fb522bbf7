/* Reads for the pager's I/O threads, and of single rows and headers. Knows offsets and sizes, and nothing of experts.
 */
#define _GNU_SOURCE
#include "smallthinker/reader.h"

#include "smallthinker/status.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef O_DIRECT
#define O_DIRECT 0
#endif

enum { RETRIES = 3 };

struct st_reader {
    int fd;
    int direct, cached;
};

static int open_to_read(const char *path, int flags) {
    int fd;
    do
        fd = open(path, O_RDONLY | O_CLOEXEC | flags);
    while (fd < 0 && errno == EINTR);
    return fd;
}

/* Opened for direct I/O; -1 where that cannot be had, for whatever reason: file systems and sandboxes refuse it with
 * any errno, and some take the flag at open and refuse the first read. */
static int open_direct(const char *path) {
    void *buffer;
    ssize_t got = -1;
    int fd = open_to_read(path, O_DIRECT);
    if (fd < 0)
        return -1;
    if (posix_memalign(&buffer, ST_READER_ALIGN, ST_READER_ALIGN) == 0) {
        do
            got = pread(fd, buffer, ST_READER_ALIGN, 0);
        while (got < 0 && errno == EINTR);
        free(buffer);
    }
    if (got >= 0)
        return fd;
    close(fd);
    return -1;
}

/* Whether the page cache holds (nearly) the whole file. Linux tells that only to those who may write to it. */
static int in_page_cache(const char *path) {
    int resident = 0;
#ifdef __linux__
    struct stat about;
    int fd = open_to_read(path, 0);
    if (fd < 0)
        return 0;
    if (fstat(fd, &about) == 0 && about.st_size > 0 && (about.st_uid == geteuid() || access(path, W_OK) == 0)) {
        size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = ((size_t)about.st_size + page - 1) / page, held = 0;
        void *map = mmap(NULL, (size_t)about.st_size, PROT_READ, MAP_SHARED, fd, 0);
        unsigned char *states = malloc(pages);
        if (map != MAP_FAILED && states && mincore(map, (size_t)about.st_size, states) == 0) {
            for (size_t i = 0; i < pages; i++)
                held += states[i] & 1;
            resident = held >= pages - pages / 20;
        }
        free(states);
        if (map != MAP_FAILED)
            munmap(map, (size_t)about.st_size);
    }
    close(fd);
#else
    (void)path;
#endif
    return resident;
}

st_reader *st_reader_open(const char *path, int cached) {
    st_reader *reader = calloc(1, sizeof *reader);
    if (!reader)
        return NULL;
    cached = cached && in_page_cache(path);
    reader->cached = cached;
    reader->fd = O_DIRECT != 0 && !cached ? open_direct(path) : -1;
    reader->direct = reader->fd >= 0;
    if (!reader->direct)
        reader->fd = open_to_read(path, 0);
#ifdef F_NOCACHE
    if (reader->fd >= 0 && !cached)
        (void)fcntl(reader->fd, F_NOCACHE, 1);
#endif
    if (reader->fd < 0) {
        int why = errno;
        free(reader);
        errno = why;
        return NULL;
    }
    return reader;
}

void st_reader_close(st_reader *reader) {
    if (!reader)
        return;
    close(reader->fd);
    free(reader);
}

int st_reader_direct(const st_reader *reader) { return reader->direct; }

int st_reader_read(void *arg, int64_t offset, size_t size, void *buffer) {
    st_reader *reader = arg;
    size_t done = 0;
    for (int failures = 0; done < size;) {
        ssize_t got = pread(reader->fd, (char *)buffer + done, size - done, offset + (int64_t)done);
        if (got > 0) {
            done += (size_t)got;
            /* A direct read may stop inside a block at the end of a damaged file; never go on from there. */
            if (reader->direct && done < size && done % ST_READER_ALIGN)
                return ST_ERR_IO;
        } else if (got == 0 || (errno != EINTR && ++failures > RETRIES)) {
            return ST_ERR_IO;
        }
    }
#if defined(POSIX_FADV_DONTNEED)
    if (!reader->direct &&
        !reader->cached) { /* only whole pages are dropped, and a page may be larger than our alignment */
        int64_t page = sysconf(_SC_PAGESIZE), start = offset / page * page;
        int64_t end = (offset + (int64_t)size + page - 1) / page * page;
        (void)posix_fadvise(reader->fd, start, end - start, POSIX_FADV_DONTNEED);
    }
#endif
    return 0;
}

int st_read_at(int fd, int64_t offset, size_t size, void *buffer) {
    for (size_t done = 0; done < size;) {
        ssize_t got = pread(fd, (char *)buffer + done, size - done, offset + (int64_t)done);
        if (got > 0) {
            done += (size_t)got;
        } else if (got == 0) {
            errno = 0;
            return ST_ERR_IO;
        } else if (errno != EINTR) {
            return ST_ERR_IO;
        }
    }
    return 0;
}
