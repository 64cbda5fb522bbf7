"""Progress on stderr: how every command shows that long work goes on, and how long it will still take.

With tqdm where that is installed (extra `terminal`), else as one line that is rewritten; nothing where stderr is no
terminal.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from smallthinker_edge.cli.arguments import one_line, shorten

NAME_WIDTH = 72


def shown_name(name: str) -> str:
    """A name of a file or tensor, which may have 65535 bytes of anything, on one line."""
    return shorten(one_line(name), NAME_WIDTH)


def on_terminal() -> bool:
    return sys.stderr.isatty()


class Progress:
    """What is called with (done, all, what of). Where `all` changes, or less is done than before, other work begins.

    transient: what was shown goes when the work has ended.
    """

    def __init__(self, transient: bool = False) -> None:
        self._transient = transient
        self._tqdm = find_tqdm() if on_terminal() else None  # now, so that a memory budget counts it
        self._done = self._total = 0
        self._view: Bar | Line | None = None

    def __call__(self, done: int, total: int, name: str = "") -> None:
        if not on_terminal():
            return
        if total != self._total or done < self._done:
            self.close()
        self._done, self._total = done, total
        if self._view is None and done < total:
            if self._tqdm is None:
                self._view = Line(done, total, self._transient)
            else:
                self._view = Bar(self._tqdm, done, total, self._transient)
        if self._view is not None:
            self._view.show(done, shown_name(name))
        if done == total:
            self.close()

    def close(self) -> None:
        """Leaves the line. Safe to call twice."""
        view, self._view, self._done, self._total = self._view, None, 0, 0
        if view is not None:
            view.close()


@contextmanager
def progress(*, transient: bool = False) -> Iterator[Progress]:
    """A Progress that leaves its line at the end, so that what comes next, an error too, has one of its own."""
    shown = Progress(transient)
    try:
        yield shown
    finally:
        shown.close()


class Bar:
    """tqdm's."""

    def __init__(self, tqdm: Any, done: int, total: int, transient: bool) -> None:
        self._bar = tqdm(total=total, initial=done, file=sys.stderr, leave=not transient, dynamic_ncols=True)

    def show(self, done: int, name: str) -> None:
        self._bar.set_postfix_str(name, refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.refresh()
        self._bar.close()


class Line:
    """A line that is rewritten."""

    def __init__(self, done: int, total: int, transient: bool) -> None:
        self._first, self._total, self._transient = done, total, transient
        self._started = time.monotonic()

    def show(self, done: int, name: str) -> None:
        text = f"{done}/{self._total} {name}".rstrip()
        if self._first < done < self._total:
            left = (time.monotonic() - self._started) / (done - self._first) * (self._total - done)
            text += f", {left:.0f} s left"
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        print("\r\x1b[K" if self._transient else "", end="" if self._transient else "\n", file=sys.stderr, flush=True)


def find_tqdm() -> Any:
    """The class, so set up that it starts no thread and takes no semaphore of the system; None without the extra."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())
    return tqdm
