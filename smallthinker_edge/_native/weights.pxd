# cython: cdivision=True
# The weights of a model as the forward pass reads them, and products with its matrices. Filled once by weights.pyx;
# nothing here changes while a token is computed.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t

from smallthinker_edge._native.core cimport *
from smallthinker_edge._native.memory cimport Arena

cdef enum:
    TILE = 1         # Tile16 of a tiled type, integer kernels
    ROWS = 2         # rows as in GGUF, dequantised one at a time, float arithmetic
    SPARSE_ROWS = 3  # a sparse type in the Rows layout, integer kernels: where few rows of many are read
    FILE_ROWS = 4    # rows as in GGUF that stay in the file: read_row() only

cdef struct Matrix:
    int layout
    int type
    int tiled         # st_tiled(type)
    int64_t rows
    int64_t cols
    const uint8_t *data  # all but FILE_ROWS
    int fd               # FILE_ROWS: the file, and where row 0 begins in it
    int64_t offset

cdef struct Layer:
    float *attn_norm  # [d]
    float *ffn_norm   # [d]
    float *router     # [E][d]
    uint8_t *absent   # [E] whether the file lacks the expert, which is then never chosen; NULL: it has all
    Matrix q
    Matrix k
    Matrix v
    Matrix o
    int rope
    int64_t window
    int64_t kv_index  # its page in a KV block: among the full layers, or among the window layers
    st_expert expert  # how each of its experts stands in a blob

# Sizes of the model, and what follows from them.
cdef struct Shape:
    int64_t layers, vocab
    int64_t d         # width of the residual stream
    int64_t heads, kv_heads, hd
    int64_t experts   # E of a layer
    int64_t used      # K of them for a token
    int64_t f         # neurons of an expert
    int64_t d_padded  # d in whole chunks of down
    int64_t groups    # of 32 neurons
    int64_t parts     # of ST_FFN_PART groups
    int64_t rope_half
    float eps
    int softmax
    int down_transposed

cdef struct Weights:
    Shape shape
    const st_kernels *kernels
    Layer *layers
    const uint8_t **experts  # [L * E] blobs; NULL where they are paged
    Matrix embedding
    Matrix head
    float *output_norm
    Matrix predictor_in      # [K, d] of the LM head's predictor; no rows where the file has none
    Matrix predictor_out     # [V, K]


cdef inline void dequantize(const st_kernels *kernels, int type, const uint8_t *row, int64_t cols,
                            float *out) noexcept nogil:
    if type == ST_F16:
        kernels.from_f16(<const uint16_t *>row, out, cols)
    else:
        st_dequantize_row(type, row, cols, out)


cdef inline void multiply(const st_kernels *kernels, const Matrix *m, int64_t r0, int64_t r1, const st_q8x4 *const *xq,
                          const float *xf, int64_t ldx, int64_t n, float *y, int64_t ldy, float *row) noexcept nogil:
    """y[i * ldy + r - r0] = W[r] . x[i] for rows r0..r1 (r0 a multiple of 16 for TILE) and i < n.

    xq, xf: the inputs, quantised and as floats ldx apart. row: room for a row of m.
    """
    cdef int64_t r, i
    cdef size_t row_bytes = st_row_bytes(m.type, m.cols)
    cdef int32_t index[64]
    if m.layout == SPARSE_ROWS:
        for r in range(r0, r1):
            index[(r - r0) % 64] = <int32_t>r
            if (r - r0) % 64 == 63 or r == r1 - 1:
                for i in range(n):
                    kernels.rows[m.tiled](m.data, row_bytes, m.cols // 32, index, (r - r0) % 64 + 1, xq[i],
                                          y + i * ldy + (r - r0) // 64 * 64)
        return
    if m.layout == TILE:
        kernels.gemm[m.tiled](m.data, r1, m.cols // 32, r0 // 16, (r1 + 15) // 16, xq, n, y, ldy)
        return
    for r in range(r0, r1):
        dequantize(kernels, m.type, m.data + r * row_bytes, m.cols, row)
        for i in range(n):
            y[i * ldy + r - r0] = kernels.dot(row, xf + i * ldx, m.cols)


cdef inline void multiply_some(const st_kernels *kernels, const Matrix *m, const int32_t *index, int64_t count,
                               const st_q8x4 *const *xq, const float *xf, float *y, float *row) noexcept nogil:
    """y[i] = W[index[i]] . x for ascending rows: the same bits as multiply()'s."""
    cdef int64_t i, tile = -1
    cdef float values[ST_TILE_ROWS]
    if m.layout == SPARSE_ROWS:
        kernels.rows[m.tiled](m.data, st_row_bytes(m.type, m.cols), m.cols // 32, index, count, xq[0], y)
        return
    for i in range(count):
        if m.layout == ROWS:
            multiply(kernels, m, index[i], index[i] + 1, xq, xf, m.cols, 1, y + i, 1, row)
            continue
        if index[i] // ST_TILE_ROWS != tile:
            tile = index[i] // ST_TILE_ROWS
            multiply(kernels, m, tile * ST_TILE_ROWS, min((tile + 1) * ST_TILE_ROWS, m.rows), xq, xf, m.cols, 1, values,
                     ST_TILE_ROWS, row)
        y[i] = values[index[i] % ST_TILE_ROWS]


cdef inline bint read_row(const Matrix *m, int64_t r, float *row, float *out) noexcept nogil:
    """out = W[r]; False where the file does not give it. row: room for a row of m."""
    cdef uint8_t *bytes = <uint8_t *>row
    cdef size_t size = st_row_bytes(m.type, m.cols)
    if m.layout == FILE_ROWS:
        if st_read_at(m.fd, m.offset + r * <int64_t>size, size, bytes) != 0:
            return False
        st_dequantize_row(m.type, bytes, m.cols, out)
    elif m.layout == TILE:
        st_dequantize_tile16_row(m.type, m.data, m.cols, r, out)
    elif m.layout == SPARSE_ROWS:
        st_unpack_rows(m.type, m.data + r * size, size, 1, m.cols, bytes)
        st_dequantize_row(m.type, bytes, m.cols, out)
    else:
        st_dequantize_row(m.type, m.data + r * size, m.cols, out)
    return True


cdef inline bint all_finite(const float *x, int64_t n) noexcept nogil:
    """Whether none of x[n] is a NaN or infinite."""
    cdef const uint32_t *bits = <const uint32_t *>x
    cdef int64_t i
    cdef int bad = 0
    for i in range(n):
        bad |= (bits[i] & 0x7f800000) == 0x7f800000
    return not bad


cdef class ModelWeights:
    cdef Weights weights
    cdef Arena arena
    cdef readonly object config
    cdef readonly bint exact
    cdef int expert_layouts   # of all layers: bits 1 << ST_EXPERT_...
    cdef st_piece *pieces     # that are still to be read
    cdef int64_t n_pieces, pieces_room
    cdef list sources         # of each piece: what it is read from
    cdef readonly int64_t unread

    cdef void give_back(self) noexcept
    cdef int set_layouts(self) except -1
    cdef int set_expert(self, Layer *layer, types) except -1
    cdef Layer *layer(self, int64_t l) except NULL
    cdef int set_shape(self, Matrix *m, int type, int64_t rows, int64_t cols) except -1
    cdef int make_matrix(self, Matrix *m, int type, int64_t rows, int64_t cols, data, int64_t unit,
                         bint sparse=*) except -1
    cdef float *make_vector(self, data, int64_t n) except NULL
    cdef st_piece *add_piece(self, sources) except NULL
    cdef int load(self, st_team *team, bint (*interrupted)(void *caller) noexcept nogil, void *caller,
                  int64_t ask_ns) except -1
