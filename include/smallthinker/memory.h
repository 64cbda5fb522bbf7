/* Large blocks of zeroed memory straight from the system, in huge pages where it has them. */
#ifndef SMALLTHINKER_MEMORY_H
#define SMALLTHINKER_MEMORY_H

#include <stddef.h>
#include <stdint.h>

#define ST_MEMORY_GRAIN (2 << 20) /* bytes of a huge page */

/* bytes of zeroed memory, page aligned, followed by at least 8 KiB that may be prefetched; NULL where there is
 * none. Free with st_memory_free and the same size. Pages are committed when first written. */
void *st_memory_alloc(size_t bytes);
void st_memory_free(void *p, size_t bytes); /* NULL is fine */
/* Gives p[bytes], the unused end of a block, back to the system, except a huge page that begins before p. It reads as
 * zero when it is used again. */
void st_memory_return(uint8_t *p, size_t bytes);

#endif
