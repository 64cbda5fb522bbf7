"""Session: one conversation's KV cache, and logits for people who sample themselves.

Made by SmallThinker.session(); model.py's generation runs on it too. It never samples.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from smallthinker_edge._native.engine import Engine, KVCache
from smallthinker_edge.errors import ContextFull, SessionBusy

Tokens = Sequence[int] | npt.NDArray[np.integer]


class CancelSignal(Protocol):
    """Anything with is_set(), such as threading.Event."""

    def is_set(self) -> bool: ...


class Session:
    """Token positions that share one KV cache.

    One decode at a time per session (a second one raises SessionBusy); sessions of one model may be used from
    different threads and take turns inside decode().
    """

    def __init__(self, engine: Engine, vocab_size: int, context: int, batch: int, turn: threading.Lock) -> None:
        self._engine = engine
        self._vocab_size = vocab_size
        self._batch = batch
        self._cache: KVCache | None = KVCache(engine, context)
        self._turn = turn
        self._busy = threading.Lock()

    @property
    def position(self) -> int:
        """Tokens decoded so far, that is the position of the next one."""
        return self._open_cache().position

    @property
    def context(self) -> int:
        """Most positions this session can hold."""
        return self._open_cache().context

    def decode(
        self, tokens: Tokens, all_logits: bool = False, *, cancel: CancelSignal | None = None
    ) -> npt.NDArray[np.float32]:
        """Appends tokens and returns logits.

        Args:
            tokens: ids, at least one; long prompts are computed in chunks, which does not change the result.
            all_logits: return a row for every token instead of the last one only.
            cancel: looked at between chunks; when set, decoding stops early and the positions done so far stay.

        Returns:
            float32 [V] of the last token, or [n, V].

        Raises:
            ContextFull: the tokens do not fit; nothing was computed.
            SessionBusy: another thread is decoding with this session.
            ValueError: no token, an id outside the vocabulary, or the session is closed.
        """
        ids = self._checked(tokens)
        if not self._busy.acquire(blocking=False):
            raise SessionBusy("another thread is decoding with this session")
        try:
            cache = self._open_cache()
            if cache.position + ids.size > cache.context:
                raise ContextFull(
                    f"{ids.size} tokens at position {cache.position} do not fit a context of {cache.context}"
                )
            rows = ids.size if all_logits else 1
            logits = np.empty((rows, self._vocab_size), np.float32)
            for start in range(0, ids.size, self._batch):
                if cancel is not None and cancel.is_set():
                    break
                chunk = ids[start : start + self._batch]
                last = start + chunk.size == ids.size
                out = logits[start : start + chunk.size] if all_logits else logits if last else None
                with self._turn:
                    self._engine.decode(cache, chunk, out)
            return logits if all_logits else logits[0]
        finally:
            self._busy.release()

    def reset(self) -> None:
        """Forgets every token; the context starts anew."""
        self._open_cache().reset()

    def close(self) -> None:
        """Frees the KV cache. Safe to call twice."""
        self._cache = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_cache(self) -> KVCache:
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
