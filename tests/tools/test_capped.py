"""tools/paging/capped.py: what it writes to each kind of memory cgroup, and what it falls back to.

The version 2 tree and systemd-run are fakes that record what they are told; what this machine really has is used once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import capped
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="cgroups and RLIMIT_AS are Linux's")
HOLD_600_MIB = [sys.executable, "-c", "x = bytearray(600 << 20)"]


class FakeCgroup(capped.Cgroup):
    """Over plain folders: files that the kernel would make appear with the folder."""

    files: ClassVar[dict[str, str]] = {}

    def _write(self, name: str, value: int) -> None:
        for file, text in self.files.items():
            (self.path / file).write_text(text)
        super()._write(name, value)


def test_version_2_gets_a_limit_without_swap_and_tells_what_it_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu memory")
    monkeypatch.setattr(capped, "ROOT", tmp_path)
    FakeCgroup.files = {
        "memory.swap.max": "max",
        "memory.events": "low 0\nhigh 0\nmax 3\noom 1\noom_kill 1\n",
        "memory.peak": "1048576",
    }
    group = FakeCgroup(1 << 30)
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory"
    assert (group.path / "memory.max").read_text() == str(1 << 30)
    assert (group.path / "memory.swap.max").read_text() == "0"
    group.enter()
    assert (group.path / "cgroup.procs").read_text() == str(os.getpid())
    assert group.report() == ["peak memory: 1.0 MiB (1,048,576 bytes)", "limit reached: 3 times; killed for memory: 1"]


@pytest.mark.parametrize(
    ("kind", "file", "group_of_the_command"), [("high", "memory.high", ""), ("around", "memory.max", "own/")]
)
def test_other_kinds_of_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, file: str, group_of_the_command: str
) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu memory")
    monkeypatch.setattr(capped, "ROOT", tmp_path)
    FakeCgroup.files = {"memory.events": "low 0\nhigh 5\nmax 3\noom 0\noom_kill 0\n"}
    group = FakeCgroup(1 << 30, kind)
    assert (group.path / file).read_text() == str(1 << 30)
    group.enter()
    assert (group.path / group_of_the_command / "cgroup.procs").read_text() == str(os.getpid())
    assert group.report() == [f"limit reached: {5 if kind == 'high' else 3} times; killed for memory: 0"]


def test_version_1_tells_what_it_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(capped, "ROOT", tmp_path)
    FakeCgroup.files = {
        "memory.max_usage_in_bytes": "2097152",
        "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 0\n",
        "memory.failcnt": "7",
    }
    group = FakeCgroup(4096)
    assert (group.path / "memory.limit_in_bytes").read_text() == "4096"
    assert group.report() == ["peak memory: 2.0 MiB (2,097,152 bytes)", "limit reached: 7 times; killed for memory: 0"]


def no_cgroup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(capped, "ROOT", tmp_path / "no cgroup file system")


@pytest.mark.parametrize(("works", "means"), [("--user", "systemd-run --user"), ("", "systemd-run --scope")])
def test_systemd_run_is_tried_for_the_user_and_then_for_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works: str, means: str
) -> None:
    no_cgroup(monkeypatch, tmp_path)
    program, log = tmp_path / "systemd-run", tmp_path / "log"
    refuse = "" if works else '[ "$1" = --user ] && exit 1'
    program.write_text(f'#!/bin/sh\n{refuse}\necho "$@" >> {log}\nwhile [ "$1" != -- ]; do shift; done; shift; "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    code, report, used = capped.run(5 << 20, [sys.executable, "-c", "raise SystemExit(3)"])
    assert (code, used) == (3, means)
    assert report[0].startswith("peak resident: ")
    last = log.read_text().splitlines()[-1]
    assert "-p MemoryMax=5242880 -p MemorySwapMax=0 -- " in last


@pytest.mark.parametrize(("limit", "fails"), [(4 << 30, False), (256 << 20, True)])
def test_without_any_of_them_addresses_are_limited_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, fails: bool
) -> None:
    no_cgroup(monkeypatch, tmp_path)
    monkeypatch.setattr(capped, "systemd_scope", lambda: None)
    code, report, means = capped.run(limit, HOLD_600_MIB)
    assert (code != 0) == fails
    assert means.startswith("RLIMIT_AS")
    assert "address space" in report[-1]


@pytest.mark.parametrize(("size", "fails"), [("20", False), ("600", True)])
def test_capped_enforces_its_limit_and_reports(size: str, fails: bool) -> None:
    code = f"import sys; x = bytearray({size} << 20); print(len(x))"
    run = subprocess.run(
        [sys.executable, capped.__file__, "--memory", "256MiB", "--", sys.executable, "-c", code],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (run.returncode != 0) == fails
    assert ("20971520" in run.stdout) != fails
    assert "limit: 256.0 MiB (268,435,456 bytes), by " in run.stderr
    assert "peak" in run.stderr
