/* src/paging/reader.c against a system that reads short, is interrupted, fails, and refuses direct I/O. Run by
 * tests/engine/test_native.py, plain and under sanitizers, with an empty folder as its argument.
 * Prints "ok" or dies. */
#define _GNU_SOURCE
#include "smallthinker/reader.h"

#include "check.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BLOCK = ST_READER_ALIGN, BLOCKS = 64, ANY_NUMBER = 100 };

/* What the next system calls do. */
static struct {
    atomic_int interrupts, errors; /* how many preads end so first */
    int shorten;                   /* a pread gives at most so many bytes; 0: all */
    int refuse_open, refuse_read;  /* errno of direct I/O, or 0 */
} fault;
static atomic_int open_files;

static int faulty_open(const char *path, int flags) {
    if (fault.refuse_open && (flags & O_DIRECT)) {
        errno = fault.refuse_open;
        return -1;
    }
    int fd = open(path, flags);
    atomic_fetch_add(&open_files, fd >= 0);
    return fd;
}

static int counted_close(int fd) {
    atomic_fetch_sub(&open_files, 1);
    return close(fd);
}

static ssize_t faulty_pread(int fd, void *buffer, size_t size, off_t offset) {
    if (fault.refuse_read && (fcntl(fd, F_GETFL) & O_DIRECT)) {
        errno = fault.refuse_read;
        return -1;
    }
    if (atomic_load(&fault.interrupts) > 0 && atomic_fetch_sub(&fault.interrupts, 1) > 0) {
        errno = EINTR;
        return -1;
    }
    if (atomic_load(&fault.errors) > 0 && atomic_fetch_sub(&fault.errors, 1) > 0) {
        errno = EIO;
        return -1;
    }
    if (fault.shorten && size > (size_t)fault.shorten)
        size = (size_t)fault.shorten;
    return pread(fd, buffer, size, offset);
}

#define open faulty_open
#define close counted_close
#define pread faulty_pread
#include "../../src/paging/reader.c"
#undef open
#undef close
#undef pread

static uint8_t value(int64_t at) { return (uint8_t)(at / BLOCK * 7 + at % 251); }

/* Writes `blocks` blocks, each byte telling its place plus `shift`. */
static void write_file(const char *path, int blocks, int shift) {
    FILE *file = fopen(path, "wb");
    CHECK(file);
    for (int64_t at = 0; at < (int64_t)blocks * BLOCK; at++)
        putc((uint8_t)(value(at) + shift), file);
    CHECK(fclose(file) == 0);
}

/* Reads `blocks` blocks from block `first` on; 1 where they are right, 0 where the reader says it failed. */
static int reads(st_reader *reader, int first, int blocks) {
    size_t size = (size_t)blocks * BLOCK;
    int64_t offset = (int64_t)first * BLOCK;
    uint8_t *buffer = aligned_alloc(BLOCK, size);
    CHECK(buffer);
    errno = EINTR; /* left over from something else: it says nothing about the end of a file */
    int status = st_reader_read(reader, offset, size, buffer);
    CHECK(status == 0 || status == ST_ERR_IO);
    for (size_t i = 0; status == 0 && i < size; i++)
        CHECK(buffer[i] == value(offset + (int64_t)i));
    free(buffer);
    return status == 0;
}

/* The same for a reader with direct I/O and one without. */
static void faults(const char *path, int direct) {
    st_reader *reader = st_reader_open(path, 0);
    CHECK(reader && st_reader_direct(reader) == direct);
    CHECK(reads(reader, 0, BLOCKS) && reads(reader, 5, 1) && reads(reader, BLOCKS - 1, 1));

    fault.shorten = direct ? 3 * BLOCK : 1000; /* a direct read ends on a block, or at the end of the file */
    CHECK(reads(reader, 0, BLOCKS));
    atomic_store(&fault.interrupts, ANY_NUMBER);
    CHECK(reads(reader, 3, 20) && atomic_load(&fault.interrupts) <= 0);
    atomic_store(&fault.errors, 3); /* what passes is tried again */
    CHECK(reads(reader, 3, 20));
    atomic_store(&fault.errors, 4); /* what stays is an error, and no endless loop */
    CHECK(!reads(reader, 3, 20));
    atomic_store(&fault.errors, 0);
    CHECK(reads(reader, 3, 20));
    fault.shorten = 0;

    CHECK(!reads(reader, BLOCKS - 1, 2) && !reads(reader, BLOCKS, 1)); /* the end of the file, and beyond */
    CHECK(truncate(path, 10 * BLOCK + 100) == 0);                      /* underneath, within a block */
    CHECK(reads(reader, 0, 10) && !reads(reader, 9, 2) && !reads(reader, 10, 1) && !reads(reader, 20, 1));
    write_file(path, BLOCKS, 0);
    CHECK(reads(reader, 0, BLOCKS)); /* as long as before, it is readable again */
    st_reader_close(reader);
}

/* A file of the same name that takes the place of the opened one is not mixed with it. */
static void replaced(const char *path, const char *other) {
    st_reader *reader = st_reader_open(path, 0);
    CHECK(reader);
    write_file(other, 2, 1);
    CHECK(rename(other, path) == 0);
    CHECK(reads(reader, 0, BLOCKS));
    st_reader_close(reader);
    write_file(path, BLOCKS, 0);
}

static void *read_all(void *reader) {
    for (int i = 0; i < 50; i++)
        CHECK(reads(reader, i, 1 + i % 14));
    return NULL;
}

static void from_several_threads(const char *path) {
    st_reader *reader = st_reader_open(path, 0);
    CHECK(reader);
    atomic_store(&fault.interrupts, 20);
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        CHECK(pthread_create(&threads[i], NULL, read_all, reader) == 0);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    st_reader_close(reader);
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    char path[4096], other[4096];
    snprintf(path, sizeof path, "%s/file", argv[1]);
    snprintf(other, sizeof other, "%s/other", argv[1]);
    CHECK(!st_reader_open(path, 0) && errno == ENOENT);
    st_reader_close(NULL);
    write_file(path, BLOCKS, 0);

    st_reader *reader = st_reader_open(path, 0);
    CHECK(reader);
    int direct = st_reader_direct(reader); /* whether this file system takes it */
    st_reader_close(reader);
    reader = st_reader_open(path, 1); /* just written: the page cache has it */
    CHECK(reader && !st_reader_direct(reader) && reads(reader, 0, BLOCKS) && !reads(reader, BLOCKS, 1));
    st_reader_close(reader);
    faults(path, direct);
    replaced(path, other);
    from_several_threads(path);

    const int refusals[] = {EINVAL, EPERM, ENOTSUP, ENOSYS, EIO};
    for (size_t i = 0; i < sizeof refusals / sizeof *refusals; i++) {
        fault.refuse_open = refusals[i];
        faults(path, 0);
        replaced(path, other);
        from_several_threads(path);
        fault.refuse_open = 0;
        fault.refuse_read = refusals[i]; /* opened, but the first read is refused */
        faults(path, 0);
        fault.refuse_read = 0;
    }
    CHECK(atomic_load(&open_files) == 0);
    puts("ok");
    return 0;
}
