"""Answers of create_completion(): a prompt's continuation in OpenAI's older shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from smallthinker_edge.completions.answers import Answer, Answering
from smallthinker_edge.completions.arguments import TEXT_ARGUMENTS, checked_arguments
from smallthinker_edge.completions.shapes import Completion, FinishReason, TextChoice, TextLogprobs, Usage
from smallthinker_edge.completions.tool_calls import Tools
from smallthinker_edge.generation.choice import TokenLogprobs

Prompt = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]
COMPLETION_TOKENS = 16  # unless told otherwise, as OpenAI and llama-cpp-python have it


class TextAnswer(Answer):
    """Of create_completion().

    Args:
        prompt: text, ids, or a list of such.
        arguments: of TextArguments, and options of the generation.

    Raises as SmallThinker.stream().
    """

    prefix = "cmpl"

    def __init__(self, model: Answering, prompt: Prompt, arguments: Mapping[str, Any]) -> None:
        own, options = checked_arguments(arguments, TEXT_ARGUMENTS)
        options = {"max_tokens": COMPLETION_TOKENS, **options, "logprobs": own["logprobs"]}
        prompts = [model.tokenize(one) if isinstance(one, str) else one for one in _prompts(prompt)]
        self._text_at = 0
        super().__init__(model, own, options, prompts, Tools())

    def complete(self) -> Completion:
        """Computes the whole answer."""
        choices: list[TextChoice] = []
        for index in range(len(self._turns)):
            text = self._echo(index)
            pieces = list(self._pieces(index))
            noted = [entry for piece in pieces for entry in piece.logprobs]
            text += "".join(piece.text for piece in pieces)
            choices.append(self._choice(index, text, noted, pieces[-1].reason))
        return self._completion(choices, self._usage())

    def chunks(self) -> Iterator[Completion]:
        """Computes the answer bit by bit."""
        for index in range(len(self._turns)):
            if echo := self._echo(index):
                yield self._chunk(self._choice(index, echo, [], None))
            for piece in self._pieces(index):
                yield self._chunk(self._choice(index, piece.text, piece.logprobs, piece.reason))
        if self._include_usage:
            yield self._completion([], self._usage())

    def _chunk(self, choice: TextChoice) -> Completion:
        return self._completion([choice], None)

    def _completion(self, choices: list[TextChoice], usage: Usage | None) -> Completion:
        completion: Completion = {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._name,
            "choices": choices,
        }
        if usage is not None or self._include_usage:
            completion["usage"] = usage
        return completion

    def _echo(self, index: int) -> str:
        self._text_at = 0
        echo = self._model.detokenize(self._turns[index][0]) if self._own["echo"] else ""
        self._text_at = len(echo)
        return echo

    def _choice(self, index: int, text: str, noted: list[TokenLogprobs], reason: FinishReason | None) -> TextChoice:
        logprobs: TextLogprobs | None = None
        if self._own["logprobs"] is not None:
            logprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
            for entry in noted:
                shown = self._model.detokenize([entry.token])
                logprobs["tokens"].append(shown)
                logprobs["token_logprobs"].append(entry.logprob)
                # Tokens of half a character all read U+FFFD: the likeliest stands for them.
                top = {self._model.detokenize([token]): value for token, value in reversed(entry.top)}
                logprobs["top_logprobs"].append(top)
                logprobs["text_offset"].append(self._text_at)
                self._text_at += len(shown)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _prompts(prompt: Prompt) -> list[Any]:
    """The prompts, each text or ids, of one or a list of them. Raises TypeError or ValueError."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, bytes | Mapping) or not isinstance(prompt, Sequence):
        raise TypeError(f"prompt must be a string, token ids, or a list of such, not {prompt!r:.60}")
    if not prompt:
        raise ValueError("there is no prompt")
    if all(isinstance(item, str) for item in prompt):
        return list(prompt)
    several = all(isinstance(item, Sequence) and not isinstance(item, str) for item in prompt)
    many: list[Any] = list(prompt) if several else [prompt]
    for ids in many:
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise TypeError("a prompt of token ids must hold whole numbers only")
    return many
