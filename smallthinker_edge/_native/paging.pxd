# Experts that live in a packed file: see paging.pyx.
from libc.stdint cimport int64_t, uint8_t

from smallthinker_edge._native.core cimport st_pager, st_reader
from smallthinker_edge._native.memory cimport Arena
from smallthinker_edge._native.router cimport Paging

cdef class ExpertPaging:
    cdef Paging state             # what the forward pass needs
    cdef st_reader *reader
    cdef Arena arena              # of the small buffers
    cdef Arena slot_arena
    cdef uint8_t *slot_memory
    cdef size_t slot_bytes
    cdef int64_t sessions         # bytes of the budget set aside for them, -1 without a budget
    cdef bint lend
    cdef int64_t least_slots, own_slots, most_slots, experts
    cdef readonly int64_t slots   # in use now

    cdef void give_back(self) noexcept
    cdef int fit(self, int64_t in_use) except -1
    cdef int check_open(self) except -1
