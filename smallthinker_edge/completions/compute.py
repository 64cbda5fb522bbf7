"""One thread that computes for coroutines, one job after the other, so that no event loop ever waits for a token.

Used by calls.py. A job is cancelled when whoever waits for it is: queued, it never starts; running, it ends within 50
ms.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

from smallthinker_edge.errors import OpenedBeforeFork, memory_told

T = TypeVar("T")


class Settable(Protocol):
    """What ends a job, from any thread."""

    def set(self) -> None: ...


class ComputeThread:
    """A queue of jobs and the thread that does them, started with the first one. Safe to use from several event loops.

    In the child of a fork, which has no such thread, OpenedBeforeFork is raised instead of waiting for it.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="smallthinker-compute")
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="smallthinker-prepare")

    async def prepare(self, work: Callable[[], T]) -> T:
        """What work() returns or raises: something short, in another thread, that need not wait for the queue."""
        self._check_process()
        return await asyncio.wrap_future(self._preparing.submit(memory_told(work)))

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Puts a job at the end of the queue. Raises RuntimeError after close()."""
        self._check_process()
        return self._executor.submit(memory_told(work))

    async def run(self, work: Callable[[], T], cancel: Settable) -> T:
        """What work() returns or raises."""
        try:
            return await asyncio.wrap_future(self.submit(work))
        except asyncio.CancelledError:
            cancel.set()
            raise

    def iterate(self, items: Callable[[], Iterator[T]], cancel: Settable) -> AsyncItems[T]:
        """The items that an iterator gives in the thread, which never waits for those who take them."""
        return AsyncItems(self, items, cancel)

    def close(self) -> None:
        """What is queued never starts; what runs is not waited for. Safe to call twice."""
        if self._process != os.getpid():  # a thread that is not here may have held the executors' locks
            return
        for executor in (self._executor, self._preparing):
            executor.shutdown(wait=False, cancel_futures=True)

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise OpenedBeforeFork("the model's compute thread is in the process that this one was forked from")


class AsyncItems(AsyncIterator[T], Generic[T]):
    """Items computed elsewhere. The work ends when the iterator is closed, dropped, or its reader cancelled."""

    def __init__(self, thread: ComputeThread, items: Callable[[], Iterator[T]], cancel: Settable) -> None:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[T] | BaseException | None]()
        self._loop, self._queue, self._cancel, self._ended = loop, queue, cancel, False

        def put(entry: tuple[T] | BaseException | None) -> None:
            try:
                loop.call_soon_threadsafe(queue.put_nowait, entry)
            except RuntimeError:  # the loop is closed: nobody is there any more
                cancel.set()

        def produce() -> None:  # refers to the queue and not to this object, which may be dropped meanwhile
            try:
                for item in items():
                    put((item,))
            except BaseException as error:
                put(error)
            else:
                put(None)

        self._future = thread.submit(produce)
        self._future.add_done_callback(lambda future: put(None) if future.cancelled() else None)

    def __aiter__(self) -> AsyncItems[T]:
        return self

    async def __anext__(self) -> T:
        if self._ended:
            raise StopAsyncIteration
        try:
            entry = await self._queue.get()
        except asyncio.CancelledError:
            self._stop()
            raise
        if isinstance(entry, tuple):
            return entry[0]
        self._ended = True
        if entry is not None:
            raise entry
        raise StopAsyncIteration

    def when_computed(self, call: Callable[[], None]) -> None:
        """Calls call() in the event loop when nothing more will be computed, whether or not the items are taken."""
        loop = self._loop

        def tell(_: object) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(call)

        self._future.add_done_callback(tell)

    async def aclose(self) -> None:
        """Ends the work and waits until it has ended. Safe to call twice."""
        self._stop()
        await asyncio.wait([asyncio.wrap_future(self._future)])

    def _stop(self) -> None:
        self._ended = True
        self._cancel.set()
        self._future.cancel()

    def __del__(self) -> None:
        if hasattr(self, "_future"):
            self._stop()
