# What the forward pass computes into: one set for an engine, allocated by buffers.pyx from the list that the memory
# plan counts.
from libc.stdint cimport int32_t, int64_t

from smallthinker_edge._native.core cimport *
from smallthinker_edge._native.memory cimport Arena
from smallthinker_edge._native.weights cimport Shape

cdef enum:
    NEURON_UNIT = 128  # neurons of a unit whose experts are in tiles: one st_q8x4
    NEURON_TOKENS = 32  # whose gate and up of such a unit are computed together
    FEW_TOKENS = 8  # up to which experts are read once, gate to down (docs/notes/2026-11-25-speculation.md)

# What one thread needs for itself.
cdef struct Scratch:
    float *norm           # [max(d, H*hd)]
    st_q8x4 *xq           # the same, quantised
    const st_q8x4 **rows  # [2 * batch] pointers handed to the GEMMs
    st_neurons neurons[4]  # on their way through the FFN of a few tokens
    st_neurons *stage[4]   # which of them is where; NULL: none
    float *gate           # [batch][32]
    float *neurons_of_unit  # [gate, up][NEURON_TOKENS][NEURON_UNIT]
    float *row            # [max(d, H*hd, f)] one dequantised row
    int32_t *keys         # [E] of top_k
    float *scores         # [2 * G][256], what attention_many takes, or one head
    st_q8x4 *head         # one head's keys or values, quantised
    const st_q8x4 **queries  # [2 * G] pointers into q8
    float *out            # [batch][64]: a unit's output before it is added to x
    int32_t *selected     # [batch] rows of the LM head that this thread has selected

# n: tokens of a call, at most `batch`; G: query heads of a KV head.
cdef struct Buffers:
    int64_t batch
    Scratch *scratch      # [threads]
    float *x              # [n][d_padded] residual
    float *hidden         # [n][d] normalised, for ROWS matrices
    st_q8x4 *xq           # [n][nq] normalised and quantised, or attention's output
    int64_t nq            # st_q8x4 a row
    float *router_logits  # [n][E]
    int32_t *chosen       # [n][K] ascending expert id
    float *weight         # [n][K]
    int32_t *list_start   # [E + 1]
    int32_t *list_slot    # [n * K]: t * K + k, grouped by expert
    int32_t *active_expert  # [E] those with tokens, ascending
    int32_t *order        # [E] places in active_expert, experts that are in memory first
    int64_t n_active
    float *q              # [n][H*hd]
    float *attn           # [n][H*hd]
    float *kv             # [2 * kv_heads][n][hd]
    st_q8x4 *q8           # [n][heads][query, its rest][nq_head], for a Q8_0 cache
    int64_t nq_head
    float *rope           # [n][cos, sin][rope_half]
    float *rope_window    # the same for window layers; rope itself where theta does not differ
    float *partial        # [unit][G][hd] of one token (n == 1), or of one thread
    float *partial_m      # [unit][G] largest score
    float *partial_l      # [unit][G] sum
    int64_t max_chunks    # of a KV head that the three have room for
    st_active *active     # [n*K][groups]
    st_fired *fired       # the same where down is transposed
    float *parts          # [FEW_TOKENS * K * parts][d_padded]: what each part of an expert adds, not yet weighted
    float *h              # [n*K][f], where experts stay in GGUF rows
    st_q8x4 *hq           # [n*K][nq_h], where they are in tiles
    int64_t nq_h
    float *z              # [n][K] predictor_in . x
    st_q8x4 *zq           # [n][nq_z]
    int64_t nq_z


cdef class ModelBuffers:
    cdef Buffers buffers
    cdef Arena arena
    cdef Arena partials
    cdef int threads
    cdef int expert_layouts  # that there are buffers for: bits 1 << ST_EXPERT_...
    cdef object config

    cdef void give_back(self) noexcept
    cdef int64_t lacks(self, int64_t context, bint q8) except -1
    cdef int fit(self, int64_t context, bint q8, int expert_layouts) except -1
    cdef int fit_experts(self, int layouts) except -1
    cdef int fill_rope(self, const Shape *shape, int64_t position, int64_t n) except -1
