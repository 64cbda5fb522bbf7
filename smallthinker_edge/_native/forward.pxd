# cython: cdivision=True
# The whole pass of one decode call, as every thread of the team runs it. Phases are separated by barriers; within one,
# each thread works through its share of the units, and no unit's result depends on who computed it or with which other
# tokens.
from libc.stdint cimport int64_t

from smallthinker_edge._native.attention cimport (
    attention_phase, attention_units, output_phase, output_units, projection_phase, projection_units)
from smallthinker_edge._native.buffers cimport Scratch
from smallthinker_edge._native.call cimport (
    TIME_ATTENTION, TIME_EXPERTS, TIME_OTHER, Call, end_part, next_unit, set_flag, shared_inputs)
from smallthinker_edge._native.capture cimport (
    Capture, capture_attention, capture_ffn, capture_neurons, capture_output, captured)
from smallthinker_edge._native.core cimport st_team_barrier, st_team_size, st_team_stopped
from smallthinker_edge._native.experts cimport expert_phases, neuron_units
from smallthinker_edge._native.head cimport first_head_units, head_phase
from smallthinker_edge._native.weights cimport Layer, read_row


cdef inline void forward(void *arg, int tid) noexcept nogil:
    cdef Call *call = <Call *>arg
    cdef Scratch *scratch = call.buffers.scratch + tid
    cdef const Layer *layer
    cdef const Capture *capture
    cdef int threads = st_team_size(call.team)
    cdef int64_t l, last = call.weights.shape.layers - 1, next_units = shared_inputs(call, projection_units(call))
    embed(call, tid, scratch, next_units)
    if call.no_row:
        return
    end_part(call, tid, TIME_OTHER)
    for l in range(last + 1):
        layer = call.weights.layers + l
        capture = call.capture if captured(call.capture, l) else NULL
        if capture != NULL:
            capture_attention(capture, call.weights, call.buffers, l, call.n, tid, threads)
        projection_phase(call, layer, l, tid, scratch)
        st_team_barrier(call.team, attention_units(call, layer))
        if st_team_stopped(call.team):
            return
        attention_phase(call, layer, l, tid, scratch)
        st_team_barrier(call.team, shared_inputs(call, output_units(call)))
        if st_team_stopped(call.team):
            return
        if capture != NULL:
            capture_output(capture, call.weights, call.buffers, l, call.n, tid, threads)
        output_phase(call, layer, tid, scratch)
        st_team_barrier(call.team, shared_inputs(call, neuron_units(call, layer)))
        if st_team_stopped(call.team):
            return
        end_part(call, tid, TIME_ATTENTION)
        if capture != NULL:
            capture_ffn(capture, call.weights, call.buffers, l, call.n, tid, threads)
        if l == last:
            next_units = shared_inputs(call, first_head_units(call))
        if not expert_phases(call, layer, l, tid, scratch, next_units):
            if tid == 0:
                call.failed = 1
            return
        if st_team_stopped(call.team):
            return
        if capture != NULL:
            capture_neurons(capture, call.weights, call.buffers, l, call.n, tid, threads)
        end_part(call, tid, TIME_EXPERTS)
    if call.logits != NULL:
        head_phase(call, tid, scratch)


cdef inline void embed(Call *call, int tid, Scratch *scratch, int64_t next_units) noexcept nogil:
    """x = the tokens' rows of the embedding; marks the call where one cannot be read, for all threads to see."""
    cdef int64_t t
    while True:
        t = next_unit(call, tid)
        if t < 0:
            break
        if not read_row(&call.weights.embedding, call.tokens[t], scratch.row,
                        call.buffers.x + t * call.weights.shape.d_padded):
            set_flag(&call.no_row)
    st_team_barrier(call.team, next_units)
