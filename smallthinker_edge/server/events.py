"""Answers that go on while their client listens: event streams, and whole answers whose client may leave."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from smallthinker_edge.completions.compute import AsyncItems
from smallthinker_edge.server.errors import describe, status_of
from smallthinker_edge.server.settings import Settings

logger = logging.getLogger(__name__)
T = TypeVar("T")


async def until_gone(receive: Receive) -> None:
    """Ends when the client has left; what it still sends is dropped."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """What the work gives; it is cancelled where the client leaves first, and ClientDisconnect raised."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return await task
        raise ClientDisconnect
    finally:
        for one in (task, gone):
            one.cancel()


class EventStream(Response):
    """Server-sent events, one a chunk, then [DONE] (OpenAI's form of the WHATWG's event streams).

    Args:
        chunks: the events; closed when the client leaves. comment: what to say while there is nothing.
    """

    def __init__(self, chunks: AsyncItems[Any], comment: Callable[[], str], settings: Settings) -> None:
        # X-Accel-Buffering tells nginx to pass events on at once.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self._chunks, self._comment, self._settings = chunks, comment, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._write(send))
        except ClientDisconnect:
            logger.info("a client left; its answer is not computed any further")
        finally:
            await self._chunks.aclose()

    async def _write(self, send: Send) -> None:
        await self._send(send, {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events():
            await self._send(send, {"type": "http.response.body", "body": event.encode(), "more_body": True})
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, message: Message) -> None:
        try:
            await asyncio.wait_for(send(message), self._settings.send_seconds)
        except (asyncio.TimeoutError, OSError):
            raise ClientDisconnect from None

    async def _events(self) -> AsyncIterator[str]:
        waiting: asyncio.Future[Any] | None = None
        try:
            while True:
                waiting = waiting or asyncio.ensure_future(self._chunks.__anext__())
                done, _ = await asyncio.wait((waiting,), timeout=self._settings.comment_seconds)
                if not done:
                    yield f": {self._comment()}\n\n"
                    continue
                try:
                    chunk = waiting.result()
                except StopAsyncIteration:
                    break
                waiting = None
                yield f"data: {json.dumps(chunk)}\n\n"
            yield "data: [DONE]\n\n"
        except Exception as error:  # the status line is sent already
            if status_of(error) >= 500:
                logger.exception("an answer failed")
            yield f"data: {json.dumps(describe(error))}\n\n"
        finally:
            if waiting is not None:
                waiting.cancel()
