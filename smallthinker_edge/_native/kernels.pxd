# Down by itself, for tests and timing: its scales, then its lines, with nothing between.
from libc.stdint cimport int64_t, uint8_t

from smallthinker_edge._native.core cimport *


cdef inline int64_t down_scales(int type, bint transposed, int64_t d, int64_t f) noexcept nogil:
    """Bytes of all scales."""
    return (f if transposed else f // 32) * <int64_t>st_down_scale_bytes(type, transposed, d)


cdef inline int64_t down_bytes(int type, bint transposed, int64_t d, int64_t f) noexcept nogil:
    """Bytes of the whole; 0 where the type has no Down, or the shape does not fit."""
    if d <= 0 or f <= 0 or f % 32 or not st_down_scale_bytes(type, transposed, d):
        return 0
    if not st_row_bytes(type, d if transposed else f):
        return 0
    return down_scales(type, transposed, d, f) + f * <int64_t>st_down_line_bytes(type, d)


cdef inline st_down_view down_view(const uint8_t *data, int type, bint transposed, int64_t d, int64_t f) noexcept nogil:
    cdef st_down_view view
    view.scales, view.lines = data, data + down_scales(type, transposed, d, f)
    view.stride, view.scale_stride = st_down_line_bytes(type, d), st_down_scale_bytes(type, transposed, d)
    return view
