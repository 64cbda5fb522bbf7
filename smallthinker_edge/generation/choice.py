"""Chooses each token of one answer: processors, constraint and sampler in turn, and what was probable.

Made by model.py for a generation, called by stream.py with every row of logits. It never decodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from smallthinker_edge.options import Constraint, LogitsProcessor, TokenSampler


@dataclass(frozen=True)
class TokenLogprobs:
    """A token, its log probability (0.0 where a constraint left no choice), and the likeliest ones, best first."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Choice:
    """What chooses the tokens of one generation.

    Args:
        sampler: draws a token. processors: see LogitsProcessor. constraint: None, or what every token keeps to.
        logprobs: how many likeliest tokens to note; None notes nothing.

    Attributes:
        noted: of each token chosen or forced so far, in order; empty without `logprobs`.
    """

    def __init__(
        self,
        sampler: TokenSampler,
        processors: Sequence[LogitsProcessor] = (),
        constraint: Constraint | None = None,
        logprobs: int | None = None,
    ) -> None:
        self._sampler, self._processors, self._constraint, self._logprobs = sampler, processors, constraint, logprobs
        self.noted: list[TokenLogprobs] = []

    @property
    def constrained(self) -> bool:
        return self._constraint is not None

    def allowed(self) -> npt.NDArray[np.uint32] | None:
        """The only tokens whose logits choose() will look at next, as a Constraint tells them; None where it is all."""
        if self._constraint is None or self._processors or self._logprobs is not None:
            return None
        return self._constraint.allowed()

    def choose(self, logits: npt.NDArray[np.float32], history: Sequence[int], *, only_allowed: bool = False) -> int:
        """The next id, given the logits [V] of the newest of the ids so far; changes the logits.

        only_allowed: all other logits are minus infinity already.

        Raises ValueError where a processor returns something else than logits, or leaves none.
        """
        probable = None if self._logprobs is None else log_softmax(logits)
        for processor in self._processors:
            processed = np.asarray(processor(np.array(history, np.int64), logits))
            if processed.shape != logits.shape or processed.dtype.kind != "f":
                raise ValueError(f"a logits processor must return the logits, float32 [{logits.size}]")
            logits = processed.astype(np.float32, copy=False)
        if self._constraint is not None and not only_allowed:
            bits = np.unpackbits(self._constraint.allowed().view(np.uint8), bitorder="little", count=logits.size)
            logits = np.where(bits, logits, np.float32(-np.inf))
        token = int(self._sampler.sample(logits, history))
        if not 0 <= token < logits.size:
            raise ValueError(f"the sampler chose {token}, which is outside the vocabulary of {logits.size}")
        if self._constraint is not None:
            self._constraint.accept(token)
        if probable is not None:
            self.noted.append(TokenLogprobs(token, float(probable[token]), self._likeliest(probable)))
        return token

    def _likeliest(self, probable: npt.NDArray[np.float64]) -> list[tuple[int, float]]:
        if not self._logprobs:
            return []
        count = min(self._logprobs, probable.size)
        best = np.argpartition(-probable, count - 1)[:count]
        best = best[np.lexsort((best, -probable[best]))]
        return [(int(token), float(probable[token])) for token in best]

    def forced(self) -> list[int]:
        """The tokens that must come next, accepted already; empty without a constraint."""
        if self._constraint is None:
            return []
        tokens = list(self._constraint.forced())
        for token in tokens:
            self._constraint.accept(token)
            if self._logprobs is not None:
                self.noted.append(TokenLogprobs(token, 0.0, [(token, 0.0)] if self._logprobs else []))
        return tokens


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Natural logarithms of the probabilities of logits [V]."""
    shifted = logits.astype(np.float64) - float(logits.max())
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))
