"""Conversations and templates whose text transformers has recorded: tests/fixtures/chat/expected.json.

`python tests/support/chat_cases.py`, in an environment with transformers, records it anew. The templates are written
for these tests, in the manner of those in use: a default system prompt, tools and calls, thinking, headers,
instructions, alternating turns, documents.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "fixtures" / "chat"
TEMPLATES = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.jinja"))}
BOS, EOS = "<|begin|>", "<|end|>"

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather, like \"sunny\" & 'warm' in <b>Zürich</b>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = {
    "id": "1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Zürich <&> 'x'", "days": 3}},
}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "hi"}],
    "system": [{"role": "system", "content": " be brief \n"}, {"role": "user", "content": "  hi\n"}],
    "turns": [
        {"role": "user", "content": "a < b && c > d {{ x }} {% y %}"}, {"role": "assistant", "content": "\n yes \n"},
        {"role": "user", "content": "世界 🙂 \"quoted\" \\ back\n\nlines"}, {"role": "assistant", "content": ""},
        {"role": "user", "content": ""},
    ],
    "thought": [
        {"role": "user", "content": "think"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nold"},
        {"role": "user", "content": "again"}, {"role": "assistant", "content": "<think>\nhm, hm\n</think>\n\nnew"},
    ],
    "reasoning": [
        {"role": "user", "content": "think"}, {"role": "assistant", "content": "so", "reasoning_content": "well\n"},
    ],
    "calls": [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "{\"sky\": \"blue\"}", "name": "get_weather", "tool_call_id": "1"},
        {"role": "assistant", "content": "It is blue."}, {"role": "user", "content": "thanks", "name": "eve"},
    ],
    "two calls": [
        {"role": "user", "content": "weather?"}, {"role": "assistant", "content": "wait", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "one"}, {"role": "tool", "content": "two"},
    ],
    "two users": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    "parts": [
        {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": " two"}]},
    ],
}  # fmt: skip

VARIABLES: dict[str, dict[str, Any]] = {
    "none": {},
    "some": {"enable_thinking": False, "date_string": "26 Jul 2024", "limit": 1, "settings": {"b": 1, "a": "x<y"}},
}
DOCUMENTS = [{"title": "first <one>", "text": "two\nlines"}, {"title": "second", "text": "line"}]


def cases() -> list[tuple[str, str, bool, str, bool]]:
    """(template, conversation, with tools and documents, variables, generation prompt) of each case."""
    return [
        (template, conversation, extras, variables, prompt)
        for template, conversation, extras, variables, prompt in product(
            TEMPLATES, CONVERSATIONS, (False, True), VARIABLES, (True, False)
        )
        if conversation != "parts" or template == "turns"
    ]


def record() -> dict[str, str | None]:
    """What transformers makes of every case; None where the template refuses it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    expected: dict[str, str | None] = {}
    for case in cases():
        template, conversation, extras, variables, prompt = case
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.BPE()), bos_token=BOS, eos_token=EOS, chat_template=TEMPLATES[template]
        )
        try:
            expected[json.dumps(case)] = tokenizer.apply_chat_template(
                CONVERSATIONS[conversation], tokenize=False, add_generation_prompt=prompt,
                tools=TOOLS if extras else None, documents=DOCUMENTS if extras else None, **VARIABLES[variables],
            )  # fmt: skip
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "jinja2":
                raise
            expected[json.dumps(case)] = None
    return expected


if __name__ == "__main__":
    import transformers

    data = {"transformers": transformers.__version__, "expected": record()}
    (FOLDER / "expected.json").write_text(json.dumps(data, ensure_ascii=False, indent=0) + "\n")
