# cython: boundscheck=False, wraparound=False, cdivision=True
"""What the sessions of a model take of its memory budget: keys and values, logits, buffers beyond the plan's.

The engine has one, and whoever allocates for a session asks it first. Expert slots and idle sessions make room.
"""
cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc

import numpy as np

from smallthinker_edge.errors import MemoryBudgetError, OutOfMemoryError


cdef class SessionMemory:
    """Counts what all sessions of a model take together. Changed with the GIL held.

    Attributes:
        config: ModelConfig. batch: most tokens of a decode.
        in_use: bytes taken now. limit: most bytes, None without a budget. aside: bytes set aside in that budget; beyond
            them what is idle goes first, and then slots of experts make room.
        relieve: called there, or None: frees something idle and returns True, or returns False.
    """

    def __cinit__(self, config, int64_t batch):
        self.config, self.batch, self.aside = config, batch, 0
        self.limit = self.relieve = None

    cdef int count(self, int64_t size, what) except -1:
        """Takes bytes for `what`; MemoryBudgetError where that is not there though all that is idle was given up."""
        if self.limit is not None:
            while self.in_use + size > self.aside and self.relieve is not None and self.relieve():
                pass
            if self.in_use + size > <int64_t>self.limit:
                raise MemoryBudgetError(
                    f"{size} bytes for {what} do not fit the memory budget: sessions and logits take {self.in_use} of "
                    f"the {self.limit} bytes that it has for them; close some, or open the model with memory of at "
                    f"least {self.in_use + size - <int64_t>self.limit} bytes more")
        self.in_use += size
        return 0

    cdef int take(self, int64_t size, what) except -1:
        """count(), and slots of the pager make room at once. Between decode calls only: no expert may be in use."""
        self.count(size, what)
        if self.paging is not None:
            self.paging.fit(self.in_use)
        return 0

    cdef void give(self, int64_t size) noexcept:
        self.in_use -= size


@cython.no_gc_clear  # __dealloc__ counts in the memory
cdef class Logits:
    """float32 [rows, width] whose memory counts as long as an array refers to it."""
    cdef SessionMemory memory
    cdef float *data
    cdef int64_t bytes

    def __cinit__(self, SessionMemory memory not None, int64_t rows, int64_t width):
        cdef int64_t size = rows * width * <int64_t>sizeof(float)
        memory.take(size, f"{rows} rows of logits")
        self.memory, self.bytes = memory, size
        self.data = <float *>malloc(size)
        if self.data == NULL:
            raise OutOfMemoryError(f"no memory for {size} bytes of logits")

    def __dealloc__(self):
        if self.memory is not None:
            self.memory.give(self.bytes)
        free(self.data)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.data, self.bytes, 0, flags)


def new_logits(SessionMemory memory not None, int64_t rows, int64_t width):
    """An array float32 [rows, width], not initialised, that counts in a session memory.

    Between decode calls only. Raises MemoryBudgetError, OutOfMemoryError.
    """
    if rows == 0:
        return np.empty((0, width), np.float32)
    return np.frombuffer(Logits(memory, rows, width), np.float32).reshape(rows, width)
