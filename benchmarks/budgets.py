"""Speed of a packed model within memory budgets, beside the same model all in memory.

    python benchmarks/budgets.py MODEL.stpk [--budgets 512MiB 1GiB 2GiB] [--context 2048] [--output NAME]

Every budget is a process of its own in a real limit (tools/paging/capped.py) that starts from a cold page cache: a
prompt of 512 random tokens, some to warm up, then --series series of --tokens random ones, decoded one by one. In turns
with it a process that has the whole model in memory decodes as many at the same positions, where both fit, so that both
meet the machine as it is then. A budget that the model does not fit into is left out. Writes NAME.json and its page,
NAME.md. Called by everything.py too.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import psutil
from compare import Worker, machine
from report import budgets_page, save

from smallthinker_edge.files.config import ModelConfig
from smallthinker_edge.files.gguf import GGUFFile
from smallthinker_edge.files.packed import as_model
from smallthinker_edge.machine.cpus import auto_threads
from smallthinker_edge.machine.memory import parse_memory

HERE = Path(__file__).resolve().parent
CAPPED = HERE.parent / "tools" / "paging" / "capped.py"
PROMPT, WARM_UP = 512, 64
ROOM = 3 << 29  # bytes of memory that are left to the system where two processes run

Ids = Callable[[str, int], list[int]]  # of a name and a number: so many random tokens, always the same of a name


@contextmanager
def worker(arguments: argparse.Namespace, memory: str | None = None) -> Iterator[tuple[Worker, Path]]:
    """A process with the model, and the file that has what it wrote to standard error. memory: its budget and its
    limit. Raises SystemExit where it does not open."""
    command = [sys.executable, str(HERE / "worker_smallthinker.py"), arguments.model]
    command += ["--threads", str(arguments.threads), "--context", str(arguments.context)]
    if memory:
        capped = [sys.executable, str(CAPPED), "--memory", memory, "--drop-caches", "--"]
        command = [*capped, *command, "--memory", memory]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as errors:
        try:
            process = Worker(command, errors)
            try:
                yield process, Path(errors.name)
            finally:
                process.close()
        except SystemExit as end:
            written = Path(errors.name).read_text(encoding="utf-8")
            raise SystemExit(f"{end}\n{written}") from None


def decode(process: Worker, ids: list[int], prompt: bool = False) -> float:
    """Seconds. prompt: all at once, at the beginning of the context."""
    answer = process.ask({"stream": "tokens", "tokens": ids, "steps": not prompt, "reset": prompt})
    return float(answer["seconds"])


def measure(arguments: argparse.Namespace, process: Worker, alone: Worker | None, ids: Ids) -> dict[str, Any]:
    """What one budget gives."""
    both = [process] if alone is None else [alone, process]
    prompts = {}
    for one in both:
        prompts[one] = prompt_of(arguments) / decode(one, ids("prompt", prompt_of(arguments)), prompt=True)
        decode(one, ids("warm up", WARM_UP))
    seconds: dict[Worker, list[float]] = {one: [] for one in both}
    change = dict.fromkeys(COUNTS, 0.0)
    for series in range(arguments.series):
        for one in both if series % 2 == 0 else reversed(both):
            before = counts(process)
            seconds[one].append(decode(one, ids(f"series {series}", arguments.tokens)))
            if one is process:
                after = counts(process)
                change = {name: change[name] + after[name] - before[name] for name in COUNTS}
    uses = change["hits"] + change["ahead_hits"] + change["misses"]
    tokens = arguments.tokens * arguments.series
    return {
        "fits": True,
        "slots": process.ask({"call": "stats", "arguments": {}})["slots"],
        "prompt": prompts[process],
        "decode": [arguments.tokens / s for s in seconds[process]],
        "alone": [arguments.tokens / s for s in seconds[alone]] if alone else [],
        "hit_rate": change["hits"] / uses if uses else 1.0,
        "ahead_hit_rate": change["ahead_hits"] / uses if uses else 0.0,
        "wait_share": change["wait_seconds"] / sum(seconds[process]),
        "stolen_share": change["steal"] / sum(seconds[process]) if hasattr(psutil.cpu_times(), "steal") else None,
        **{f"{name}_per_token": change[name] / tokens for name in ("read_bytes", "wasted_bytes", "disk_seconds")},
    }


PAGER = ("hits", "ahead_hits", "misses", "read_bytes", "wasted_bytes", "disk_seconds", "wait_seconds")
COUNTS = (*PAGER, "steal")


def counts(process: Worker) -> dict[str, float]:
    """The pager's counts up to now, and the CPU seconds that the host of a virtual machine has given to others."""
    told = process.ask({"call": "stats", "arguments": {}})
    return {name: float(told[name]) for name in PAGER} | {"steal": getattr(psutil.cpu_times(), "steal", 0.0)}


def prompt_of(arguments: argparse.Namespace) -> int:
    """Tokens of the prompt."""
    return min(PROMPT, int(arguments.context) // 2)


def in_limit(arguments: argparse.Namespace, memory: str, alone: Worker | None, ids: Ids) -> dict[str, Any]:
    """One budget in a process of its own."""
    try:
        with worker(arguments, memory) as (process, errors):
            figures = measure(arguments, process, alone, ids)
            process.close()  # what the limit counted is told at the end
            report = [line for line in errors.read_text(encoding="utf-8").splitlines() if line.startswith("capped: ")]
    except SystemExit as end:
        refused = re.findall(r"MemoryBudgetError: (.*)", str(end)) or re.findall(r"killed for memory: [1-9]", str(end))
        if not refused:
            raise
        return {"memory": memory, "fits": False, "why": refused[-1]}
    return {"memory": memory, "limit": report, **figures}


def fits_beside(model: str, memory: str) -> bool:
    """Whether a process with the whole model and one of that size have room together."""
    return psutil.virtual_memory().available > os.path.getsize(model) + parse_memory(memory) + ROOM


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="MODEL.stpk")
    parser.add_argument("--budgets", nargs="+", default=["512MiB", "768MiB", "1GiB", "1.5GiB", "2GiB", "2.5GiB"])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=auto_threads())
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="of a series (64)")
    parser.add_argument("--series", type=int, default=5, metavar="N", help="the median of which counts (5)")
    parser.add_argument("--output", type=Path, metavar="NAME", help="writes NAME.json and NAME.md")
    arguments = parser.parse_args()
    if prompt_of(arguments) + WARM_UP + arguments.tokens * arguments.series > arguments.context:
        parser.error("the context does not hold all series")
    with GGUFFile(arguments.model) as file:
        config = ModelConfig.from_gguf(as_model(file))
        name = str(file.metadata.get("general.name", Path(arguments.model).name))
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "model": {"name": name, "file_bytes": os.path.getsize(arguments.model)},
        "threads": arguments.threads,
        "context": arguments.context,
        "budgets": [],
    }

    def ids(name: str, count: int) -> list[int]:
        tokens = random.Random(name)
        return [tokens.randrange(config.vocab_size) for _ in range(count)]

    def run(budgets: list[str], alone: Worker | None) -> None:
        for memory in budgets:
            result["budgets"].append(in_limit(arguments, memory, alone, ids))
            print(f"{memory} is measured", file=sys.stderr, flush=True)

    beside = [memory for memory in arguments.budgets if fits_beside(arguments.model, memory)]
    if beside:
        with worker(arguments) as (alone, _):
            run(beside, alone)
    run([memory for memory in arguments.budgets if memory not in beside], None)
    print(save(result, arguments.output) if arguments.output else budgets_page(result))


if __name__ == "__main__":
    main()
