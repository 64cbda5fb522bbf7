"""A cancel signal that comes by itself, for tests of what is cancelled in the middle."""

from __future__ import annotations


class Countdown:
    """A cancel signal that comes at the n-th look."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def is_set(self) -> bool:
        self.looks -= 1
        return self.looks < 0
