"""Puts the figures of ARM into words: docs/measurements/arm-*.md, each from the .json beside it. It measures nothing.

Run by `make bench-docs`. Instructions were counted by predict.py and count_tokens.py; the tokens per second of boards
are predictions from them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from predict import BOARDS, COUNTS, KERNELS, MISS_1GIB, MODELS, REPORT, TABLES, predict

COLUMNS = (
    "GEMV Q4_0",
    "GEMM Q4_0, 8 tokens",
    "GEMV Q8_0",
    "up rows",
    "sparse down",
    "attention, F16",
    "attention, Q8_0",
)
ENGINES = ("ours", "llama.cpp")
MADE = "`make bench-docs` writes this page from the .json beside it; [README.md](README.md) says how it was measured."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def predictions(counts: dict[str, Any]) -> str:
    """Milliseconds and tokens per second of each board, as a table."""
    rows = []
    for board in BOARDS:
        for name, budget, misses in [("4B", 0, 0.0), ("21B", 0, 0.0), ("4B", 1, MISS_1GIB)]:
            seconds = predict(MODELS[name], board, counts, misses)
            parts = [f"{1e3 * seconds[part]:.0f} ms" for part in ("compute", "memory", "storage")]
            known = REPORT.get((name, budget)) if board.name.startswith("Pi 5") else None
            where = f"{name}, {budget} GiB" if budget else f"{name}, all in memory"
            rows.append([board.name, where, *parts, f"{1 / seconds['total']:.1f}", f"{known or ''}"])
    head = ["board", "model, budget", "computing", "memory", "storage", "predicted tokens/s", "report, authors' engine"]
    return table(head, rows)


def counts_page(counts: dict[str, Any]) -> str:
    """Of arm-counts.json: instructions per weight, and what follows for boards."""
    per_weight = counts["instructions_per_weight"]
    rows = [[f"`{name}`", *(f"{kernels[kernel]:.3f}" for kernel in KERNELS)] for name, kernels in per_weight.items()]
    return "\n\n".join([
        "# ARM: instructions per weight, and predictions",
        MADE,
        table(["", *COLUMNS], rows),
        f"{counts['date']}; {counts['compiler']}, {counts['qemu']}.",
        "Predicted, not measured, from these counts:",
        predictions(counts),
    ]) + "\n"  # fmt: skip


def tokens_page(models: dict[str, Any]) -> str:
    """Of arm-tokens.json: instructions of a whole token beside llama.cpp's."""
    rows = []
    for name, model in models.items():
        for cpu, counted in model["cpus"].items():
            millions = [f"{counted[engine] / 1e6:.2f} M" if engine in counted else "" for engine in ENGINES]
            ratio = f"{counted['ratio']:.3f}" if "ratio" in counted else ""
            rows.append([name, f"{cpu}, `{TABLES[cpu]}`", *millions, ratio])
    counted = "; ".join(f"{name}: {model['date']}, N = {model['tokens']}" for name, model in models.items())
    return "\n\n".join([
        "# ARM: instructions of a decoded token",
        MADE,
        table(["model", "CPU, table", "ours", "llama.cpp", "ratio"], rows),
        f"{counted}.",
    ]) + "\n"  # fmt: skip


def pages(results: Path = COUNTS.parent) -> dict[Path, str]:
    """The ARM pages of a folder: each file, and its text made anew from the .json of the same name."""
    makers = {"arm-counts": counts_page, "arm-tokens": tokens_page}
    found = {name: json.loads((results / f"{name}.json").read_text(encoding="utf-8")) for name in makers}
    return {results / f"{name}.md": maker(found[name]) for name, maker in makers.items()}


def main() -> None:
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
