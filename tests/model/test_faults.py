"""Every system call, allocation and thread of a short run that can fail, failing; see tests/support/faults.py."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import faults
import pytest

SHIM = Path(__file__).parents[1] / "native" / "fault_shim.c"
EVERY = os.environ.get("FAULTS") == "all"  # make test-faults


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if os.environ.get("LD_PRELOAD"):
        pytest.skip("something else is preloaded")
    library = tmp_path_factory.mktemp("shim") / "fault_shim.so"
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")
    options = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC"]
    try:
        subprocess.run([*compiler, *options, SHIM, "-o", library, "-ldl"], check=True, capture_output=True)
        subprocess.run([sys.executable, "-c", ""], env={"LD_PRELOAD": str(library)}, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as problem:
        pytest.skip(f"no C compiler that can build the shim, or no glibc: {problem}")
    return library


@pytest.mark.parametrize("scenario", faults.SCENARIOS)
def test_every_fault_is_an_exception_that_leaves_nothing_behind(shim: Path, scenario: str, tmp_path: Path) -> None:
    command = [sys.executable, faults.__file__, tmp_path, scenario, *(["--all"] if EVERY else [])]
    environment = os.environ | {"LD_PRELOAD": str(shim)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    print(report)
    assert {kind for kind, count in report["calls"].items() if count} >= faults.SCENARIOS[scenario]
    assert sum(report["done"].values()) > 30
