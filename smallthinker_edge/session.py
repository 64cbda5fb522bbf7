"""Session: one conversation's KV cache, and logits for people who sample themselves.

Made by SmallThinker.session(); generations run on it too (stream.py). It never samples.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt

from smallthinker_edge._native.engine import Engine
from smallthinker_edge._native.kv_cache import KVCache
from smallthinker_edge._native.locks import Busy, Turns
from smallthinker_edge._native.session_memory import new_logits
from smallthinker_edge.errors import ContextFull, DecodeCancelled, SmallThinkerError, tells_of_memory
from smallthinker_edge.files import session_file
from smallthinker_edge.options import CancelSignal

Tokens = Sequence[int] | npt.NDArray[np.integer]


@tells_of_memory
class Session:
    """Token positions that share one KV cache.

    One decode at a time per session (a second one raises SessionBusy); sessions of one model may be used from
    different threads and take turns inside decode().
    """

    def __init__(
        self,
        engine: Engine,
        vocab_size: int,
        context: int,
        turns: Turns,
        kv: str = "f16",
        model_hash: Callable[[], bytes] = bytes,
    ) -> None:
        self._engine = engine
        self._vocab_size = vocab_size
        self._cache: KVCache | None = KVCache(engine.memory, context, kv)
        self._marks: list[KVCache] = []
        self._turns = turns
        self._model_hash = model_hash
        self._busy = Busy()

    @property
    def position(self) -> int:
        """Tokens decoded so far, that is the position of the next one."""
        return self._open_cache().position

    @property
    def tokens(self) -> list[int]:
        """The ids decoded so far."""
        ids: list[int] = self._open_cache().tokens.tolist()
        return ids

    @property
    def holds_tokens(self) -> bool:
        """Whether it is worth keeping: open, in a model that is open, with something decoded. Never raises."""
        try:
            return self.position > 0
        except (SmallThinkerError, ValueError):
            return False

    @property
    def kv_bytes(self) -> int:
        """Bytes that the KV cache takes now; what it shares with forks counts in each."""
        return self._open_cache().bytes

    @property
    def context(self) -> int:
        """Most positions this session can hold."""
        return self._open_cache().context

    def decode(
        self,
        tokens: Tokens,
        all_logits: bool = False,
        *,
        cancel: CancelSignal | None = None,
        head_threshold: float | None = None,
        states: npt.NDArray[np.float32] | None = None,
        allowed: npt.NDArray[np.uint32] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Appends tokens and returns logits.

        Args:
            tokens: ids, at least one; long prompts are computed in chunks, which does not change the result.
            all_logits: return a row for every token instead of the last one only.
            cancel: looked at about every 50 ms, like Ctrl-C: when it is set DecodeCancelled is raised. What was decoded
                in earlier chunks (of 512 tokens) stays, after a KeyboardInterrupt too: see `position`.
            head_threshold: with a model whose LM head has a predictor (`model.head_threshold` is not None then), only
                logits whose score is above it are computed, the others are minus infinity; where no score is, all are.
                None, the default, computes all, as probabilities need it.
            states: an array float32 [n, d_model], C-contiguous, that is filled with what the LM head is applied to for
                each token (normed), for those who train or measure a head.
            allowed: bits uint32 [ceil(V / 32)], token t being bit t % 32 of word t // 32: only their logits are
                computed, the same bits as without it, and the others are minus infinity. For the last token only, and
                instead of head_threshold.

        Returns:
            float32 [V] of the last token, or [n, V].

        Raises:
            ContextFull: the tokens do not fit; nothing was computed.
            MemoryBudgetError: the logits, or more keys and values, do not fit the budget; earlier chunks stay.
            DecodeCancelled: `cancel` was set; its `done` says how many tokens were decoded and stay.
            ExpertReadError: expert weights could not be read; earlier chunks stay, and it may be tried again.
            SessionBusy: another thread is decoding with this session.
            ValueError: no token, an id outside the vocabulary, states of another shape, or the session or its model is
                closed.
            OpenedBeforeFork: this is the child of a fork.
        """
        ids = self._checked(tokens)
        if allowed is not None and all_logits and ids.size > 1:
            raise ValueError("allowed is for the logits of the last token")
        logits = self._append(ids, ids.size if all_logits else 1, cancel, head_threshold, states, allowed)
        return logits if all_logits else logits[0]

    def fork(self) -> Session:
        """An independent session that stands where this one does.

        Costs nothing at first: both share the memory of what was decoded, and copy only the blocks of 256 positions
        that they write to (the newest one, and with window layers those of the ring as they come round).
        """
        with self._busy:
            cache = self._open_cache()
            other = Session(self._engine, self._vocab_size, cache.context, self._turns, cache.kv, self._model_hash)
            other._cache, other._marks = cache.fork(), list(self._marks)
            return other

    def rewindable(self, count: int) -> bool:
        """Whether rewind(count) can be done."""
        cache = self._open_cache()
        return 0 <= count <= cache.position and self._holder(cache.position - count) is not None

    def rewind(self, count: int) -> None:
        """Forgets the `count` newest tokens, as if they had never been decoded.

        Without window layers this is always possible. Window layers remember their window and 255 positions more:
        back to a position it works for at least 255 tokens, for any number while fewer than that have been decoded in
        all, and to any place where mark() was called. Everything can always be forgotten (reset).

        Raises ValueError where window layers have lost what is needed, or for a count that is not there.
        """
        with self._busy:
            position = self.position - count
            holder = self._holder(position) if 0 <= count <= self.position else None
            if holder is None:
                raise ValueError(
                    f"cannot rewind {count} of {self.position} tokens: not decoded, or the window layers have lost them"
                )
            cache = self._open_cache() if holder is self._cache else holder.fork()
            marks = [mark for mark in self._marks if mark.position <= position]
            cache.rewind(position)
            self._cache, self._marks = cache, marks

    def mark(self) -> None:
        """Keeps what a rewind to here will need, until the session is rewound beyond or closed.

        With window layers that is up to one more ring: window + 255 positions of every window layer, taken bit by
        bit as decoding goes on. Without window layers it costs nothing.
        """
        with self._busy:
            if self._open_cache().ring_blocks:
                self._marks.append(self._open_cache().fork())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the tokens and the KV cache to a file. Raises OSError; an older file stays whole then."""
        with self._busy:
            session_file.save(path, self._open_cache(), self._model_hash())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replaces everything by a saved session of the same model and KV type; continues bit for bit like it.

        (With the same kernel table: another CPU's instructions round differently.)

        Raises SessionFormatError for a file that is damaged or of another kind, OSError where it cannot be read; the
        session is then unchanged.
        """
        with self._busy:
            model = self._model_hash()
            cache = KVCache(self._engine.memory, self.context, self._open_cache().kv)
            try:
                with self._turns.wait():
                    session_file.load(path, cache, self._vocab_size, model)
            except BaseException:
                cache.rewind(0)  # the traceback keeps it, but not its memory
                raise
            self._cache, self._marks = cache, []

    def reset(self) -> None:
        """Forgets every token; the context starts anew."""
        self.rewind(self.position)

    def close(self) -> None:
        """Frees the KV cache; where another thread is decoding with it, when that has ended. Safe to call twice."""
        self._cache, self._marks = None, []

    def prefill(self, tokens: Tokens, *, cancel: CancelSignal | None = None) -> None:
        """Appends tokens and computes no logits: for a prompt that forks will continue. Otherwise as decode()."""
        self._append(self._checked(tokens), 0, cancel)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(
        self,
        ids: npt.NDArray[np.int32],
        rows: int,
        cancel: CancelSignal | None,
        head_threshold: float | None = None,
        states: npt.NDArray[np.float32] | None = None,
        allowed: npt.NDArray[np.uint32] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Decodes ids; returns the logits [rows, V] of all of them, of the last one, or of none."""
        width = self._engine.config.d_model
        if states is not None and (states.shape != (ids.size, width) or states.dtype != np.float32):
            raise ValueError(f"states must be float32 [{ids.size}, {width}]")
        if states is not None and not states.flags.c_contiguous:
            raise ValueError("states must be C-contiguous")
        if allowed is not None and (allowed.shape != ((self._vocab_size + 31) // 32,) or allowed.dtype != np.uint32):
            raise ValueError(f"allowed must be uint32 [{(self._vocab_size + 31) // 32}]")
        with self._busy:
            cache = self._open_cache()
            if cache.position + ids.size > cache.context:
                raise ContextFull(
                    f"{ids.size} tokens at position {cache.position} do not fit a context of {cache.context}"
                )
            logits: npt.NDArray[np.float32] | None = None
            start = 0
            while start < ids.size:
                if cancel is not None and cancel.is_set():
                    raise DecodeCancelled("decoding was cancelled", start)
                chunk = ids[start : start + cache.room()]
                last = start + chunk.size == ids.size
                each = rows == ids.size
                try:
                    with self._turns.wait(cancel):
                        if logits is None:
                            logits = new_logits(self._engine.memory, rows, self._vocab_size)
                        out = logits[start : start + chunk.size] if each else logits if rows and last else None
                        self._engine.decode(cache, chunk, out, head_threshold, cancel, None if out is None else allowed)
                        if states is not None:
                            self._engine.final_states(states[start : start + chunk.size])
                except DecodeCancelled as cancelled:
                    cancelled.done = start
                    raise
                start += chunk.size
            assert logits is not None  # there is a token
            return logits

    def _holder(self, position: int) -> KVCache | None:
        """The cache, or else a mark, that can go back to a position."""
        for cache in (self._open_cache(), *reversed(self._marks)):
            if cache.rewindable(position):
                return cache
        return None

    def _open_cache(self) -> KVCache:
        self._engine.check_usable()
        if self._cache is None:
            raise ValueError("the session is closed")
        return self._cache

    def _checked(self, tokens: Tokens) -> npt.NDArray[np.int32]:
        ids = np.asarray(tokens)
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise ValueError("tokens must be a non-empty one-dimensional sequence of integers")
        if int(ids.min()) < 0 or int(ids.max()) >= self._vocab_size:
            raise ValueError(f"a token id is outside the vocabulary of {self._vocab_size}")
        return np.ascontiguousarray(ids, np.int32)
