"""Memory budgets: what "auto" sees of cgroups, and the tool that runs a command under a limit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from smallthinker_edge import budget

CAPPED = Path(__file__).resolve().parents[1] / "tools" / "capped.py"


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def test_limits_of_cgroup_version_2_are_found_at_every_level(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    for name, limit, use in (("a", 1000, 600), ("a/b", "max", 500)):
        write(root / name / "memory.max", limit)
        write(root / name / "memory.current", use)
        write(root / name / "memory.stat", "anon 7\ninactive_file 100")
    write(tmp_path / "self", "0::/a/b")
    assert budget._cgroup_limits(root, tmp_path / "self") == [(1000, 500)]


def test_limits_of_cgroup_version_1_skip_the_number_that_means_none(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    for name, limit in (("memory", 9223372036854771712), ("memory/a", 4096)):
        write(root / name / "memory.limit_in_bytes", limit)
        write(root / name / "memory.usage_in_bytes", 1024)
        write(root / name / "memory.stat", "total_inactive_file 24")
    write(tmp_path / "self", "5:cpu:/x\n4:memory:/a\n0::/")
    assert budget._cgroup_limits(root, tmp_path / "self") == [(4096, 1000)]


def test_in_a_container_the_visible_root_counts(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    write(root / "memory.max", 1000)
    write(root / "memory.current", 10)
    write(root / "memory.stat", "anon 7")
    write(tmp_path / "self", "0::/docker/0123")
    assert budget._cgroup_limits(root, tmp_path / "self") == [(1000, 10)]


def test_auto_is_what_is_free_and_what_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    own = psutil.Process().memory_info().rss
    monkeypatch.setattr(budget, "_cgroup_limits", lambda: [(3000, 1000)])
    assert abs(budget.parse_memory("auto") - own - 1800) < 1 << 20
    monkeypatch.setattr(budget, "_cgroup_limits", lambda: [(1000, 3000)])
    assert budget.parse_memory("auto") < own + (1 << 20)


@pytest.mark.skipif(sys.platform != "linux", reason="cgroups and RLIMIT_AS are Linux's")
@pytest.mark.parametrize(("size", "fails"), [("20", False), ("600", True)])
def test_capped_enforces_its_limit_and_reports(size: str, fails: bool) -> None:
    code = f"import sys; x = bytearray({size} << 20); print(len(x))"
    run = subprocess.run(
        [sys.executable, CAPPED, "--memory", "256MiB", "--", sys.executable, "-c", code], capture_output=True, text=True
    )
    assert (run.returncode != 0) == fails
    assert ("20971520" in run.stdout) != fails
    assert "limit: 256.0 MiB (268,435,456 bytes), by " in run.stderr
    assert "peak" in run.stderr
