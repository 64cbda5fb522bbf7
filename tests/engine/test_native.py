"""The pager, its reader and the thread team in C, under faults and load, plain and under the compiler's sanitizers."""

from __future__ import annotations

import shlex
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Programs of tests/native/ and what they are linked with; the latter two include what they test.
PROGRAMS = {
    "pager_stress": ["src/paging/pager.c", "src/paging/eviction.c", "src/paging/crc32.c", "src/system/thread_start.c"],
    "reader_faults": [],
    "team_stress": [],
}


def build_and_run(folder: Path, name: str, flags: list[str]) -> str:
    program, data = folder / name, folder / "data"
    data.mkdir()
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")
    sources = [ROOT / "tests/native" / f"{name}.c", *(ROOT / source for source in PROGRAMS[name])]
    options = ["-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", *flags, f"-I{ROOT / 'include'}"]
    subprocess.run([*compiler, *options, *sources, "-o", program, "-pthread", "-lm"], check=True)
    return subprocess.run([program, data], check=True, capture_output=True, text=True, timeout=300).stdout


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_behaves(tmp_path: Path, name: str) -> None:
    assert build_and_run(tmp_path, name, []) == "ok\n"


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_race_and_no_bad_access(tmp_path: Path, name: str, sanitizer: str) -> None:
    try:
        assert build_and_run(tmp_path, name, [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]) == "ok\n"
    except subprocess.CalledProcessError as error:
        if error.cmd[0] != tmp_path / name:
            pytest.skip(f"this compiler has no {sanitizer} sanitizer")
        print(error.stderr)
        raise
