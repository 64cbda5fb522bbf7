# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The weights of one model in the kernels' layouts. Filled by loading.py, read by the forward pass."""
cimport cython
from libc.errno cimport EIO
from libc.stdint cimport int64_t, uint8_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memset
from posix.unistd cimport close

import os

from smallthinker_edge._native.core cimport *
from smallthinker_edge._native.memory cimport Arena

from smallthinker_edge.errors import OutOfMemoryError

cdef enum:
    PIECE_BYTES = 1 << 20  # of a matrix that a thread reads at a time
    ROOM_BYTES = 32 << 20  # that all threads read into: so many of them load


@cython.no_gc_clear  # __dealloc__ has an order
cdef class ModelWeights:
    """Args:
        config: ModelConfig.
        kernels: name of a kernel table; None picks the best of this CPU. ValueError where it cannot run.
        exact: keep every matrix as GGUF rows, so that they are computed with in float32 (slow; the tests' yardstick).

    Each set_ method is called once, with stored bytes of exactly the size that shape and type ask for (else
    ValueError), and takes memory for them; Engine.load() reads them.

    Attributes: unread: bytes that it has to read.
    """

    def __cinit__(self, config, kernels=None, bint exact=False):
        cdef Weights *w = &self.weights
        cdef Shape *s = &w.shape
        self.config, self.exact = config, exact
        self.arena, self.sources = Arena(), []
        w.kernels = find_table(kernels)
        s.layers, s.vocab, s.d = config.n_layers, config.vocab_size, config.d_model
        s.heads, s.kv_heads, s.hd = config.n_heads, config.n_kv_heads, config.head_dim
        s.experts, s.used, s.f = config.n_experts, config.n_experts_used, config.d_ffn
        s.eps, s.softmax, s.down_transposed = config.rms_eps, config.gating == "softmax", config.down_transposed
        s.d_padded = (s.d + 255) // 256 * 256
        s.groups = (s.f + 31) // 32
        s.parts = (s.groups + ST_FFN_PART - 1) // ST_FFN_PART
        s.rope_half = config.rope_dim // 2
        w.layers = <Layer *>calloc(s.layers, sizeof(Layer))
        w.experts = <const uint8_t **>calloc(s.layers * s.experts, sizeof(void *))
        if w.layers == NULL or w.experts == NULL:
            raise OutOfMemoryError("cannot allocate the layers")
        self.set_layouts()

    def __dealloc__(self):
        self.give_back()

    cdef void give_back(self) noexcept:
        """Frees everything. Nothing may be read any more."""
        free(self.weights.layers)
        free(self.weights.experts)
        free(self.pieces)
        self.pieces = NULL
        self.n_pieces = self.pieces_room = self.unread = 0
        self.sources = None
        self.weights.layers, self.weights.experts = NULL, NULL
        if self.arena is not None:
            self.arena.give_back()
        if self.weights.embedding.layout == FILE_ROWS:
            close(self.weights.embedding.fd)
            self.weights.embedding.layout = 0

    cdef int set_layouts(self) except -1:
        cdef int64_t l, windows = 0
        cdef Layer *layer
        for l in range(self.weights.shape.layers):
            layer = self.weights.layers + l
            layer.rope = self.config.rope_layout[l]
            layer.window = self.config.window if self.config.window_layout[l] else 0
            layer.kv_index = windows if layer.window else l - windows
            windows += layer.window > 0
        return 0

    @property
    def kernels(self):
        """Name of the kernel table in use."""
        return self.weights.kernels.name.decode()

    @property
    def bytes(self):
        """Bytes of memory (rows that are read from the file not counted)."""
        return self.arena.bytes

    cdef Layer *layer(self, int64_t l) except NULL:
        if self.weights.layers == NULL:
            raise ValueError("the model is closed")
        if not 0 <= l < self.weights.shape.layers:
            raise ValueError(f"no layer {l}")
        return self.weights.layers + l

    cdef int set_shape(self, Matrix *m, int type, int64_t rows, int64_t cols) except -1:
        m.type, m.tiled, m.rows, m.cols, m.fd = type, st_tiled(type), rows, cols, -1
        return 0

    cdef int make_matrix(self, Matrix *m, int type, int64_t rows, int64_t cols, data, int64_t unit,
                         bint sparse=False) except -1:
        """Takes memory for one matrix in the layout that suits it, and lists its pieces.

        unit: rows that one work unit takes, which must suit the tiles. sparse: few of its rows will be read at a time.
        """
        cdef size_t row_bytes = st_row_bytes(type, cols), size = row_bytes * rows
        cdef int64_t r, step = max(1, <int64_t>(PIECE_BYTES // (row_bytes * ST_TILE_ROWS))) * ST_TILE_ROWS
        cdef uint8_t *dst
        cdef st_piece *piece
        cdef int kind = ST_AS_COPY
        if <size_t>data.size != size:
            raise ValueError("matrix bytes do not match its shape and type")
        self.set_shape(m, type, rows, cols)
        if sparse and not self.exact and st_sparse(type):
            m.layout, kind = SPARSE_ROWS, ST_AS_ROWS
        elif not self.exact and m.tiled >= 0 and unit % ST_TILE_ROWS == 0:
            m.layout, kind = TILE, ST_AS_TILES
            size = st_tile16_bytes(type, rows, cols)
        else:
            m.layout = ROWS
        m.data = dst = <uint8_t *>self.arena.take(size)
        for r in range(0, rows, step):  # whole tiles, whose bytes are as many as their rows'
            piece = self.add_piece([data.part(r * row_bytes, min(r + step, rows) * row_bytes)])
            piece.as_, piece.type, piece.rows, piece.cols = kind, type, min(step, rows - r), cols
            piece.to = dst + r * row_bytes
        return 0

    cdef float *make_vector(self, data, int64_t n) except NULL:
        cdef st_piece *piece
        cdef float *to
        if <int64_t>data.size != n * 4:
            raise ValueError("vector has the wrong length")
        to = <float *>self.arena.take(n * 4)
        piece = self.add_piece([data])
        piece.as_, piece.to = ST_AS_COPY, <uint8_t *>to
        return to

    cdef st_piece *add_piece(self, sources) except NULL:
        """A new piece to be read from up to three sources; what becomes of them is for the caller to say."""
        cdef st_piece *piece
        cdef int64_t room = max(256, 2 * self.pieces_room)
        if self.n_pieces == self.pieces_room:
            piece = <st_piece *>realloc(self.pieces, room * sizeof(st_piece))
            if piece == NULL:
                raise OutOfMemoryError("cannot list what is to be read")
            self.pieces, self.pieces_room = piece, room
        piece = self.pieces + self.n_pieces
        memset(piece, 0, sizeof(st_piece))
        for i, source in enumerate(sources):
            piece.fd[i], piece.offset[i], piece.bytes[i] = source.file.fileno(), source.offset, source.size
            self.unread += source.size
        self.sources.append(sources)
        self.n_pieces += 1
        return piece

    cdef int load(self, st_team *team, bint (*interrupted)(void *caller) noexcept nogil, void *caller,
                  int64_t ask_ns) except -1:
        """Reads and packs all that set_ methods were given, as Engine.load() says; not all where it was interrupted."""
        cdef Arena arena = Arena()
        cdef size_t each = st_load_room(self.pieces, self.n_pieces)
        cdef int64_t ended
        cdef uint8_t *room
        st_team_resize(team, max(1, min(st_team_size(team), <int>(ROOM_BYTES // max(1, each)))))
        room = <uint8_t *>arena.take(each * st_team_size(team) + 1)
        with nogil:
            ended = st_load(team, self.pieces, self.n_pieces, room, interrupted, caller, ask_ns)
        arena.give_back()
        sources, self.sources = self.sources, []
        self.n_pieces = self.unread = 0
        if ended >= 0:
            for source in sources[ended]:
                source[:]  # which says what is wrong
            raise OSError(EIO, os.strerror(EIO), sources[ended][0].file.path)
        return 0

    def set_embedding(self, int type, data):
        """token_embd: GGUF rows."""
        cdef Weights *w = &self.weights
        self.make_matrix(&w.embedding, type, w.shape.vocab, w.shape.d, data, ST_TILE_ROWS, w.predictor_in.rows > 0)

    def set_embedding_rows(self, int type, int fd, int64_t offset):
        """token_embd whose GGUF rows stay in a file, from an offset on, and are read one a token. fd: of the open file;
        duplicated, it may be closed then. OSError where that cannot be."""
        cdef Matrix *m = &self.weights.embedding
        self.set_shape(m, type, self.weights.shape.vocab, self.weights.shape.d)
        m.offset, m.fd = offset, os.dup(fd)
        m.layout = FILE_ROWS

    def set_predictor(self, int type, data):
        """lm_head_profiler: K rows of d, then V rows of K, in one run of GGUF rows (K from the config). To be called
        before set_embedding() and set_head(), which lay the head out for reading single rows then."""
        cdef Weights *w = &self.weights
        cdef int64_t K = self.config.lm_head_predictor_size
        cdef size_t size = st_row_bytes(type, w.shape.d) * K
        self.make_matrix(&w.predictor_in, type, K, w.shape.d, data.part(0, size), ST_TILE_ROWS)
        self.make_matrix(&w.predictor_out, type, w.shape.vocab, K, data.part(size, data.size), ST_TILE_ROWS)

    def set_head(self, norm, type=None, data=None):
        """output_norm, and output; without a matrix the embedding serves as the head (tied)."""
        cdef Weights *w = &self.weights
        w.output_norm = self.make_vector(norm, w.shape.d)
        if data is None:
            w.head = w.embedding
        else:
            self.make_matrix(&w.head, type, w.shape.vocab, w.shape.d, data, ST_TILE_ROWS, w.predictor_in.rows > 0)

    def set_layer(self, int64_t l, attn_norm, ffn_norm, router, q, k, v, o):
        """Dense weights of layer l: vectors of float32, router [E * d], and (type, stored bytes) of q, k, v, o."""
        cdef Shape *s = &self.weights.shape
        cdef Layer *layer = self.layer(l)
        layer.attn_norm = self.make_vector(attn_norm, s.d)
        layer.ffn_norm = self.make_vector(ffn_norm, s.d)
        layer.router = self.make_vector(router, s.experts * s.d)
        self.make_matrix(&layer.q, q[0], s.heads * s.hd, s.d, q[1], s.hd)
        self.make_matrix(&layer.k, k[0], s.kv_heads * s.hd, s.d, k[1], s.hd)
        self.make_matrix(&layer.v, v[0], s.kv_heads * s.hd, s.d, v[1], s.hd)
        self.make_matrix(&layer.o, o[0], s.d, s.heads * s.hd, o[1], 64)

    def set_absent(self, int64_t l, absent):
        """Experts of layer l that there are not, as bool [E]: the router passes them over. At least K must be left."""
        cdef const uint8_t[::1] flags = absent.view("uint8")
        cdef Layer *layer = self.layer(l)
        if flags.shape[0] != self.weights.shape.experts or absent.size - absent.sum() < self.weights.shape.used:
            raise ValueError("one flag for every expert is needed, and as many experts as a token uses")
        layer.absent = <uint8_t *>self.arena.take(flags.shape[0])
        memcpy(layer.absent, &flags[0], flags.shape[0])

    def set_experts(self, int64_t l, gate, up, down):
        """The experts of layer l: (type, stored bytes) of the stacked gate, up and down tensors."""
        cdef Layer *layer = self.layer(l)
        cdef int64_t e, E = self.weights.shape.experts
        cdef st_expert *expert = &layer.expert
        cdef size_t size
        cdef uint8_t *blob
        cdef st_piece *piece
        self.set_expert(layer, (gate[0], up[0], down[0]))
        if [matrix[1].size for matrix in (gate, up, down)] != [expert.rows[i] * E for i in range(3)]:
            raise ValueError("expert bytes do not match their shape and type")
        size = (expert.bytes + 63) // 64 * 64
        blob = <uint8_t *>self.arena.take(size * E)
        for e in range(E):
            piece = self.add_piece([matrix[1].part(e * expert.rows[i], (e + 1) * expert.rows[i])
                                    for i, matrix in enumerate((gate, up, down))])
            self.weights.experts[l * E + e] = piece.to = blob
            piece.expert = expert
            blob += size

    cdef int set_expert(self, Layer *layer, types) except -1:
        """How the experts of a layer stand in their blobs, by the numbers of the types of gate, up and down."""
        cdef Shape *s = &self.weights.shape
        gate, up, down = types
        if st_expert_init(&layer.expert, s.d, s.f, gate, up, down, s.down_transposed, not self.exact) < 0:
            raise ValueError("experts of a type that cannot be read, or sizes that do not fit it")
        self.expert_layouts |= 1 << layer.expert.layout
        return 0


cdef const st_kernels *find_table(name) except NULL:
    cdef const st_kernels *table
    if name is None:
        return st_cpu_best()
    encoded = name.encode()
    table = st_cpu_table(encoded)
    if table == NULL:
        raise ValueError(f"kernel table {name!r} is unknown or this CPU lacks its instructions")
    return table
