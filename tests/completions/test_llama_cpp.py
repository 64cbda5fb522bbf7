"""One script of the common subset, run with llama-cpp-python's Llama and SmallThinker: same keys, same greedy text.

The other engine runs in a Python of its own: LLAMA_PYTHON names it, or .venv-llama of `make bench`; skipped without.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from smallthinker_edge import SmallThinker

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("LLAMA_PYTHON", ROOT / ".venv-llama/bin/python"))

# Runs in both Pythons, so it is text: `llm` is a Llama or a SmallThinker.
SCRIPT = """\
def script(llm):
    chat = [{"role": "user", "content": "turn on the kitchen light"}]
    said = {}
    said["chat"] = llm.create_chat_completion(messages=chat, max_tokens=40, temperature=0.0)
    said["more"] = llm.create_chat_completion(
        chat, temperature=0.0, top_p=0.9, top_k=20, min_p=0.05, seed=3, stop=["room"], presence_penalty=0.0,
        frequency_penalty=0.0, max_tokens=None, tools=None, tool_choice=None, logit_bias=None, response_format=None,
    )
    chunks = list(llm.create_chat_completion(messages=chat, stream=True, temperature=0.0, max_tokens=40))
    said["first_chunk"], said["last_chunk"] = chunks[0], chunks[-1]
    said["streamed"] = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    said["text"] = llm("turn on", max_tokens=6, temperature=0.0, echo=True, stop=None)
    said["completion"] = llm.create_completion("turn on", max_tokens=6, temperature=0.0, seed=1, top_p=1.0)
    said["default"] = llm.create_completion("turn on", temperature=0.0)
    pieces = list(llm.create_completion(prompt="turn on", max_tokens=6, temperature=0.0, stream=True))
    said["pieces"] = "".join(piece["choices"][0]["text"] for piece in pieces)
    said["piece"] = pieces[0]
    return said
"""
THEIRS = """
import json, sys
from llama_cpp import Llama
print(json.dumps(script(Llama(model_path=sys.argv[1], n_ctx=512, verbose=False))))
"""


@pytest.fixture(scope="module")
def theirs(demo_model: Path) -> dict[str, Any]:
    if not PYTHON.is_file() or subprocess.run([PYTHON, "-c", "import llama_cpp"], capture_output=True).returncode:
        pytest.skip("llama-cpp-python is not there: LLAMA_PYTHON names a Python that has it")
    done = subprocess.run(
        [PYTHON, "-c", SCRIPT + THEIRS, demo_model], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


@pytest.fixture(scope="module")
def ours(demo_model: Path) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(SCRIPT, names)  # noqa: S102
    with SmallThinker(demo_model, context=512) as model:
        said: dict[str, Any] = json.loads(json.dumps(names["script"](model)))
    return said


def shape(value: Any) -> Any:
    """Keys and kinds of values."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    return [shape(item) for item in value] if isinstance(value, list) else type(value).__name__


def covers(mine: Any, other: Any) -> bool:
    """Whether a shape has all that the other has; more is fine."""
    if isinstance(other, dict):
        return isinstance(mine, dict) and all(key in mine and covers(mine[key], item) for key, item in other.items())
    if isinstance(other, list):
        return isinstance(mine, list) and len(mine) == len(other) and all(map(covers, mine, other))
    return bool(mine == other)


def test_the_script_gives_the_same_texts(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name in ("streamed", "pieces"):
        assert ours[name] == theirs[name]
    for name in ("chat", "more", "text", "completion", "default"):
        for field in ("text", "message", "finish_reason", "index"):
            mine, other = ours[name]["choices"][0], theirs[name]["choices"][0]
            assert mine.get(field) == other.get(field), (name, field)
        # Its ChatML begins with an empty system message, which the model's own template does not have.
        counts = ["completion_tokens"] + ["prompt_tokens", "total_tokens"] * (name not in ("chat", "more"))
        assert [ours[name]["usage"][c] for c in counts] == [theirs[name]["usage"][c] for c in counts], name


def test_the_answers_have_the_same_shapes(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name in ("chat", "text", "completion", "first_chunk", "last_chunk", "piece"):
        assert covers(shape(ours[name]), shape(theirs[name])), (name, shape(ours[name]), shape(theirs[name]))
        assert ours[name]["object"] == theirs[name]["object"]
