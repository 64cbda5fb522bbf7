/* Anonymous mappings for weights, KV cache and buffers: returned to the system at once when freed, unlike heap
 * memory, so that the process stays within its budget. */
#define _DEFAULT_SOURCE
#include "smallthinker/memory.h"

#include <sys/mman.h>

enum { GUARD = 8192, HUGE_MINIMUM = 2 * ST_MEMORY_GRAIN };

void *st_memory_alloc(size_t bytes) {
    if (bytes > SIZE_MAX - GUARD)
        return NULL;
    void *p = mmap(NULL, bytes + GUARD, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        return NULL;
#ifdef MADV_HUGEPAGE
    if (bytes >= HUGE_MINIMUM)
        (void)madvise(p, bytes, MADV_HUGEPAGE); /* only a hint: without it the same bytes in small pages */
#endif
    return p;
}

void st_memory_return(uint8_t *p, size_t bytes) {
    uintptr_t start = ((uintptr_t)p + ST_MEMORY_GRAIN - 1) / ST_MEMORY_GRAIN * ST_MEMORY_GRAIN;
    uintptr_t end = (uintptr_t)p + bytes;
    if (start < end)
        (void)madvise((void *)start, end - start, MADV_DONTNEED);
}

void st_memory_free(void *p, size_t bytes) {
    if (p)
        munmap(p, bytes + GUARD);
}
