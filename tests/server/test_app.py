"""The server's routes in this process: what is refused, how errors look, what is ignored, clipped and filled in."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.testclient import TestClient

from smallthinker_edge import ExpertReadError, SmallThinker
from smallthinker_edge.generation.choice import Choice
from smallthinker_edge.server.app import content_policy, make_app
from smallthinker_edge.server.body import BodyReader
from smallthinker_edge.server.errors import RequestError
from smallthinker_edge.server.settings import Settings

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "turn on the kitchen light"}]
ANSWER = '{"action":"on","device":"light","area":"kitchen"}'


@pytest.fixture(scope="module")
def model(demo_model: Path) -> Iterator[SmallThinker]:
    with SmallThinker(demo_model) as model:
        yield model


def client_of(model: SmallThinker, **settings: Any) -> TestClient:
    return TestClient(make_app(model, Settings(**settings)), base_url="http://localhost:8080")


@pytest.fixture(scope="module")
def client(model: SmallThinker) -> TestClient:
    return client_of(model)


def events(text: str) -> list[Any]:
    """The events of a stream; comments are left out."""
    found = [event.removeprefix("data: ") for event in text.split("\n\n") if event.startswith("data: ")]
    assert found.pop() == "[DONE]"
    return [json.loads(event) for event in found]


def test_chats_are_those_of_the_library(client: TestClient, model: SmallThinker) -> None:
    body = {"messages": MESSAGES, "model": "any", "logprobs": True, "top_logprobs": 2}
    answer = client.post(CHAT, json=body)
    assert answer.status_code == 200
    expected = model.create_chat_completion(MESSAGES, logprobs=True, top_logprobs=2)
    assert answer.json()["choices"] == json.loads(json.dumps(expected["choices"]))
    assert answer.json()["model"] == "any"
    chunks = events(client.post(CHAT, json={**body, "stream": True, "stream_options": {"include_usage": True}}).text)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == ANSWER
    assert chunks[-1]["usage"]["completion_tokens"] == answer.json()["usage"]["completion_tokens"]


def test_completions_are_those_of_the_library(client: TestClient, model: SmallThinker) -> None:
    answer = client.post("/v1/completions", json={"prompt": "turn on", "max_tokens": 5, "echo": True, "logprobs": 1})
    expected = model.create_completion("turn on", max_tokens=5, echo=True, logprobs=1)
    assert answer.json()["choices"] == json.loads(json.dumps(expected["choices"]))
    chunks = events(client.post("/v1/completions", json={"prompt": "turn on", "max_tokens": 5, "stream": True}).text)
    assert "turn on" + "".join(c["choices"][0]["text"] for c in chunks) == expected["choices"][0]["text"]


def test_null_is_the_default(client: TestClient) -> None:
    nothing = dict.fromkeys(
        ["max_tokens", "temperature", "tools", "response_format", "stream", "stop", "seed", "n", "user"]
    )
    answer = client.post(CHAT, json={"messages": MESSAGES, **nothing})
    assert answer.json()["choices"][0]["message"]["content"] == ANSWER


def test_unknown_arguments_are_ignored_with_a_log_line(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "smallthinker_edge.server")
    answer = client.post(CHAT, json={"messages": MESSAGES, "frobnicate": 1, "on_text": "x", "cancel": 3, "sampler": 4})
    assert answer.json()["choices"][0]["message"]["content"] == ANSWER
    assert "'cancel', 'frobnicate', 'on_text', 'sampler'" in caplog.text


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        ({"max_tokens": -1}, {}), ({"max_tokens": -2}, {}), ({"max_tokens": 3.0}, {"max_tokens": 3}),
        ({"temperature": 1, "top_p": 0, "seed": 4}, {}), ({"temperature": 1, "top_k": 1.5, "seed": 4}, {}),
        ({"stop": "", "max_tokens": 9}, {"max_tokens": 9}), ({"stop": ['"on"', ""]}, {"stop": '"on"'}),
    ],
)  # fmt: skip
def test_what_people_may_choose_in_clients_is_taken(
    client: TestClient, sent: dict[str, Any], meant: dict[str, Any]
) -> None:
    answer, expected = (client.post(CHAT, json={"messages": MESSAGES, **body}) for body in (sent, meant))
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"] == expected.json()["choices"]


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (b"{bad", 400, "not JSON"), (b"", 400, "not JSON"), (b"[1]", 400, "object"), (b"\xff\xfe", 400, "not JSON"),
        (b"[" * 100000, 400, "not JSON"), ({}, 400, "messages"), ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": 3}]}, 400, "role"), ({"messages": "hello"}, 400, "messages"),
        ({"messages": MESSAGES, "temperature": -1}, 400, "temperature"),
        ({"messages": MESSAGES, "temperature": "hot"}, 400, "temperature"),
        ({"messages": MESSAGES, "stream": "yes"}, 400, "stream"),
        ({"messages": MESSAGES, "stream": True, "n": 99}, 400, "n must"),
        ({"messages": MESSAGES, "tools": [{}]}, 400, "tool"),
        ({"messages": MESSAGES, "response_format": {"type": "json_schema", "json_schema": {}}}, 400, "schema"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400, "temperature"),
    ],
)  # fmt: skip
def test_errors_have_openais_shape(client: TestClient, body: Any, status: int, told: str) -> None:
    sent = {"content": body} if isinstance(body, bytes) else {"json": body}
    answer = client.post(CHAT, **sent)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert told in error["message"]


def test_a_prompt_that_is_too_long_says_so(client: TestClient) -> None:
    answer = client.post(CHAT, json={"messages": [{"role": "user", "content": "light " * 3000}]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_other_paths_and_methods(client: TestClient) -> None:
    assert client.get("/nope").json()["error"]["type"] == "not_found_error"
    assert client.get(CHAT).status_code == 405
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/v1/models/demo").json() == client.get("/v1/models").json()["data"][0]
    assert client.get("/v1/models").json()["data"][0]["id"] == "demo"


@pytest.mark.parametrize("told", [True, False])
def test_a_huge_body_is_refused(model: SmallThinker, told: bool) -> None:
    client = client_of(model, most_body=1000)
    big = b'{"messages": [{"role": "user", "content": "' + b"x" * 2000 + b'"}]}'
    parts: Any = big if told else iter([big[:500], big[500:]])  # an iterator has no Content-Length
    assert client.post(CHAT, content=parts).status_code == 413
    assert client.post(CHAT, json={"messages": MESSAGES}).status_code == 200


def test_bodies_of_all_clients_together_are_bounded(model: SmallThinker) -> None:
    """What was read and refused or answered no longer counts: the same bodies may come again and again."""
    client = client_of(model, most_body=1000)
    for size in (900, 2000, 9000):
        for _ in range(10):
            assert client.post(CHAT, content=b"x" * size).status_code == (400 if size < 1000 else 413)
    reader = BodyReader(Settings(most_body=1000))

    async def main() -> None:
        async def one() -> int:
            parts = iter([b"x" * 900, b""])

            async def receive() -> dict[str, Any]:
                part = next(parts)
                if not part:
                    await asyncio.sleep(0.05)  # the others come meanwhile
                return {"type": "http.request", "body": part, "more_body": bool(part)}

            try:
                await reader.read_object(Request({"type": "http", "headers": []}, receive))
            except RequestError as error:
                return error.status
            return 200

        assert sorted(await asyncio.gather(*(one() for _ in range(7)))) == [400] * 4 + [503] * 3
        assert await one() == 400

    asyncio.run(main())


def test_a_key_is_asked_for(model: SmallThinker) -> None:
    client = client_of(model, api_key="sesame")
    for sent in ("", "Bearer wrong", "sesame", "Basic sesame", "Bearer sésame".encode()):
        headers: Any = {"Authorization": sent} if sent else {}
        for path in ("/v1/models", "/metrics", "/v1/models/demo", "/nope"):
            answer = client.get(path, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert client.post(CHAT, json={"messages": MESSAGES}, headers=headers).status_code == 401
    right = {"Authorization": "Bearer sesame"}
    assert client.post(CHAT, json={"messages": MESSAGES}, headers=right).status_code == 200
    assert client.get("/healthz").status_code == client.get("/").status_code == 200


def test_the_key_is_compared_in_constant_time(model: SmallThinker, monkeypatch: pytest.MonkeyPatch) -> None:
    from smallthinker_edge.server import guard

    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr(guard.hmac, "compare_digest", compare)
    client = client_of(model, api_key="sesame")
    for token in ("", "s", "sesame", "x" * 1000):
        client.get("/v1/models", headers={"Authorization": f"Bearer {token}"})
    assert {len(value) for pair in compared for value in pair} == {32}
    assert len(compared) == 4


def test_other_names_and_origins_are_refused(model: SmallThinker) -> None:
    client = client_of(model)
    for host in ("evil.example", "localhost.evil.example", "localhost@evil.example", "", "[::1].evil"):
        assert client.get("/v1/models", headers={"Host": host}).status_code == 403, host
    for host in ("localhost", "127.0.0.1:8080", "[::1]:8080", "[::1]"):
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200, host
    for origin in ("http://evil.example", "null", "http://localhost:9999"):
        assert client.post(CHAT, json={"messages": MESSAGES}, headers={"Origin": origin}).status_code == 403
    assert client.get("/v1/models", headers={"Origin": "http://localhost:8080"}).status_code == 200
    anyone = client_of(model, hosts=("*",))
    assert anyone.get("/v1/models", headers={"Host": "board.local"}).status_code == 200
    assert anyone.get("/v1/models", headers={"Host": "board.local", "Origin": "http://evil.example"}).status_code == 403


def test_lengths_are_clipped_and_defaults_filled_in(model: SmallThinker) -> None:
    client = client_of(model, most_tokens=3, defaults={"stop": ["on"], "max_tokens": 2})
    body: dict[str, Any] = {"messages": MESSAGES}
    assert client.post(CHAT, json=body).json()["usage"]["completion_tokens"] == 2
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.post(CHAT, json={**body, name: 10**30, "stop": ["never"]}).json()
        assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (3, "length")
    assert client.post(CHAT, json={**body, "seed": -1, "temperature": 1}).status_code == 200
    assert client.post("/v1/completions", json={"prompt": "x"}).json()["usage"]["completion_tokens"] <= 2
    cap = client_of(model, most_tokens=3)
    assert cap.post(CHAT, json=body).json()["usage"]["completion_tokens"] == 3
    assert cap.post("/v1/completions", json={"prompt": "x"}).json()["usage"]["completion_tokens"] <= 3


def test_names_that_are_no_text_break_nothing(client: TestClient) -> None:
    lone = b'{"messages": [{"role": "user", "content": "turn on the kitchen light"}], "model": "\\ud800", "stream": %s}'
    chunks = events(client.post(CHAT, content=lone % b"true").text)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == ANSWER
    assert client.post(CHAT, content=lone % b"false").status_code == 400


def test_calls_of_tools_in_a_stream(client: TestClient) -> None:
    pytest.importorskip("llguidance")
    tool = {"name": "light", "parameters": {"type": "object", "properties": {"room": {"enum": ["hall", "kitchen"]}},
                                            "required": ["room"], "additionalProperties": False}}  # fmt: skip
    body = {"messages": MESSAGES, "tools": [{"type": "function", "function": tool}], "tool_choice": "required",
            "temperature": 1, "seed": 1, "max_tokens": 60, "stream": True}  # fmt: skip
    chunks = events(client.post(CHAT, json=body).text)
    calls = [call for c in chunks for call in c["choices"][0]["delta"].get("tool_calls", [])]
    assert json.loads(calls[0]["function"]["arguments"])["room"] in ("hall", "kitchen")


def test_what_nobody_foresaw_is_not_told_to_strangers(
    model: SmallThinker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*args: Any, **kwargs: Any) -> None:
        raise KeyError("secret")

    monkeypatch.setattr(model, "acreate_chat_completion", broken)
    answer = client_of(model).post(CHAT, json={"messages": MESSAGES})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "secret" in caplog.text


def test_an_error_in_a_stream_is_an_event(model: SmallThinker, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object, logits: object, history: object, **_: object) -> int:
        raise ExpertReadError("storage is gone")

    monkeypatch.setattr(Choice, "choose", broken)
    lines = client_of(model).post(CHAT, json={"messages": MESSAGES, "stream": True}).text.split("\n\n")
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["message"] == "storage is gone"
    assert client_of(model).post(CHAT, json={"messages": MESSAGES}).status_code == 503


def test_metrics_count(model: SmallThinker) -> None:
    client = client_of(model, most_pending=7)
    client.post(CHAT, json={"messages": MESSAGES})
    client.post(CHAT, content=b"{")
    text = client.get("/metrics").text
    assert 'smallthinker_requests_total{route="/v1/chat/completions",status="200"} 1\n' in text
    assert 'smallthinker_requests_total{route="/v1/chat/completions",status="400"} 1\n' in text
    assert "smallthinker_most_pending_requests 7\n" in text
    assert f"smallthinker_generated_tokens_total {model.stats()['generated_tokens']}\n" in text
    for line in text.splitlines():
        assert line.startswith(("# HELP smallthinker_", "# TYPE smallthinker_", "smallthinker_"))


def test_health_tells_whether_the_model_is_there(tiny_model: Path) -> None:
    model = SmallThinker(tiny_model)
    client = client_of(model)
    assert client.get("/healthz").json() == {"status": "ok"}
    model.close()
    assert client.get("/healthz").status_code == 503


def test_the_page_runs_only_what_stands_in_it(client: TestClient) -> None:
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert policy == content_policy(page.text)
    assert "'unsafe" not in policy
    assert policy.count("sha256-") == 2
    assert "innerHTML" not in page.text
    assert "http" not in page.text.replace("http-equiv", "")  # nothing is fetched from elsewhere
