"""The plugin for `llm`, with the real package: models, options, schemas, conversations, coroutines, the command."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

llm = pytest.importorskip("llm", reason="llm is not installed")

PLUGIN = Path(__file__).resolve().parents[2] / "examples" / "llm_plugin"
SENTENCE, ANSWER = "turn on the kitchen light", {"action": "on", "device": "light", "area": "kitchen"}


@pytest.fixture(scope="module")
def folder(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copy(demo_model, folder / "demo.gguf")
    (folder / "notes.txt").write_text("no model", encoding="utf-8")
    return folder


@pytest.fixture
def plugin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The plugin, registered as its entry point would be."""
    monkeypatch.syspath_prepend(str(PLUGIN))
    monkeypatch.setenv("SMALLTHINKER_MODELS", str(folder))
    monkeypatch.delenv("SMALLTHINKER_MEMORY", raising=False)
    from llm.plugins import pm

    module = import_module("llm_smallthinker")
    pm.register(module, "smallthinker")
    yield module
    pm.unregister(module)


def test_a_model_answers_and_tells_what_it_used(plugin: Any) -> None:
    assert [model.model_id for model in llm.get_models() if "smallthinker" in model.model_id] == ["smallthinker/demo"]
    response = llm.get_model("smallthinker/demo").prompt(SENTENCE)
    assert json.loads(response.text()) == ANSWER
    assert response.usage().output > 5
    assert response.usage().input > 5


def test_options_are_those_of_a_generation(plugin: Any) -> None:
    model = llm.get_model("smallthinker/demo")
    assert model.prompt(SENTENCE, max_tokens=1).text() == '{"'
    assert set(model.Options.model_fields) >= {"temperature", "top_p", "seed", "stop", "logit_bias"}
    with pytest.raises(ValueError, match="temperature"):
        model.prompt(SENTENCE, temperature=-1).text()


def test_a_schema_binds_the_answer(plugin: Any) -> None:
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    schema = {"type": "object", "properties": {"mood": {"enum": ["glad", "sad"]}}, "required": ["mood"]}
    response = llm.get_model("smallthinker/demo").prompt(SENTENCE, schema=schema)
    assert json.loads(response.text())["mood"] in ("glad", "sad")


def test_a_conversation_has_its_past(plugin: Any) -> None:
    conversation = llm.get_model("smallthinker/demo").conversation()
    first = conversation.prompt(SENTENCE, system="Answer with JSON.").text()
    second = conversation.prompt("and the lamp")
    request = llm.get_model("smallthinker/demo").request(second.prompt)
    assert request["messages"] == [
        {"role": "system", "content": "Answer with JSON."},
        {"role": "user", "content": SENTENCE},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "and the lamp"},
    ]
    assert second.text()


def test_coroutines_get_the_same_answer(plugin: Any) -> None:
    async def ask() -> str:
        return "".join([piece async for piece in llm.get_async_model("smallthinker/demo").prompt(SENTENCE)])

    assert json.loads(asyncio.run(ask())) == ANSWER


def test_the_command_finds_it_by_its_entry_point(folder: Path, tmp_path: Path) -> None:
    """As installed: the entry point of pyproject.toml, in the metadata that an installer would write."""
    [group] = re.findall(
        r"^\[project\.entry-points\.llm\]\n((?:.+\n)+)", (PLUGIN / "pyproject.toml").read_text("utf-8"), re.M
    )
    metadata = tmp_path / "site" / "llm_smallthinker-0.1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: llm-smallthinker\nVersion: 0.1\n", encoding="utf-8"
    )
    (metadata / "entry_points.txt").write_text("[llm]\n" + group.replace('"', ""), encoding="utf-8")
    paths = os.pathsep.join([str(tmp_path / "site"), str(PLUGIN), os.getcwd()])
    env = {**os.environ, "PYTHONPATH": paths, "LLM_USER_PATH": str(tmp_path), "SMALLTHINKER_MODELS": str(folder)}
    command = [sys.executable, "-m", "llm", "-m", "smallthinker/demo", SENTENCE, "-o", "max_tokens", "50"]
    # llm puts what it finds on its standard input before the prompt.
    done = subprocess.run(command, env=env, input="", capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ANSWER
