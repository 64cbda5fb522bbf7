# cython: cdivision=True
# One decode call: its arguments, and how the threads of the team share its work.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t

from smallthinker_edge._native.buffers cimport Buffers, Scratch
from smallthinker_edge._native.capture cimport Capture
from smallthinker_edge._native.core cimport *
from smallthinker_edge._native.kv_cache cimport KVView
from smallthinker_edge._native.router cimport Paging
from smallthinker_edge._native.weights cimport Weights, all_finite

cdef enum:
    LOOK_NS = 50000000  # between two looks for Ctrl-C and at the cancel signal
    UNITS_A_LOOK = 8    # of thread 0 in decoding, between two looks at the clock

# Where the time of a call goes, on thread 0's clock. OTHER: the embedding, and what is before and after the pass.
cdef enum:
    TIME_ATTENTION, TIME_EXPERTS, TIME_HEAD, TIME_WAITING, TIME_OTHER, TIME_PARTS

# Shared by the threads of the team. Written by the engine before they start, but for what says otherwise.
cdef struct Call:
    const Weights *weights
    Buffers *buffers
    Paging *paging
    KVView kv
    st_team *team
    const int32_t *tokens  # [n]
    int64_t n
    int64_t position       # of the first
    float *logits          # [n or 1][V], or NULL
    int all_logits
    int sparse_head        # only the rows whose score is above the threshold
    float head_threshold
    const uint32_t *allowed  # [ceil(V / 32)] bits: the only rows that are asked for, of one token; or NULL
    int32_t *trace         # [n][L][K] that takes the chosen experts, or NULL
    const Capture *capture  # takes what some layers' matrices are multiplied with, of n > 1 tokens; or NULL
    int64_t undecided      # tokens that have not chosen this layer's experts yet; all threads count it down
    int failed             # set by thread 0: an expert could not be read
    int no_row             # set by any thread: a row of the embedding could not
    int not_finite         # set by any thread, see check_finite()
    void *caller           # of `interrupted`
    bint (*interrupted)(void *caller) noexcept nogil
    int64_t look_at        # thread 0's: when to ask that again, on the monotonic clock
    int64_t units_taken    # thread 0's
    int64_t time_ns[TIME_PARTS]  # thread 0's, of all calls so far
    int64_t part_at        # thread 0's: when the part under way began, later by what it waited for reads


cdef extern from * nogil:
    """
    static inline int64_t count_down(int64_t *counter) { return __atomic_sub_fetch(counter, 1, __ATOMIC_ACQ_REL); }
    static inline void set_flag(int *flag) { __atomic_store_n(flag, 1, __ATOMIC_RELAXED); }
    """
    void set_flag(int *flag)
    int64_t count_down(int64_t *counter)  # what is left; whoever gets 0 sees all that the others did before


cdef inline void check_finite(Call *call, const float *x, int64_t n) noexcept nogil:
    """Marks the call where some of x[n] are not: vector instructions lose a NaN when they take a maximum."""
    if not all_finite(x, n):
        set_flag(&call.not_finite)


cdef inline void end_part(Call *call, int tid, int part) noexcept nogil:
    """The time since the last part's end was this one's."""
    cdef int64_t now
    if tid == 0:
        now = st_nanoseconds()
        call.time_ns[part] += now - call.part_at
        call.part_at = now


cdef inline bint look_up(Call *call) noexcept nogil:
    """Looks for Ctrl-C and at the cancel signal, at most every LOOK_NS; stops the team and says so where one came."""
    cdef int64_t now = st_nanoseconds()
    if now < call.look_at:
        return False
    call.look_at = now + LOOK_NS
    if not call.interrupted(call.caller):
        return False
    st_team_stop(call.team)
    return True


cdef inline int64_t next_unit(Call *call, int tid) noexcept nogil:
    """The next unit of this phase for a thread, -1 where there is none. Thread 0, the caller's, looks now and then
    whether it should go on."""
    if tid == 0:
        call.units_taken += 1
        if call.n > 1 or call.units_taken % UNITS_A_LOOK == 0:
            look_up(call)
    return st_team_next(call.team, tid)


cdef inline int64_t shared_inputs(const Call *call, int64_t units) noexcept nogil:
    """Units of the phase that starts with inputs(), before `units` units: prompts first normalise each token once."""
    return units if call.n == 1 else call.n


cdef inline void inputs(Call *call, Scratch *scratch, int tid, const float *norm, int64_t units,
                        const st_q8x4 *const **xq, const float **xf) noexcept nogil:
    """What the next GEMM reads, before `units` units: x normalised with `norm`, quantised in xq and as floats in xf.

    One token: every thread makes its own copy, which is cheaper than a barrier.
    """
    cdef const st_kernels *kernels = call.weights.kernels
    cdef Buffers *buffers = call.buffers
    cdef int64_t t, d = call.weights.shape.d
    cdef float eps = call.weights.shape.eps
    if call.n == 1:
        kernels.rmsnorm(buffers.x, norm, d, eps, scratch.norm)
        kernels.quantize(scratch.norm, d // 32 * 32, scratch.xq)
        scratch.rows[0] = scratch.xq
        xf[0] = scratch.norm
    else:
        while True:
            t = next_unit(call, tid)
            if t < 0:
                break
            kernels.rmsnorm(buffers.x + t * call.weights.shape.d_padded, norm, d, eps, buffers.hidden + t * d)
            kernels.quantize(buffers.hidden + t * d, d // 32 * 32, buffers.xq + t * buffers.nq)
        st_team_barrier(call.team, units)
        for t in range(call.n):
            scratch.rows[t] = buffers.xq + t * buffers.nq
        xf[0] = buffers.hidden
    xq[0] = scratch.rows


cdef inline const uint8_t *expert_blob(Call *call, int64_t l, int64_t e, int tid) noexcept nogil:
    """The weights of an expert, waiting for them; NULL where they cannot be read, or the call was interrupted."""
    cdef int32_t id_ = <int32_t>(l * call.weights.shape.experts + e)
    cdef st_pager *pager = call.paging.pager
    cdef int64_t began, waited
    if pager == NULL:
        return call.weights.experts[id_]
    if tid == 0 and st_pager_progress(pager, id_) < 2:
        began = st_nanoseconds()
        while not st_pager_wait(pager, id_, LOOK_NS):
            if look_up(call):
                st_pager_interrupt(pager, 1)
                break
        waited = st_nanoseconds() - began
        call.time_ns[TIME_WAITING] += waited
        call.part_at += waited
    return st_pager_take(pager, id_)
