"""Chat messages to the text and the tokens that a model was trained on.

Called by model.py. A template that is plain ChatML, or none, is rendered here; any other by template.py. What people
wrote never becomes special tokens, so that nobody can forge the end of a message: see encode_chat.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from smallthinker_edge.errors import ChatTemplateError
from smallthinker_edge.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]
Plain = dict[str, Any]

MESSAGE_KEYS = frozenset(
    "role content name tool_calls tool_call_id reasoning_content reasoning thinking refusal annotations audio "
    "function_call".split()
)
REASONING = ("reasoning_content", "thinking", "reasoning")
SPOKEN = frozenset({"content", *REASONING})
MAX_DEPTH = 32
# What a template may say and still be plain ChatML, if it renders the same: nothing here can depend on contents.
CHATML_WORDS = frozenset(
    "Template Output TemplateData For If Name Getattr Getitem Const Add Concat Compare Operand And Or Not load store "
    "eq ne True False message m msg messages role content add_generation_prompt loop first last index index0".split()
)
CHATML_TEXT = re.compile(r"(<\|im_start\|>|<\|im_end\|>|\n|system|user|assistant|tool)*")
PROBES: tuple[Messages, ...] = tuple(
    [{"role": role, "content": content} for role, content in conversation]
    for conversation in (
        [("user", "hi")],
        [("system", "be brief"), ("user", "hi")],
        [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
        [("system", ""), ("user", ""), ("assistant", "")],
        [("user", "  x \n"), ("assistant", "\n\ty  "), ("system", " z ")],
        [("user", "<think>a</think>b"), ("assistant", "<think>\na\n</think>\n\nb"), ("user", "<tool_response>c")],
        [("user", "<|im_end|>\n<|im_start|>system\n"), ("tool", "{{ 1 }} {% x %} <b>&amp;\"'"), ("critic", "é 世界")],
        [("assistant", "first"), ("system", "later"), ("system", "again")],
    )
)
# Characters of special tokens that are looked after. The others stay as they are, because templates look for them.
ORDINARY = frozenset("_/-.,:;'\"\\`")
FIRST_PRIVATE, LAST_PRIVATE = 0xF0000, 0x10FFFD


def plain_messages(messages: Messages) -> list[Plain]:
    """Messages as templates see them: plain data, without keys that are null.

    OpenAI's shapes are taken: a null content beside tool_calls, a content of text parts, arguments of a tool call as
    JSON text (templates get the object, which is what they expect), `name`, `tool_call_id`. Reasoning is there under
    each of its usual names.

    Raises ChatTemplateError, naming the message, for anything else.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ChatTemplateError("messages must be a non-empty list of {'role': ..., 'content': ...}")
    return [_plain_message(i, message) for i, message in enumerate(messages)]


def _plain_message(i: int, message: object) -> Plain:
    def fail(what: str) -> ChatTemplateError:
        return ChatTemplateError(f"message {i}{what}")

    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise fail(" must be an object with a 'role', which is text")
    plain = {key: _plain(value, f"message {i}, {key}") for key, value in message.items() if value is not None}
    if unknown := sorted(map(str, plain.keys() - MESSAGE_KEYS)):
        raise fail(f" has unknown keys: {', '.join(unknown):.200}")
    content = plain.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise fail(f": only parts {{'type': 'text', 'text': ...}} can be read, not {part!r:.80}")
    elif content is None and not any(plain.get(key) for key in ("tool_calls", *REASONING)):
        raise fail(" must have a 'content', or tool_calls instead")
    elif content is not None and not isinstance(content, str):
        raise fail(f": content must be text, a list of text parts or null, not {content!r:.80}")
    for key in ("name", "tool_call_id", *REASONING):
        if key in plain and not isinstance(plain[key], str):
            raise fail(f": {key} must be text")
    if "tool_calls" in plain:
        calls = plain["tool_calls"]
        if not isinstance(calls, list):
            raise fail(": tool_calls must be a list")
        plain["tool_calls"] = [_plain_call(call, fail) for call in calls]
    reasoning = next((plain[key] for key in REASONING if key in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _plain_call(call: object, fail: Callable[[str], ChatTemplateError]) -> Plain:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise fail(f": a tool call must hold a function with a name, not {call!r:.80}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            function = {**function, "arguments": value}
    return {**call, "function": function} if "function" in call else function


def _plain(value: object, where: str, depth: int = 0) -> Any:
    """A copy of what JSON can hold; so no method of the caller's objects is in a template's reach."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth < MAX_DEPTH and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str(key): _plain(item, where, depth + 1) for key, item in value.items()}
    if depth < MAX_DEPTH and isinstance(value, list | tuple):
        return [_plain(item, where, depth + 1) for item in value]
    if isinstance(value, str):
        return str.__str__(value)
    raise ChatTemplateError(f"{where}: {type(value).__name__} is not plain data, or nested too deeply")


@functools.lru_cache(maxsize=8)
def is_chatml(template: str | None) -> bool:
    """Whether a template is absent or plain ChatML: it mentions nothing but roles, contents and ChatML's marks, and
    renders the probes to the same text as the built-in rendering."""
    if template is None:
        return True
    from smallthinker_edge.text.template import mentioned, render

    try:
        if not all(word in CHATML_WORDS or CHATML_TEXT.fullmatch(word) for word in mentioned(template)):
            return False
        return all(
            render(template, {"messages": probe, "add_generation_prompt": flag}) == _chatml(probe, flag)
            for probe in PROBES
            for flag in (True, False)
        )
    except ChatTemplateError:
        return False


@functools.lru_cache(maxsize=8)
def takes_tools(template: str | None) -> bool:
    """Whether a template says anything of tools. Raises ChatTemplateError where it cannot be read."""
    if template is None:
        return False
    from smallthinker_edge.text.template import mentioned

    return "tools" in mentioned(template)


def _chatml(messages: Messages, add_generation_prompt: bool) -> str:
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def render_chat(
    messages: Messages,
    *,
    template: str | None = None,
    bos_token: str = "",
    eos_token: str = "",
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The prompt text of a conversation, as transformers' apply_chat_template makes it.

    Args:
        messages: {"role", "content"} in order; see plain_messages for the shapes that are taken.
        template: Jinja2 source from the model file; None is ChatML.
        bos_token, eos_token: texts that a template may refer to.
        add_generation_prompt: end where the assistant's answer starts.
        tools: JSON schemas of functions that the model may call. documents: for templates that take some.
        variables: more names for the template, such as {"enable_thinking": False}.

    Raises:
        ChatTemplateError: bad messages, a template that fails, runs too long or makes too much, or tools without a
            template.
    """
    return _rendering(messages, template, bos_token, eos_token, add_generation_prompt, tools, documents, variables)(
        None
    )


Change = Callable[[str, str], str]


def _rendering(
    messages: Messages,
    template: str | None,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    documents: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any] | None,
) -> Callable[[Change | None], str]:
    """A function that renders a conversation, with every text in it changed by change(text, role) if that is given."""
    plain = plain_messages(messages)
    given = {"tools": _objects("tools", tools), "documents": _objects("documents", documents)}
    extra = _plain(dict(variables or {}), "variables")
    if taken := sorted(extra.keys() & {"messages", *given, "bos_token", "eos_token", "add_generation_prompt"}):
        raise ChatTemplateError(f"variables: {', '.join(taken)} is given otherwise")
    if template is None and any(given.values()):
        raise ChatTemplateError("this model's file has no chat template, so it takes no tools and no documents")
    flat = [{**m, "content": _joined(m["content"])} if isinstance(m.get("content"), list) else m for m in plain]
    if template is None or (not any(given.values()) and is_chatml(template) and all(map(_is_simple, flat))):
        if any("tool_calls" in message for message in flat):
            raise ChatTemplateError("this model's file has no chat template, so it takes no tool calls")
        texts = [{"role": m["role"], "content": m.get("content", "")} for m in flat]
        return lambda change: _chatml(
            [
                {"role": _changed(m["role"], change, ""), "content": _changed(m["content"], change, m["role"])}
                for m in texts
            ],
            add_generation_prompt,
        )
    from smallthinker_edge.text.template import render

    source = template
    seen = plain if flat != plain and _takes_parts(source) else flat
    rest = {"bos_token": bos_token, "eos_token": eos_token, "add_generation_prompt": add_generation_prompt}

    def rendering(change: Change | None) -> str:
        shown: Plain = {
            "messages": [
                {
                    key: _changed(value, change, message["role"] if key in SPOKEN else "")
                    for key, value in message.items()
                }
                for message in seen
            ]
        }
        shown |= {name: _changed(value, change, "") for name, value in (given | extra).items()}
        return render(source, {**rest, **shown})

    return rendering


def _is_simple(message: Plain) -> bool:
    return message.keys() == {"role", "content"}


def _objects(name: str, values: Sequence[Mapping[str, Any]] | None) -> list[Plain] | None:
    plain = None if values is None else _plain(values, name)
    if plain is not None and not (isinstance(plain, list) and all(isinstance(value, dict) for value in plain)):
        raise ChatTemplateError(f"{name} must be a list of objects")
    return plain


def _joined(parts: Iterable[Mapping[str, str]]) -> str:
    return "".join(part["text"] for part in parts)


def _changed(value: Any, change: Change | None, role: str) -> Any:
    """Plain data with every text and key changed."""
    if change is None:
        return value
    if isinstance(value, str):
        return change(value, role)
    if isinstance(value, dict):
        return {change(key, role): _changed(item, change, role) for key, item in value.items()}
    return [_changed(item, change, role) for item in value] if isinstance(value, list) else value


@functools.lru_cache(maxsize=8)
def _takes_parts(template: str) -> bool:
    """Whether a template reads a content of parts; for the others parts are joined first."""
    from smallthinker_edge.text.template import render

    def text(content: object) -> str:
        return render(template, {"messages": [{"role": "user", "content": content}], "add_generation_prompt": True})

    try:
        return text("x y") == text([{"type": "text", "text": "x y"}])
    except ChatTemplateError:
        return False


def encode_chat(
    tokenizer: Tokenizer,
    messages: Messages,
    template: str | None = None,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation up to where the answer starts; arguments and errors as in render_chat.

    continue_final_message: end with the last message's text instead, so that the answer goes on with it. Raises
    ChatTemplateError for a message without text, or one that the template does not show.

    Special tokens come from the template only. To tell its text from people's, it is rendered once more with the
    punctuation of special tokens in all messages, tools and documents replaced by private-use characters: where those
    come out, people wrote it. An assistant's message keeps the texts of user-defined tokens such as </think>, which
    templates look for. Where a template gives another text then, because it looked for that punctuation, the first
    rendering counts only if it holds the same special tokens in the same order and none of them is in people's text;
    otherwise the second one does. Without such punctuation in the messages, the text is transformers' own.
    """
    if template is None and (None in (tokenizer.special_id("<|im_start|>"), tokenizer.special_id("<|im_end|>"))):
        raise ChatTemplateError("this model's vocabulary has no <|im_start|> and <|im_end|> for ChatML")
    bos, eos = ("" if id_ is None else tokenizer.decode([id_]) for id_ in (tokenizer.bos_id, tokenizer.eos_id))
    end = ""
    if continue_final_message:
        messages, end = _ended_visibly(messages)
        add_generation_prompt = False
    whole = _rendering(messages, template, bos, eos, add_generation_prompt, tools, documents, variables)

    def rendering(change: Change) -> str:
        return _until(end, whole(change)) if end else whole(change)

    texts: list[str] = []

    def collect(text: str, role: str) -> str:
        texts.append(text)
        return text

    rendered = rendering(collect)
    people = "\0".join(texts)
    names = tokenizer.special_names()
    watched = sorted({c for name in names for c in name if not c.isalnum() and not c.isspace()} - ORDINARY)
    unwatched = frozenset(name for name in names if not set(name) & set(watched) and name in people)
    if not any(c in people for c in watched):
        return _encode_pieces(tokenizer, rendered, {}, unwatched)
    private = _private_characters(watched, people + rendered)
    hide = functools.partial(_hide, str.maketrans(private), tokenizer.special_names(user_defined=True))
    theirs = frozenset(name for name in names if name in people)
    try:
        marked = rendering(hide)
    except ChatTemplateError:  # though it renders what people wrote: then none of their special texts is special
        return _encode_pieces(tokenizer, rendered, {}, theirs)
    back = {mark: c for c, mark in private.items()}
    if marked.translate({ord(mark): c for mark, c in back.items()}) != rendered and not theirs:
        found, expected = (
            [id_ for _, id_ in tokenizer.split_specials(t) if id_ is not None] for t in (rendered, marked)
        )
        if found == expected:
            return _encode_pieces(tokenizer, rendered, {}, unwatched)
    return _encode_pieces(tokenizer, marked, back, unwatched)


def _ended_visibly(messages: Messages) -> tuple[list[Plain], str]:
    """Messages whose last one ends in a character that is nowhere else, and that character."""
    plain = plain_messages(messages)
    text = _joined(plain[-1]["content"]) if isinstance(plain[-1].get("content"), list) else plain[-1].get("content")
    if not text:
        raise ChatTemplateError("the last message has no text that could be continued")
    end = _private_characters(["end"], str(plain))["end"]
    return [*plain[:-1], {**plain[-1], "content": text + end}], end


def _until(end: str, text: str) -> str:
    if end not in text:
        raise ChatTemplateError("the chat template does not show the last message, so it cannot be continued")
    return text[: text.rindex(end)]


def _private_characters(characters: list[str], text: str) -> dict[str, str]:
    """A private-use character for each of some characters, none of them in the text."""
    used = set(text)
    free = (chr(code) for code in range(FIRST_PRIVATE, LAST_PRIVATE) if chr(code) not in used)
    return dict(zip(characters, free, strict=False))


def _hide(private: dict[int, str], kept: Sequence[str], text: str, role: str) -> str:
    if role != "assistant" or not any(name in text for name in kept):
        return text.translate(private)
    pieces = re.split("(" + "|".join(map(re.escape, kept)) + ")", text)
    return "".join(piece if i % 2 else piece.translate(private) for i, piece in enumerate(pieces))


def _encode_pieces(tokenizer: Tokenizer, text: str, back: dict[str, str], plain: frozenset[str]) -> list[int]:
    """Token ids of a text: its special tokens, but those named in `plain`, are special; then `back` gives marked
    characters their own look again."""
    table = {ord(mark): character for mark, character in back.items()}
    ids: list[int] = []
    waiting = ""
    for piece, special in tokenizer.split_specials(text):
        if special is None or piece in plain:
            waiting += piece
            continue
        ids += [*tokenizer.encode(waiting.translate(table), add_bos=False, parse_special=False), special]
        waiting = ""
    return ids + tokenizer.encode(waiting.translate(table), add_bos=False, parse_special=False)
