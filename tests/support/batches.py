"""Inputs and runs of `map` for tests: lines, a task, processes that are watched and killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from interruptible import heed_interrupts

SENTENCES = [
    "turn on the kitchen light",
    "dim the bedroom lamp to thirty percent",
    "close the kitchen blinds",
    "put milk on the shopping list",
    "what is the temperature in the bathroom",
]


def write_batch(folder: Path, count: int) -> tuple[Path, Path]:
    """(a task, an input of so many lines) for the demo model, which answers each with JSON."""
    task, source = folder / "task.txt", folder / "in.jsonl"
    task.write_text("{sentence}\n", encoding="utf-8")
    lines = [{"id": f"s{i}", "sentence": f"{SENTENCES[i % 5]}{' please' * (i // 5 % 3)}"} for i in range(count)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return task, source


def start_map(*arguments: object, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "smallthinker_edge", "map", *map(str, arguments)]
    pipe, whole = subprocess.PIPE, {**os.environ, **(env or {})}
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=whole, preexec_fn=heed_interrupts)


def run_map(*arguments: object, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a run in a process of its own."""
    process = start_map(*arguments, env=env)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for_answers(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Until a file of answers has so many, or the process has ended."""
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.01)


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that a run has started to compute."""
    return [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]


def answers(path: Path) -> list[dict[str, Any]]:
    """The records of a file of answers, without what depends on the run: tokens that were found in a cache."""
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    for record in records:
        record.get("usage", {}).pop("prompt_tokens_details", None)
    return records
