"""What `smallthinker-edge bench` does: measures memory reads, and kernels or sparsity by them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TypeVar

from smallthinker_edge._native import kernels
from smallthinker_edge.machine.cpus import auto_threads
from smallthinker_edge.measure.kernels import SHAPES, KernelResult, bench_kernels, kernel_table
from smallthinker_edge.measure.limits import OtherProcesses, arbitrary_weights, read_limit, streaming_bytes
from smallthinker_edge.measure.sparsity import FfnResult, bench_sparsity, plot_sparsity, sparsity_table

Result = TypeVar("Result", KernelResult, FfnResult)
Progress = Callable[[int, int, str], object]


def run_bench(
    what: str,
    *,
    threads: int | None = None,
    tables: Sequence[str] | None = None,
    shapes: Sequence[str] = ("4b", "21b"),
    json_path: str | None = None,
    plot: str | None = None,
    progress: Progress | None = None,
) -> str:
    """What `smallthinker-edge bench` does; returns what it prints.

    Args:
        what: "memory", "kernels" or "sparsity".
        threads: the largest team; one thread is measured too. Default: the usable CPUs.
        tables, shapes: names; json_path: where all figures are written too. plot: image file of "sparsity".
        progress: called with (done, all, what of): a shape on a table with a team is one.

    Raises ValueError for unknown names, ImportError for a plot without matplotlib.
    """
    if plot:
        import matplotlib  # noqa: F401  (known before minutes are spent)
    memory = arbitrary_weights(streaming_bytes())
    teams = sorted({1, threads or auto_threads()})
    chosen = [shape for shape in SHAPES if shape.name in shapes]
    used = tables if tables is not None else [name for name in kernels.tables() if what == "kernels" or name != "ref"]
    rounds = len(chosen) * len(used) * len(teams)
    others = OtherProcesses()
    limits = {count: read_limit(count, memory) for count in teams}
    text = [f"Memory reads, {count} thread{'s' if count > 1 else ''}: {limit}" for count, limit in limits.items()]
    figures: dict[str, object] = {"read_limits": [asdict(limit) for limit in limits.values()]}
    if what == "kernels":
        results = list(counted(bench_kernels(memory, tables=tables, shapes=chosen, threads=teams), rounds, progress))
        text.append(kernel_table(results, limits))
        figures["kernels"] = [asdict(result) for result in results]
    elif what == "sparsity":
        curves = list(counted(bench_sparsity(memory, tables=tables, shapes=chosen, threads=teams), rounds, progress))
        text.append(sparsity_table(curves))
        figures["sparsity"] = [asdict(result) for result in curves]
        if plot:
            plot_sparsity(curves, plot)
    elif what != "memory":
        raise ValueError(f"cannot measure {what!r}")
    figures["foreign_cpus"] = others.cpus
    text.append(f"{date.today().isoformat()}. {others}")
    if json_path:
        Path(json_path).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return "\n\n".join(text)


def counted(results: Iterable[Result], rounds: int, progress: Progress | None) -> Iterator[Result]:
    """The results, of a shape on a table with a team each, as they come; tells in which of so many rounds."""
    report, begun = progress or (lambda done, total, name: None), dict[tuple[object, ...], None]()
    for result in results:
        key = result.shape, result.table, result.threads
        begun.setdefault(key)
        report(len(begun) - 1, rounds, f"{result.shape}, {result.table}, threads: {result.threads}")
        yield result
    report(rounds, rounds, "done")
