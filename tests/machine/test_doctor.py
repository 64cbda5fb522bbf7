"""The doctor's report: what it says of this machine, and of machines described by fake /proc and /sys trees."""

from __future__ import annotations

import os
import re
from pathlib import Path

import psutil
import pytest

from smallthinker_edge._native import kernels
from smallthinker_edge.cli import main
from smallthinker_edge.machine import doctor
from smallthinker_edge.measure import limits


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SECONDS", 0.05)
    monkeypatch.setattr(doctor, "FILE", 4 << 20)
    monkeypatch.setattr(limits, "streaming_bytes", lambda: 4 << 20)


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_report_names_table_page_size_and_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path)]) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert rows["kernel table"].split()[0] == (os.environ.get("SMALLTHINKER_CPU") or kernels.tables()[0])
    assert rows["page size"].split()[0] == str(os.sysconf("SC_PAGE_SIZE"))
    assert rows["recommended budget"].strip().startswith("memory=")
    assert "MB/s" in rows[f"reads at {tmp_path}"]
    assert re.search(r"GB/s \([\d.]+-[\d.]+\) with 1", rows["memory reads"])
    assert list(tmp_path.iterdir()) == []  # the temporary file is gone


def test_a_file_is_read_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "model"
    file.write_bytes(os.urandom(3 << 20))
    assert doctor.measure_disk(file).one_reader > 0
    assert file.stat().st_size == 3 << 20


def test_a_missing_path_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path / "absent")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_features_of_a_raspberry_pi_5(tmp_path: Path) -> None:
    write(tmp_path, "proc/cpuinfo", "processor\t: 0\nFeatures\t: fp asimd evtstrm aes fphp asimdhp cpuid asimddp\n")
    write(tmp_path, "proc/device-tree/model", "Raspberry Pi 5 Model B Rev 1.0\0")
    rows = dict(doctor.processor(tmp_path))
    assert rows["processor"].startswith("Raspberry Pi 5 Model B Rev 1.0")
    assert rows["features"] == "asimd asimdhp asimddp"


def test_a_table_that_this_cpu_lacks_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALLTHINKER_CPU", "nonsense")
    assert "nonsense" in dict(doctor.processor())["warning"]


def test_huge_pages_and_cgroup_are_read(tmp_path: Path) -> None:
    write(tmp_path, "sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n")
    write(tmp_path, "sys/fs/cgroup/cgroup.controllers", "memory\n")
    write(tmp_path, "sys/fs/cgroup/memory.max", "1073741824\n")
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    rows = dict(doctor.memory(tmp_path))
    assert rows["huge pages"] == "madvise"
    assert rows["cgroup"] == "version 2, limit 1.00 GiB"


def test_the_budget_is_the_cgroups_limit_where_that_is_the_tighter_one(tmp_path: Path) -> None:
    free = doctor.recommended_budget(tmp_path)
    assert free < psutil.virtual_memory().available
    write(tmp_path, "sys/fs/cgroup/cgroup.controllers", "memory\n")
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    write(tmp_path, "sys/fs/cgroup/memory.max", str(64 << 20))
    assert doctor.recommended_budget(tmp_path) == 64 << 20
