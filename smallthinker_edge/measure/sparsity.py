"""Where skipping silent neurons pays: the FFN of one token against the share of active neurons.

Run by `smallthinker-edge bench sparsity`; docs/measurements/ has its result. It times the kernels as the forward
pass uses them, but not the forward pass itself.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from smallthinker_edge._native import kernels
from smallthinker_edge._native.timing import Timer
from smallthinker_edge.measure.kernels import SHAPES, Shape
from smallthinker_edge.measure.limits import Bytes, warm_up

SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.38, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
DOWNS = ("normal", "transposed")
TOKENS, REPETITIONS = 8, 7


@dataclass(frozen=True)
class FfnResult:
    """Time of one token's FFN: gate dense, up and down by active neurons, all used experts of one layer.

    Attributes:
        share: of neurons whose gate is positive; 1.0 computes every row and every neuron in the sparse layouts.
            None: a plain dense FFN, its three matrices in the dense layout (Tile16), activations quantised between.
        microseconds: the median; weights come from memory, experts that follow one another are never in a cache.
        low, high: the quartiles.
        down: layout of down where neurons are skipped, "normal" or "transposed"; the dense one is the same for both.
    """

    table: str
    shape: str
    threads: int
    share: float | None
    microseconds: float
    low: float
    high: float
    down: str = "normal"


def gate_outputs(f: int, share: float) -> np.ndarray:
    """[f] outputs of the gate of which a random share is positive, at least one."""
    rng = np.random.default_rng(0)
    gate = np.full(f, -1, np.float32)
    chosen = rng.permutation(f)[: max(1, round(f * share))]
    gate[chosen] = rng.uniform(0.5, 1, len(chosen))
    return gate


def bench_sparsity(
    memory: Bytes,
    *,
    tables: Sequence[str] | None = None,
    shapes: Sequence[Shape] = SHAPES,
    threads: Sequence[int] = (1,),
    shares: Sequence[float] = SHARES,
) -> Iterator[FfnResult]:
    """Times the FFN at each share of active neurons, and as a plain dense one.

    Args:
        memory: arbitrary_weights() of the pool of experts, larger than the caches. tables: default: all but plain C.
        threads: team sizes. shares: of active neurons.

    The repetitions go round over all shares, so that a slow moment of the machine does not fall on one of them.
    """
    for shape in shapes:
        gates = {share: gate_outputs(shape.d_ffn, share) for share in shares}
        for table in [name for name in kernels.tables() if name != "ref"] if tables is None else tables:
            for count in threads:
                timer = Timer(table, count)
                warm_up(timer, memory)
                dense: list[float] = []
                sparse: dict[tuple[str, float], list[float]] = {(down, share): [] for down in DOWNS for share in shares}
                first = 0
                for _ in range(REPETITIONS):
                    for (down, share), taken in [(("", None), dense), *sparse.items()]:
                        seconds = timer.ffn(
                            *(memory, shape.d_model, shape.d_ffn, shape.n_experts_used),
                            gates[shares[-1] if share is None else share],
                            whole=share is None,
                            transposed=down == "transposed",
                            first=first,
                            tokens=TOKENS,
                        )
                        taken.append(seconds / TOKENS * 1e6)
                        first += TOKENS * shape.n_experts_used
                for down in DOWNS:
                    for share in (None, *shares):
                        taken = dense if share is None else sparse[down, share]
                        low, _, high = statistics.quantiles(taken, n=4)
                        yield FfnResult(table, shape.name, count, share, statistics.median(taken), low, high, down)


def crossover(results: Sequence[FfnResult]) -> float | None:
    """The share of active neurons at which the sparse FFN costs what the plain dense one does, by straight lines.

    results: of one table, shape, thread count and layout of down. None where the sparse one is cheaper at every share
    measured.
    """
    dense = next(r.microseconds for r in results if r.share is None)
    points = sorted((r.share, r.microseconds) for r in results if r.share is not None)
    if points[0][1] > dense:
        return 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if y0 <= dense < y1:
            return x0 + (x1 - x0) * (dense - y0) / (y1 - y0)
    return None


def groups_of(results: Sequence[FfnResult]) -> dict[tuple[str, str, int, str], list[FfnResult]]:
    """The results by (shape, table, threads, down)."""
    groups: dict[tuple[str, str, int, str], list[FfnResult]] = {}
    for result in results:
        groups.setdefault((result.shape, result.table, result.threads, result.down), []).append(result)
    return groups


def sparsity_table(results: Sequence[FfnResult]) -> str:
    """Markdown: microseconds by share, the dense FFN, and the share at which both cost the same."""
    shares = sorted({result.share for result in results if result.share is not None})
    head = ["shape", "table", "threads", "down", *(f"{share:.0%}" for share in shares), "dense", "equal at"]
    lines = ["| " + " | ".join(head) + " |", "|---" * 4 + "|---:" * (len(shares) + 2) + "|"]
    for (shape, table, threads, down), group in groups_of(results).items():
        times = {result.share: f"{result.microseconds:.0f}" for result in group}
        equal = crossover(group)
        cells = [*(times[share] for share in shares), times[None], "never" if equal is None else f"{equal:.0%}"]
        lines.append(f"| {shape} | {table} | {threads} | {down} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_sparsity(results: Sequence[FfnResult], path: str) -> None:
    """Draws the curves of the normal down, one panel per shape, into an image file (its ending names the format).

    Raises ImportError without matplotlib (the [plots] extra).
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text: a third of the size
    from matplotlib import pyplot

    groups = {key[:3]: group for key, group in groups_of(results).items() if key[3] == "normal"}
    shapes = list(dict.fromkeys(shape for shape, _, _ in groups))
    figure, panels = pyplot.subplots(1, len(shapes), figsize=(5 * len(shapes), 3.6), squeeze=False)
    tables = list(dict.fromkeys(table for _, table, _ in groups))
    most = max(threads for _, _, threads in groups)
    for (shape, table, threads), group in groups.items():
        axes: Any = panels[0][shapes.index(shape)]
        style = "-" if threads == most else "--"
        color = f"C{tables.index(table)}"
        points = sorted((r.share, r.microseconds) for r in group if r.share is not None)
        label = f"{table}, {threads} thread{'s' if threads > 1 else ''}"
        axes.plot(*zip(*points, strict=True), style, marker=".", color=color, label=label)
        axes.axhline(next(r.microseconds for r in group if r.share is None), linestyle=":", color=color, alpha=0.6)
        axes.set_title(f"{shape}: FFN of one token (dotted: dense)")
        axes.set_xlabel("share of active neurons")
        axes.set_ylabel("microseconds")
    for axes in panels[0]:
        axes.set_ylim(bottom=0)
    panels[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)
    pyplot.close(figure)
