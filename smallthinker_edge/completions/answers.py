"""What answers of both calls have in common: the model's pieces of text for each choice, cancelling, usage.

text_answer.py and chat_answer.py give them OpenAI's shapes; calls.py runs them in the caller's thread or in the compute
thread. Everything that can be wrong with a request is found when an answer is made, before anything is computed.
"""

from __future__ import annotations

import logging
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from smallthinker_edge.completions.response_format import is_free, make_constraint
from smallthinker_edge.completions.shapes import FinishReason, Usage
from smallthinker_edge.completions.tool_calls import Tools
from smallthinker_edge.errors import GrammarError, MemoryBudgetError, MissingExtra
from smallthinker_edge.generation.choice import TokenLogprobs
from smallthinker_edge.generation.stream import TextStream
from smallthinker_edge.options import OPTIONS, CancelSignal, Constraint, GenerationOptions
from smallthinker_edge.text.chat import Messages
from smallthinker_edge.text.grammar import Grammars
from smallthinker_edge.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)


class Answering(Protocol):
    """What answers need of a model."""

    @property
    def name(self) -> str: ...
    @property
    def context(self) -> int: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def takes_tools(self) -> bool: ...
    def tokenize(self, text: str, /) -> list[int]: ...
    def detokenize(self, tokens: Sequence[int], /) -> str: ...
    def stream(self, prompt: Sequence[int], /, **options: Unpack[GenerationOptions]) -> TextStream: ...
    def encode_chat(
        self,
        messages: Messages,
        /,
        *,
        continue_final_message: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        chat_template_kwargs: Mapping[str, Any] | None,
    ) -> list[int]: ...
    def shared_prefix(
        self,
        ids: Sequence[int],
        messages: Messages,
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        chat_template_kwargs: Mapping[str, Any] | None,
    ) -> int: ...
    def grammars(self) -> Grammars: ...


class Cancel:
    """A signal of ours beside the caller's own, if there is one.

    It has no lock, as threading.Event has: a finaliser may set it, in a thread that is just doing so.
    """

    def __init__(self, other: CancelSignal | None) -> None:
        self._own, self._other = False, other

    def set(self) -> None:
        self._own = True

    def is_set(self) -> bool:
        return self._own or (self._other is not None and self._other.is_set())


@dataclass(frozen=True)
class Piece:
    """A piece of a choice's text with the tokens that it came with; reason: why the choice ended, in its last piece."""

    text: str
    logprobs: list[TokenLogprobs]
    reason: FinishReason | None = None


class Answer(ABC):
    """A request that has been checked. complete() or chunks() may be called once.

    Attributes:
        cancel: set it, from any thread, to end the work; what is there until then is the answer.
    """

    prefix = ""  # of its id

    def __init__(
        self, model: Answering, own: dict[str, Any], options: dict[str, Any], prompts: list[list[int]], tools: Tools
    ) -> None:
        self.cancel = Cancel(options.get("cancel"))
        self._model, self._own, self._options, self._tools = model, own, options, tools
        # Each choice's prompt, and the choice's number among those of the same prompt.
        self._turns = [(prompt, k) for prompt in prompts for k in range(own["n"])]
        self._include_usage = bool(own["stream_options"].get("include_usage"))
        self._id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._name: str = own["model"] or model.name
        self._prompt_tokens = sum(map(len, prompts))
        self._completion_tokens = self._cached_tokens = 0
        self._first = self._start(0)  # what is wrong with the options shows now

    def _start(self, index: int) -> TextStream:
        prompt, k = self._turns[index]
        options = {**self._options, "cancel": self.cancel}
        if options.get("seed") is not None:
            options["seed"] = (OPTIONS["seed"].checked("seed", options["seed"]) + k) % 2**64
        constraint = self._constraint()
        if constraint is not None:
            if options.get("constraint") is not None:
                raise ValueError("constraint cannot stand beside a response_format or tools that constrain")
            options["constraint"] = constraint
        return self._model.stream(prompt, **options)

    def _constraint(self) -> Constraint | None:
        """A new one for a choice. Calls of tools that need not be made are constrained where that can be done."""
        response_format = self._own["response_format"]
        if is_free(response_format, self._tools):
            if not self._tools.callable or self._options.get("constraint") is not None:
                return None
            try:
                return make_constraint(self._model.grammars(), response_format, self._tools)
            except (MissingExtra, MemoryBudgetError):
                return None
            except GrammarError as error:
                if self._tools.strict:
                    raise
                logger.info("calls of tools are not held to their schemas: %s", error)
                return None
        return make_constraint(self._model.grammars(), response_format, self._tools)

    def _pieces(self, index: int) -> Iterator[Piece]:
        """The pieces of a choice; the last one says why it ended."""
        stream = self._first if index == 0 else self._start(index)
        seen = 0

        def news() -> list[TokenLogprobs]:
            """Of the tokens since the last call, the one that ends the text left out; counts them all."""
            nonlocal seen
            tokens, logprobs = stream.tokens[seen:], stream.logprobs[seen:]
            seen += len(tokens)
            if tokens and tokens[-1] in self._model.tokenizer.eos_ids:
                tokens, logprobs = tokens[:-1], logprobs[: len(tokens) - 1]
            self._completion_tokens += len(tokens)
            return logprobs

        try:
            for text in stream:
                yield Piece(text, news())
        finally:
            stream.close()
        assert stream.result is not None  # a stream that has ended has one
        if self._turns[index][1] == 0:
            self._cached_tokens += stream.result.timings.reused_tokens
        yield Piece("", news(), "stop" if stream.result.finish_reason == "stop" else "length")

    def _usage(self) -> Usage:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }

    @abstractmethod
    def complete(self) -> Any:
        """Computes the whole answer."""

    @abstractmethod
    def chunks(self) -> Iterator[Any]:
        """Computes the answer bit by bit."""
