"""Workers of this machine: this process itself, or several processes that share its memory budget.

A process that is killed, by the system in need of memory perhaps, is replaced, and its line is given to another one.
Processes end when this one does, however it ends.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection

from smallthinker_edge.batch.task import Line, Task
from smallthinker_edge.batch.worker import Answer, Opening, Unfit, Worker, error_fields
from smallthinker_edge.errors import MemoryBudgetError
from smallthinker_edge.machine.cpus import auto_threads
from smallthinker_edge.machine.memory import process_memory

logger = logging.getLogger(__name__)

MOST_DEATHS = 3  # of processes that had the same line, or that were not even ready
OWN_GROWTH = 32 << 20  # of this process, with the helper that multiprocessing starts


class ThisProcess:
    """One worker, which answers in the caller's thread. Arguments and errors as of Worker."""

    def __init__(self, task: Task, opening: Opening, expected: str | None) -> None:
        self._worker = Worker(task, opening, expected)
        self._lines = deque[Line]()

    def has_room(self) -> bool:
        return not self._lines

    def submit(self, line: Line) -> None:
        self._lines.append(line)

    def answers(self) -> Iterator[tuple[Line, Answer]]:
        while self._lines:
            line = self._lines.popleft()
            yield line, self._worker.answer(line)

    def close(self) -> None:
        self._worker.model.close()


class Processes:
    """Several processes, each with a model of its own.

    Args:
        opening: memory is the budget of them all and this process together; threads "auto" are shared out too.
        count: how many. expected: as of Worker.

    Raises MemoryBudgetError for a budget that leaves them nothing.
    """

    def __init__(self, task: Task, opening: Opening, expected: str | None, count: int) -> None:
        memory = opening.memory
        if memory is not None:
            memory = (memory - process_memory()["rss_bytes"] - OWN_GROWTH) // count
            if memory <= 0:
                raise MemoryBudgetError(f"a budget of {opening.memory} bytes leaves nothing for {count} processes")
        threads = max(1, auto_threads() // count) if opening.threads == "auto" else opening.threads
        self._task, self._opening = task, replace(opening, memory=memory, threads=threads)
        self._expected = expected
        self._deaths = dict[int, int]()  # line -> processes that were gone before they had answered it
        self._failed_starts = 0
        self._again = deque[Line]()  # whose process is gone
        self._lost = list[tuple[Line, Answer]]()  # given up
        self._processes = list[_Process]()
        try:
            for _ in range(count):
                self._start()
        except BaseException:
            self.close()
            raise

    def has_room(self) -> bool:
        return any(process.is_free for process in self._processes)

    def submit(self, line: Line) -> None:
        next(process for process in self._processes if process.is_free).give(line)

    def answers(self) -> Iterator[tuple[Line, Answer]]:
        """Raises what SmallThinker() raises where the model cannot be opened, and Unfit where it is another one."""
        known = {process.pipe: process for process in self._processes}
        for ready in connection.wait(list(known)):
            process = known[ready]  # type: ignore[index]
            try:
                message = process.pipe.recv()
            except (EOFError, OSError):
                self._replace(process)
                continue
            if isinstance(message, Exception):
                raise message
            if isinstance(message, Answer):
                yield process.take(), message
            else:
                self._note_ready(process, message)
        while self._again and self.has_room():
            self.submit(self._again.popleft())
        lost, self._lost = self._lost, []
        yield from lost

    def close(self) -> None:
        for process in self._processes:
            process.end()
        self._processes = []

    def _start(self) -> None:
        self._processes.append(_Process(self._task, self._opening, self._expected))

    def _note_ready(self, process: _Process, digest: str) -> None:
        if self._expected not in (None, digest):
            raise Unfit(f"{self._opening.path} has changed since the run began")
        self._expected, self._failed_starts, process.is_ready = digest, 0, True

    def _replace(self, process: _Process) -> None:
        """Another process for one that is gone, and for its line another chance."""
        self._processes.remove(process)
        code = process.end()
        logger.warning("a worker process has ended (%s); another one is started", code)
        if process.line is None:
            self._failed_starts += not process.is_ready
            if self._failed_starts == MOST_DEATHS:
                raise Unfit(f"processes that open {self._opening.path} end before they are ready ({code})")
        else:
            line = process.take()
            self._deaths[line.number] = self._deaths.get(line.number, 0) + 1
            if self._deaths[line.number] < MOST_DEATHS:
                self._again.append(line)
            else:
                fields = error_fields("WorkerLost", f"{MOST_DEATHS} processes ended while they computed it ({code})")
                self._lost.append((line, Answer(fields, self._expected or "")))
        self._start()


class _Process:
    """A worker process, what it computes, and the pipe to it."""

    def __init__(self, task: Task, opening: Opening, expected: str | None) -> None:
        context = get_context("spawn")
        self.line: Line | None = None
        self.is_ready = False
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, task, opening, expected), daemon=True)
        self.process.start()
        other.close()

    @property
    def is_free(self) -> bool:
        return self.is_ready and self.line is None

    def give(self, line: Line) -> None:
        self.line = line
        with suppress(OSError):  # it is gone, which the next answers() sees
            self.pipe.send(line)

    def take(self) -> Line:
        line, self.line = self.line, None
        assert line is not None  # who answers was asked
        return line

    def end(self) -> str:
        """Ends it where it runs; returns how it ended, in words."""
        self.pipe.close()
        self.process.kill()
        self.process.join()
        code = self.process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _serve(pipe: Connection, task: Task, opening: Opening, expected: str | None) -> None:
    """What a worker process does: it says which model it has, then answers line after line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's business
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        worker = Worker(task, opening, expected)
        pipe.send(worker.digest)
        while True:
            pipe.send(worker.answer(pipe.recv()))
    except EOFError:
        pass
    except Exception as error:
        pipe.send(error)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
