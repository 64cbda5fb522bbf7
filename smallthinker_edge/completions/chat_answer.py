"""Answers of create_chat_completion(): messages, calls of tools, log probabilities as OpenAI's chat has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from smallthinker_edge.completions.answers import Answer, Answering, Piece
from smallthinker_edge.completions.arguments import CHAT_ARGUMENTS, checked_arguments
from smallthinker_edge.completions.response_format import is_free
from smallthinker_edge.completions.shapes import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprob,
    ChatLogprobs,
    ChatTokenLogprob,
    ChunkChoice,
    Delta,
    FinishReason,
    ToolCall,
    Usage,
)
from smallthinker_edge.completions.tool_calls import CallFinder, Tools, read_tools, speaks_of_tools, told_in_text
from smallthinker_edge.generation.choice import TokenLogprobs
from smallthinker_edge.text.chat import Messages


class ChatAnswer(Answer):
    """Of create_chat_completion().

    Args:
        messages: as SmallThinker.chat() takes them. arguments: of ChatArguments.

    Raises as SmallThinker.stream(), and ChatTemplateError.
    """

    prefix = "chatcmpl"

    def __init__(self, model: Answering, messages: Messages, arguments: Mapping[str, Any]) -> None:
        own, options = checked_arguments(arguments, CHAT_ARGUMENTS)
        if own["max_completion_tokens"] is not None:
            options["max_tokens"] = own["max_completion_tokens"]
        if own["top_logprobs"] and not own["logprobs"]:
            raise ValueError("top_logprobs needs logprobs=True")
        options = {"max_tokens": model.context, **options, "logprobs": own["top_logprobs"] if own["logprobs"] else None}
        tools = read_tools(own["tools"], own["tool_choice"])
        listed = tools.listed or None
        if not model.takes_tools and (tools.listed or speaks_of_tools(messages)):
            messages, listed = told_in_text(messages, tools.listed), None
        rest: dict[str, Any] = {name: own[name] for name in ("documents", "chat_template_kwargs")} | {"tools": listed}
        goes_on = self._goes_on(own, messages, tools)
        prompt = model.encode_chat(messages, continue_final_message=goes_on, **rest)
        options.setdefault("shared_prefix", model.shared_prefix(prompt, messages, **rest))
        super().__init__(model, own, options, [prompt], tools)

    @staticmethod
    def _goes_on(own: Mapping[str, Any], messages: Messages, tools: Tools) -> bool:
        """Whether the answer goes on with the last message: unless told, with an assistant's own text."""
        free = is_free(own["response_format"], tools)
        if own["continue_final_message"] and not free:
            raise ValueError("continue_final_message cannot stand beside a response_format or tools that constrain")
        if own["continue_final_message"] is not None:
            return bool(own["continue_final_message"])
        last = messages[-1] if isinstance(messages, Sequence) and messages else None
        if not isinstance(last, Mapping) or last.get("role") != "assistant" or last.get("tool_calls"):
            return False
        return free and bool(last.get("content"))

    def complete(self) -> ChatCompletion:
        """Computes the whole answer."""
        choices: list[ChatChoice] = []
        for index in range(len(self._turns)):
            content: list[str] = []
            calls: list[ToolCall] = []
            noted: list[TokenLogprobs] = []
            reason: FinishReason = "length"
            for piece, parts in self._parts(index):
                content += [part for part in parts if isinstance(part, str)]
                calls += [part for part in parts if not isinstance(part, str)]
                noted += piece.logprobs
                reason = piece.reason or reason
            message: AnswerMessage = {"role": "assistant", "content": "".join(content)}
            if calls:
                message = {"role": "assistant", "content": "".join(content) or None, "tool_calls": calls}
            choices.append(
                {"index": index, "message": message, "logprobs": self._logprobs(noted), "finish_reason": reason}
            )
        return {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._name,
            "choices": choices,
            "usage": self._usage(),
        }

    def chunks(self) -> Iterator[ChatCompletionChunk]:
        """Computes the answer bit by bit; a call of a tool comes whole."""
        for index in range(len(self._turns)):
            called = 0
            yield self._chunk(index, {"role": "assistant", "content": ""})
            for piece, parts in self._parts(index):
                noted = piece.logprobs
                for part in parts:
                    delta: Delta = (
                        {"content": part} if isinstance(part, str) else {"tool_calls": [{"index": called, **part}]}
                    )
                    called += not isinstance(part, str)
                    yield self._chunk(index, delta, noted)
                    noted = []
                if noted or piece.reason:
                    yield self._chunk(index, {}, noted, piece.reason)
        if self._include_usage:
            yield self._completion_chunk([], self._usage())

    def _parts(self, index: int) -> Iterator[tuple[Piece, list[str | ToolCall]]]:
        """Each piece with the content and the calls that are certain with it."""
        if not self._tools.callable:
            for piece in self._pieces(index):
                yield piece, [piece.text] if piece.text else []
            return
        finder = CallFinder(frozenset(self._tools.callable))
        for piece in self._pieces(index):
            parts = finder.push(piece.text)
            if piece.reason is not None:
                parts += finder.flush()
                if finder.found and piece.reason == "stop":
                    piece = Piece(piece.text, piece.logprobs, "tool_calls")
            yield piece, parts

    def _chunk(
        self, index: int, delta: Delta, noted: list[TokenLogprobs] | None = None, reason: FinishReason | None = None
    ) -> ChatCompletionChunk:
        return self._completion_chunk(
            [{"index": index, "delta": delta, "logprobs": self._logprobs(noted or []), "finish_reason": reason}], None
        )

    def _completion_chunk(self, choices: list[ChunkChoice], usage: Usage | None) -> ChatCompletionChunk:
        chunk: ChatCompletionChunk = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._name,
            "choices": choices,
        }
        if self._include_usage:
            chunk["usage"] = usage
        return chunk

    def _delta(self, part: str | ToolCall, calls: int) -> Delta:
        return {"content": part} if isinstance(part, str) else {"tool_calls": [{"index": calls, **part}]}

    def _logprobs(self, noted: list[TokenLogprobs]) -> ChatLogprobs | None:
        if not self._own["logprobs"]:
            return None
        return {"content": [self._token_logprob(entry) for entry in noted]}

    def _token_logprob(self, entry: TokenLogprobs) -> ChatTokenLogprob:
        top = [self._logprob(token, value) for token, value in entry.top]
        return {**self._logprob(entry.token, entry.logprob), "top_logprobs": top}

    def _logprob(self, token: int, logprob: float) -> ChatLogprob:
        data = self._model.tokenizer.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}
