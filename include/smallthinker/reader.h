/* Reads from a model file: of whole blocks past the page cache, and of any bytes. */
#ifndef SMALLTHINKER_READER_H
#define SMALLTHINKER_READER_H

#include <stddef.h>
#include <stdint.h>

#define ST_READER_ALIGN 4096 /* of offsets, sizes and buffers */

typedef struct st_reader st_reader;

/* Opens for O_DIRECT where the file system takes it, else for ordinary reads that are dropped from the page cache.
 * cached: for ordinary reads, and nothing dropped, where the page cache holds the file now. NULL with errno set on
 * failure. */
st_reader *st_reader_open(const char *path, int cached);
void st_reader_close(st_reader *reader); /* NULL is fine */
int st_reader_direct(const st_reader *reader);

/* Reads exactly size bytes; from any thread. 0, or ST_ERR_IO after retries (also when the file is too short). */
int st_reader_read(void *reader, int64_t offset, size_t size, void *buffer);

/* Reads exactly size bytes at an offset of an open file; from any thread. 0; ST_ERR_IO with errno set, to 0 where the
 * file ends before. */
int st_read_at(int fd, int64_t offset, size_t size, void *buffer);

#endif
