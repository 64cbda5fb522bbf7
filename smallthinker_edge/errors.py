"""The library's own exceptions, all under SmallThinkerError: of files, budgets, sessions, memory and the Hub.

tells_of_memory() is how a MemoryError of Python or NumPy becomes one of them where it leaves the library.

Raised by Python and native modules alike; what other modules define for themselves does not leave the package. Wrong
arguments and the use of what is closed are TypeError or ValueError, as anywhere in Python, a failing system OSError.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import ParamSpec, TypeVar

from smallthinker_edge.printable import printable

P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C", bound=type)


class SmallThinkerError(Exception):
    """Base class of the exceptions that smallthinker_edge defines."""


class ModelFormatError(SmallThinkerError, ValueError):
    """A model file is damaged, truncated, or of a kind that this library does not read.

    What the file says is escaped in the message, not in the attributes.

    Attributes:
        path: the file, or None when the model did not come from one.
        field: the metadata key, tensor or header field that was wrong, or None.
        offset: byte offset in the file where it stands, or None.
    """

    def __init__(
        self, message: str, *, path: str | None = None, field: str | None = None, offset: int | None = None
    ) -> None:
        self.path = path
        self.field = field
        self.offset = offset
        where = [str(path)] if path is not None else []
        if field is not None:
            where.append(f"field {field!r:.200}")
        if offset is not None:
            where.append(f"at byte {offset}")
        super().__init__(printable(f"{', '.join(where)}: {message}" if where else message))


class SessionFormatError(ModelFormatError):
    """A saved session is damaged, or belongs to another model, KV cache or version; attributes as ModelFormatError."""


class MemoryBudgetError(SmallThinkerError, MemoryError):
    """The memory budget cannot hold the model; the message names the smallest one that would."""


class OutOfMemoryError(SmallThinkerError, MemoryError):
    """The system has not enough memory, or no more threads, for what was asked; the model stays as it was."""


def memory_told(call: Callable[P, T]) -> Callable[P, T]:
    """The call, with OutOfMemoryError for any other MemoryError that it raises."""

    @functools.wraps(call)
    def told(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return call(*args, **kwargs)
        except MemoryError as problem:
            if isinstance(problem, SmallThinkerError):
                raise
            raise OutOfMemoryError("no memory for objects of Python") from problem

    return told


def tells_of_memory(door: C) -> C:
    """A class whose public methods, and those that make and iterate, raise as memory_told() says."""
    for name, method in list(vars(door).items()):
        public = not name.startswith("_") or name in ("__init__", "__next__", "__call__")
        if public and isinstance(method, FunctionType):
            setattr(door, name, memory_told(method))
    return door


class ExpertReadError(SmallThinkerError, OSError):
    """Expert weights could not be read from storage; the session stays usable."""


class ContextFull(SmallThinkerError):
    """More tokens were given than the session's context has room for; nothing was computed."""


class DecodeCancelled(SmallThinkerError):
    """Decoding was stopped by its cancel signal; what had been decoded before stays.

    Attributes:
        done: how many of the tokens given were decoded, a multiple of what is computed together.
    """

    def __init__(self, message: str, done: int = 0) -> None:
        self.done = done
        super().__init__(message)


class NotFiniteError(SmallThinkerError, ArithmeticError):
    """Weights led to values that are no numbers or infinite, or too large for the KV cache; nothing was decoded."""


class HubError(SmallThinkerError, OSError):
    """A model cannot be had from the Hugging Face Hub, or there is no room for it; the message says what helps."""


class OpenedBeforeFork(SmallThinkerError, RuntimeError):
    """A model was opened before os.fork() and used in the child, which has neither its threads nor its reads."""


class ChatTemplateError(SmallThinkerError, ValueError):
    """A chat template or a list of messages cannot be rendered."""


class SessionBusy(SmallThinkerError, RuntimeError):
    """Two threads used one session at the same time."""


class GrammarError(SmallThinkerError, ValueError):
    """A JSON schema, regular expression or grammar that cannot be read or enforced."""


class MissingExtra(SmallThinkerError, ImportError):
    """What was asked for needs a package that is not installed; the message names the extra that brings it."""
