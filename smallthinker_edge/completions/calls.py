"""The calls that users of OpenAI's API and llama-cpp-python know, as methods that SmallThinker inherits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, overload

from smallthinker_edge.completions.answers import Answering
from smallthinker_edge.completions.arguments import ChatArguments, TextArguments
from smallthinker_edge.completions.chat_answer import ChatAnswer
from smallthinker_edge.completions.shapes import ChatCompletion, ChatCompletionChunk, Completion
from smallthinker_edge.completions.text_answer import Prompt, TextAnswer
from smallthinker_edge.errors import tells_of_memory
from smallthinker_edge.text.chat import Messages

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from smallthinker_edge.completions.compute import AsyncItems, ComputeThread


@tells_of_memory
class CompletionCalls(ABC):
    """create_completion() and create_chat_completion(), and their asynchronous twins.

    Arguments stand in completions.arguments and options.CompletionOptions; None is always the default, and a name
    that is none raises TypeError. With stream=True a call returns an iterator of chunks, else the whole answer; their
    shapes are those of completions.shapes, plain dicts. Beyond what stream() raises, ChatTemplateError for bad
    messages, and ValueError where structured output is asked for and its extra is not installed.

    The twins whose names begin with `a` are for coroutines: they prepare a request in a thread and compute it in
    another one, which serves them all in turn, so that the event loop never waits. Cancelling the task that waits, or
    closing or dropping the iterator, ends the computation within 50 ms; a request that still waits for its turn is
    never computed.
    """

    def __init__(self) -> None:
        self._threads: dict[str, ComputeThread] = {}

    @property
    def _computing(self) -> ComputeThread:
        """Made when it is first asked for: with asyncio it takes 3 MB, which a program without coroutines keeps."""
        if "compute" not in self._threads:
            from smallthinker_edge.completions.compute import ComputeThread

            # Without a lock, which a fork would copy as it is: one that comes second is dropped before it starts.
            return self._threads.setdefault("compute", ComputeThread())
        return self._threads["compute"]

    def _stop_computing(self) -> None:
        """What is queued never starts."""
        for thread in list(self._threads.values()):
            thread.close()

    @abstractmethod
    def _answering(self) -> Answering:
        """What answers need of a model."""

    @overload
    def create_completion(
        self, prompt: Prompt, *, stream: Literal[False] | None = None, **arguments: Unpack[TextArguments]
    ) -> Completion: ...
    @overload
    def create_completion(
        self, prompt: Prompt, *, stream: Literal[True], **arguments: Unpack[TextArguments]
    ) -> Iterator[Completion]: ...
    def create_completion(
        self, prompt: Prompt, *, stream: bool | None = None, **arguments: Unpack[TextArguments]
    ) -> Completion | Iterator[Completion]:
        """Continues a prompt, or each of several.

        Args:
            prompt: text, token ids, or a list of such. stream: give chunks. arguments: see TextArguments.
        """
        answer = TextAnswer(self._answering(), prompt, arguments)
        return answer.chunks() if stream else answer.complete()

    __call__ = create_completion

    @overload
    def create_chat_completion(
        self, messages: Messages, *, stream: Literal[False] | None = None, **arguments: Unpack[ChatArguments]
    ) -> ChatCompletion: ...
    @overload
    def create_chat_completion(
        self, messages: Messages, *, stream: Literal[True], **arguments: Unpack[ChatArguments]
    ) -> Iterator[ChatCompletionChunk]: ...
    def create_chat_completion(
        self, messages: Messages, *, stream: bool | None = None, **arguments: Unpack[ChatArguments]
    ) -> ChatCompletion | Iterator[ChatCompletionChunk]:
        """Answers a conversation.

        Args:
            messages: as chat() takes them. stream: give chunks. arguments: see ChatArguments.
        """
        answer = ChatAnswer(self._answering(), messages, arguments)
        return answer.chunks() if stream else answer.complete()

    @overload
    async def acreate_completion(
        self, prompt: Prompt, *, stream: Literal[False] | None = None, **arguments: Unpack[TextArguments]
    ) -> Completion: ...
    @overload
    async def acreate_completion(
        self, prompt: Prompt, *, stream: Literal[True], **arguments: Unpack[TextArguments]
    ) -> AsyncItems[Completion]: ...
    async def acreate_completion(
        self, prompt: Prompt, *, stream: bool | None = None, **arguments: Unpack[TextArguments]
    ) -> Completion | AsyncItems[Completion]:
        """create_completion() for coroutines."""
        answer = await self._computing.prepare(lambda: TextAnswer(self._answering(), prompt, arguments))
        if stream:
            return self._computing.iterate(answer.chunks, answer.cancel)
        return await self._computing.run(answer.complete, answer.cancel)

    @overload
    async def acreate_chat_completion(
        self, messages: Messages, *, stream: Literal[False] | None = None, **arguments: Unpack[ChatArguments]
    ) -> ChatCompletion: ...
    @overload
    async def acreate_chat_completion(
        self, messages: Messages, *, stream: Literal[True], **arguments: Unpack[ChatArguments]
    ) -> AsyncItems[ChatCompletionChunk]: ...
    async def acreate_chat_completion(
        self, messages: Messages, *, stream: bool | None = None, **arguments: Unpack[ChatArguments]
    ) -> ChatCompletion | AsyncItems[ChatCompletionChunk]:
        """create_chat_completion() for coroutines."""
        answer = await self._computing.prepare(lambda: ChatAnswer(self._answering(), messages, arguments))
        if stream:
            return self._computing.iterate(answer.chunks, answer.cancel)
        return await self._computing.run(answer.complete, answer.cancel)
