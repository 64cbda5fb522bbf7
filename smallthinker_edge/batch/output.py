"""The lines that go in and the file of answers: in the input's order, and after any end of the run taken up again.

Each record names the task, the model and the input line that it answers, so that nothing else is needed to go on with a
file. Answers that come before those of earlier lines wait in a second file. Knows no model.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import time
from array import array
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any

from smallthinker_edge.batch.task import LONGEST_LINE, Line, digest_of
from smallthinker_edge.errors import SmallThinkerError
from smallthinker_edge.files.atomic import atomic_file

AHEAD = ".ahead"
PIECE = 1 << 20
SETTLE_SECONDS = 1.0


class OutputError(SmallThinkerError):
    """The file of answers belongs to another run, or to no run at all; it is left as it was."""


def read_lines(path: str | os.PathLike[str]) -> Iterator[Line]:
    """The lines of a file that are not blank; of one that is too long, only as much as shows that. Raises OSError."""
    with open(path, "rb") as file:
        number = 0
        while data := file.readline(LONGEST_LINE + 2):
            number += 1
            piece = data
            while len(piece) > PIECE and not piece.endswith(b"\n"):
                piece = file.readline(PIECE + 1)
            if data.strip():
                yield Line(number, data.removesuffix(b"\n").removesuffix(b"\r"))


class Output:
    """The answers of a run, on disk: `path`, and beside it `path`.ahead with those that wait for their turn.

    Args:
        path: the file of answers; made where there is none, gone on with else.
        source: the file of lines. task: digest of the task.
        retry: forget the answers that are errors.

    Raises OutputError where the file holds something else than answers to this task and these lines, or another run
    writes it; OSError.

    Attributes:
        model: digest of the model that gave the answers; None while there are none.
        total: lines of the input. errors: answers that are errors.
    """

    def __init__(
        self, path: str | os.PathLike[str], source: str | os.PathLike[str], task: str, *, retry: bool = False
    ) -> None:
        self.path, self.source, self.task = os.fspath(path), os.fspath(source), task
        self.model: str | None = None
        self.errors = self._written = 0
        self._numbers = array("Q")  # of the input's lines that are not blank
        self._held = dict[int, int]()  # line -> where its record stands in the second file
        self._ahead = self._file = -1
        self._settled = time.monotonic()
        there = os.stat(self.source)  # before a file of answers is made for what is not there
        new = not os.path.exists(self.path)
        if not new and os.path.samestat(os.stat(self.path), there):
            raise OutputError(f"{self.path} is the input")
        try:
            self._file = _locked(self.path)
            if new:
                with suppress(FileNotFoundError):
                    os.unlink(self.path + AHEAD)
            first_error = self._take_up()
            if retry and first_error is not None:
                self._set_back(*first_error)
            self._ahead = _locked(self.path + AHEAD)
            self._take_up_ahead(retry)
            self._write_in_turn()
        except BaseException:
            self.close()
            raise

    @property
    def total(self) -> int:
        return len(self._numbers)

    @property
    def done(self) -> int:
        """Lines that have an answer."""
        return self._written + len(self._held)

    def pending(self) -> Iterator[Line]:
        """The lines that have none, each once. May be taken from while answers are added."""
        for index, line in zip(range(self.total), read_lines(self.source), strict=False):
            if index >= self._written and line.number not in self._held:
                yield line

    def add(self, line: Line, fields: dict[str, Any], model: str) -> None:
        """Puts the answer to a line into a file, and within a second on disk.

        Raises OSError; what is there then is whole, but for its end.
        """
        self.model = self.model or model
        whole = {"line": line.number, **fields, "source": _source(line, self.task, model)}
        record = json.dumps(whole, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        self.errors += "error" in fields
        if self._numbers[self._written] == line.number:
            _append(self._file, record)
            self._written += 1
            self._write_in_turn()
        else:
            self._held[line.number] = _append(self._ahead, record)
        if time.monotonic() - self._settled > SETTLE_SECONDS:
            self._settle()

    def close(self) -> None:
        """Safe to call twice. Raises OSError where what was added cannot be put on disk."""
        try:
            self._settle()
            if self._ahead >= 0 and not self._held:
                os.unlink(self.path + AHEAD)
        finally:
            for descriptor in (self._ahead, self._file):
                if descriptor >= 0:
                    os.close(descriptor)
            self._ahead = self._file = -1

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take_up(self) -> tuple[int, int] | None:
        """Reads the input, and the answers that are there; cuts off half a one.

        Returns (how many answers stand before the first error, their bytes), None where there is no error.
        """
        first_error = None
        with open(self.path, "rb") as file:
            for line in read_lines(self.source):
                self._numbers.append(line.number)
                at = file.tell()
                if not (record := file.readline()):
                    continue
                if not record.endswith(b"\n") and _begins_like_one(record, line):
                    os.ftruncate(self._file, at)
                    file.seek(0, os.SEEK_END)
                    continue
                if self._is_error(record, line):
                    first_error = first_error or (self._written, at)
                    self.errors += 1
                self._written += 1
            if file.readline():
                raise OutputError(f"{self.path} has more answers than {self.source} has lines")
        return first_error

    def _is_error(self, record: bytes, line: Line) -> bool:
        """Whether the record of a line is one. OutputError where it is no answer to this line and task."""
        found = _decoded(record)
        if found is None or found.get("line") != line.number:
            raise OutputError(f"{self.path}: where the answer to line {line.number} should be is something else")
        source = found["source"]
        if source["task"] != self.task:
            raise OutputError(f"{self.path} holds answers to another task, or with other options")
        if source["input"] != digest_of(line.data):
            raise OutputError(f"line {line.number} of {self.source} has changed since it was answered in {self.path}")
        if source["model"]:
            self.model = self.model or source["model"]
            if source["model"] != self.model:
                raise OutputError(f"{self.path} holds answers of several models")
        return "error" in found

    def _set_back(self, written: int, size: int) -> None:
        """Ends the file before its first error; the good answers after it wait in the second file from now on."""
        with atomic_file(self.path + AHEAD) as part, open(self.path, "rb") as file:
            at = 0
            for record in _whole_records(self.path + AHEAD):
                part.write(at, record)
                at += len(record)
            file.seek(size)
            for record in file:
                if "error" not in (_decoded(record) or {}):
                    part.write(at, record)
                    at += len(record)
        os.ftruncate(self._file, size)
        os.fsync(self._file)
        self._written, self.errors = written, 0

    def _take_up_ahead(self, retry: bool) -> None:
        """Finds the answers that wait for their turn, and are to these lines and this task by this model."""
        found, at = dict[int, tuple[int, dict[str, Any]]](), 0
        for record in _whole_records(self.path + AHEAD):
            fields = _decoded(record)
            if fields is not None and not (retry and "error" in fields):
                found[fields["line"]] = at, {"source": fields["source"], "error": "error" in fields}
            at += len(record)
        os.ftruncate(self._ahead, at)
        if not found:
            return
        for index, line in enumerate(read_lines(self.source)):
            if index >= self._written and line.number in found:
                at, fields = found[line.number]
                model = fields["source"]["model"]
                if fields["source"] == _source(line, self.task, model) and model in ("", self.model or model):
                    self.model = self.model or model or None
                    self._held[line.number] = at
                    self.errors += fields["error"]

    def _settle(self) -> None:
        """Waits until all that was added is on disk: nothing of that is lost in a power cut."""
        for descriptor in (self._ahead, self._file):
            if descriptor >= 0:
                os.fsync(descriptor)
        self._settled = time.monotonic()

    def _write_in_turn(self) -> None:
        while self._written < self.total and (at := self._held.pop(self._numbers[self._written], None)) is not None:
            with open(self.path + AHEAD, "rb") as file:
                file.seek(at)
                _append(self._file, file.readline())
            self._written += 1


def _source(line: Line, task: str, model: str) -> dict[str, str]:
    """What an answer is the answer to, as its record says it."""
    return {"task": task, "model": model, "input": digest_of(line.data)}


def _decoded(record: bytes) -> dict[str, Any] | None:
    """A record of ours; None for anything else."""
    try:
        found = json.loads(record)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or type(found.get("line")) is not int or not isinstance(found.get("source"), dict):
        return None
    known = all(isinstance(found["source"].get(name), str) for name in ("task", "model", "input"))
    return found if known else None


def _begins_like_one(record: bytes, line: Line) -> bool:
    """Whether it is the beginning of a line's record, as a killed writer or a power cut leaves it."""
    begin, there = f'{{"line": {line.number}, '.encode(), record.rstrip(b"\0")
    return there.startswith(begin) or begin.startswith(there)


def _whole_records(path: str) -> Iterator[bytes]:
    """The lines of a file but one that has no end; none where there is no file."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        for record in file:
            if record.endswith(b"\n"):
                yield record


def _append(descriptor: int, record: bytes) -> int:
    """Puts a record at the end; returns where it begins."""
    at = os.lseek(descriptor, 0, os.SEEK_END)
    rest = memoryview(record)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    return at


def _locked(path: str) -> int:
    """A file of this run alone, made where there is none. OutputError where another run has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OutputError(f"{path} is no file that answers can be kept in")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OutputError(f"{path} is being written by another run") from None
    except OSError as problem:
        if problem.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):  # else there are no locks
            os.close(descriptor)
            raise
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
