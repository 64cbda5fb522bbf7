"""The process's control groups (version 2 or 1): where they are mounted, and the memory they allow.

Called by cpus.py, memory.py, doctor.py and measure/limits.py. It reads /proc and /sys only; `root` is for the tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def version(root: Path = Path("/")) -> int:
    """2, 1, or 0 where no cgroup file system is mounted."""
    base = root / "sys/fs/cgroup"
    if (base / "cgroup.controllers").exists():
        return 2
    return 1 if base.is_dir() and any(base.iterdir()) else 0


def folders(root: Path, controller: str) -> Iterator[Path]:
    """The process's cgroup of a controller and those around it, which bound it too, up to the mount point.

    A container often sees its own cgroup mounted at the top while /proc names the path outside: the folders that
    do not exist here are skipped.
    """
    base = root / "sys/fs/cgroup"
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # Beside version 1, systemd has version 2 in `unified`.
        for top in (base / controllers, base / controller) if controllers else (base / "unified", base):
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


def memory(root: Path = Path("/")) -> list[tuple[int, int]]:
    """(limit, use without reclaimable cache) in bytes of every memory cgroup around this process that has a limit.

    Beyond memory.max a process is killed, beyond memory.high slowed down until it hardly runs: the smaller one counts.
    """
    found = []
    for folder in folders(root, "memory"):
        limits = [read(folder / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
        # Version 1 writes "no limit" as the largest page-aligned number.
        limit = min((int(text) for text in limits if text.isdigit() and 0 < int(text) < 1 << 60), default=0)
        if not limit:
            continue
        use = read(folder / "memory.current") or read(folder / "memory.usage_in_bytes")
        stat = dict(line.split(None, 1) for line in read(folder / "memory.stat").splitlines() if " " in line)
        # What version 1 calls inactive_file leaves out the groups below.
        cache = stat.get("total_inactive_file") or stat.get("inactive_file", "0")
        found.append((limit, (int(use) if use.isdigit() else 0) - (int(cache) if cache.isdigit() else 0)))
    return found


def memory_limit(root: Path = Path("/")) -> int:
    """The tightest memory limit of the process's cgroups in bytes; 0 without one."""
    return min((limit for limit, _ in memory(root)), default=0)


def read(path: Path) -> str:
    """The text of a file without the white space around it; "" where it cannot be read."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
