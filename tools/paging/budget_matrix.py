"""Holds a packed model to its budget under real memory limits: budgets times contexts times numbers of sessions.

    python tools/paging/budget_matrix.py MODEL.stpk [--budgets 768MiB 1GiB] [--contexts 512 2048] [--sessions 1 4]
        [--kv f16 q8_0] [--limits max high around] [--auto]

Each cell is a process of its own in a memory cgroup whose limit is the budget, from a cold page cache; with --auto it
is not told the budget, but finds it in its cgroups. It fills its sessions, forks them, asks for the logits of 300
tokens, generates, saves and loads a session. Refusals with a MemoryBudgetError are counted and allowed; being killed
for memory is a failure, and a peak beyond a limit that kills cannot be. Needs root (cgroups, tools/paging/capped.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from capped import Cgroup, drop_caches, memory_size, run_in_cgroup

PROMPT_LOGITS = 300


def worker(path: str, memory: int | str, context: int, count: int, kv: str, result: str) -> None:
    """The work of one cell; writes what it did to `result`."""
    import random

    from smallthinker_edge import MemoryBudgetError, SmallThinker

    draw = random.Random(0)
    done, refused = 0, 0

    def attempt(work: Callable[[], object]) -> None:
        nonlocal done, refused
        try:
            work()
            done += 1
        except MemoryBudgetError:
            refused += 1

    try:
        model = SmallThinker(path, memory=memory, context=context, kv=kv)
    except MemoryBudgetError:
        Path(result).write_text(json.dumps({"opened": False}))
        return
    with model, tempfile.TemporaryDirectory() as folder:
        vocabulary = model.config.vocab_size
        sessions = []
        for _ in range(count):
            sessions.append(model.session())
            ids = [draw.randrange(vocabulary) for _ in range(context - PROMPT_LOGITS - 64)]
            attempt(lambda session=sessions[-1], ids=ids: session.prefill(ids))  # type: ignore[misc]
        for session in sessions:
            attempt(lambda session=session: session.fork().decode([1]))  # type: ignore[misc]
        tail = [draw.randrange(vocabulary) for _ in range(PROMPT_LOGITS)]
        attempt(lambda: sessions[-1].decode(tail, all_logits=True))
        attempt(lambda: model.generate("The weather today is", max_tokens=32, temperature=0.8))
        attempt(lambda: sessions[0].save(Path(folder) / "session"))
        sessions.pop(0).close()
        attempt(lambda: model.load_session(Path(folder) / "session").decode([1]))
        stats = model.stats()
    figures = {"opened": True, "done": done, "refused": refused, "slots": stats["slots"], "planned": model.plan.slots}
    Path(result).write_text(json.dumps(figures))


def cell(path: str, memory: int, auto: bool, context: int, sessions: int, kv: str, limit: str) -> tuple[str, bool]:
    """(a row of the table, whether it kept its promise)."""
    told = "auto" if auto else memory
    with tempfile.NamedTemporaryFile(suffix=".json") as result:
        drop_caches()
        command = [sys.executable, __file__, path, "--worker", json.dumps([told, context, sessions, kv, result.name])]
        code, report = run_in_cgroup(Cgroup(memory, limit), command)
        text = Path(result.name).read_text()
    figures = json.loads(text) if text else {}
    did = "-" if code or not figures else "refused" if not figures["opened"] else f"{figures['done']} done"
    if figures.get("refused"):
        did += f", {figures['refused']} refused"
    slots = f"{figures['planned']} -> {figures['slots']}" if figures.get("opened") else ""
    row = [f"{memory / 2**20:.0f} MiB", limit, context, sessions, kv, did, slots, "; ".join(report), code]
    return "| " + " | ".join(map(str, row)) + " |", code == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--budgets", nargs="+", type=memory_size, default=[768 << 20, 1 << 30, 3 << 29])
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--sessions", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--kv", nargs="+", default=["f16", "q8_0"])
    parser.add_argument("--limits", nargs="+", choices=("max", "high", "around"), default=["max"])
    parser.add_argument("--auto", action="store_true", help="let the library find the budget")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.model, *json.loads(arguments.worker))
        return 0
    columns = ("budget", "limit", "context", "sessions", "KV cache", "calls", "slots", "cgroup", "exit")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    kept = []
    for memory, *each in itertools.product(
        arguments.budgets, arguments.contexts, arguments.sessions, arguments.kv, arguments.limits
    ):
        row, good = cell(arguments.model, memory, arguments.auto, *each)
        kept.append(good)
        print(row, flush=True)
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
