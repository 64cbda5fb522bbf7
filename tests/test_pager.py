"""The pager in C against a slow and faulty reader, plain and under the compiler's sanitizers."""

from __future__ import annotations

import shlex
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ["src/pager.c", "src/eviction.c", "src/crc32.c"]


def build_and_run(folder: Path, flags: list[str]) -> str:
    program = folder / "pager_stress"
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")
    command = [
        *compiler,
        "-std=gnu11",
        "-g",
        "-O1",
        *flags,
        f"-I{ROOT / 'include'}",
        ROOT / "tests/native/pager_stress.c",
    ]
    subprocess.run([*command, *(ROOT / s for s in SOURCES), "-o", program, "-pthread", "-lm"], check=True)
    return subprocess.run([program], check=True, capture_output=True, text=True, timeout=300).stdout


def test_experts_are_whole_pinned_and_counted(tmp_path: Path) -> None:
    assert build_and_run(tmp_path, []) == "ok\n"


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_no_race_and_no_bad_access(tmp_path: Path, sanitizer: str) -> None:
    try:
        assert build_and_run(tmp_path, [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]) == "ok\n"
    except subprocess.CalledProcessError as error:
        if error.cmd[0] != tmp_path / "pager_stress":
            pytest.skip(f"this compiler has no {sanitizer} sanitizer")
        raise
