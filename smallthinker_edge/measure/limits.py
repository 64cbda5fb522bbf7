"""How fast this machine reads memory, which bounds decoding, and what else disturbs a measurement.

Called by `smallthinker-edge bench` and `doctor`, and by benchmarks/ as their yardstick. Reads are timed in C
(_native/timing.pyx). It never opens a model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil

from smallthinker_edge._native.timing import Timer, allocate
from smallthinker_edge.machine.cgroup import memory_limit

Bytes = npt.NDArray[np.uint8]
# Loads side by side and bytes of prefetch ahead: which is fastest differs between machines.
READ_PATTERNS = [(streams, ahead) for streams in (1, 2, 4, 8) for ahead in (0, 1024, 4096)]
READ_ITEM = 1 << 20
REPETITIONS, LIMIT_REPETITIONS = 3, 7
# Other guests' caches, and those of which the hypervisor tells less than there is, must not hold what is read.
LEAST_STREAMED, CACHES_STREAMED = 1 << 30, 4


def last_level_cache() -> int:
    """Bytes of the largest cache that the first CPU reports; 32 MiB where it reports none."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        unit = {"K": 2**10, "M": 2**20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * unit)
    return max(sizes) or 32 << 20


def streaming_bytes() -> int:
    """Memory to walk through so that no cache holds it: four times the largest cache that is told of, 1 GiB at least;
    but no more than a third of what is free."""
    free = int(psutil.virtual_memory().available)
    wanted = max(LEAST_STREAMED, CACHES_STREAMED * last_level_cache())
    return max(64 << 20, min(wanted, min(free, memory_limit() or free) // 3))


def arbitrary_weights(size: int) -> Bytes:
    """Bytes that are sound fp16 scales wherever a kernel looks for one: no infinities, NaN or denormals."""
    memory = allocate(size)
    block = np.random.default_rng(0).integers(0x24, 0x38, min(size, 1 << 20), np.uint8)
    for start in range(0, size, block.size):
        memory[start : start + block.size] = block[: size - start]
    return memory


def rate(run: Callable[[int, int], float], threads: int, seconds: float) -> float:
    """Items per second of run(first, count) -> seconds: the median of REPETITIONS. See rates()."""
    return statistics.median(rates(run, threads, seconds, REPETITIONS))


def rates(run: Callable[[int, int], float], threads: int, seconds: float, repetitions: int) -> list[float]:
    """Items per second of run(first, count) -> seconds in each repetition, about `seconds` long.

    Each repetition goes on where the last one stopped, so that memory larger than the caches stays out of them. Each
    thread has an item at least.
    """
    first, count = 0, threads
    while (taken := run(first, count)) < seconds:
        first += count
        # Short runs tell little about the length needed: go there in steps.
        count = -(-min(16 * count, max(2 * count, int(count * seconds / max(taken, 1e-9)))) // threads) * threads
    measured = []
    for _ in range(repetitions):
        first += count
        measured.append(count / run(first, count))
    return measured


def warm_up(timer: Timer, memory: Bytes) -> None:
    """Reads for a moment: a new thread may share its maker's CPU until the scheduler notices."""
    timer.run("read", memory, READ_ITEM, 0, 1000 * timer.threads)


@dataclass(frozen=True)
class ReadLimit:
    """How fast memory is read.

    Attributes:
        bytes_per_second: of the best pattern, measured again once it was known for that: the median of seven.
        slowest, fastest: of the seven.
        threads: how many read at once.
        streams, ahead: the best pattern: pieces that each thread reads side by side, bytes of prefetch.
        patterns: bytes per second of each, by "streams/ahead".
    """

    bytes_per_second: float
    slowest: float
    fastest: float
    threads: int
    streams: int
    ahead: int
    patterns: dict[str, float]

    def __str__(self) -> str:
        return f"{self.bytes_per_second / 1e9:.1f} GB/s ({self.slowest / 1e9:.1f}-{self.fastest / 1e9:.1f})"


def read_limit(
    threads: int,
    memory: Bytes | None = None,
    seconds: float = 0.05,
    patterns: Sequence[tuple[int, int]] = READ_PATTERNS,
) -> ReadLimit:
    """Measures how fast `threads` threads read memory that no cache holds.

    Args:
        memory: what to read, for callers that have some; default: streaming_bytes() of it.
        seconds: least time of each repetition of each pattern. patterns: (streams, ahead) to try.
    """
    memory = arbitrary_weights(streaming_bytes()) if memory is None else memory
    timer = Timer("ref", threads)
    warm_up(timer, memory)

    def reads(streams: int, ahead: int, repetitions: int) -> list[float]:
        def run(first: int, count: int) -> float:
            return timer.run("read", memory, READ_ITEM, first, count, streams=streams, ahead=ahead)

        return [READ_ITEM * items for items in rates(run, threads, seconds, repetitions)]

    measured = {pattern: statistics.median(reads(*pattern, REPETITIONS)) for pattern in patterns}
    best = max(measured, key=lambda pattern: measured[pattern])
    again = reads(*best, LIMIT_REPETITIONS)
    named = {f"{streams}/{ahead}": value for (streams, ahead), value in measured.items()}
    return ReadLimit(statistics.median(again), min(again), max(again), threads, *best, named)


def foreign_seconds() -> float:
    """CPU seconds since the start of the system that neither this process nor its children used, in ticks."""
    times, own = psutil.cpu_times(), psutil.Process()
    waiting = times.idle + getattr(times, "iowait", 0.0) + getattr(times, "guest", 0.0)
    used = 0.0
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            mine = process.cpu_times()
            used += mine.user + mine.system
    return float(sum(times) - waiting - used)


class OtherProcesses:
    """What other processes compute from now on."""

    def __init__(self) -> None:
        self._busy, self._started = foreign_seconds(), time.perf_counter()

    @property
    def cpus(self) -> float:
        """How many CPUs they used so far, on average."""
        return max(0.0, (foreign_seconds() - self._busy) / (time.perf_counter() - self._started))

    def __str__(self) -> str:
        return f"Other processes used {self.cpus:.2f} CPUs meanwhile."
