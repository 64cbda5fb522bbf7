# cython: boundscheck=False, wraparound=False
"""A model file on disk, read by place: exactly the bytes that are asked for, or an exception.

Used by gguf_reader.pyx and files/gguf.py. Never a mapping: touching one kills the process (SIGBUS) where the file was
cut short meanwhile or the disk has a bad sector.
"""
import errno
import os
import stat

import numpy as np

from libc.errno cimport errno as c_errno
from libc.stdint cimport int64_t, uint8_t, uint64_t
from posix.unistd cimport close

from smallthinker_edge._native.core cimport st_read_at

from smallthinker_edge.errors import ModelFormatError, OutOfMemoryError


cdef class SourceFile:
    """Args: path: a regular file.

    Attributes:
        path: as given. size: bytes when it was opened.

    Several threads may read at once; none while it is closed. Raises OSError as open() does, ModelFormatError for a
    pipe or device.
    """

    def __cinit__(self, str path not None):
        self.path = path
        # Opening a pipe would wait for its writer.
        self.fd, self.opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), True
        about = os.fstat(self.fd)
        if stat.S_ISDIR(about.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(about.st_mode):
            raise ModelFormatError("not a regular file", path=path)
        self.size = about.st_size

    def __dealloc__(self):
        self.close()

    def close(self):
        """Safe to call twice. Reading raises ValueError from then on."""
        if self.opened:
            self.opened = False
            close(self.fd)

    @property
    def closed(self):
        """True after close()."""
        return not self.opened

    def fileno(self):
        """The descriptor. ValueError after close()."""
        if not self.opened:
            raise ValueError(f"{self.path} is closed")
        return self.fd

    cdef int read_into(self, uint64_t offset, size_t size, void *buffer, str field) except -1:
        cdef int fd = self.fileno()
        cdef int status, why
        with nogil:
            status = st_read_at(fd, <int64_t>offset, size, buffer)
            why = c_errno
        if status == 0:
            return 0
        if why == 0:
            raise ModelFormatError(
                f"the file ends within the {size} bytes to be read here: it was cut short",
                path=self.path, field=field, offset=offset,
            )
        raise OSError(why, os.strerror(why), self.path)

    def read(self, uint64_t offset, size_t size, str field=None):
        """The bytes from an offset on: uint8 [size], a copy.

        Raises ModelFormatError, naming `field`, where the file does not have them any more; OSError where they cannot
        be read; OutOfMemoryError.
        """
        cdef uint8_t[::1] view
        try:
            data = np.empty(size, np.uint8)
        except MemoryError:
            raise OutOfMemoryError(f"no memory for {size} bytes of {self.path}") from None
        if size:
            view = data
            self.read_into(offset, size, &view[0], field)
        return data
