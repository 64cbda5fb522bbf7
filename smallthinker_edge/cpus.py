"""Which CPUs compute: affinity, cgroup quota, and the big cores of a big.LITTLE chip. Also the cgroup's memory limit.

Called by model.py (`threads=`) and doctor.py. It reads /proc and /sys only; `root` is there for the tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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


def cpu_quota(root: Path = Path("/")) -> int:
    """The tightest CPU limit of the process's cgroups (version 2 or 1) in whole CPUs, rounded up; 0 without one."""
    quotas = []
    for folder in _cgroup_folders(root, "cpu"):
        text = _text(folder / "cpu.max")
        if not text:
            text = f"{_text(folder / 'cpu.cfs_quota_us')} {_text(folder / 'cpu.cfs_period_us')}"
        quota, _, period = text.partition(" ")
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            quotas.append(max(1, -(-int(quota) // int(period))))
    return min(quotas, default=0)


def memory_limit(root: Path = Path("/")) -> int:
    """The tightest memory limit of the process's cgroups in bytes; 0 without one."""
    limits = []
    for folder in _cgroup_folders(root, "memory"):
        text = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes")
        # Version 1 writes "no limit" as the largest page-aligned number.
        if text.isdigit() and 0 < int(text) < 1 << 60:
            limits.append(int(text))
    return min(limits, default=0)


def cgroup_version(root: Path = Path("/")) -> int:
    """2, 1, or 0 where no cgroup file system is mounted."""
    base = root / "sys/fs/cgroup"
    if (base / "cgroup.controllers").exists():
        return 2
    return 1 if base.is_dir() and any(base.iterdir()) else 0


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """The process's cgroup of a controller and those around it, which bound it too, up to the mount point.

    A container often sees its own cgroup mounted at the top while /proc names the path outside: the folders that
    do not exist here are skipped.
    """
    base = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for top in (base / controllers, base / controller) if controllers else (base,):
            if not top.is_dir():
                continue
            folder = top / path.strip("/")
            while True:
                if folder.is_dir():
                    yield folder
                if folder == top or top not in folder.parents:
                    break
                folder = folder.parent
            break


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _integer(path: Path) -> int:
    text = _text(path)
    return int(text) if text.isdigit() else 0
