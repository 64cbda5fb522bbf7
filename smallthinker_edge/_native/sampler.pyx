# cython: boundscheck=False, cdivision=True
"""Choosing the next token from a row of logits.

Called by model.py, and by people who drive a Session themselves. It never sees the model. Adding a step means one
function here; whole rows are only walked without the GIL.
"""
from libc.math cimport INFINITY, exp, isnan
from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.stdlib cimport free, realloc

import math
import operator
import secrets

import numpy as np

# A token this many temperatures below the best one has a weight under 1e-17: it cannot change a sum of doubles.
DEF_FLOOR = 40.0
cdef double FLOOR = DEF_FLOOR
# Sums of weights are rounded; a top_p that is reached but for this share of it counts as reached.
cdef double REACHED = 1 - 1e-12


cdef struct Candidate:
    float logit
    int32_t id


cdef uint64_t splitmix(uint64_t *state) noexcept nogil:
    """SplitMix64 (Steele, Lea, Flood 2014)."""
    cdef uint64_t z
    state[0] += <uint64_t>0x9E3779B97F4A7C15
    z = state[0]
    z = (z ^ (z >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * <uint64_t>0x94D049BB133111EB
    return z ^ (z >> 31)


cdef inline bint likelier(Candidate a, Candidate b) noexcept nogil:
    """The order of candidates: by logit, the lower id first where logits are equal. No two are the same."""
    return a.logit > b.logit or (a.logit == b.logit and a.id < b.id)


cdef void sift(Candidate *heap, int64_t count, int64_t at, bint best_first) noexcept nogil:
    """Moves heap[at] down to its place; the likeliest of all is at the root, or with best_first off the unlikeliest."""
    cdef Candidate moving = heap[at]
    cdef int64_t child = 2 * at + 1
    while child < count:
        if child + 1 < count and likelier(heap[child + 1], heap[child]) == best_first:
            child += 1
        if likelier(heap[child], moving) != best_first:
            break
        heap[at] = heap[child]
        at = child
        child = 2 * at + 1
    heap[at] = moving


cdef void heapify(Candidate *heap, int64_t count, bint best_first) noexcept nogil:
    cdef int64_t i
    for i in range(count // 2 - 1, -1, -1):
        sift(heap, count, i, best_first)


cdef int64_t collect(const float *logits, int64_t size, double floor, int64_t most, Candidate *kept) noexcept nogil:
    """Writes the `most` likeliest tokens with a logit above `floor` to kept[most], in no order; returns how many."""
    cdef int64_t i, count = 0
    cdef Candidate candidate
    for i in range(size):
        if not logits[i] > floor:
            continue
        candidate.logit, candidate.id = logits[i], <int32_t>i
        if count < most:
            kept[count] = candidate
            count += 1
            if count == most < size:
                heapify(kept, count, False)
        elif likelier(candidate, kept[0]):
            kept[0] = candidate
            sift(kept, count, 0, False)
    return count


cdef int64_t largest(const float *logits, int64_t size) noexcept nogil:
    """Index of the largest logit, the lowest of equal ones; -1 where one is NaN or plus infinity."""
    cdef int64_t i, best = 0
    cdef bint bad = False
    for i in range(size):
        bad |= isnan(logits[i]) or logits[i] == INFINITY
        if logits[i] > logits[best]:
            best = i
    return -1 if bad else best


cdef class Sampler:
    """Picks tokens. Steps, in this order: logit bias, repetition penalty, temperature, top-k, top-p, min-p, draw.

    Args:
        temperature: 0 (the default) picks the largest logit, the lowest id of equal ones; else logits are divided
            by it.
        top_k: keep the k most likely tokens, the lower ids of equally likely ones; 0 keeps all.
        top_p: of those, keep the fewest most likely ones whose share of the probability reaches top_p, in (0, 1]
            (nucleus sampling, Holtzman et al. 2020).
        min_p: keep tokens at least min_p times as likely as the most likely one, in [0, 1].
        repetition_penalty: above 1 makes tokens of the recent history less likely: positive logits are divided by
            it, negative ones multiplied, once for each token however often it occurs (CTRL, Keskar et al. 2019).
        repetition_window: how many of the newest tokens of the history count.
        seed: 0 .. 2**64 - 1. Same seed and same logits, same tokens, on every platform; None takes one from the
            system.
        logit_bias: {token: added to its logit}; minus infinity forbids a token.

    The draw takes 53 bits of one SplitMix64 number and walks the kept tokens from the most likely one, so it can be
    repeated by any program. Greedy picks use up no number.

    Raises ValueError for a value out of range, TypeError for one of another kind. Not safe for several threads at
    once.
    """
    cdef readonly double temperature, top_p, min_p, repetition_penalty
    cdef readonly int64_t top_k, repetition_window
    cdef readonly object seed
    cdef readonly dict logit_bias
    cdef uint64_t state
    cdef object adjusted  # float32 [V], reused from call to call; None until a bias or penalty needs it
    cdef Candidate *kept  # kept[room], reused likewise
    cdef int64_t room

    def __cinit__(self):
        self.kept = NULL
        self.room = 0

    def __dealloc__(self):
        free(self.kept)

    def __init__(self, *, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
                 repetition_window=64, seed=None, logit_bias=None):
        self.temperature = number("temperature", temperature)
        self.top_k = whole("top_k", top_k, 2**31 - 1)
        self.top_p = number("top_p", top_p)
        self.min_p = number("min_p", min_p)
        self.repetition_penalty = number("repetition_penalty", repetition_penalty)
        self.repetition_window = whole("repetition_window", repetition_window, 2**31 - 1)
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, not {temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in 0..1, not {min_p}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be above 0, not {repetition_penalty}")
        self.logit_bias = biases(logit_bias or {})
        self.reset(secrets.randbits(64) if seed is None else seed)

    def reset(self, seed=None):
        """Starts the draws anew, of the seed as it is or of another one."""
        if seed is not None:
            self.seed = whole("seed", seed, 2**64 - 1)
        self.state = self.seed

    def sample(self, logits, history=()):
        """Next token id.

        Args:
            logits: float32 [V]; not changed. Minus infinity means never.
            history: earlier ids, oldest first, for the repetition penalty.

        Raises ValueError when a logit is NaN or plus infinity, none is above minus infinity, or a token of
        logit_bias or of the history's window is outside the vocabulary.
        """
        cdef const float[::1] row = self._row(logits, history)
        cdef int64_t best = checked_largest(row), count, rank
        cdef double mass
        if self.temperature == 0 or self.top_k == 1:
            return best
        self._reserve(row.shape[0])
        with nogil:
            count = self._filter(row, best, &mass)
            rank = self._draw(row[best], mass, count)
        return self.kept[rank].id

    def candidates(self, logits, history=()):
        """The tokens that sample() would choose from, most likely first, and their probabilities.

        Takes no random number. Arguments and errors are those of sample().

        Returns:
            (ids int64 [n], probabilities float64 [n], of sum 1); the greedy token alone at temperature 0.
        """
        cdef const float[::1] row = self._row(logits, history)
        cdef int64_t best = checked_largest(row), count, i
        cdef double mass
        if self.temperature == 0:
            return np.array([best]), np.array([1.0])
        self._reserve(row.shape[0])
        count = self._filter(row, best, &mass)
        pairs = [(self._next(i, count), self.kept[count - 1 - i].id) for i in range(self._alive(count))]
        return pairs

    def _row(self, logits, history):
        """The logits after bias and penalty, float32 [V] and contiguous; the caller's own where nothing changes."""
        values = np.ascontiguousarray(logits, np.float32)
        if values.ndim != 1 or values.size == 0 or np.ndim(logits) != 1:
            raise ValueError("logits must be a non-empty one-dimensional array")
        return values
