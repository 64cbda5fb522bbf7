# What the sessions of a model take of its memory budget.
from libc.stdint cimport int64_t

from smallthinker_edge._native.paging cimport ExpertPaging


cdef class SessionMemory:
    cdef readonly object config
    cdef readonly int64_t batch
    cdef readonly int64_t in_use
    cdef public int64_t aside
    cdef public object limit
    cdef public object relieve
    cdef ExpertPaging paging  # whose slots make room, or None

    cdef int count(self, int64_t size, what) except -1
    cdef int take(self, int64_t size, what) except -1
    cdef void give(self, int64_t size) noexcept
