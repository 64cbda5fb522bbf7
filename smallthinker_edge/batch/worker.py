"""Who answers lines: a model that is opened once in a process, and asked about one line after the other.

What is wrong with a line is its answer; what is wrong with the worker is an Unfit. Knows no file of answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, Protocol

from smallthinker_edge.batch.task import Line, Task, digest_of
from smallthinker_edge.errors import GrammarError, MissingExtra, SmallThinkerError
from smallthinker_edge.model import SmallThinker


class Unfit(SmallThinkerError):
    """A worker that cannot answer any line: its model cannot be opened, or is another one."""


@dataclass(frozen=True)
class Opening:
    """How a worker opens its model: the arguments of SmallThinker that have these names."""

    path: str
    memory: int | None = None
    threads: int | Literal["auto"] | None = "auto"
    pin: bool = False
    context: int | None = None
    kv: str = "f16"
    head_threshold: float | Literal["auto"] | None = "auto"
    verify: bool = False

    @property
    def answering(self) -> dict[str, Any]:
        """What answers may depend on, besides the model and the task."""
        return {"context": self.context, "kv": self.kv, "head_threshold": self.head_threshold}


@dataclass(frozen=True)
class Answer:
    """What became of a line.

    Attributes:
        fields: of its record: answer, finish_reason, usage and, where there are some, tool_calls and logprobs; or error
            with type and message. id, where the line has one.
        model: digest of the model and its chat template.
        broken: the error is this machine's, such as a failing disk; another one may do better.
    """

    fields: dict[str, Any]
    model: str
    broken: bool = False


class Workers(Protocol):
    """Those who answer the lines of a run."""

    def has_room(self) -> bool:
        """Whether another line can be taken now."""

    def submit(self, line: Line) -> None: ...

    def answers(self) -> Iterator[tuple[Line, Answer]]:
        """Waits for news, and gives the answers among them, perhaps none. Unfit where no worker can answer any more."""

    def close(self) -> None: ...


class Worker:
    """A model that is open, for a task.

    Args:
        expected: digest of the model that is wanted; None takes any.

    Raises Unfit where the model is another one, and as SmallThinker().
    """

    def __init__(self, task: Task, opening: Opening, expected: str | None) -> None:
        self.model = open_for(task, opening)
        self.digest = model_digest(self.model)
        if expected not in (None, self.digest):
            self.model.close()
            raise Unfit(f"{opening.path} is another model than the one that gave the answers so far")
        self.task = task

    def answer(self, line: Line) -> Answer:
        return answer(self.model, self.digest, self.task, line)


def open_for(task: Task, opening: Opening) -> SmallThinker:
    """The model of this process. Raises as SmallThinker()."""
    structured = task.is_structured and (find_spec("llguidance") is not None or not task.request.get("tools"))
    return SmallThinker(**vars(opening), structured=structured)


def model_digest(model: SmallThinker) -> str:
    """16 hex digits that differ where weights or chat template do, and not between a GGUF and its packed file."""
    return digest_of(model.fingerprint().encode() + repr(model.chat_template).encode())


def answer(model: SmallThinker, digest: str, task: Task, line: Line) -> Answer:
    """What the model says to a line, or why it does not. Raises Unfit where no line could be answered."""
    fields: dict[str, Any] = {}
    try:
        given = task.fields(line)
        if task.id_field in given:
            fields["id"] = given[task.id_field]
        return Answer({**fields, **_asked(model, task, given)}, digest)
    except (GrammarError, MissingExtra) as error:  # which no line has a part in
        raise Unfit(str(error)) from error
    except Exception as error:
        return Answer({**fields, **error_fields(type(error).__name__, str(error))}, digest, isinstance(error, OSError))


def error_fields(kind: str, message: str) -> dict[str, Any]:
    return {"error": {"type": kind, "message": message}}


def _asked(model: SmallThinker, task: Task, given: Any) -> dict[str, Any]:
    asked, arguments = task.asked(given), task.arguments
    if task.is_chat:
        chat = model.create_chat_completion(asked, **arguments)
        choice, message = chat["choices"][0], chat["choices"][0]["message"]
        fields: dict[str, Any] = {"answer": message["content"]}
        if "tool_calls" in message:
            fields["tool_calls"] = message["tool_calls"]
        return fields | _rest(choice, chat["usage"])
    text = model.create_completion(asked, **arguments)
    return {"answer": text["choices"][0]["text"], **_rest(text["choices"][0], text.get("usage"))}


def _rest(choice: Any, usage: Any) -> dict[str, Any]:
    logprobs = {} if choice["logprobs"] is None else {"logprobs": choice["logprobs"]}
    return {"finish_reason": choice["finish_reason"], "usage": usage, **logprobs}
