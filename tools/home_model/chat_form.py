"""How a conversation with the home model is written: its special tokens, its chat template, and what that makes.

Called by the trainer, which puts the template into the model's file, and by tests that need the text of a conversation.
"""

from __future__ import annotations

from collections.abc import Iterable

from smallthinker_edge.text.chat import render_chat

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END = SPECIAL[2]  # of a message, the model's answer too
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def prompt(turns: Iterable[tuple[str, str]]) -> str:
    """A conversation of (role, content), up to where the model answers."""
    return render_chat([{"role": role, "content": content} for role, content in turns], template=TEMPLATE)
