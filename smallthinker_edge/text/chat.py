"""Chat messages to the text that a model was trained on.

ChatML is built in and needs nothing. Another template from the file is rendered by Jinja2 in its sandbox, which
is the [chat] extra: a well-kept library for a language that is not ours, kept off devices that do not need it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from smallthinker_edge.errors import ChatTemplateError
from smallthinker_edge.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, str]]


def check_messages(messages: Messages) -> None:
    """Raises ChatTemplateError unless messages are {"role": str, "content": str}, at least one."""
    if isinstance(messages, str | bytes | Mapping) or not messages:
        raise ChatTemplateError("messages must be a non-empty list of {'role': ..., 'content': ...}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise ChatTemplateError(f"message {i} must have exactly the keys 'role' and 'content'")
        if not all(isinstance(value, str) for value in message.values()):
            raise ChatTemplateError(f"message {i}: role and content must be strings")


def is_chatml(template: str | None) -> bool:
    """Whether a template is absent or plain ChatML, which needs no Jinja2.

    Plain: it loops over the messages, adds nothing but ChatML's marks, and has no tools or default system prompt.
    """
    if template is None:
        return True
    return "<|im_start|>" in template and not any(
        word in template for word in ("tools", "system", "raise_exception", "set ")
    )


def render_chat(messages: Messages, *, template: str | None = None, bos_token: str = "", eos_token: str = "",
                add_generation_prompt: bool = True) -> str:  # fmt: skip
    """The prompt text of a conversation.

    Args:
        messages: {"role", "content"} in order.
        template: Jinja2 source from the model file; None or plain ChatML uses the built-in rendering.
        bos_token, eos_token: texts that a template may refer to.
        add_generation_prompt: end where the assistant's answer starts.

    Raises:
        ChatTemplateError: bad messages, a template that fails, or Jinja2 is needed and missing.
    """
    check_messages(messages)
    if is_chatml(template):
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ChatTemplateError(
            "this model's chat template needs Jinja2: pip install 'smallthinker_edge[chat]'"
        ) from None

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template or "").render(
            messages=[dict(m) for m in messages],
            bos_token=bos_token,
            eos_token=eos_token,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # a template is a program from a file: whatever it does wrong is its error
        raise ChatTemplateError(f"the model's chat template failed: {error}") from error


def encode_chat(tokenizer: Tokenizer, messages: Messages, template: str | None = None) -> list[int]:
    """Token ids of a conversation up to where the answer starts.

    With ChatML, content is never read as special tokens, so that a user cannot forge the end of a message. A
    Jinja2 template mixes marks and content, so there special tokens are recognised everywhere.
    """
    if not is_chatml(template):
        return tokenizer.encode(render_chat(messages, template=template), add_bos=False)
    check_messages(messages)
    start, end = tokenizer.special_id("<|im_start|>"), tokenizer.special_id("<|im_end|>")
    if start is None or end is None:
        raise ChatTemplateError("this model's vocabulary has no <|im_start|> and <|im_end|> for ChatML")
    ids: list[int] = []
    for message in messages:
        text = f"{message['role']}\n{message['content']}"
        ids += [start, *tokenizer.encode(text, add_bos=False, parse_special=False), end]
        ids += tokenizer.encode("\n", add_bos=False)
    return [*ids, start, *tokenizer.encode("assistant\n", add_bos=False)]
