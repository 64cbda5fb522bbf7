# cython: boundscheck=False, cdivision=True
"""Choosing the next token from a row of logits.

Made by model.py for stream.py, and by people who drive a Session themselves. It never sees the model.
"""
from libc.float cimport FLT_MAX
from libc.math cimport INFINITY, isnan
from libc.stdint cimport int64_t, uint64_t

import secrets

import numpy as np

from smallthinker_edge.options import OPTIONS


cdef uint64_t splitmix(uint64_t *state) noexcept nogil:
    """SplitMix64 (Steele, Lea, Flood 2014)."""
    cdef uint64_t z
    state[0] += <uint64_t>0x9E3779B97F4A7C15
    z = state[0]
    z = (z ^ (z >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * <uint64_t>0x94D049BB133111EB
    return z ^ (z >> 31)


def _checked(name, value):
    return OPTIONS[name].checked(name, value)


cdef class Sampler:
    """Picks tokens. Steps, in this order: logit bias, repetition penalty, temperature, top-k, top-p, min-p, draw.

    Args:
        temperature: 0 picks the largest logit (the lowest id of equal ones); else logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the fewest most likely tokens whose probabilities reach top_p, in (0, 1].
        min_p: keep tokens at least min_p times as likely as the most likely one, in [0, 1].
        repetition_penalty: above 1 makes tokens of the recent history less likely: positive logits are divided by
            it, negative ones multiplied (CTRL, Keskar et al. 2019).
        repetition_window: how many of the newest tokens of the history count.
        seed: same seed, same draws, on every platform; None takes one from the system.
        logit_bias: {token: added to its logit}; minus infinity forbids a token.

    None is the default. Raises ValueError for a value out of range, TypeError for one of another type. Not safe for
    several threads at once.
    """
    cdef readonly double temperature, top_p, min_p, repetition_penalty
    cdef readonly int64_t top_k, repetition_window
    cdef readonly object seed
    cdef readonly dict logit_bias
    cdef uint64_t state

    def __init__(self, *, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0,
                 repetition_penalty=1.0, repetition_window=64, seed=None, logit_bias=None):
        self.temperature = _checked("temperature", temperature)
        self.top_k = _checked("top_k", top_k)
        self.top_p = _checked("top_p", top_p)
        self.min_p = _checked("min_p", min_p)
        self.repetition_penalty = _checked("repetition_penalty", repetition_penalty)
        self.repetition_window = _checked("repetition_window", repetition_window)
        self.logit_bias = dict(_checked("logit_bias", logit_bias))
        self.seed = secrets.randbits(63) if seed is None else _checked("seed", seed)
        self.state = self.seed

    def reset(self):
        """Starts the draws of the seed anew."""
        self.state = self.seed

    def sample(self, logits, history=()):
        """Next token id.

        Args:
            logits: float32 [V]; not changed. Minus infinity means never.
            history: earlier ids, oldest first, for the repetition penalty.

        Raises ValueError when a logit is NaN or plus infinity, or none is above minus infinity.
        """
        values = np.asarray(logits, np.float32)
        if values.ndim != 1 or values.size == 0:
            raise ValueError("logits must be a non-empty one-dimensional array")
        if self.logit_bias or self.repetition_penalty != 1:
            values = self._adjusted(values, history)
        values = np.ascontiguousarray(values)
        best = largest(values)
        if self.temperature == 0 or self.top_k == 1:
            return best
        ids, weights = self._kept(values, best)
        return int(ids[self._draw(weights)])

    def _adjusted(self, values, history):
        values = values.copy()
        for token, bias in self.logit_bias.items():
            if not 0 <= token < values.size:
                raise ValueError(f"logit bias for token {token} outside the vocabulary of {values.size}")
            values[token] += np.float32(bias)
        if self.repetition_penalty != 1 and self.repetition_window:
            seen = np.unique(np.asarray(history[-self.repetition_window:], np.int64))
            if seen.size and not 0 <= seen[0] <= seen[-1] < values.size:
                raise ValueError("history holds a token outside the vocabulary")
            penalty = np.float32(self.repetition_penalty)
            values[seen] = np.where(values[seen] > 0, values[seen] / penalty, values[seen] * penalty)
        return values

    def _kept(self, values, best):
        """Ids that survive top-k, top-p and min-p, most likely first, and their unnormalised weights (float64)."""
        # A token this far below the best has a weight under 1e-17: it cannot change a sum of doubles.
        floor = max(float(values[best]) - 40 * self.temperature, -FLT_MAX)  # never minus infinity, however hot
        ids = np.flatnonzero(values >= floor)  # not empty, however small the temperature
        if 0 < self.top_k < ids.size:
            ids = np.sort(np.argpartition(-values, self.top_k - 1)[: self.top_k])
        ids = ids[np.argsort(-values[ids], kind="stable")]
        weights = np.exp((values[ids].astype(np.float64) - float(values[best])) / self.temperature)
        if self.top_p < 1:
            sums = np.cumsum(weights)
            keep = int(np.searchsorted(sums, self.top_p * sums[-1] * (1 - 1e-12))) + 1
            ids, weights = ids[:keep], weights[:keep]
        if self.min_p > 0:
            keep = int(np.count_nonzero(weights >= self.min_p * weights[0]))
            ids, weights = ids[:keep], weights[:keep]
        return ids, weights

    cdef int64_t _draw(self, weights):
        cdef const double[::1] w = weights
        cdef double total = 0, at
        cdef int64_t i, n = w.shape[0]
        for i in range(n):
            total += w[i]
        at = <double>(splitmix(&self.state) >> 11) * (1.0 / (<uint64_t>1 << 53)) * total
        for i in range(n - 1):
            at -= w[i]
            if at < 0:
                return i
        return n - 1


cdef int64_t largest(values) except -1:
    cdef const float[::1] v = values
    cdef int64_t i, best = 0
    cdef bint bad = False
    with nogil:
        for i in range(v.shape[0]):
            bad |= isnan(v[i]) or v[i] == INFINITY
            if v[i] > v[best]:
                best = i
    if bad:
        raise ValueError("a logit is not a number, or infinite")
    if v[best] == -INFINITY:
        raise ValueError("no token is possible: every logit is minus infinity")
    return best
