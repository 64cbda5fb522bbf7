"""Keeps the sessions of finished generations, so that a prompt that begins like an earlier one is not computed again.

Owned by model.py, called by stream.py around every generation. It never computes; results are those of a fresh
session, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from smallthinker_edge.generation.saved_prefixes import SavedPrefixes
from smallthinker_edge.session import Session


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences share from their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class SessionStore:
    """At most `size` idle sessions, the one used longest ago goes first. Safe for several threads.

    It has no lock, so that a stream may come back here from a finaliser, which can run anywhere: a session belongs to
    whoever took it out of the list, and the list's own operations are atomic.

    Args:
        size: sessions to keep; 0 keeps none.
        new: makes an empty session.
        saved: where long prefixes are kept on disk, or None.
    """

    def __init__(
        self,
        size: int,
        new: Callable[[], Session],
        saved: SavedPrefixes | None = None,
    ) -> None:
        self._size, self._new, self._saved = size, new, saved
        self._idle: list[Session] = []

    def take(self, tokens: Sequence[int]) -> tuple[Session, int]:
        """(a session that has decoded the first tokens, how many), for the caller alone.

        At least one token is left to decode. An idle session is rewound to what it shares with `tokens`; where there
        is room to keep it too, a fork of it is.
        """
        best, shared = self._claim(tokens)
        loaded = self._saved.take(tokens, shared) if self._saved else None
        if loaded is not None:
            if best is not None:
                self._idle.append(best)
            self._trim(self._size - 1)
            return loaded, loaded.position
        if best is None:
            self._trim(self._size - 1)  # that memory is needed now
            return self._new(), 0
        if len(self._idle) + 1 < self._size and shared < best.position:
            fork = best.fork()
            self._idle.append(best)
            best = fork
        best.rewind(best.position - shared)
        return best, shared

    def save_prefix(self, session: Session) -> None:
        """Keeps what a session holds for other prompts that begin so, where there is a folder for that."""
        if self._saved:
            self._saved.save(session)

    def _claim(self, tokens: Sequence[int]) -> tuple[Session | None, int]:
        """The idle session that shares most with `tokens`, taken out of the list, and how much."""
        while True:
            best, shared = None, 0
            for session in list(self._idle):
                with suppress(ValueError):  # closed by another thread meanwhile
                    count = min(common_prefix(session.tokens, tokens), len(tokens) - 1)
                    if count > shared and session.rewindable(session.position - count):
                        best, shared = session, count
            if best is None:
                return None, 0
            with suppress(ValueError):  # another thread was quicker
                self._idle.remove(best)
                return best, shared

    def give_back(self, session: Session) -> None:
        """Keeps a session, or closes it."""
        if self._size and session.holds_tokens:
            self._idle.append(session)
            self._trim(self._size)
        else:
            session.close()

    def _trim(self, size: int) -> None:
        """Closes what is beyond `size`."""
        while len(self._idle) > max(0, size):
            with suppress(IndexError):  # another thread has taken the last one
                self._idle.pop(0).close()

    def relieve(self) -> bool:
        """Closes the session that has been idle longest, for its memory; False where there is none."""
        with suppress(IndexError):
            self._idle.pop(0).close()
            return True
        return False

    def close(self) -> None:
        """Closes what is idle and keeps nothing from now on."""
        self._size = 0
        self._trim(0)
