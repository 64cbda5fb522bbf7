"""A real server process: the openai client, clients that leave, a full queue, a slow client."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from gguf_files import write_model
from server_process import ServerProcess, eventually, serving

MESSAGES: Any = [{"role": "user", "content": "turn on the kitchen light"}]
ANSWER = '{"action":"on","device":"light","area":"kitchen"}'
# Some milliseconds a token, so that an answer of thousands is never done by itself while a test runs.
SLOW: dict[str, Any] = {
    "n_layers": 16, "d_model": 512, "n_heads": 8, "n_kv_heads": 2, "head_dim": 64, "n_experts": 8, "n_experts_used": 4,
    "d_ffn": 512, "context_length": 16384,
}  # fmt: skip
# Without the tiny vocabulary's two end tokens.
ENDLESS: dict[str, Any] = {
    "prompt": "hello", "max_tokens": 16000, "temperature": 1, "seed": 1, "logit_bias": {"272": -100, "274": -100},
}  # fmt: skip


@pytest.fixture(scope="module")
def server(demo_model: Path) -> Iterator[ServerProcess]:
    with serving(demo_model, "--memory", "1GiB") as server:
        yield server


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    path = write_model(tmp_path_factory.mktemp("slow") / "slow.gguf", **SLOW)
    with serving(path, "--queue", "3", "--context", "16384") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_openais_client_lists_and_chats(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    answer = client.chat.completions.create(model="demo", messages=MESSAGES, logprobs=True, top_logprobs=1)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert "".join(entry.token for entry in answer.choices[0].logprobs.content) == ANSWER
    text = client.completions.create(model="demo", prompt="turn on", max_tokens=3, echo=True)
    assert text.choices[0].text.startswith("turn on")


def test_openais_client_streams(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="demo", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert chunks[-1].usage is not None
    with client.chat.completions.stream(model="demo", messages=MESSAGES) as helper:
        assert helper.get_final_completion().choices[0].message.content == ANSWER


def test_openais_client_calls_tools_and_reads_json(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"room": {"enum": ["hall", "kitchen"]}}, "required": ["room"],
              "additionalProperties": False}  # fmt: skip
    tools: Any = [{"type": "function", "function": {"name": "light", "parameters": schema}}]
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, tools=tools, tool_choice={"type": "function", "function": {"name": "light"}}
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    call: Any = (answer.choices[0].message.tool_calls or [])[0]
    history = [
        *MESSAGES,
        answer.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "done"},
    ]
    assert client.chat.completions.create(model="demo", messages=history, tools=tools).choices
    json_answer = client.chat.completions.create(
        model="demo",
        messages=MESSAGES,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    assert json.loads(json_answer.choices[0].message.content or "")["room"] in ("hall", "kitchen")


def test_openais_client_raises_its_own_errors(client: openai.OpenAI, server: ServerProcess) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="demo", messages=MESSAGES, temperature=-1)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_openais_asynchronous_client(server: ServerProcess) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        stream = await client.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
        assert "".join([c.choices[0].delta.content or "" async for c in stream]) == ANSWER


def test_a_key_from_a_file(demo_model: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sesame\n")
    with serving(demo_model, "--api-key-file", str(tmp_path / "key")) as server:
        right = openai.OpenAI(base_url=f"{server.url}/v1", api_key="sesame", max_retries=0)
        assert right.chat.completions.create(model="demo", messages=MESSAGES).choices[0].message.content == ANSWER
        wrong = openai.OpenAI(base_url=f"{server.url}/v1", api_key="open", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            wrong.chat.completions.create(model="demo", messages=MESSAGES)
        assert not any("sesame" in line for line in server.log)


def test_a_long_system_prompt_survives_a_restart(demo_model: Path, tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "lights and lamps " * 100}, *MESSAGES]
    cached = []
    for _ in range(2):
        with serving(demo_model, "--memory", "1GiB", "--prefix-folder", str(tmp_path / "p")) as server:
            usage = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": messages}, timeout=60).json()[
                "usage"
            ]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert cached[0] == 0
    assert cached[1] > 300


def tokens_made(server: ServerProcess) -> float:
    return server.metrics()["generated_tokens_total"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_answer(slow: ServerProcess, stream: bool) -> None:
    before = tokens_made(slow)
    with httpx.Client(timeout=60) as client:
        if stream:
            with client.stream("POST", f"{slow.url}/v1/completions", json={**ENDLESS, "stream": True}) as answer:
                lines = answer.iter_lines()
                assert next(lines).startswith("data: ")
                assert slow.pending() == 1
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{slow.url}/v1/completions", json=ENDLESS, timeout=httpx.Timeout(60, read=1.0))
    eventually(lambda: slow.pending() == 0)
    assert 0 < tokens_made(slow) - before < ENDLESS["max_tokens"] / 2


def test_a_client_that_leaves_in_a_long_prompt_ends_it(slow: ServerProcess) -> None:
    body = {**ENDLESS, "prompt": [65] * 16000, "max_tokens": 1}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{slow.url}/v1/completions", json=body, timeout=httpx.Timeout(60, read=1.0))
    eventually(lambda: slow.pending() == 0)
    assert slow.metrics()["prompt_seconds_total"] < 60


def test_a_long_prompt_is_commented_on(tmp_path: Path) -> None:
    path = write_model(tmp_path / "slow.gguf", **SLOW)
    with serving(path, "--context", "16384", "--comment-seconds", "0.05") as server:
        body = {"prompt": [65] * 2000, "max_tokens": 2, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as answer:
            lines = [line for line in answer.iter_lines() if line]
    comments = [line for line in lines if line.startswith(":")]
    assert len(comments) > 3
    assert any(line.startswith(": prompt ") and line.endswith("/2000") for line in comments)
    assert lines[-1] == "data: [DONE]"


def test_a_full_queue_says_when_to_come_again(slow: ServerProcess) -> None:
    url = f"{slow.url}/v1/completions"
    with httpx.Client(timeout=60) as client:
        streams = [client.stream("POST", url, json={**ENDLESS, "stream": True}) for _ in range(3)]
        # Requests that wait have no first byte before a comment, so they run in threads of their own.
        entered = [threading.Thread(target=lambda s=s: s.__enter__()) for s in streams]
        for thread in entered:
            thread.start()
        eventually(lambda: slow.pending() == 3)
        answer = client.post(url, json=ENDLESS)
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert client.get(f"{slow.url}/healthz").status_code == 200  # what does not compute is still answered
        for thread in entered:
            thread.join()
    eventually(lambda: slow.pending() == 0)
    assert httpx.post(url, json={**ENDLESS, "max_tokens": 1}, timeout=60).status_code == 200


def test_a_client_that_does_not_read_holds_nobody(slow: ServerProcess) -> None:
    host, port = slow.url.removeprefix("http://").split(":")
    body = json.dumps({**ENDLESS, "max_tokens": 400, "stream": True, "logprobs": 20}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect((host, int(port)))
        stalled.sendall(head + body)  # and never reads: 400 events of some kilobytes do not fit the buffers
        eventually(lambda: slow.pending() == 1)
        answer = httpx.post(f"{slow.url}/v1/completions", json={**ENDLESS, "max_tokens": 1}, timeout=60)
        assert answer.status_code == 200
        eventually(lambda: slow.pending() == 0)


def test_a_body_that_never_ends_holds_nobody(slow: ServerProcess) -> None:
    host, port = slow.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as stalled:
        stalled.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1000\r\n\r\n{{".encode())
        answer = httpx.post(f"{slow.url}/v1/completions", json={**ENDLESS, "max_tokens": 1}, timeout=60)
        assert answer.status_code == 200
        assert slow.pending() == 0


def test_ctrl_c_ends_a_server_that_computes(demo_model: Path, tmp_path: Path) -> None:
    path = write_model(tmp_path / "slow.gguf", **SLOW)
    with serving(path, "--context", "16384") as server:
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json={**ENDLESS, "stream": True}, timeout=60
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.kill(server.process.pid, signal.SIGINT)
            with pytest.raises(httpx.HTTPError):
                list(lines)
        assert server.process.wait(30) in (0, 130, -2)


def test_what_is_missing_is_named(demo_model: Path, tmp_path: Path) -> None:
    from smallthinker_edge.cli import main

    (tmp_path / "empty").write_text("\n")
    assert main(["serve", "-m", str(demo_model), "--api-key-file", str(tmp_path / "empty")]) == 2
    assert main(["serve", "-m", str(tmp_path / "absent.gguf")]) == 1
