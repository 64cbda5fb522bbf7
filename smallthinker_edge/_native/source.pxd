# A file that is only read: see source.pyx.
from libc.stdint cimport uint64_t

cdef class SourceFile:
    cdef readonly str path
    cdef readonly uint64_t size
    cdef int fd
    cdef bint opened

    cdef int read_into(self, uint64_t offset, size_t size, void *buffer, str field) except -1
