"""What was said before in each conversation, so that "and the kitchen too" has something to go on."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from smallthinker_edge.home.schema import UNKNOWN, Command

MOST = 256
SECONDS = 300.0  # as long as Home Assistant keeps a conversation
LONGEST_NAME = 256
T = TypeVar("T")


class Conversations(Generic[T]):
    """Something by conversation, for a while and for the newest ones. For one thread."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._known: OrderedDict[str, tuple[float, T]] = OrderedDict()

    def get(self, name: str, default: T) -> T:
        """What was put last, the default where the conversation is new or forgotten."""
        when, value = self._known.get(name, (0.0, default))
        return value if self._now() - when < SECONDS else default

    def put(self, name: str, value: T) -> None:
        """Nothing is kept for a conversation without a name, or with an endless one."""
        self.forget(name)
        if 0 < len(name) <= LONGEST_NAME:
            self._known[name] = self._now(), value
        while len(self._known) > MOST:
            self._known.popitem(last=False)

    def forget(self, name: str) -> None:
        self._known.pop(name, None)


def remember(conversations: Conversations[list[Command]], name: str, commands: Sequence[Command]) -> None:
    """Puts a sentence's commands in place of those before. What was not understood changes nothing; "nevermind"
    forgets."""
    actions = {command["action"] for command in commands}
    if "nevermind" in actions:
        conversations.forget(name)
    elif UNKNOWN not in actions:
        conversations.put(name, list(commands))
