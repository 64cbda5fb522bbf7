"""What fuzzing found, once more, and a few hundred new inputs for each target; `make fuzz` goes on for longer."""

from __future__ import annotations

import gzip
import itertools
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from run import Trying
from targets import FINDINGS, TARGETS

ROOT = Path(__file__).parents[2]
INPUTS = 40  # besides the seeds
CORE = ["src/weights/expert.c", "src/weights/layout.c", "src/weights/quantize.c", "src/weights/types.c",
        "src/paging/crc32.c", "src/paging/eviction.c"]  # fmt: skip


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Trying]]:
    out = tmp_path_factory.mktemp("findings")
    tried = {name: Trying(name, out) for name in TARGETS}
    yield tried
    for target in tried.values():
        target.workplace.close()


FOUND = sorted(FINDINGS.glob("*/*.gz"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_was_found_once_is_refused(path: Path, tried: dict[str, Trying]) -> None:
    """Each of these ended in something else than a SmallThinkerError, or in memory without bounds."""
    target = tried[path.parent.name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    target.run(target.target, gzip.decompress(path.read_bytes()))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40 << 10  # KiB


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_taken_and_changed_ones_are_taken_or_refused(name: str, tried: dict[str, Trying]) -> None:
    target = tried[name]
    for data in target.seeds:
        assert target.run(target.target, data) or name == "template"  # not every template takes tools
    for data in itertools.islice(target.inputs(0), INPUTS + len(target.seeds)):
        target.run(target.target, data)


def test_the_core_takes_what_files_may_hold(tmp_path: Path) -> None:
    if shutil.which("clang") is None:
        pytest.skip("no clang")
    flags = ["-std=gnu11", "-O1", "-g", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all", "-Iinclude"]
    sources = ["tests/native/fuzz_core.c", *CORE, "-lm", "-o", tmp_path / "core"]
    try:
        subprocess.run(["clang", *flags, *sources], cwd=ROOT, check=True, capture_output=True)
    except subprocess.CalledProcessError as problem:
        pytest.skip(f"this clang has no fuzzer: {problem.stderr[-300:]!r}")
    done = subprocess.run(
        [tmp_path / "core", "-runs=3000", "-seed=1"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
