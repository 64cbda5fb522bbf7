"""Clients that come, stall, flood, send broken requests and leave, all at once: nobody's answer is lost.

LOAD_CLIENTS and LOAD_ROUNDS make it longer: `make test-load`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from pathlib import Path
from typing import Any

import httpx
from server_process import eventually, serving

CLIENTS = int(os.environ.get("LOAD_CLIENTS", "15"))
ROUNDS = int(os.environ.get("LOAD_ROUNDS", "2"))
BUDGET = 192 << 20
CHAT = "/v1/chat/completions"
QUESTIONS = {
    "turn on the kitchen light": '{"action":"on","device":"light","area":"kitchen"}',
    "turn off the bedroom light": '{"action":"off","device":"light","area":"bedroom"}',
}


def body(question: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], **more}


async def ask(client: httpx.AsyncClient, rng: random.Random) -> None:
    """Comes again where too many are there, and gets the right answer in the end."""
    question = rng.choice(list(QUESTIONS))
    while True:
        answer = await client.post(CHAT, json=body(question))
        if answer.status_code not in (429, 503):
            break
        await asyncio.sleep(rng.uniform(0.05, 0.3))
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == QUESTIONS[question]


async def stream(client: httpx.AsyncClient, rng: random.Random) -> None:
    question = rng.choice(list(QUESTIONS))
    async with client.stream("POST", CHAT, json=body(question, stream=True)) as answer:
        if answer.status_code in (429, 503):
            return
        events = [line.removeprefix("data: ") async for line in answer.aiter_lines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(deltas) == QUESTIONS[question]


async def flood(client: httpx.AsyncClient, rng: random.Random) -> None:
    """More at once than there is room for; with very many connections some are closed at the door."""
    posts = (client.post(CHAT, json=body("turn on the kitchen light")) for _ in range(12))
    for answer in await asyncio.gather(*posts, return_exceptions=True):
        if not isinstance(answer, httpx.NetworkError):
            assert isinstance(answer, httpx.Response), answer
            assert answer.status_code in (200, 429, 503)


async def broken(client: httpx.AsyncClient, rng: random.Random) -> None:
    for content in (b"{", b"[" * 50000, b"\x00" * 100, b'{"messages": 3}', os.urandom(500)):
        assert (await client.post(CHAT, content=content)).status_code in (400, 429, 503)
    with contextlib.suppress(httpx.NetworkError):  # one that is sent away unread may find the connection closed
        assert (await client.post(CHAT, content=b"x" * (5 << 20))).status_code in (413, 503)


async def leave(client: httpx.AsyncClient, rng: random.Random) -> None:
    more = {"max_tokens": 1500, "logit_bias": {"1023": -100}, "stream": rng.random() < 0.5, "temperature": 1.0}
    task = asyncio.create_task(client.post(CHAT, json=body("turn on", **more)))
    await asyncio.sleep(rng.uniform(0, 0.5))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def stall(client: httpx.AsyncClient, rng: random.Random) -> None:
    """Half a request, or an answer that nobody reads."""
    _reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port, limit=1024)
    content = json.dumps(body("turn on", stream=True, max_tokens=300, logit_bias={"1023": -100})).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    writer.write(head + (content if rng.random() < 0.5 else content[:20]))
    await writer.drain()
    await asyncio.sleep(rng.uniform(0.2, 1.0))
    writer.close()


async def run(url: str) -> None:
    async def one(number: int) -> None:
        rng = random.Random(number)
        kinds = [ask, stream, flood, broken, leave, stall]
        limits = httpx.Limits(max_connections=20)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            for turn in range(ROUNDS):
                await kinds[(number + turn) % len(kinds)](client, rng)
            await ask(client, rng)

    await asyncio.gather(*(one(number) for number in range(CLIENTS)))


def test_many_clients_of_every_kind(demo_model: Path) -> None:
    with serving(demo_model, "--memory", str(BUDGET), "--queue", "8", "--keep-sessions", "4") as server:
        asyncio.run(run(server.url))
        eventually(lambda: server.pending() == 0)
        assert server.metrics()["memory_peak_bytes"] <= BUDGET
        assert not any("Traceback" in line for line in server.log), "".join(server.log)
