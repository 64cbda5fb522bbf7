"""Libraries of tests/native/ that are preloaded into Python processes, and what comes of these."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

NATIVE = Path(__file__).parents[1] / "native"
SECONDS = 1800


def build_shim(name: str, folder: Path, **variables: str) -> Path:
    """The library made of a source file, which reads these variables; skips the test where it cannot be preloaded."""
    if os.environ.get("LD_PRELOAD"):
        pytest.skip("something else is preloaded")
    library = folder / f"{name}.so"
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")
    options = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC"]
    try:
        subprocess.run(
            [*compiler, *options, NATIVE / f"{name}.c", "-o", library, "-ldl"], check=True, capture_output=True
        )
        subprocess.run(
            [sys.executable, "-c", ""], env={"LD_PRELOAD": str(library), **variables}, check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError) as problem:
        pytest.skip(f"no C compiler that can build the shim, or no glibc: {problem}")
    return library


def run_with(shim: Path, arguments: list[Any], **variables: str) -> str:
    """What Python prints, run with these arguments and the shim. AssertionError where it fails."""
    environment = os.environ | {"LD_PRELOAD": str(shim)} | variables
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
