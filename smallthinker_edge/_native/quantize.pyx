# cython: boundscheck=False, wraparound=False
"""Floats to GGUF blocks, for the converter; see include/smallthinker/quantize.h.

Called by convert.py and requantize.py, from several threads at once: nothing is shared and the GIL is released.
"""
from libc.stdint cimport int64_t, uint8_t

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
    cdef int number = TYPES[type], src_type = source_type(flat), status
    cdef int64_t n = flat.size
    cdef size_t size = st_row_bytes(number, n)
    if size == 0:
        raise ValueError(f"{n} elements are not whole blocks of {type}")
    out = np.empty(size, np.uint8)
    cdef uint8_t[::1] dst = out
    cdef const uint8_t[::1] src = flat.view(np.uint8)
    with nogil:
        status = st_quantize(number, &dst[0], src_type, &src[0], n)
    if status == ST_ERR_UNSUPPORTED:
        raise OverflowError(f"holds values that are not finite or too large for {type}")
    return out


def quantize_rows(source not None, const float[::1] weight not None, const float[:, ::1] feedback=None):
    """Rows of a matrix [n, cols] as Q4_0 by least weighted error: uint8 [bytes]. See st_quantize_q4_0_rows().

    Args:
        source: as of quantize(), n * cols elements.
        weight: float32 [cols], what an error of each column counts, not negative.
        feedback: float32 [cols, cols] that carries an error of a column to later ones, or None.

    Raises as quantize(), ValueError also for shapes that do not fit together.
    """
    flat = np.ascontiguousarray(source).reshape(-1)
    cdef int src_type = source_type(flat), status
    cdef int64_t cols = weight.shape[0], n = flat.size
    cdef size_t size = st_row_bytes(ST_Q4_0, n)
    if cols == 0 or st_row_bytes(ST_Q4_0, cols) == 0 or n % cols or size == 0:
        raise ValueError(f"{n} elements are not rows of {cols} in whole blocks")
    if feedback is not None and (feedback.shape[0] != cols or feedback.shape[1] != cols):
        raise ValueError(f"feedback must be [{cols}, {cols}]")
    out, room = np.empty(size, np.uint8), np.empty(ST_QUANTIZE_ROWS * cols, np.float32)
    cdef uint8_t[::1] dst = out
    cdef const uint8_t[::1] src = flat.view(np.uint8)
    cdef float[::1] work = room
    cdef const float *factors = NULL
    if feedback is not None:
        factors = &feedback[0, 0]
    with nogil:
        status = st_quantize_q4_0_rows(&dst[0], src_type, &src[0], n // cols, cols, &weight[0], factors, &work[0])
    if status == ST_ERR_UNSUPPORTED:
        raise OverflowError("holds values that are not finite or too large for Q4_0")
    return out


cdef int source_type(flat) except -1:
    """The type of an array's elements, for the C side."""
    if flat.dtype == np.float32:
        return ST_F32
    if flat.dtype == np.uint16:
        return ST_BF16
    raise ValueError(f"source must be float32, or uint16 for bfloat16, not {flat.dtype}")
