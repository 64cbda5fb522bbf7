"""Keeps the sessions of finished generations, so that a prompt that begins like an earlier one is not computed again.

Called by model.py around every generation. It never computes; results are those of a fresh session, bit for bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from smallthinker_edge.session import Session


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences share from their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class SessionStore:
    """At most `size` idle sessions, the one used longest ago goes first. Safe for several threads.

    Args:
        size: sessions to keep; 0 keeps none.
        new: makes an empty session.
    """

    def __init__(self, size: int, new: Callable[[], Session]) -> None:
        self._size, self._new = size, new
        self._idle: list[Session] = []
        self._lock = threading.Lock()

    def take(self, tokens: Sequence[int]) -> tuple[Session, int]:
        """(a session that has decoded the first tokens, how many), for the caller alone.

        At least one token is left to decode. An idle session is rewound to what it shares with `tokens`; where there
        is room to keep it too, a fork of it is.
        """
        with self._lock:
            best, shared = None, 0
            for session in self._idle:
                count = min(common_prefix(session.tokens, tokens), len(tokens) - 1)
                if count > shared and session.rewindable(session.position - count):
                    best, shared = session, count
            if best is None:
                if self._size and len(self._idle) == self._size:
                    self._idle.pop(0).close()  # its memory is needed now
                return self._new(), 0
            if len(self._idle) < self._size and shared < best.position:
                best = best.fork()
            else:
                self._idle.remove(best)
            best.rewind(best.position - shared)
            return best, shared

    def give_back(self, session: Session) -> None:
        """Keeps a session, or closes it."""
        with self._lock:
            if not self._size or not session.position:
                session.close()
                return
            self._idle.append(session)
            for old in self._idle[: -self._size]:
                old.close()
            del self._idle[: -self._size]

    def close(self) -> None:
        """Closes what is idle and keeps nothing from now on."""
        with self._lock:
            for session in self._idle:
                session.close()
            self._idle.clear()
            self._size = 0
