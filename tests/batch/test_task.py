"""Tasks: how a line becomes a request, and which tasks and lines are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smallthinker_edge.batch.task import LONGEST_LINE, Line, Task, read_task


def asked(text: str, line: str) -> Any:
    task = Task({"prompt": text}, "json")
    return task.asked(task.fields(Line(1, line.encode())))


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("Sum up: {text}", {"text": "a {text} b"}, "Sum up: a {text} b"),
        ("{a}{b}", {"a": 1.5, "b": [None, "é"]}, '1.5[null, "é"]'),
        ("{author.name}", {"author": {"name": "Ada"}}, "Ada"),
        ("{a.b}", {"a.b": "whole", "a": {"b": "part"}}, "whole"),
        ('{"name": "{name}"}', {"name": "x"}, '{"name": "x"}'),
        ("{{name}} is {name}", {"name": "x"}, "{name} is x"),
        ("\\d{3} {first-name} { x }", {"first-name": "y"}, "\\d{3} y { x }"),
        ("{größe}", {"größe": "9"}, "9"),
    ],
)
def test_places_are_filled_and_other_braces_are_text(text: str, line: dict[str, Any], expected: str) -> None:
    assert asked(text, json.dumps(line)) == expected


def test_messages_are_filled_in_depth_and_arguments_are_not() -> None:
    request = {
        "messages": [
            {"role": "system", "content": "You know {topic}."},
            {"role": "user", "content": [{"type": "text", "text": "{question}"}]},
        ],
        "stop": ["{topic}"],
    }
    task = Task(request, "json")
    fields = task.fields(Line(1, b'{"topic": "cheese", "question": "Why?"}'))
    assert task.asked(fields) == [
        {"role": "system", "content": "You know cheese."},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
    ]
    assert task.arguments == {"stop": ["{topic}"]}


def test_a_text_is_a_users_message_and_a_json_file_a_request(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Translate {text}\n", encoding="utf-8")
    task = read_task(tmp_path / "prompt.txt", "text", {"seed": 1})
    assert task.request == {"messages": [{"role": "user", "content": "Translate {text}"}], "seed": 1}
    (tmp_path / "a.json").write_text(json.dumps({"prompt": "{text}", "max_tokens": 5, "seed": 2}), encoding="utf-8")
    assert read_task(tmp_path / "a.json", "text", {"seed": 3}).request == {
        "prompt": "{text}",
        "max_tokens": 5,
        "seed": 3,
    }
    (tmp_path / "b.json").write_text('[{"role": "user", "content": "{text}"}]', encoding="utf-8")
    assert read_task(tmp_path / "b.json", "text", {}).is_chat


MESSAGES = [{"role": "user", "content": "{text}"}]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({}, "either"),
        ({"messages": MESSAGES, "prompt": "{text}"}, "either"),
        ({"messages": [{"role": "user", "content": "no place"}]}, "no place"),
        ({"prompt": "{{text}}"}, "no place"),
        ({"prompt": ["{text}"]}, "must be text"),
        ({"messages": [{"content": "{text}"}]}, "role"),
        ({"messages": MESSAGES, "n": 2}, "cannot have n"),
        ({"messages": MESSAGES, "stream": True, "sampler": 1}, "cannot have sampler, stream"),
        ({"messages": MESSAGES, "frobnicate": 1}, "frobnicate"),
        ({"messages": MESSAGES, "temperature": -1}, "temperature"),
        ({"messages": MESSAGES, "response_format": "json"}, "response_format"),
    ],
)
def test_tasks_that_no_line_could_be_asked_are_refused(request_: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        Task(request_, "json")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"text": "a"', "no JSON"),
        (b'["a"]', "no JSON object"),
        (b"[" * 100_000, "no JSON"),
        (b'{"text": "\xff"}', "no UTF-8"),
        (b'{"other": 1}', "no field 'text'"),
        (b" " * (LONGEST_LINE + 1), "more than"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_bad_line_is_a_value_error(data: bytes, said: str) -> None:
    task = Task({"prompt": "{text}"}, "json")
    with pytest.raises(ValueError, match=said):
        task.asked(task.fields(Line(2, data)))


def test_lines_of_text_are_the_field_text_and_a_bom_is_none_of_it() -> None:
    task = Task({"prompt": "{text}"}, "text")
    assert task.fields(Line(1, b'\xef\xbb\xbf{"a": 1}')) == {"text": '{"a": 1}'}


def test_the_digest_differs_with_task_lines_and_settings() -> None:
    first = Task({"prompt": "{text}", "seed": 1}, "json")
    others = [
        Task({"prompt": "{text}!", "seed": 1}, "json"),
        Task({"prompt": "{text}", "seed": 2}, "json"),
        Task({"prompt": "{text}", "seed": 1}, "text"),
        Task({"prompt": "{text}", "seed": 1}, "json", "key"),
    ]
    digests = {task.digest({"kv": "f16"}) for task in [first, *others]} | {first.digest({"kv": "q8_0"})}
    assert len(digests) == 6
    assert Task({"seed": 1, "prompt": "{text}"}, "json").digest({"kv": "f16"}) == first.digest({"kv": "f16"})
