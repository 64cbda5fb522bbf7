"""The arguments of create_completion() and create_chat_completion(), each one once, and how they are checked.

The options of a generation stand in options.py; here is what OpenAI's API has beside them. HTTP requests are read by
the same lists. Knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args, get_type_hints

from smallthinker_edge.options import MOST_LOGPROBS, OPTIONS, CompletionOptions, Option

MOST_CHOICES = 16


class SharedArguments(CompletionOptions, total=False):
    """What both calls take, besides the options of options.CompletionOptions; None is the default.

    model: the name that answers show (default: the file's). n: how many answers, one after the other; with a `seed`,
        each next one has the next seed.
    stream_options: {"include_usage": True} adds a last chunk with the usage.
    response_format: {"type": "text"}, {"type": "json_object"}, or {"type": "json_schema", "json_schema": {"schema":
        {...}}}. Beyond OpenAI's: {"type": "regex", "pattern": ...} and {"type": "grammar", "grammar": ...} (Lark, as
        llguidance reads it). All but text need the extra `structured`.
    """

    model: Annotated[str | None, Option(None, "text")]
    n: Annotated[int | None, Option(1, "int", low=1, high=MOST_CHOICES)]
    stream_options: Annotated[Mapping[str, Any] | None, Option({}, "mapping")]
    response_format: Annotated[Mapping[str, Any] | None, Option(None, "mapping")]


class TextArguments(SharedArguments, total=False):
    """What create_completion() takes by name, besides SharedArguments.

    logprobs: for each token, its log probability and those of so many likeliest ones. echo: the prompt comes first.
    max_tokens is 16 unless given, as everywhere that this call exists.
    """

    logprobs: Annotated[int | None, Option(None, "int", low=0, high=MOST_LOGPROBS)]
    echo: Annotated[bool | None, Option(False, "flag")]


class ChatArguments(SharedArguments, total=False):
    """What create_chat_completion() takes by name, besides SharedArguments.

    logprobs: whether log probabilities are wanted; top_logprobs: of how many likeliest tokens too, at most 20.
    tools: [{"type": "function", "function": {"name", "description", "parameters"}}, ...].
    tool_choice: "auto" (default), "none", or, which needs the extra `structured`, "required" or {"type": "function",
        "function": {"name": ...}}.
    max_completion_tokens: another name of max_tokens, whose default is what the context has left.
    continue_final_message: whether the answer goes on with the last message's text (and is what comes after it).
        Default: where an assistant wrote it and no response_format or tool_choice asks for a form.
    documents, chat_template_kwargs: see SmallThinker.chat.
    """

    logprobs: Annotated[bool | None, Option(False, "flag")]
    top_logprobs: Annotated[int | None, Option(0, "int", low=0, high=MOST_LOGPROBS)]
    tools: Annotated[Sequence[Mapping[str, Any]] | None, Option((), "mappings")]
    tool_choice: Annotated[str | Mapping[str, Any] | None, Option("auto", "any")]
    max_completion_tokens: Annotated[int | None, Option(None, "int", low=1)]
    continue_final_message: Annotated[bool | None, Option(None, "flag")]
    documents: Annotated[Sequence[Mapping[str, Any]] | None, Option(None, "mappings")]
    chat_template_kwargs: Annotated[Mapping[str, Any] | None, Option(None, "mapping")]


def _listed(arguments: type) -> dict[str, Option]:
    return {name: get_args(hint)[1] for name, hint in get_type_hints(arguments, include_extras=True).items()}


TEXT_ARGUMENTS: Mapping[str, Option] = _listed(TextArguments)
CHAT_ARGUMENTS: Mapping[str, Option] = _listed(ChatArguments)
# What no request may hold: objects of the caller's process, and what is written to its disk.
LOCAL = frozenset(name for name, option in OPTIONS.items() if option.kind in ("object", "call", "calls")) | {
    "shared_prefix"
}


def checked_arguments(given: Mapping[str, Any], known: Mapping[str, Option]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the call's own arguments, each with its default; the options of the generation that were given).

    Raises TypeError for a name that is none or a value of a wrong type, ValueError for one out of range.
    """
    for name in given:
        if name not in known:
            raise TypeError(f"there is no argument {name!r}; there are {', '.join(known)}")
    generation = known.keys() & (OPTIONS.keys() - {"logprobs"})
    own = {name: option.checked(name, given.get(name)) for name, option in known.items() if name not in generation}
    return own, {name: given[name] for name in generation if given.get(name) is not None}
