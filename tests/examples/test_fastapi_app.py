"""The FastAPI example: what it answers, and that who leaves ends the computation."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf_files
import pytest

pytest.importorskip("fastapi", reason="FastAPI is not installed")
from fastapi.testclient import TestClient

PATH = Path(__file__).resolve().parents[2] / "examples" / "fastapi_app.py"
TOKENS = 2000


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.delenv("SMALLTHINKER_MODEL", raising=False)
    spec = importlib.util.spec_from_file_location("fastapi_app", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fastapi_app", module)
    spec.loader.exec_module(module)
    return module


def test_sentences_become_commands(example: ModuleType) -> None:
    with TestClient(example.app) as client:
        answer = client.post("/commands", json={"sentence": "turn on the kitchen light"})
        assert answer.json() == {"commands": {"action": "on", "device": "light", "area": "kitchen"}}
        text = client.post("/stream", json={"sentence": "turn on the kitchen light"}).text
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert json.loads(said) == answer.json()["commands"]
        assert text.endswith("data: [DONE]\n\n")
        assert client.post("/commands", json={"sentence": "x", "max_tokens": 0}).status_code == 422
        for path in ("/commands", "/stream"):
            assert client.post(path, json={"sentence": "light " * 1500}).status_code == 413
        assert client.post("/commands", json={"sentence": "turn on", "max_tokens": 1}).status_code == 502
    assert not example.app.state.model.is_open, "closed with the application"


@pytest.mark.parametrize("path", ["/commands", "/stream"])
def test_who_leaves_ends_the_computation(
    example: ModuleType, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gguf_files.write_model(tmp_path / "model.gguf", context_length=2 * TOKENS + 100)
    monkeypatch.setenv("SMALLTHINKER_MODEL", str(model))

    async def leave() -> int:
        async with example.lifespan(example.app):
            example.app.state.model.create_completion("a", max_tokens=1)
            started, gone = asyncio.Event(), asyncio.Event()
            body = json.dumps({"sentence": "a", "max_tokens": TOKENS}).encode()
            requests = iter([{"type": "http.request", "body": body, "more_body": False}])

            async def receive() -> dict[str, Any]:
                if (request := next(requests, None)) is not None:
                    return request
                if path == "/stream":
                    await started.wait()
                gone.set()
                return {"type": "http.disconnect"}

            async def send(message: dict[str, Any]) -> None:
                if message.get("body"):
                    started.set()

            scope = {
                "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
                "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "scheme": "http",
                "headers": [(b"content-type", b"application/json")], "app": example.app,
            }  # fmt: skip
            await asyncio.wait_for(example.app(scope, receive, send), 60)
            assert gone.is_set()
            return int(example.app.state.model.stats()["generated_tokens"])

    assert asyncio.run(leave()) < TOKENS
