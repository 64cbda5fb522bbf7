# cython: boundscheck=False, wraparound=False
"""Locks that an exception cannot leave taken: held by `with`, whose entry and exit are one C call each.

Used by session.py and model.py. A Python lock's acquire() followed by `try` has a moment in between at which Ctrl-C
leaves it taken for good. They are taken with the GIL held, and never by a finaliser.
"""
from cpython.exc cimport PyErr_CheckSignals
from cpython.pythread cimport (
    PY_LOCK_ACQUIRED, PyLockStatus, PyThread_acquire_lock, PyThread_allocate_lock, PyThread_free_lock,
    PyThread_get_thread_ident, PyThread_release_lock, PyThread_type_lock)

from smallthinker_edge.errors import DecodeCancelled, OutOfMemoryError, SessionBusy

cdef extern from "pythread.h":
    PyLockStatus PyThread_acquire_lock_timed(PyThread_type_lock lock, long long microseconds, int interrupts) nogil

cdef enum:
    LOOK_MICROSECONDS = 50000


cdef class Busy:
    """Held by one thread at a time: `with busy:` raises SessionBusy where another one is inside, and never waits."""
    cdef bint taken

    def __enter__(self):
        if self.taken:
            raise SessionBusy("another thread is using this session")
        self.taken = True

    def __exit__(self, *exception):
        self.taken = False


cdef class Turns:
    """Threads take turns: `with turns.wait(cancel):` waits for the others.

    While it waits it looks for Ctrl-C and at `cancel` (anything with is_set(), or None) every 50 ms, and raises
    KeyboardInterrupt or DecodeCancelled then. RuntimeError where the thread itself is inside already: a signal handler
    that interrupts a decode.
    """
    cdef PyThread_type_lock lock
    cdef unsigned long holder
    cdef bint held

    def __cinit__(self):
        self.lock = PyThread_allocate_lock()
        if self.lock == NULL:
            raise OutOfMemoryError("cannot allocate a lock")

    def __dealloc__(self):
        if self.lock != NULL and not self.held:
            PyThread_free_lock(self.lock)

    def wait(self, cancel=None):
        """What to enter with `with`."""
        return _Turn(self, cancel)


cdef class _Turn:
    cdef Turns turns
    cdef object cancel

    def __cinit__(self, Turns turns not None, cancel):
        self.turns, self.cancel = turns, cancel

    def __enter__(self):
        cdef Turns turns = self.turns
        cdef bint acquired = PyThread_acquire_lock(turns.lock, 0)
        if not acquired and turns.held and turns.holder == PyThread_get_thread_ident():
            raise RuntimeError("this thread is computing with the model already")
        while not acquired:
            with nogil:
                acquired = PyThread_acquire_lock_timed(turns.lock, LOOK_MICROSECONDS, 0) == PY_LOCK_ACQUIRED
            if not acquired:
                PyErr_CheckSignals()
                if self.cancel is not None and self.cancel.is_set():
                    raise DecodeCancelled("cancelled while others were computing")
        turns.holder, turns.held = PyThread_get_thread_ident(), True

    def __exit__(self, *exception):
        self.turns.held = False
        PyThread_release_lock(self.turns.lock)
