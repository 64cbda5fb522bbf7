# The C core as Cython sees it: declarations only, of what some .pyx calls; the contracts are in include/.
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t

cdef extern from "smallthinker/types.h" nogil:
    enum:
        ST_F32
        ST_F16
        ST_BF16
        ST_Q4_0
        ST_Q8_0
        ST_TYPE_NUMBERS
    ctypedef struct st_type_info:
        const char *name
        int columns
        int bytes
    const st_type_info *st_type_of(int number)
    int st_tiled(int type)
    int st_sparse(int type)
    size_t st_row_bytes(int type, int64_t cols)
    void st_dequantize_row(int type, const uint8_t *row, int64_t cols, float *out)

cdef extern from "smallthinker/status.h" nogil:
    enum:
        ST_ERR_UNSUPPORTED

cdef extern from "smallthinker/quantize.h" nogil:
    enum:
        ST_QUANTIZE_ROWS
    int st_quantize(int type, uint8_t *dst, int src_type, const void *src, int64_t n)
    int st_quantize_q4_0_rows(uint8_t *dst, int src_type, const void *src, int64_t rows, int64_t cols,
                              const float *weight, const float *feedback, float *work)

cdef extern from "smallthinker/layout.h" nogil:
    enum:
        ST_TILE_ROWS
        ST_DOWN_CHUNK
    ctypedef struct st_q8x4:
        int8_t q[2][4][16]
        float scale[16]
    ctypedef struct st_active:
        int8_t h[32]
        uint8_t index[32]
        int32_t quads
        float scale
    ctypedef struct st_fired:
        float h[32]
        uint8_t index[32]
        int32_t quads
    size_t st_tile16_bytes(int type, int64_t rows, int64_t cols)
    ctypedef struct st_down_view:
        const uint8_t *lines
        const uint8_t *scales
        size_t stride
        size_t scale_stride
    size_t st_down_line_bytes(int type, int64_t d)
    size_t st_down_scale_bytes(int type, int transposed, int64_t d)
    void st_pack_tile16(int type, const uint8_t *src, int64_t rows, int64_t cols, uint8_t *dst, int64_t t0, int64_t t1)
    void st_unpack_tile16(int type, const uint8_t *src, int64_t rows, int64_t cols, uint8_t *dst)
    void st_pack_rows(int type, const uint8_t *src, int64_t rows, int64_t cols, uint8_t *dst, size_t stride)
    void st_unpack_rows(int type, const uint8_t *src, size_t stride, int64_t rows, int64_t cols, uint8_t *dst)
    void st_pack_down(int type, int transposed, const uint8_t *src, int64_t d, int64_t f, uint8_t *lines,
                      uint8_t *scales, const st_down_view *to)
    void st_unpack_down(int type, int transposed, const st_down_view *source, int64_t d, int64_t f, uint8_t *dst)
    void st_dequantize_tile16_row(int type, const uint8_t *tiles, int64_t cols, int64_t r, float *out)

cdef extern from "smallthinker/expert.h" nogil:
    enum:
        ST_EXPERT_ROWS
        ST_EXPERT_TILES
        ST_EXPERT_SPARSE
    ctypedef struct st_expert:
        int64_t d
        int64_t f
        int gate
        int up
        int down
        int transposed
        int layout
        int tiled[3]
        size_t rows[3]
        size_t up_at
        size_t down_at
        size_t stride
        size_t bytes
        size_t group_bytes
    int st_expert_init(st_expert *e, int64_t d, int64_t f, int gate, int up, int down, int transposed, int pack)
    st_down_view st_expert_down(const st_expert *e, const uint8_t *blob)
    void st_expert_pack(const st_expert *e, const uint8_t *gate, const uint8_t *up, const uint8_t *down, uint8_t *blob)
    void st_expert_unpack(const st_expert *e, const uint8_t *blob, uint8_t *gate, uint8_t *up, uint8_t *down)

cdef extern from "smallthinker/kernels.h" nogil:
    enum:
        ST_ATTN_CHUNK
        ST_ATTN_TOKENS
        ST_FFN_PART
        ST_DOWN_TOKENS
        ST_UP_TOKENS
    ctypedef struct st_neurons:
        const st_q8x4 *x
        const uint8_t *gate
        const uint8_t *up
        size_t up_stride
        st_down_view down
        int transposed
        float *y
        int64_t group
        int64_t fired
        int32_t index[32]
        float g[32]
        st_active active
        st_fired output
    ctypedef void st_gemm(const uint8_t *w, int64_t rows, int64_t nb, int64_t t0, int64_t t1, const st_q8x4 *const *x,
                          int64_t n, float *y, int64_t ldy) noexcept nogil
    ctypedef void st_rows(const uint8_t *w, size_t stride, int64_t nb, const int32_t *index, int64_t n,
                          const st_q8x4 *x, float *out) noexcept nogil
    ctypedef void st_up(const uint8_t *w, size_t stride, int64_t nb, const st_q8x4 *const *x, int64_t n,
                        const uint32_t *fires, float *up) noexcept nogil
    ctypedef void st_ffn(const int *tiled, int64_t nb, st_neurons *const *stage) noexcept nogil
    ctypedef void st_down(const st_down_view *down, int64_t d, int64_t groups, int64_t c0, int64_t c1,
                          const st_active *const *a, const float *weight, int64_t n, float *const *y) noexcept nogil
    ctypedef void st_down_transposed(const st_down_view *down, int64_t d, int64_t groups, int64_t c0, int64_t c1,
                                     const st_fired *a, float weight, float *y) noexcept nogil
    ctypedef void st_attention(const float *q, int64_t G, int64_t hd, const uint16_t *k, const uint16_t *v, int64_t n,
                               float scale, float *scores, float *acc, float *m, float *l) noexcept nogil
    ctypedef void st_attention_many(const float *q, int64_t ldq, int64_t n, int64_t G, int64_t hd, const uint16_t *k,
                                    const uint16_t *v, const int32_t *p0, const int32_t *p1, float scale,
                                    float *scratch, float *acc, float *m, float *l) noexcept nogil
    ctypedef void st_attention_q8(const st_q8x4 *const *q, int64_t G, int64_t hd, const uint8_t *k, const uint8_t *v,
                                  int64_t p0, int64_t p1, float scale, float *scores, float *acc, float *m,
                                  float *l) noexcept nogil
    ctypedef struct st_kernels:
        const char *name
        st_gemm *gemm[1]  # and the others: by st_tiled()
        st_rows *rows[1]
        st_up *up[1]
        st_ffn *ffn
        st_down *down[1]
        st_down_transposed *down_transposed[1]
        st_attention *attention
        st_attention_many *attention_many
        st_attention_q8 *attention_q8
        void (*quantize)(const float *x, int64_t cols, st_q8x4 *out) noexcept nogil
        void (*activate)(const float *g, const float *up, st_active *out) noexcept nogil
        void (*rmsnorm)(const float *x, const float *w, int64_t n, float eps, float *out) noexcept nogil
        float (*dot)(const float *a, const float *b, int64_t n) noexcept nogil
        void (*axpy)(float a, const float *x, float *y, int64_t n) noexcept nogil
        void (*to_f16)(const float *x, uint16_t *out, int64_t n) noexcept nogil
        void (*from_f16)(const uint16_t *x, float *out, int64_t n) noexcept nogil
        void (*rope)(float *v, const float *cosine, const float *sine, int64_t half) noexcept nogil
        void (*top_k)(const float *x, int64_t n, int64_t k, int32_t *keys, int32_t *ids) noexcept nogil
    int64_t ST_ATTN_SCRATCH(int64_t rows, int64_t hd)
    void st_neurons_choose(st_neurons *n)
    void st_neurons_advance(st_neurons **stage)
    void st_neurons_tokens(const float *gate, int64_t n, uint32_t *fires)
    void st_neurons_spread(const st_neurons *n, const float *value, float *up)
    void st_neurons_multiply(const st_neurons *n, const float *value, st_fired *out)

cdef extern from "smallthinker/kv.h" nogil:
    ctypedef struct st_kv_kind:
        const char *name
        int full
        int window
    const st_kv_kind *st_kv_kind_at(int i)
    size_t st_kv_head_bytes(int type, int64_t hd)
    void st_kv_store_q8_key(const st_q8x4 *x, int64_t hd, int64_t position, uint8_t *keys)
    void st_kv_query_rest(const float *x, const st_q8x4 *q, int64_t hd, st_q8x4 *rest)
    void st_kv_store_q8_value(const st_q8x4 *x, int64_t hd, int64_t position, uint8_t *values)

cdef extern from "smallthinker/cpu.h" nogil:
    const char *const *st_cpu_tables()
    const st_kernels *st_cpu_table(const char *name)
    const st_kernels *st_cpu_best()
    int st_cpu_supports(const char *name)

cdef extern from "smallthinker/clock.h" nogil:
    int64_t st_nanoseconds()

cdef extern from "smallthinker/sizing.h" nogil:
    ctypedef struct st_sizing:
        int size
    void st_sizing_init(st_sizing *s, int threads)
    void st_sizing_token(st_sizing *s, double seconds, double slept)

cdef extern from "smallthinker/threads.h" nogil:
    ctypedef struct st_team:
        pass
    ctypedef void (*st_team_fn)(void *arg, int tid) noexcept nogil
    st_team *st_team_create(int n, const int *cpus)
    void st_team_destroy(st_team *team)
    int st_team_size(const st_team *team)
    void st_team_resize(st_team *team, int size)
    int64_t st_team_slept(const st_team *team)
    void st_team_run(st_team *team, st_team_fn fn, void *arg, int64_t units)
    void st_team_barrier(st_team *team, int64_t units)
    int64_t st_team_next(st_team *team, int tid)
    void st_team_stop(st_team *team)
    int st_team_stopped(const st_team *team)

cdef extern from "smallthinker/load.h" nogil:
    enum:
        ST_AS_TILES
        ST_AS_ROWS
        ST_AS_COPY
    ctypedef struct st_piece:
        const st_expert *expert
        int fd[3]
        int64_t offset[3]
        size_t bytes[3]
        int as_ "as"
        int type
        int64_t rows
        int64_t cols
        uint8_t *to
    enum:
        ST_LOADED
        ST_LOAD_INTERRUPTED
    size_t st_load_room(const st_piece *pieces, int64_t n)
    int64_t st_load(st_team *team, const st_piece *pieces, int64_t n, uint8_t *room,
                    bint (*interrupted)(void *caller) noexcept nogil, void *caller, int64_t ask_ns)

cdef extern from "smallthinker/reader.h" nogil:
    ctypedef struct st_reader:
        pass
    st_reader *st_reader_open(const char *path, int cached)
    void st_reader_close(st_reader *reader)
    int st_reader_direct(const st_reader *reader)
    int st_reader_read(void *reader, int64_t offset, size_t size, void *buffer)
    int st_read_at(int fd, int64_t offset, size_t size, void *buffer)

cdef extern from "smallthinker/pager.h" nogil:
    ctypedef struct st_pager:
        pass
    ctypedef int (*st_pager_read)(void *source, int64_t offset, size_t size, void *buffer) noexcept nogil
    ctypedef struct st_pager_config:
        st_pager_read read
        void *source
        int64_t experts
        int64_t layer
        const int64_t *offsets
        size_t bytes
        uint8_t *memory
        int64_t slots
        int io_threads
        const uint32_t *sums
        size_t piece
        int64_t give_way_ns
        int64_t (*stolen)() noexcept nogil
        void (*write)(uint8_t *memory, size_t bytes) noexcept nogil
    ctypedef struct st_pager_stats:
        int64_t hits
        int64_t ahead_hits
        int64_t misses
        int64_t bytes_read
        int64_t bytes_wasted
        int64_t read_errors
        int64_t evictions
        int64_t predicted
        int64_t predicted_right
        int64_t ahead_reads
        int64_t stall_ns
        int64_t disk_ns
    st_pager *st_pager_create(const st_pager_config *config)
    void st_pager_destroy(st_pager *pager)
    void st_pager_want(st_pager *pager, const int32_t *ids, const int32_t *uses, int64_t n, int64_t tokens)
    void st_pager_ahead(st_pager *pager, const int32_t *ids, int64_t n)
    int st_pager_progress(st_pager *pager, int32_t id)
    const uint8_t *st_pager_take(st_pager *pager, int32_t id)
    int st_pager_wait(st_pager *pager, int32_t id, int64_t ns)
    void st_pager_interrupt(st_pager *pager, int on)
    void st_pager_release(st_pager *pager, const int32_t *ids, int64_t n)
    int64_t st_pager_since_arrival(st_pager *pager)
    void st_pager_resize(st_pager *pager, int64_t slots)
    void st_pager_get_uses(st_pager *pager, double *uses)
    void st_pager_warm(st_pager *pager, const int32_t *ids, const double *uses, int64_t n)
    void st_pager_get_stats(st_pager *pager, st_pager_stats *stats)

cdef extern from "smallthinker/stolen.h" nogil:
    int64_t st_stolen_ns()

cdef extern from "smallthinker/memory.h" nogil:
    void *st_memory_alloc(size_t bytes)
    void st_memory_free(void *p, size_t bytes)
    void st_memory_return(uint8_t *p, size_t bytes)
    enum:
        ST_MEMORY_GRAIN
