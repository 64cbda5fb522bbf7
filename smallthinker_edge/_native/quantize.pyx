# cython: boundscheck=False, wraparound=False
"""Floats to GGUF blocks, for the converter; see include/smallthinker/quantize.h.

Called by convert.py and requantize.py, from several threads at once: nothing is shared and the GIL is released.
"""
from libc.stdint cimport int64_t, uint8_t, uint16_t

import numpy as np

from smallthinker_edge._native.core cimport *

TYPES = {"Q4_0": ST_Q4_0, "Q8_0": ST_Q8_0, "F16": ST_F16}


def quantize(str type not None, source not None):
    """The blocks of `source` as uint8 [bytes]: type "Q4_0", "Q8_0" or "F16"; source contiguous, its elements float32,
    or uint16 that are the bits of bfloat16, as many as make whole blocks.

    Raises ValueError for another type or size, OverflowError where a value is not finite or too large for the type.
    """
    if type not in TYPES:
        raise ValueError(f"type must be one of {', '.join(TYPES)}, not {type!r}")
    flat = np.ascontiguousarray(source).reshape(-1)
    cdef int number = TYPES[type], status
    cdef int64_t n = flat.size
    cdef size_t size = st_row_bytes(number, n)
    if size == 0:
        raise ValueError(f"{n} elements are not whole blocks of {type}")
    out = np.empty(size, np.uint8)
    cdef uint8_t[::1] dst = out
    cdef const float[::1] floats
    cdef const uint16_t[::1] halves
    if flat.dtype == np.float32:
        floats = flat
        with nogil:
            status = st_quantize(number, &dst[0], ST_F32, &floats[0], n)
    elif flat.dtype == np.uint16:
        halves = flat
        with nogil:
            status = st_quantize(number, &dst[0], ST_BF16, &halves[0], n)
    else:
        raise ValueError(f"source must be float32, or uint16 for bfloat16, not {flat.dtype}")
    if status == ST_ERR_UNSUPPORTED:
        raise OverflowError(f"holds values that are not finite or too large for {type}")
    return out
