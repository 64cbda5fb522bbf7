# cython: boundscheck=False, cdivision=True
"""Choosing the next token from a row of logits.

Made by model.py for stream.py, and by people who drive a Session themselves. It never sees the model.
"""
from libc.float cimport FLT_MAX
from libc.math cimport INFINITY, fmin, isnan, pow
from libc.stdint cimport int64_t, uint64_t

import secrets

import numpy as np

from smallthinker_edge.options import LARGEST, OPTIONS


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
    """Picks tokens. Steps, in this order: logit bias, repetition, presence, frequency and DRY penalties, temperature,
    top-k, top-p, min-p, draw.

    Args:
        temperature: 0 picks the largest logit (the lowest id of equal ones); else logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the fewest most likely tokens whose probabilities reach top_p, in (0, 1].
        min_p: keep tokens at least min_p times as likely as the most likely one, in [0, 1].
        repetition_penalty: above 1 makes tokens of the recent history less likely: positive logits are divided by
            it, negative ones multiplied (CTRL, Keskar et al. 2019).
        repetition_window: how many of the newest tokens of the history count for it.
        presence_penalty: subtracted from the logit of every token that was sampled before.
        frequency_penalty: the same, as many times as the token was sampled (both as OpenAI's API defines them).
        dry_multiplier: above 0, a token that would continue a repetition of n >= dry_allowed_length tokens loses
            dry_multiplier * dry_base ** (n - dry_allowed_length) (DRY, p-e-w 2024). A repetition is the end of the
            history that stands in it earlier too, within its newest dry_window tokens.
        seed: same seed, same draws, on every platform; None takes one from the system.
        logit_bias: {token: added to its logit}; minus infinity forbids a token.
        prompt_tokens: how many of the history's first ids are a prompt, which was not sampled.
        breaker_tokens: ids that no repetition of DRY reaches across.

    None is the default. Raises ValueError for a value out of range, TypeError for one of another type. Not safe for
    several threads at once.
    """
    cdef readonly double temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty
    cdef readonly double dry_multiplier, dry_base
    cdef readonly int64_t top_k, repetition_window, dry_allowed_length, dry_window, prompt_tokens
    cdef readonly object seed
    cdef readonly dict logit_bias
    cdef readonly object breaker_tokens
    cdef uint64_t state

    def __init__(self, *, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0,
                 repetition_penalty=1.0, repetition_window=64, presence_penalty=0.0, frequency_penalty=0.0,
                 dry_multiplier=0.0, dry_base=1.75, dry_allowed_length=2, dry_window=4096, seed=None,
                 logit_bias=None, prompt_tokens=0, breaker_tokens=()):
        self.temperature = _checked("temperature", temperature)
        self.top_k = _checked("top_k", top_k)
        self.top_p = _checked("top_p", top_p)
        self.min_p = _checked("min_p", min_p)
        self.repetition_penalty = _checked("repetition_penalty", repetition_penalty)
        self.repetition_window = _checked("repetition_window", repetition_window)
        self.presence_penalty = _checked("presence_penalty", presence_penalty)
        self.frequency_penalty = _checked("frequency_penalty", frequency_penalty)
        self.dry_multiplier = _checked("dry_multiplier", dry_multiplier)
        self.dry_base = _checked("dry_base", dry_base)
        self.dry_allowed_length = _checked("dry_allowed_length", dry_allowed_length)
        self.dry_window = _checked("dry_window", dry_window)
        self.logit_bias = dict(_checked("logit_bias", logit_bias))
        self.prompt_tokens, self.breaker_tokens = prompt_tokens, frozenset(breaker_tokens)
        self.seed = secrets.randbits(63) if seed is None else _checked("seed", seed)
        self.state = self.seed

    def reset(self):
        """Starts the draws of the seed anew."""
        self.state = self.seed

    def sample(self, logits, history=()):
        """Next token id.

        Args:
            logits: float32 [V]; not changed. Minus infinity means never.
            history: earlier ids, oldest first, for the penalties.

        Raises ValueError when a logit is NaN or plus infinity, or none is above minus infinity.
        """
        values = np.asarray(logits, np.float32)
        if values.ndim != 1 or values.size == 0:
            raise ValueError("logits must be a non-empty one-dimensional array")
        if (self.logit_bias or self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty
                or self.dry_multiplier):
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
            seen = np.unique(_ids(history[-self.repetition_window:], values.size))
            penalty = np.float32(self.repetition_penalty)
            values[seen] = np.where(values[seen] > 0, values[seen] / penalty, values[seen] * penalty)
        if self.presence_penalty or self.frequency_penalty:
            seen, counts = np.unique(_ids(history[self.prompt_tokens:], values.size), return_counts=True)
            values[seen] -= (self.presence_penalty + self.frequency_penalty * counts).astype(np.float32)
        if self.dry_multiplier and self.dry_window:
            self._subtract_dry(values, _ids(history[-self.dry_window:], values.size))
        return values

    cdef _subtract_dry(self, values, history):
        """The DRY penalty, given ids int64 [n]: linear in n by the Z-function of the history read backwards."""
        cdef const int64_t[::1] ids = np.ascontiguousarray(history[::-1])
        cdef int64_t[::1] same = np.zeros(history.size + 1, np.int64)
        cdef int64_t i, n = history.size, left = 0, right = 0, limit = n
        cdef double penalty
        longest = {}  # token that would go on -> tokens repeated before it
        if self.breaker_tokens:
            broken = np.isin(history, np.fromiter(self.breaker_tokens, np.int64))[::-1]
            limit = int(broken.argmax()) if broken.any() else n
        for i in range(1, n):  # same[i]: how many of ids[i:] are those of ids[0:]
            if i < right:
                same[i] = min(right - i, same[i - left])
            while i + same[i] < n and ids[i + same[i]] == ids[same[i]]:
                same[i] += 1
            if i + same[i] > right:
                left, right = i, i + same[i]
            if min(same[i], limit) >= max(1, self.dry_allowed_length):
                longest[ids[i - 1]] = max(longest.get(ids[i - 1], 0), min(same[i], limit))
        for token, length in longest.items():
            if token not in self.breaker_tokens:
                penalty = self.dry_multiplier * pow(self.dry_base, length - self.dry_allowed_length)
                values[token] -= np.float32(fmin(penalty, LARGEST))

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


cdef _ids(history, int64_t vocab_size):
    """Ids as int64 [n]. ValueError for one outside the vocabulary."""
    ids = np.asarray(history, np.int64)
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError("history holds a token outside the vocabulary")
    return ids


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
