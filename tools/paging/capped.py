"""Runs a command under a real memory limit and prints its peak memory, failed allocations and exit status.

    python tools/paging/capped.py --memory 1GiB [--drop-caches] -- COMMAND ...

Uses what this machine allows, the first of: a memory cgroup of its own (version 2 or 1; needs root), `systemd-run
--scope`, and as a last resort RLIMIT_AS, which limits addresses instead of memory and is said to. Needs only
the standard library.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def memory_size(text: str) -> int:
    """Bytes of "1GiB", "512M" or a plain number; units are powers of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:iB|B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"cannot read {text!r} as a memory size")
    return int(float(match.group(1)) * UNITS[match.group(2).upper()])


class Cgroup:
    """A memory cgroup of our own. Raises OSError where it cannot be made.

    kind: "max", a limit that kills; "high", one that only slows down (version 2); "around", a limit that kills of a
    group around the command's own, which has none.
    """

    def __init__(self, limit: int, kind: str = "max") -> None:
        self.kind = kind
        self.version = 2 if (ROOT / "cgroup.controllers").exists() else 1
        top = ROOT if self.version == 2 else ROOT / "memory"
        if self.version == 2:
            (top / "cgroup.subtree_control").write_text("+memory")
        self.path = top / f"capped-{os.getpid()}"
        self.path.mkdir()
        try:
            file = "memory.high" if kind == "high" else "memory.max" if self.version == 2 else "memory.limit_in_bytes"
            self._write(file, limit)
            if self.version == 2 and (self.path / "memory.swap.max").exists():
                self._write("memory.swap.max", 0)
            if kind == "around":
                (self.path / "own").mkdir()
        except OSError:
            self.path.rmdir()
            raise

    def _write(self, name: str, value: int) -> None:
        (self.path / name).write_text(str(value))

    def enter(self) -> None:
        """Puts the calling process in; called in the child before it runs the command."""
        self._write("own/cgroup.procs" if self.kind == "around" else "cgroup.procs", os.getpid())

    def report(self) -> list[str]:
        """What the cgroup counted, as lines."""
        if self.version == 2:
            events = dict(line.split() for line in (self.path / "memory.events").read_text().splitlines())
            peak = self.path / "memory.peak"  # Linux 5.19
            lines = [f"peak memory: {mebibytes(int(peak.read_text()))}"] if peak.exists() else []
            reached = events["high" if self.kind == "high" else "max"]
            return [*lines, f"limit reached: {reached} times; killed for memory: {events['oom_kill']}"]
        peak_bytes = int((self.path / "memory.max_usage_in_bytes").read_text())
        control = dict(line.split() for line in (self.path / "memory.oom_control").read_text().splitlines())
        reached = (self.path / "memory.failcnt").read_text().strip()
        killed = control.get("oom_kill", "unknown")
        return [f"peak memory: {mebibytes(peak_bytes)}", f"limit reached: {reached} times; killed for memory: {killed}"]

    def remove(self) -> None:
        for _ in range(50):  # the kernel may need a moment after the last process
            try:
                if self.kind == "around" and (self.path / "own").exists():
                    (self.path / "own").rmdir()
                self.path.rmdir()
                return
            except OSError:
                time.sleep(0.1)


def mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB ({size:,} bytes)"


def drop_caches() -> None:
    """Empties the page cache for a cold start; says so where it may not."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError as problem:
        print(f"capped: cannot drop caches, so this is no cold start: {problem}", file=sys.stderr)


def run_in_cgroup(group: Cgroup, command: Sequence[str]) -> tuple[int, list[str]]:
    try:
        code = subprocess.run(command, preexec_fn=group.enter).returncode
        return code, group.report()
    finally:
        group.remove()


def systemd_scope() -> list[str] | None:
    """The beginning of a systemd-run command that works here, as this user or for the system; None without one."""
    if not shutil.which("systemd-run"):
        return None
    for whose in (["--user"], []):
        scope = ["systemd-run", *whose, "--scope", "--quiet", "--no-ask-password"]
        probe = [*scope, "-p", "MemoryMax=64M", "--", "true"]
        if subprocess.run(probe, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
            return scope
    return None


def run_with_systemd(scope: Sequence[str], limit: int, command: Sequence[str]) -> tuple[int, list[str]]:
    options = ["-p", f"MemoryMax={limit}", "-p", "MemorySwapMax=0"]
    code = subprocess.run([*scope, *options, "--", *command]).returncode
    return code, [resident_peak()]


def run_with_address_limit(limit: int, command: Sequence[str]) -> tuple[int, list[str]]:
    def set_limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    code = subprocess.run(command, preexec_fn=set_limit).returncode
    return code, [resident_peak(), "RLIMIT_AS bounds address space: stricter than a memory limit, and not the same"]


def resident_peak() -> str:
    unit = 1 if sys.platform == "darwin" else 1024
    return f"peak resident: {mebibytes(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit)}"


def run(limit: int, command: Sequence[str]) -> tuple[int, list[str], str]:
    """(exit code, report, name of the means)."""
    try:
        group = Cgroup(limit)
    except OSError:
        scope = systemd_scope()
        if scope:
            return *run_with_systemd(scope, limit, command), " ".join(scope[:2])
        return *run_with_address_limit(limit, command), "RLIMIT_AS, as no cgroup can be made here"
    return *run_in_cgroup(group, command), f"cgroup version {group.version}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--memory", type=memory_size, required=True, metavar="SIZE", help="limit, such as 1GiB")
    parser.add_argument("--drop-caches", action="store_true", help="empty the page cache first (needs root)")
    parser.add_argument("command", nargs="+", help="what to run, after --")
    arguments = parser.parse_args()
    if arguments.drop_caches:
        drop_caches()
    started = time.monotonic()
    try:
        code, report, means = run(arguments.memory, arguments.command)
    except FileNotFoundError as problem:
        print(f"capped: {problem}", file=sys.stderr)
        return 127
    lines = [f"limit: {mebibytes(arguments.memory)}, by {means}", *report]
    lines.append(f"exit status {code} after {time.monotonic() - started:.1f} s")
    print("\n".join("capped: " + line for line in lines), file=sys.stderr)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
