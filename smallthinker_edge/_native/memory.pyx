# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Memory for weights and buffers, straight from the system. Used by the other native modules; it never computes."""
cimport cython
from libc.stdint cimport uint8_t, uintptr_t

from smallthinker_edge._native.core cimport st_memory_alloc, st_memory_free

from smallthinker_edge.errors import OutOfMemoryError

cdef enum:
    SLAB_BYTES = 32 << 20


@cython.no_gc  # it holds numbers only, and the collector must not clear them before the memory is given back
cdef class Arena:
    """System memory that lives as long as this object; the total handed out is in `bytes`.

    Small blocks are cut from slabs large enough for huge pages: on pages of 4 KiB, attention's matrices of about a
    megabyte each streamed a quarter slower.
    """

    def __cinit__(self):
        self.blocks = []
        self.bytes = self.left = 0
        self.slab = NULL

    def __dealloc__(self):
        self.give_back()

    cdef void give_back(self) noexcept:
        """Gives all of it back."""
        cdef uintptr_t p
        for address, size in self.blocks:
            p = address
            st_memory_free(<void *>p, size)
        self.blocks.clear()
        self.bytes = self.left = 0

    cdef void *map(self, size_t size) except NULL:
        cdef void *p = st_memory_alloc(size)
        if p == NULL:
            raise OutOfMemoryError(f"cannot get {size} bytes from the system")
        self.blocks.append((<uintptr_t>p, size))
        return p

    cdef void *take_apart(self, size_t size) except NULL:
        """size bytes in pages of their own: page aligned, committed when first written."""
        cdef void *p = self.map(size + 64)
        self.bytes += size
        return p

    cdef void *take(self, size_t size) except NULL:
        """size bytes of zeroed memory, 64-byte aligned, that may be prefetched 8 KiB past the end."""
        cdef size_t rounded = (size + 127) // 64 * 64
        cdef uint8_t *p
        if rounded > SLAB_BYTES // 8:
            p = <uint8_t *>self.map(rounded)
        else:
            if rounded > self.left:
                self.slab = <uint8_t *>self.map(SLAB_BYTES)
                self.left = SLAB_BYTES
            p = self.slab
            self.slab += rounded
            self.left -= rounded
        self.bytes += size
        return p
