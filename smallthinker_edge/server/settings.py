"""What a server allows, each setting once. The command line of `serve` sets them; nothing here does anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Bounds and habits of a server.

    Attributes:
        api_key: what clients must send as a bearer token; None asks for nothing.
        hosts: names that a request's Host may have; ("*",) allows any. A page on the web could reach a server on this
            machine otherwise, by a name that it makes point here.
        most_body: bytes of a request's body. body_seconds: until it must be there.
        most_tokens: of an answer; longer ones are clipped. None: as the context has room.
        most_pending: requests that wait or are computed; one more is answered with 429.
        comment_seconds: an event stream that has nothing to say for so long gets a comment, so that nothing on the way
            takes it for dead. send_seconds: a client that takes nothing for so long is gone.
        defaults: options of the generation where a request leaves them out.
    """

    api_key: str | None = None
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]")
    most_body: int = 1 << 20
    body_seconds: float = 30.0
    most_tokens: int | None = None
    most_pending: int = 16
    comment_seconds: float = 5.0
    send_seconds: float = 60.0
    defaults: Mapping[str, Any] = field(default_factory=dict)
