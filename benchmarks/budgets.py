"""Speed of a packed model within memory budgets, each in a real limit and from a cold page cache.

    python benchmarks/budgets.py MODEL.stpk [--budgets 512MiB 1GiB 2GiB] [--context 2048] [--output FILE.json]

Every budget is a process of its own under tools/paging/capped.py: a prompt of 512 random tokens, some to warm up, then
--series series of --tokens random ones, decoded one by one. A budget that the model does not fit into is left out.
Called by everything.py too.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from compare import machine

from smallthinker_edge import MemoryBudgetError, SmallThinker

ROOT = Path(__file__).resolve().parent.parent
CAPPED = ROOT / "tools" / "paging" / "capped.py"
PROMPT, WARM_UP = 512, 64


def measure(path: str, memory: str, context: int, tokens: int, series: int) -> dict[str, Any]:
    """What one budget gives; "fits": False where the model does not open within it."""
    draw = random.Random(0)
    try:
        model = SmallThinker(path, memory=memory, context=context)
    except MemoryBudgetError as error:
        return {"fits": False, "why": str(error)}
    with model, model.session() as session:

        def timed(count: int, one_by_one: bool) -> float:
            ids = [draw.randrange(model.config.vocab_size) for _ in range(count)]
            begun = time.perf_counter()
            for piece in [[i] for i in ids] if one_by_one else [ids]:
                session.decode(piece)
            return count / (time.perf_counter() - begun)

        prompt = timed(min(PROMPT, context // 2), False)
        timed(WARM_UP, True)
        before = model.stats()
        rates = [timed(tokens, True) for _ in range(series)]
        after = model.stats()

    def change(name: str) -> float:
        return float(after[name]) - float(before[name])  # type: ignore[arg-type]

    uses = change("hits") + change("ahead_hits") + change("misses")
    return {
        "fits": True,
        "slots": after["slots"],
        "prompt": prompt,
        "decode": rates,
        "hit_rate": change("hits") / uses if uses else 1.0,
        "read_bytes_per_token": change("read_bytes") / (tokens * series),
    }


def in_limit(arguments: argparse.Namespace, memory: str) -> dict[str, Any]:
    """One budget in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as result:
        sizes = [str(n) for n in (arguments.context, arguments.tokens, arguments.series)]
        work = [sys.executable, __file__, arguments.model, "--worker", memory, *sizes, result.name]
        command = [sys.executable, str(CAPPED), "--memory", memory, "--drop-caches", "--", *work]
        done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
        text = Path(result.name).read_text(encoding="utf-8")
    report = [line for line in done.stderr.splitlines() if line.startswith("capped: ")]
    if not text:
        raise SystemExit(f"{memory}: {done.stderr}")
    return {"memory": memory, "limit": report, **json.loads(text)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="MODEL.stpk")
    parser.add_argument("--budgets", nargs="+", default=["512MiB", "768MiB", "1GiB", "1.5GiB", "2GiB", "2.5GiB"])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="of a series (64)")
    parser.add_argument("--series", type=int, default=5, metavar="N", help="the median of which counts (5)")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        memory, *sizes, result = arguments.worker
        figures = measure(arguments.model, memory, *(int(size) for size in sizes))
        Path(result).write_text(json.dumps(figures), encoding="utf-8")
        return
    rows = []
    for memory in arguments.budgets:
        rows.append(in_limit(arguments, memory))
        row = rows[-1]
        told = (
            f"{statistics.median(row['decode']):.1f} tok/s, hit rate {row['hit_rate']:.3f}"
            if row["fits"]
            else row["why"]
        )
        print(f"{memory}: {told}", flush=True)
    if arguments.output:
        result = {"machine": machine(), "context": arguments.context, "budgets": rows}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
