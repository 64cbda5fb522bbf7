"""TextStream and Generation: from a prompt's ids to pieces of text, and the result.

Made by model.py. A generation drives a session and a sampler; where it guesses tokens (speculation.py) the text is that
of plain decoding, and where it drops turns (overflow.py) that of a conversation without them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from smallthinker_edge._native.locks import Busy
from smallthinker_edge.errors import DecodeCancelled, SessionBusy, tells_of_memory
from smallthinker_edge.generation.choice import Choice, TokenLogprobs
from smallthinker_edge.generation.overflow import TurnDropper, shift_limit
from smallthinker_edge.generation.reuse import SessionStore, common_prefix
from smallthinker_edge.generation.speculation import BatchCosts, PromptLookup
from smallthinker_edge.session import Session
from smallthinker_edge.text.tokenizer import Tokenizer

MOST_NEWS = 1000
PROMPT_PIECE = 512  # tokens between two calls of on_prompt


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


class Totals:
    """Sums over all generations of a model that have ended. Safe for several threads.

    add() never waits for a lock, because a stream's finaliser may call it anywhere: what is new stands in a queue until
    somebody adds it up.
    """

    def __init__(self) -> None:
        self._adding = Busy()
        self._news: deque[tuple[float, ...]] = deque()
        self._sums = dict.fromkeys(
            ("prompt_tokens", "reused_tokens", "generated_tokens", "prompt_seconds", "generation_seconds"), 0.0
        )

    def add(self, timings: Timings, tokens: int) -> None:
        """Counts a generation that made so many tokens."""
        self._news.append(
            (timings.prompt_tokens, timings.reused_tokens, tokens, timings.prompt_seconds, timings.decode_seconds)
        )
        if len(self._news) > MOST_NEWS:
            with suppress(SessionBusy), self._adding:
                self._add_up()

    def figures(self) -> dict[str, float]:
        """Each sum by its name; tokens as whole numbers."""
        while True:
            with suppress(SessionBusy), self._adding:
                self._add_up()
                return {name: int(value) if name.endswith("tokens") else value for name, value in self._sums.items()}
            time.sleep(0.001)

    def _add_up(self) -> None:
        while self._news:
            for name, value in zip(self._sums, self._news.popleft(), strict=True):
                self._sums[name] += value


@dataclass(frozen=True)
class GenerationResult:
    """text: without the stop string and without control tokens; tokens: all that were chosen, the ending one included;
    finish_reason: "stop" (end token or stop string), "length" (max_tokens or the context), "cancelled" or "timeout";
    logprobs: of every token, where they were asked for."""

    text: str
    tokens: list[int]
    finish_reason: str
    timings: Timings
    logprobs: list[TokenLogprobs] | None = None


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


@tells_of_memory
class TextStream(Iterator[str]):
    """The pieces of a text while a model makes them. Made by SmallThinker.stream().

    A stream that is closed, ends or is simply dropped (`break` out of its loop) gives its session back at once, so that
    the next prompt that begins alike need not be computed again. One thread may take pieces at a time (another one gets
    a ValueError); any thread may close it.
    """

    def __init__(self, generation: Generation) -> None:
        # The iterator refers to the generation and not to this object: without a cycle between the two, dropping the
        # stream ends the work there and then, not when the collector comes.
        self._generation = generation
        self._pieces = generation.pieces()

    @property
    def result(self) -> GenerationResult | None:
        """The whole result once the stream has ended or was closed, None before."""
        return self._generation.result

    @property
    def tokens(self) -> list[int]:
        """The tokens so far; those of text that is held back, because it may begin a stop string, among them."""
        return list(self._generation.tokens)

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        """Of the tokens so far, where they were asked for."""
        return self._generation.choice.noted[: len(self._generation.tokens)]

    def __next__(self) -> str:
        return next(self._pieces)

    def read(self) -> GenerationResult:
        """Takes all pieces and returns the result."""
        for _ in self._pieces:
            pass
        assert self.result is not None  # a stream that has ended has one
        return self.result

    def close(self) -> None:
        """Ends the generation, also where another thread waits for a piece, within a moment. Safe to call twice."""
        self._generation.closed = True
        try:
            self._pieces.close()
        except ValueError:  # another thread is inside, and finds `closed` set
            return
        if self.result is None:  # it never started
            self._generation.finish()


class Generation:
    """The work behind a TextStream, with all its state; `pieces()` does it, once.

    Args:
        sessions: where its session comes from and goes. choice: chooses the tokens. prompt: ids, at least one.
        options: checked ones; of these it reads what the others do not. drop: what shortens a conversation, or None.
        costs: of batches on this model. head_threshold: see Session.decode. totals: where it is counted when it ends.

    Attributes:
        result: None until it has ended. closed: set it to end the work soon, from any thread. tokens: the answer's.
    """

    def __init__(
        self,
        sessions: SessionStore,
        tokenizer: Tokenizer,
        choice: Choice,
        prompt: list[int],
        options: Mapping[str, Any],
        *,
        drop: TurnDropper | None = None,
        costs: BatchCosts | None = None,
        head_threshold: float | None = None,
        totals: Totals | None = None,
    ) -> None:
        self.result: GenerationResult | None = None
        self.closed = False
        self.choice, self.tokens = choice, list[int]()
        self._sessions, self._tokenizer = sessions, tokenizer
        self._session: Session | None = None
        self._prompt, self._options = prompt, options
        self._max_tokens: int = options["max_tokens"]
        self._stops = _StopFilter(options["stop"])
        self._drop = drop
        guesses = options["speculate"] and not choice.constrained
        self._lookup = PromptLookup(prompt, options["speculate"]) if guesses else None
        self._costs = costs or BatchCosts()
        self._head_threshold = head_threshold
        self._totals = totals
        self._text: list[str] = []
        self._reason = "cancelled"
        self._started = self._first = 0.0
        self._reused = self._drafted = self._accepted = 0

    def is_set(self) -> bool:
        """Whether to stop: what decoding looks at, as its cancel signal."""
        cancel, timeout = self._options["cancel"], self._options["timeout"]
        if self.closed or (cancel is not None and cancel.is_set()):
            return True
        if timeout is not None and time.perf_counter() - self._started > timeout:
            self._reason = "timeout"
            return True
        return False

    def pieces(self) -> Generator[str, None, None]:
        """The text, piece by piece."""
        self._started = time.perf_counter()
        try:
            self._session, self._reused = self._sessions.take(self._prompt)
            for piece in self._generate(self._session):
                self._text.append(piece)
                if self._options["on_text"] is not None:
                    self._options["on_text"](piece)
                yield piece
        finally:
            self.finish()

    def _generate(self, session: Session) -> Iterator[str]:
        decoder = self._tokenizer.stream()
        for token in self._chosen(session):
            self.tokens.append(token)
            if token in self._tokenizer.eos_ids:
                self._reason = "stop"
                break
            if piece := self._stops.push(decoder.push(token)):
                yield piece
            if self._stops.hit:
                self._reason = "stop"
                return
            if len(self.tokens) >= self._max_tokens:
                self._reason = "length"
                break
        if rest := self._stops.push(decoder.flush()) + self._stops.flush():
            yield rest

    def _chosen(self, session: Session) -> Iterator[int]:
        """The answer's tokens, until cancelled or the context is full. What it yields is in self.tokens afterwards."""
        yield from self.choice.forced()
        pending = (self._prompt + self.tokens)[self._reused :]
        while not self.is_set():
            if session.position + len(pending) > session.context:
                shorter = self._drop(self._prompt + self.tokens, shift_limit(session.context)) if self._drop else None
                if shorter is None:
                    self._reason = "length"
                    return
                pending = self._shift(session, shorter)
            draft = self._draft(session, len(pending))
            allowed = self.choice.allowed()
            started = time.perf_counter()
            try:
                pending = self._compute_prompt(session, pending)
                logits = session.decode(
                    [*pending, *draft], bool(draft), cancel=self, head_threshold=self._head_threshold, allowed=allowed
                )
            except DecodeCancelled:
                return
            seconds = time.perf_counter() - started
            if not self._first:
                self._first = time.perf_counter()
                self._tell_prompt(len(self._prompt))
            before = len(self.tokens)
            rows = np.atleast_2d(logits)[-len(draft) - 1 :]
            yield from self._verified(session, rows, draft, only_allowed=allowed is not None)
            if self._lookup is not None and len(pending) == 1:
                self._costs.measured(1 + len(draft), seconds)
                self._drafted += len(draft)
            yield from self.choice.forced()
            pending = self.tokens[-1:] if self._lookup is not None else self.tokens[before:]

    def _compute_prompt(self, session: Session, pending: list[int]) -> list[int]:
        """Computes a prompt but for its last piece, which it returns: so far that its progress can be told, and that
        the session can be saved where a prefix ends that other prompts will have too."""
        prefix: int = self._options["shared_prefix"]
        while not self._first:
            ends = [PROMPT_PIECE] if self._options["on_prompt"] is not None else []
            ends += [prefix - session.position] if session.position < prefix else []
            size = min(ends, default=len(pending))
            if size >= len(pending):
                break
            session.prefill(pending[:size], cancel=self)
            pending = pending[size:]
            self._tell_prompt(len(self._prompt) - len(pending))
            if session.position == prefix:
                self._sessions.save_prefix(session)
        return pending

    def _tell_prompt(self, done: int) -> None:
        if self._options["on_prompt"] is not None:
            self._options["on_prompt"](done, len(self._prompt))

    def _verified(
        self, session: Session, logits: npt.NDArray[np.float32], draft: list[int], *, only_allowed: bool
    ) -> Iterator[int]:
        """Chooses row after row as plain decoding would, for as long as the draft agrees."""
        for i, row in enumerate(logits):
            token = self.choice.choose(row, self._prompt + self.tokens, only_allowed=only_allowed)
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
        room = min(session.context - session.position - 1, self._max_tokens - len(self.tokens) - 1)
        return self._lookup.draft(self._costs.seconds, room)

    def _shift(self, session: Session, tokens: list[int]) -> list[int]:
        """Makes the session hold the beginning of `tokens`; returns what is left to decode."""
        shared = min(common_prefix(session.tokens, tokens), len(tokens) - 1)
        if not session.rewindable(session.position - shared):
            shared = 0
        session.rewind(session.position - shared)
        return tokens[shared:]

    def finish(self) -> None:
        """Gives the session back and makes the result of what there is. Safe to call twice."""
        if self.result is not None:
            return
        session, self._session = self._session, None
        if session is not None:
            self._sessions.give_back(session)
        now = time.perf_counter()
        started = self._started or now
        first = self._first or now
        decoded = max(0, len(self.tokens) - 1)
        timings = Timings(
            len(self._prompt), first - started, decoded, now - first, self._reused, self._drafted, self._accepted
        )
        noted = None if self._options["logprobs"] is None else self.choice.noted[: len(self.tokens)]
        self.result = GenerationResult("".join(self._text), self.tokens, self._reason, timings, noted)
        if self._totals is not None and self._started:
            self._totals.add(timings, len(self.tokens))
