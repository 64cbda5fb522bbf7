"""A program in a pseudo-terminal of its own, and what it shows there."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

SECONDS = 180  # for what must come at last, also under emulation or on a busy machine
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|\x1b\][^\x07]*\x07")
ASKS_PLACE = b"\x1b[6n"  # where the cursor is, which a terminal answers
# Opening a terminal makes it the controlling one of a session that has none, so that Ctrl-C becomes a signal.
START = "import os, sys; os.open(os.ttyname(0), os.O_RDWR); os.execv(sys.argv[1], sys.argv[1:])"


class PseudoTerminal:
    """shown: all that came so far, without the sequences that move and colour."""

    def __init__(self, master: int, process: subprocess.Popen[bytes]) -> None:
        self._master, self._process, self._raw = master, process, b""
        self._seen = 0

    @property
    def shown(self) -> str:
        return ESCAPES.sub("", self._raw.decode("utf-8", "replace"))

    def type(self, keys: str) -> None:
        self._seen = len(self.shown)
        os.write(self._master, keys.encode())

    def until(self, pattern: str, seconds: float = SECONDS) -> re.Match[str]:
        """Waits for what matches in what came since the last keys. AssertionError where it does not come."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.shown[self._seen :])) is None:
            assert self._read(end), f"no {pattern!r} in {self.shown[self._seen :]!r}"
        return found

    def code(self) -> int:
        """The exit code, when it has ended by itself."""
        end = time.monotonic() + SECONDS
        while self._read(end):
            pass
        return self._process.wait(SECONDS)

    def _read(self, end: float) -> bool:
        """Takes what there is, waiting for it; False at the end of the time or of the program."""
        if not select.select([self._master], [], [], max(0, end - time.monotonic()))[0]:
            return False
        try:
            new = os.read(self._master, 65536)
        except OSError:  # Linux says so where nobody has the other end any more
            return False
        self._raw += new
        for _ in range(new.count(ASKS_PLACE)):
            os.write(self._master, b"\x1b[1;1R")
        return bool(new)


@contextmanager
def in_terminal(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[PseudoTerminal]:
    """The command, with more in its environment, in a terminal of 100 columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", START, *command],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm-256color", **environment},
    )
    os.close(slave)
    try:
        yield PseudoTerminal(master, process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()
        os.close(master)
