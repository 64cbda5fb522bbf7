"""What every kernel takes on this machine: `smallthinker-edge bench kernels`.

Everything is timed in C (_native/timing.pyx); here the work is laid out and the results are put into words. It never
opens a model: the shapes are those of the real ones, the weights are arbitrary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from smallthinker_edge._native import kernels
from smallthinker_edge._native.layouts import TYPES
from smallthinker_edge._native.timing import KERNELS, Timer
from smallthinker_edge.measure.limits import Bytes, ReadLimit, rate, warm_up


@dataclass(frozen=True)
class Shape:
    """Sizes of a model that decide how its kernels are called, in elements."""

    name: str
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ffn: int
    n_experts: int
    n_experts_used: int


SHAPES = (Shape("4b", 1536, 12, 2, 128, 768, 32, 4), Shape("21b", 2560, 28, 4, 128, 768, 64, 6))
ACTIVE_SHARE = 0.38  # neurons of a chosen expert whose gate is positive (technical report, figures 4-6)


@dataclass(frozen=True)
class Case:
    """One use of a kernel.

    Attributes:
        kernel: a name of Timer.kernels(). what: where the forward pass uses it.
        rows, cols, tokens: as Timer.run() has them.
        active: share of the rows that a kernel which skips reads. transposed: the down of ffn_* is.
        streamed: whether the forward pass reads its operand from memory; then it is timed that way too.
    """

    kernel: str
    what: str
    rows: int
    cols: int
    tokens: int = 1
    active: float = 1.0
    transposed: bool = False
    streamed: bool = True


def cases(shape: Shape) -> list[Case]:
    """Every kernel at the sizes of a model."""

    def of(family: str) -> list[str]:
        return [name for name, (_, its, _) in KERNELS.items() if its == family]

    d, f, heads = shape.d_model, shape.d_ffn, shape.n_heads * shape.head_dim
    group = shape.n_heads // shape.n_kv_heads
    return [
        Case("gemm_q4_0", "gate", f, d),
        Case("gemm_q4_0", "output", d, heads),
        Case("gemm_q4_0", "gate, 64 tokens", f, d, 64, streamed=False),
        *(Case(name, "head, 512 rows", 512, d) for name in of("gemm")),
        *(Case(name, f"up, {ACTIVE_SHARE:.0%} active", f, d, active=ACTIVE_SHARE) for name in of("rows")),
        Case("rows_q4_0", "up, all", f, d),
        *(Case(name, "up, 16 tokens", f, d, 16, active=1 / 3, streamed=False) for name in of("up")),
        *(Case(name, f"expert, {ACTIVE_SHARE:.0%} active", f, d, active=ACTIVE_SHARE) for name in of("ffn")),
        Case("ffn_q4_0", f"transposed down, {ACTIVE_SHARE:.0%} active", f, d, active=ACTIVE_SHARE, transposed=True),
        *(Case(name, f"down, {ACTIVE_SHARE:.0%} active", f, d, active=ACTIVE_SHARE) for name in of("down")),
        Case("down_q4_0", "down, all", f, d),
        *(
            Case(name, "down, 16 tokens", f, d, 16, active=ACTIVE_SHARE, streamed=False)
            for name in of("down")
            if name != "down_q4_0"
        ),
        Case("down_transposed_q4_0", f"down, {ACTIVE_SHARE:.0%} active", f, d, active=ACTIVE_SHARE),
        Case("down_transposed_q4_0", "down, all", f, d),
        Case("attention", f"{group} heads, 256 positions", group, shape.head_dim, 256),
        Case(
            "attention_many",
            f"several tokens, {group} heads, 256 positions",
            group,
            shape.head_dim,
            256,
            streamed=False,
        ),
        Case("attention_q8", f"{group} heads, 256 positions", group, shape.head_dim, 256),
        Case("quantize", "d", 0, d, streamed=False),
        Case("rmsnorm", "d", 0, d, streamed=False),
        Case("dot", "router row", 0, d, streamed=False),
        Case("axpy", "d", 0, d, streamed=False),
        Case("to_f16", "key of a head", 0, shape.head_dim, streamed=False),
        Case("from_f16", "F16 row", 0, d),
        Case("rope", "a head", 0, shape.head_dim, streamed=False),
        Case("top_k", "experts", 0, shape.n_experts, shape.n_experts_used, streamed=False),
        Case("activate", "32 neurons", 0, 64, streamed=False),
    ]


# Families of kernels that compute only the active neurons.
CHOOSING = ("rows", "ffn", "down", "down_transposed")


@dataclass(frozen=True)
class KernelResult:
    """One line of `bench kernels`.

    Attributes:
        streaming: operand from memory, or from the cache.
        nanoseconds: one call on one thread; with several threads, one call's share of the wall time.
        bytes_per_call: of weights, keys or values that it reads; 0 for operations on activations alone.
        multiplies_per_call: multiply-adds of a matrix kernel.
    """

    table: str
    shape: str
    case: Case
    threads: int
    streaming: bool
    nanoseconds: float
    bytes_per_call: int
    multiplies_per_call: int

    @property
    def bytes_per_second(self) -> float:
        return self.bytes_per_call / self.nanoseconds * 1e9


def choose_rows(rows: int, share: float, seed: int = 0) -> np.ndarray:
    """A random choice of the share of the rows, ascending, at least one."""
    count = max(1, round(rows * share))
    return np.sort(np.random.default_rng(seed).permutation(rows)[:count]).astype(np.int32)


def active_groups(table: str, f: int, chosen: np.ndarray, transposed: bool = False) -> np.ndarray:
    """What f neurons of which the chosen fire give to down."""
    gate = np.full(f, -1, np.float32)
    gate[chosen] = np.random.default_rng(1).uniform(0.5, 1, len(chosen))
    up = np.ones(f, np.float32)
    one = kernels.multiply if transposed else kernels.Table(table).activate
    kind = kernels.FIRED if transposed else kernels.ACTIVE
    return np.array([one(gate[i : i + 32], up[i : i + 32]) for i in range(0, f, 32)], kind)


def bytes_of(case: Case) -> int:
    """Weights, keys or values that one call reads: for kernels that skip, what is left, and all scales of down unless
    each neuron has its own."""
    whole = Timer.item_bytes(case.kernel, case.rows, case.cols, case.tokens, case.transposed)
    _, family, number = KERNELS[case.kernel]
    if family not in CHOOSING:
        return whole
    active = len(choose_rows(case.rows, case.active))
    if family in ("rows", "down_transposed"):
        return whole // case.rows * active
    lines = Timer.line_bytes(case.kernel, case.cols)
    if family == "down":
        return whole - (case.rows - active) * lines
    info = next(info for info in TYPES.values() if info.number == number)
    row = case.cols // info.columns * info.bytes
    down = f"down_transposed_{case.kernel[4:]}" if case.transposed else f"down_{case.kernel[4:]}"
    return (case.rows + active) * row + bytes_of(replace(case, kernel=down, transposed=False))


def time_case(timer: Timer, table: str, case: Case, memory: Bytes, streaming: bool, seconds: float) -> float:
    """Nanoseconds of wall time per call."""
    stride = (
        -(-max(1, Timer.item_bytes(case.kernel, case.rows, case.cols, case.tokens, case.transposed)) // 4096) * 4096
    )
    items = memory.size // stride if streaming else timer.threads
    view = memory[: items * stride]
    family = KERNELS[case.kernel][1]
    chosen = choose_rows(case.rows, case.active) if family in CHOOSING else None
    active = None
    if case.kernel.startswith("down") and chosen is not None:
        active = active_groups(table, case.rows, chosen, case.kernel == "down_transposed_q4_0")

    def run(first: int, count: int) -> float:
        return timer.run(
            case.kernel,
            view,
            stride,
            first,
            count,
            rows=case.rows,
            cols=case.cols,
            tokens=case.tokens,
            index=chosen if family in ("rows", "ffn") else None,
            active=active,
            transposed=case.transposed,
        )

    return 1e9 / rate(run, timer.threads, seconds)


def bench_kernels(
    memory: Bytes,
    *,
    tables: Sequence[str] | None = None,
    shapes: Sequence[Shape] = SHAPES,
    threads: Sequence[int] = (1,),
    seconds: float = 0.01,
) -> Iterator[KernelResult]:
    """Times every kernel of the tables at the sizes of the shapes, from the cache and from memory.

    Args:
        memory: arbitrary_weights(); what streams is as large as this. tables: names; default: all that this CPU runs.
        threads: team sizes. seconds: least time of one repetition.

    Raises ValueError for a table that this CPU cannot run.
    """
    for shape in shapes:
        for table in kernels.tables() if tables is None else tables:
            for count in threads:
                timer = Timer(table, count)
                warm_up(timer, memory)
                for case in cases(shape):
                    if count > 1 and not case.streamed and case.rows == 0:
                        continue  # operations on activations are small: no threads share one
                    size, multiplies = bytes_of(case), 0
                    if case.kernel.startswith(("gemm", "rows", "up", "down")):
                        multiplies = round(case.rows * case.cols * case.tokens * case.active)
                    for streaming in (False, True) if case.streamed else (False,):
                        taken = time_case(timer, table, case, memory, streaming, seconds)
                        yield KernelResult(table, shape.name, case, count, streaming, taken, size, multiplies)


def kernel_table(results: Sequence[KernelResult], limits: dict[int, ReadLimit]) -> str:
    """Markdown: a row per kernel, shape and thread count, a column per table.

    Kernels that read weights or the KV cache in GB/s, with the share of the read limit where they stream; GEMMs of many
    tokens in giga multiply-adds per second; the others in nanoseconds.
    """
    tables = list(dict.fromkeys(result.table for result in results))
    rows: dict[tuple[object, ...], dict[str, str]] = {}
    for r in results:
        place = ("memory" if r.streaming else "cache") if r.bytes_per_call else "-"
        key = (r.case.kernel, r.case.what, r.shape, place, r.threads)
        rows.setdefault(key, {})[r.table] = _figure(r, limits)
    head = ["kernel", "used for", "shape", "from", "threads", *tables]
    lines = ["| " + " | ".join(head) + " |", "|---" * 5 + "|---:" * len(tables) + "|"]
    lines += [
        "| " + " | ".join([*map(str, key), *(row.get(t, "") for t in tables)]) + " |" for key, row in rows.items()
    ]
    return "\n".join(lines)


def _figure(result: KernelResult, limits: dict[int, ReadLimit]) -> str:
    if result.case.tokens > 1 and result.multiplies_per_call:
        return f"{result.multiplies_per_call / result.nanoseconds:.1f} GMAC/s"
    if not result.bytes_per_call or result.case.kernel in ("dot", "from_f16"):
        return f"{result.nanoseconds:.0f} ns"
    text = f"{result.bytes_per_second / 1e9:.1f} GB/s"
    if result.streaming and result.threads in limits:
        text += f" ({result.bytes_per_second / limits[result.threads].bytes_per_second:.0%})"
    return text
