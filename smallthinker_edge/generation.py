"""TextStream: one generation, from the prompt's ids to pieces of text, and its result.

Made by model.py. It drives a session and a sampler; where it guesses tokens (speculation.py) the text is that of plain
decoding, and where it drops turns (overflow.py) that of a conversation without them.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from smallthinker_edge._native.sampler import Sampler
from smallthinker_edge.overflow import TurnDropper, shift_limit
from smallthinker_edge.reuse import SessionStore, common_prefix
from smallthinker_edge.session import CancelSignal, Session
from smallthinker_edge.speculation import BatchCosts, PromptLookup
from smallthinker_edge.tokenizer import Tokenizer


@dataclass(frozen=True)
class Timings:
    """Seconds and tokens of one generation; the first token belongs to the prompt.

    reused_tokens: how many of the prompt's were there from an earlier generation and cost nothing.
    drafted_tokens, accepted_tokens: how many were guessed, and how many of them were right.
    """

    prompt_tokens: int
    prompt_seconds: float
    decode_tokens: int
    decode_seconds: float
    reused_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Decode speed, 0.0 where nothing was decoded after the first token."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass(frozen=True)
class GenerationResult:
    """text: without the stop string; tokens: all that were sampled, the ending one included;
    finish_reason: "stop" (end token or stop string), "length" (max_tokens or the context) or "cancelled"."""

    text: str
    tokens: list[int]
    finish_reason: str
    timings: Timings


class _StopFilter:
    """Holds text back while it may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """The text that is safe to show; after a stop string `hit` is true and the rest is dropped."""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.hit = True
            return self._held[: min(found)]
        keep = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._held)), keep, -1):
                if self._held.endswith(stop[:size]):
                    keep = size
                    break
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class TextStream(Iterator[str]):
    """The pieces of a text while a model makes them. Made by SmallThinker.stream(); closing it stops the work.

    Attributes:
        result: the whole GenerationResult once the stream has ended or was closed, None before.
    """

    def __init__(
        self,
        sessions: SessionStore,
        tokenizer: Tokenizer,
        sampler: Sampler,
        prompt: list[int],
        max_tokens: int,
        stops: Sequence[str],
        cancel: CancelSignal | None,
        drop: TurnDropper | None = None,
        speculate: int = 0,
        costs: BatchCosts | None = None,
        head_threshold: float | None = None,
    ) -> None:
        self.result: GenerationResult | None = None
        self._sessions, self._tokenizer, self._sampler = sessions, tokenizer, sampler
        self._session: Session | None = None
        self._prompt, self._max_tokens, self._cancel = prompt, max_tokens, cancel
        self._stops = _StopFilter(stops)
        self._drop = drop
        self._lookup = PromptLookup(prompt, speculate) if speculate else None
        self._costs = costs or BatchCosts()
        self._head_threshold = head_threshold
        self._tokens: list[int] = []
        self._text: list[str] = []
        self._reason = "cancelled"
        self._started = self._first = 0.0
        self._reused = self._drafted = self._accepted = 0
        self._pieces = self._run()

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Ends the generation. Safe to call twice."""
        self._pieces.close()
        if self.result is None:  # it never started
            self._finish()

    def _run(self) -> Generator[str, None, None]:
        self._started = time.perf_counter()
        self._session, self._reused = self._sessions.take(self._prompt)
        try:
            for piece in self._generate(self._session):
                self._text.append(piece)
                yield piece
        finally:
            self._finish()

    def _generate(self, session: Session) -> Iterator[str]:
        decoder = self._tokenizer.stream()
        for token in self._sampled(session):
            self._tokens.append(token)
            if token in self._tokenizer.eos_ids:
                self._reason = "stop"
                break
            if piece := self._stops.push(decoder.push(token)):
                yield piece
            if self._stops.hit:
                self._reason = "stop"
                return
            if len(self._tokens) >= self._max_tokens:
                self._reason = "length"
                break
        if rest := self._stops.push(decoder.flush()) + self._stops.flush():
            yield rest

    def _sampled(self, session: Session) -> Iterator[int]:
        """The sampled tokens, until cancelled or the context is full. What it yields is in self._tokens afterwards."""
        pending = self._prompt[self._reused :]
        while not self._cancelled():
            if session.position + len(pending) > session.context:
                shorter = self._drop(self._prompt + self._tokens, shift_limit(session.context)) if self._drop else None
                if shorter is None:
                    self._reason = "length"
                    return
                pending = self._shift(session, shorter)
            draft = self._draft(session, len(pending))
            started = time.perf_counter()
            logits = session.decode(
                [*pending, *draft],
                all_logits=bool(draft),
                cancel=self._cancel,
                head_threshold=self._head_threshold,
            )
            if self._cancelled():
                return
            seconds = time.perf_counter() - started
            self._first = self._first or time.perf_counter()
            yield from self._verified(session, np.atleast_2d(logits)[-len(draft) - 1 :], draft)
            if self._lookup is not None and len(pending) == 1:
                self._costs.measured(1 + len(draft), seconds)
                self._drafted += len(draft)
            pending = self._tokens[-1:]

    def _verified(self, session: Session, logits: npt.NDArray[np.float32], draft: list[int]) -> Iterator[int]:
        """Samples row after row as plain decoding would, for as long as the draft agrees."""
        for i, row in enumerate(logits):
            token = self._sampler.sample(row, self._prompt + self._tokens)
            if self._lookup is not None:
                self._lookup.extend([token])
            agrees = i < len(draft) and token == draft[i]
            if not agrees and i < len(draft):
                session.rewind(len(draft) - i)
            self._accepted += agrees
            yield token
            if not agrees:
                return

    def _draft(self, session: Session, pending: int) -> list[int]:
        if self._lookup is None or pending != 1 or not self._costs.worthwhile:
            return []
        room = min(session.context - session.position - 1, self._max_tokens - len(self._tokens) - 1)
        return self._lookup.draft(self._costs.seconds, room)

    def _shift(self, session: Session, tokens: list[int]) -> list[int]:
        """Makes the session hold the beginning of `tokens`; returns what is left to decode."""
        shared = min(common_prefix(session.tokens, tokens), len(tokens) - 1)
        if not session.rewindable(session.position - shared):
            shared = 0
        session.rewind(session.position - shared)
        return tokens[shared:]

    def _cancelled(self) -> bool:
        return self._cancel is not None and self._cancel.is_set()

    def _finish(self) -> None:
        now = time.perf_counter()
        started = self._started or now
        first = self._first or now
        decoded = max(0, len(self._tokens) - 1)
        timings = Timings(
            len(self._prompt), first - started, decoded, now - first, self._reused, self._drafted, self._accepted
        )
        self.result = GenerationResult("".join(self._text), self._tokens, self._reason, timings)
        if self._session is not None:
            self._sessions.give_back(self._session)
            self._session = None
