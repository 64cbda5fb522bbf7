# Memory for weights and buffers: see memory.pyx.
from libc.stdint cimport uint8_t

cdef class Arena:
    cdef list blocks
    cdef readonly size_t bytes
    cdef uint8_t *slab
    cdef size_t left

    cdef void give_back(self) noexcept
    cdef void *map(self, size_t size) except NULL
    cdef void *take_apart(self, size_t size) except NULL
    cdef void *take(self, size_t size) except NULL
