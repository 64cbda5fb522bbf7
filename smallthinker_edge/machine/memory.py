"""Memory of this process and this machine: what is used, what may be used, sizes as people write them.

Called by plan.py, opening.py, model.py and the command line. It reads /proc and asks psutil; it allocates nothing.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import psutil

from smallthinker_edge.machine import cgroup

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# What "auto" leaves to others: a share of what is free, so that a small machine stays usable.
AUTO_SHARE = 0.9


def parse_memory(memory: int | str) -> int:
    """Bytes of an int, or of a string such as "1GiB", "900 MB", "4096"; "auto" is available_memory().

    Raises ValueError for anything else.
    """
    if isinstance(memory, bool) or not isinstance(memory, int | str):
        raise ValueError("memory must be bytes as an int, or a string such as '1GiB'")
    if memory == "auto":
        return available_memory()
    if isinstance(memory, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?i?B?)", memory.strip(), re.IGNORECASE)
        unit = match.group(2).upper() if match else ""
        if match is None or unit not in UNITS:
            raise ValueError(f"cannot read {memory!r} as a memory size; write for example '1GiB' or '900MB'")
        memory = int(float(match.group(1)) * UNITS[unit])
    if memory <= 0:
        raise ValueError("memory must be positive")
    return memory


def available_memory() -> int:
    """Bytes this process may use in all: its own now, and 90 % of what the system and its cgroups have left."""
    own: int = psutil.Process().memory_info().rss
    free: int = psutil.virtual_memory().available
    for limit, used in cgroup.memory():
        free = min(free, limit - used)
    return own + int(max(0, free) * AUTO_SHARE)


def process_memory() -> dict[str, int]:
    """rss_bytes now and peak_bytes so far of this process; peak_bytes only where Linux tells it."""
    memory = {"rss_bytes": psutil.Process().memory_info().rss}
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return memory
    peak = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return memory | ({"peak_bytes": int(peak.group(1)) * 1024} if peak else {})


def drop_library_cache() -> None:
    """Takes what was read to load modules and shared libraries out of the page cache, where a cgroup charges it.

    That is 60 MiB, a third of it OpenBLAS, which comes with NumPy.
    A hint; pages that are in use, as those of running code, stay.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    for path in _loaded_files():
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _loaded_files() -> set[str]:
    """Files of the imported modules, and those mapped into this process."""
    modules = list(sys.modules.values())
    paths = {getattr(module, field, None) for module in modules for field in ("__file__", "__cached__")}
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        maps = ""
    paths |= {fields[5] for fields in (line.split(maxsplit=5) for line in maps.splitlines()) if len(fields) == 6}
    return {path for path in paths if isinstance(path, str) and os.path.isfile(path)}
