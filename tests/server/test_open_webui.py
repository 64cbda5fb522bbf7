"""What Open WebUI sends to a server of OpenAI's API and how it reads the answers, as version 0.12.4 does.

Facts from its routers/openai.py, routers/tasks.py, utils/middleware.py and utils/payload.py, and from the ranges of its
form for parameters.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from gguf_files import write_model
from scripted_server import call_text, serving_script
from server_process import ServerProcess, serving

HEADERS = {"Content-Type": "application/json", "Authorization": "Bearer sesame"}
USER_HEADERS = {
    **HEADERS, "X-OpenWebUI-User-Name": "Ann%20B", "X-OpenWebUI-User-Id": "3", "X-OpenWebUI-User-Email": "a@b.c",
    "X-OpenWebUI-User-Role": "admin", "X-OpenWebUI-Chat-Id": "chat",
}  # fmt: skip
QUESTION = "turn on the kitchen light"
ANSWER = '{"action":"on","device":"light","area":"kitchen"}'
# A tool as pydantic describes the function of one, null left out, and one of an OpenAPI server with its formats.
TOOLS: list[Any] = [
    {"type": "function", "function": {
        "name": "search_notes", "description": "Search the notes.", "parameters": {
            "properties": {
                "query": {"description": "What for.", "title": "Query", "type": "string"},
                "count": {"default": 5, "title": "Count", "type": "integer"},
                "tags": {"title": "Tags", "type": "array", "items": {"type": "string"}},
            }, "required": ["query"], "title": "search_notes", "type": "object"}}},
    {"type": "function", "function": {
        "name": "set_level", "description": "", "parameters": {
            "type": "object", "properties": {
                "room": {"type": "string", "description": "Which.", "format": "uuid4"},
                "level": {"type": "integer", "format": "int32", "minimum": 0},
                "effects": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
                "when": {"oneOf": [{"type": "string", "format": "date-time"}, {"type": "number"}]},
            }, "required": ["room"]}}},
]  # fmt: skip


@pytest.fixture(scope="module")
def server(demo_model: Path) -> Iterator[ServerProcess]:
    with serving(demo_model, "--memory", "1GiB", env={**os.environ, "SMALLTHINKER_API_KEY": "sesame"}) as server:
        yield server


def post(url: str, body: dict[str, Any], headers: dict[str, str] = HEADERS) -> httpx.Response:
    """A request as it leaves Open WebUI: the body as bytes, the options of streams only for streams."""
    if not body.get("stream"):
        body = {name: value for name, value in body.items() if name != "stream_options"}
    return httpx.post(f"{url}/v1/chat/completions", content=json.dumps(body), headers=headers, timeout=60)


def read_stream(answer: httpx.Response) -> dict[str, Any]:
    """Text, calls, reason and usage of an event stream, by lines, as Open WebUI puts them together."""
    assert answer.status_code == 200, answer.text
    assert "text/event-stream" in answer.headers["Content-Type"]
    read: dict[str, Any] = {"content": "", "calls": [], "reason": None, "usage": {}}
    for line in answer.text.split("\n"):
        if not line.startswith("data:") or (data := line[5:].strip()) == "[DONE]":
            continue
        event = json.loads(data)
        assert "error" not in event
        read["usage"] |= event.get("usage", {}) or {}
        if not event.get("choices", []):
            continue
        choice = event["choices"][0]
        read["reason"] = choice.get("finish_reason") or read["reason"]
        delta = choice.get("delta", {})
        read["content"] += delta.get("content") or ""
        for call in delta.get("tool_calls") or []:
            if call["index"] == len(read["calls"]):
                read["calls"].append({"id": call["id"], "name": call["function"]["name"], "arguments": ""})
            read["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
    return read


def test_the_connection_is_checked_and_the_models_are_listed(server: ServerProcess) -> None:
    listed = httpx.get(f"{server.url}/v1/models", headers=USER_HEADERS)
    assert listed.status_code == 200
    assert "error" not in listed.json()
    (model,) = listed.json()["data"]
    assert model.get("id") == "demo"
    assert model.get("name", model["id"]) is not None  # a null is taken for a name
    assert "status" not in model  # a state of llama.cpp's router; without, the model counts as loaded
    for headers in ({"Content-Type": "application/json"}, {**HEADERS, "Authorization": "Bearer open"}):
        refused = httpx.get(f"{server.url}/v1/models", headers=headers)
        assert refused.status_code == 401
        assert "key" in refused.json()["error"]["message"]


def test_a_chat_goes_on_over_turns(server: ServerProcess) -> None:
    messages = [
        {"role": "system", "content": "You are a home."},
        {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
    ]
    for _ in range(2):
        body = {"stream": True, "model": "demo", "messages": messages, "stream_options": {"include_usage": True}}
        read = read_stream(post(server.url, body, USER_HEADERS))
        assert read["content"]
        assert read["reason"] == "stop"
        assert read["usage"]["total_tokens"] == read["usage"]["prompt_tokens"] + read["usage"]["completion_tokens"]
        messages += [{"role": "assistant", "content": read["content"]}, {"role": "user", "content": "and the hall"}]
    assert read["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    whole = post(server.url, {"stream": False, "model": "demo", "messages": [{"role": "user", "content": QUESTION}]})
    assert whole.json()["choices"][0]["message"]["content"] == ANSWER


def test_continue_goes_on_with_the_answer(server: ServerProcess) -> None:
    """Its button sends the conversation with what there is of the answer, and appends what comes."""
    body: dict[str, Any] = {"stream": True, "model": "demo", "messages": [{"role": "user", "content": QUESTION}]}
    started = read_stream(post(server.url, body | {"max_tokens": 3}))
    assert started["reason"] == "length"
    body["messages"].append({"role": "assistant", "content": started["content"]})
    rest = read_stream(post(server.url, body))
    assert started["content"] + rest["content"] == ANSWER
    assert rest["reason"] == "stop"


# What is asked of a model beside the chat; each request has one message that holds a template with the chat.
TASKS: dict[str, dict[str, Any]] = {
    "title": {"max_tokens": 1000}, "follow_up": {}, "tags": {}, "image_prompt": {}, "queries": {},
    "autocomplete": {}, "emoji": {"max_tokens": 4}, "moa": {"stream": False},
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_tasks_beside_the_chat_are_answered_whole(server: ServerProcess, task: str) -> None:
    history = f"<chat_history>\nUSER: {QUESTION}\n</chat_history>"
    prompt = f"### Task:\nGenerate a {task}.\n### Output:\nJSON format: {{}}\n{history}"
    body = {"model": "demo", "messages": [{"role": "user", "content": prompt}], "stream": False, **TASKS[task]}
    answer = post(server.url, body)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert isinstance(choice["message"]["content"], str)


# Every field of its form for parameters, at the ends of its ranges or as typed.
LOWEST: dict[str, Any] = {
    "seed": 0, "stop": ["}", ""], "temperature": 0, "reasoning_effort": "low", "logit_bias": {"5": -100},
    "max_tokens": -2, "top_k": 0, "top_p": 0, "min_p": 0, "frequency_penalty": -2, "presence_penalty": -2,
    "mirostat": 0, "mirostat_eta": 0, "mirostat_tau": 0, "repeat_last_n": -1, "tfs_z": 0,
    "repeat_penalty": -2, "use_mmap": True, "use_mlock": False, "think": True, "format": "json", "keep_alive": "5m",
    "num_keep": -1,
    "num_ctx": -1, "num_batch": 256, "num_thread": 1, "num_gpu": 0,
}  # fmt: skip
HIGHEST: dict[str, Any] = {
    "seed": 2**63, "stop": ["\\n"], "temperature": 2, "reasoning_effort": "high", "logit_bias": {"5": 100},
    "max_tokens": 131072, "top_k": 39.5, "top_p": 1, "min_p": 1, "frequency_penalty": 2, "presence_penalty": 2,
    "response_format": {"type": "text"},
}  # fmt: skip


@pytest.mark.parametrize("params", [LOWEST, HIGHEST])
@pytest.mark.parametrize("stream", [True, False])
def test_every_parameter_of_its_form_is_taken(server: ServerProcess, params: dict[str, Any], stream: bool) -> None:
    body = {"stream": stream, "model": "demo", "messages": [{"role": "user", "content": QUESTION}], **params}
    answer = post(server.url, body)
    assert answer.status_code == 200, answer.text
    if stream:
        assert read_stream(answer)["reason"]


def test_what_it_keeps_to_itself_is_ignored(server: ServerProcess) -> None:
    """Fields that its own API takes beside OpenAI's, which filters, pipelines and older versions pass on."""
    extra = {
        "chat_id": "c", "id": "m", "session_id": "s", "metadata": {"task": "x", "variables": {}},
        "files": [{"type": "file"}], "features": {"web_search": False}, "variables": {"{{USER_NAME}}": "Ann"},
        "tool_ids": ["t"], "filter_ids": [], "background_tasks": {"title_generation": True},
        "user": {"name": "Ann", "role": "user"}, "params": {}, "options": {}, "add_generation_prompt": True,
        "model_item": {"id": "demo"},
    }  # fmt: skip
    body = {"stream": True, "model": "demo", "messages": [{"role": "user", "content": QUESTION}], **extra}
    assert read_stream(post(server.url, body))["content"] == ANSWER
    (line,) = [line for line in server.log if "ignored" in line and "'background_tasks'" in line]
    assert all(repr(name) in line for name in extra)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("light " * 3000, "tokens, the context 2048"),
        ([{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,iV"}}],
         "only parts {'type': 'text'"),
    ],
)  # fmt: skip
def test_errors_are_told_as_it_shows_them(server: ServerProcess, content: Any, told: str) -> None:
    """It shows the JSON of an answer of 400 or more that is no event stream. Images are refused: no model sees any."""
    body = {"stream": True, "model": "demo", "messages": [{"role": "user", "content": content}]}
    answer = post(server.url, body)
    assert answer.status_code == 400
    assert "text/event-stream" not in answer.headers["Content-Type"]
    assert told in answer.json()["error"]["message"]


def noted(messages: Sequence[Any], tools: list[str]) -> str:
    if messages[-1]["role"] == "tool":
        return f"There are {messages[-1]['content']}."
    return f"Let me look.\n{call_text(tools[0], query='milk')}\n{call_text(tools[1], room='hall')}"


def test_tools_are_called_and_their_results_go_back(tmp_path: Path) -> None:
    path = Path(write_model(tmp_path / "scripted.gguf", context_length=8192))
    with serving_script(path, noted, context=8192) as (url, _):
        messages: list[Any] = [
            {"role": "system", "content": "Use tools."},
            {"role": "user", "content": "what do I need?"},
        ]
        body = {"stream": True, "model": "scripted", "messages": messages, "tools": TOOLS}
        read = read_stream(post(url, body))
        assert read["content"].strip() == "Let me look."
        assert read["reason"] == "tool_calls"
        assert [(call["name"], json.loads(call["arguments"])) for call in read["calls"]] == [
            ("search_notes", {"query": "milk"}),
            ("set_level", {"room": "hall"}),
        ]
        assert len({call["id"] for call in read["calls"]}) == 2
        calls = [
            {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
            for call in read["calls"]
        ]
        messages += [
            {"role": "assistant", "content": "Let me look.", "tool_calls": calls, "reasoning_content": "Hm."},
            {"role": "tool", "tool_call_id": calls[0]["id"], "content": "2 notes"},
            {"role": "tool", "tool_call_id": calls[1]["id"], "content": ""},
        ]
        assert read_stream(post(url, body))["content"] == "There are ."
        messages[-3]["content"] = ""
        messages[-2:] = [messages[-1], messages[-2]]
        assert read_stream(post(url, body))["content"] == "There are 2 notes."


def test_an_answer_that_is_to_go_on_is_accepted(server: ServerProcess) -> None:
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": '{"action":"on"'}]
    body = {"stream": True, "model": "demo", "messages": messages}
    assert read_stream(post(server.url, body))["reason"] in ("stop", "length")
