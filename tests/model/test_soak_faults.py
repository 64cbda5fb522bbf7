"""Sessions in two threads for a long time while calls of the system fail by chance; see tests/support/soak_faults.py.

`make test-soak-faults` runs it for ten minutes, each time with another seed.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import soak_faults
from shims import run_with

SECONDS = os.environ.get("SOAK_FAULTS_SECONDS")


def test_everything_goes_on_in_bad_weather(fault_shim: Path, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32) if SECONDS else 1
    print(f"seed {seed}")
    length = ["--seconds", SECONDS] if SECONDS else ["--rounds", "4"]
    report = json.loads(run_with(fault_shim, [soak_faults.__file__, tmp_path, "--seed", seed, *length]))
    print(json.dumps(report, indent=1))
    if path := os.environ.get("SOAK_REPORT"):
        Path(path).write_text(json.dumps(report))
    assert report["tokens"] > 1000
    assert sum(report["injected"].values()) > 10
    assert {"OutOfMemoryError", "DecodeCancelled"} <= report["failed"].keys()
    assert report["steps"].keys() >= {"decode", "prompt", "fork"}
