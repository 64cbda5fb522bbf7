"""Which CPUs compute: affinity, cgroup quota, and the big cores of a big.LITTLE chip.

Called by opening.py (`threads=`), doctor.py and measure/bench.py. It reads /proc and /sys only; `root` is there for the
tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from smallthinker_edge.machine import cgroup

# A core counts as big with at least half the capacity of the largest one (the kernel scales it by clock: the RK3588's
# Cortex-A55 have 0.4 of its A76), or, where the kernel states no capacity, 0.8 of the highest clock (the same: 0.75).
BIG_CAPACITY, BIG_CLOCK = 0.5, 0.8


def auto_threads(root: Path = Path("/")) -> int:
    """Compute threads for threads="auto": one for every big core that affinity and CPU quota allow."""
    cpus, quota = big_cpus(root), cpu_quota(root)
    return max(1, min(len(cpus), quota) if quota else len(cpus))


def allowed_cpus() -> set[int]:
    """CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def big_cpus(root: Path = Path("/"), allowed: Iterable[int] | None = None) -> set[int]:
    """Those of the allowed CPUs that are fast; all of them where they are alike or the system does not say."""
    cpus = allowed_cpus() if allowed is None else set(allowed)
    for name, share in (("cpu_capacity", BIG_CAPACITY), ("cpufreq/cpuinfo_max_freq", BIG_CLOCK)):
        values = {cpu: _integer(root / f"sys/devices/system/cpu/cpu{cpu}" / name) for cpu in cpus}
        if all(values.values()):
            most = max(value for value in values.values() if value)
            return {cpu for cpu, value in values.items() if value and value >= share * most}
    return cpus


@contextmanager
def started_on(cpus: set[int]) -> Iterator[None]:
    """Threads that are started inside stay on these CPUs; the calling thread gets its own affinity back."""
    before = allowed_cpus()
    # The system may refuse (a seccomp filter, a cpuset that has just changed): the threads then run anywhere.
    change = hasattr(os, "sched_setaffinity") and cpus < before
    with suppress(OSError):
        if change:
            os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        with suppress(OSError):
            if change:
                os.sched_setaffinity(0, before)


def places(threads: int, cpus: set[int]) -> list[int]:
    """For each thread of a pinned team the CPU it stays on: by number, round and round where they are fewer."""
    numbers = sorted(cpus)
    return [numbers[i % len(numbers)] for i in range(threads)]


def cpu_quota(root: Path = Path("/")) -> int:
    """The tightest CPU limit of the process's cgroups (version 2 or 1) in whole CPUs, rounded up; 0 without one."""
    quotas = []
    for folder in cgroup.folders(root, "cpu"):
        text = cgroup.read(folder / "cpu.max")
        if not text:
            text = f"{cgroup.read(folder / 'cpu.cfs_quota_us')} {cgroup.read(folder / 'cpu.cfs_period_us')}"
        quota, _, period = text.partition(" ")
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            quotas.append(max(1, -(-int(quota) // int(period))))
    return min(quotas, default=0)


def _integer(path: Path) -> int:
    text = cgroup.read(path)
    return int(text) if text.isdigit() else 0
