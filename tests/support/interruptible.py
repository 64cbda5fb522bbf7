"""For children that are to heed SIGINT."""

from __future__ import annotations

import signal


def heed_interrupts() -> None:
    """Popen's preexec_fn: a test run in the background ignores SIGINT, and a child inherits that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
