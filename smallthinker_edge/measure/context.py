"""Long contexts for measuring, without the minutes that computing them takes."""

from __future__ import annotations

import numpy as np

from smallthinker_edge.session import Session


def fill_context(session: Session, position: int, seed: int = 0) -> None:
    """Makes a new session stand at a position, as if it had decoded that many tokens (of id 0).

    Keys and values are arbitrary bytes that are sound numbers, so tokens decoded from here on cost what they would
    after a real context, and mean nothing.

    Raises ValueError where the session is not new, or its context is too short.
    """
    cache = session._open_cache()
    cache.restore(np.zeros(position, np.int32), max(0, position - 256 * cache.ring_blocks) if cache.ring_blocks else 0)
    rng = np.random.default_rng(seed)
    for block in cache.blocks():
        # As fp16 numbers between 0.008 and 0.95, as Q8_0 small positive steps and scales.
        block[:] = rng.integers(0x20, 0x3B, block.size, np.uint8)
