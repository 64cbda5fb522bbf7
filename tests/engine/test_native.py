"""The pager, its reader, the thread team, its size, loading and the kernels' requests in C, under faults and load,
plain and under the compiler's sanitizers; and what the compiler must not leave out of the kernels."""

from __future__ import annotations

import platform
import re
import shlex
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Programs of tests/native/ and what they are linked with; those without include what they test.
PROGRAMS = {
    "pager_stress": ["src/paging/pager.c", "src/paging/eviction.c", "src/paging/crc32.c", "src/system/thread_start.c"],
    "reader_faults": [],
    "team_stress": [],
    "sizing": ["src/system/sizing.c"],
    "load": [
        *(f"src/weights/{name}.c" for name in ("load", "expert", "layout", "types")),
        *("src/paging/reader.c", "src/system/threads.c", "src/system/thread_start.c"),
    ],
    "ahead_lines": [],
}


COMPILER = shlex.split(sysconfig.get_config_var("CC") or "cc")
# A table of this machine, how it is compiled, and the requests that its functions make.
KERNELS = {
    "x86_64": (
        "x86/avx2.c",
        ["-mavx2", "-mfma", "-mf16c"],
        {"ffn": ("prefetcht0", "prefetcht1"), "attention": ("prefetcht0", "prefetcht1"), "gemm_q4_0": ("prefetcht0",)},
    ),
    "aarch64": ("arm/neon.c", [], {"ffn": ("pldl1keep",), "rows_q4_0": ("pldl1keep",)}),
}


def build_and_run(folder: Path, name: str, flags: list[str]) -> str:
    program, data = folder / name, folder / "data"
    data.mkdir()
    sources = [ROOT / "tests/native" / f"{name}.c", *(ROOT / source for source in PROGRAMS[name])]
    options = ["-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", *flags, f"-I{ROOT / 'include'}"]
    subprocess.run([*COMPILER, *options, *sources, "-o", program, "-pthread", "-lm"], check=True)
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


@pytest.mark.skipif(platform.machine() not in KERNELS, reason="no table for this machine")
def test_requests_are_not_optimised_away(tmp_path: Path) -> None:
    # as GCC 12 did with __builtin_prefetch: the results were right, and the FFN a fifth slower
    source, flags, requests = KERNELS[platform.machine()]
    options = ["-std=c11", "-O3", "-ffp-contract=off", "-S", f"-I{ROOT / 'include'}", *flags]
    assembly = tmp_path / "table.s"
    subprocess.run([*COMPILER, *options, ROOT / "src/kernels" / source, "-o", assembly], check=True)
    functions = re.split(r"^_?(\w[\w.]*):", assembly.read_text(), flags=re.MULTILINE)
    bodies = dict(zip(functions[1::2], functions[2::2], strict=True))
    for name, wanted in requests.items():
        for request in wanted:
            assert request in bodies[name], (name, request)


def test_requests_are_made_in_one_way() -> None:
    sources = {*ROOT.glob("src/**/*.[ch]"), *ROOT.glob("include/**/*.h"), *ROOT.glob("smallthinker_edge/_native/*.p*")}
    one = ROOT / "include/smallthinker/prefetch.h"
    assert len(sources) > 60
    for source in sources - {one}:
        assert not re.search(r"__builtin_prefetch|_mm_prefetch", source.read_text()), source
    assert one.read_text().count("__asm__ volatile") == 4  # a level each of two machines
