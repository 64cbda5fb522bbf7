"""Every system call, allocation and thread of a short run that can fail, failing; see tests/support/faults.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

import faults
import pytest
from shims import run_with

EVERY = os.environ.get("FAULTS") == "all"  # make test-faults


@pytest.mark.parametrize("scenario", faults.SCENARIOS)
def test_every_fault_is_an_exception_that_leaves_nothing_behind(
    fault_shim: Path, scenario: str, tmp_path: Path
) -> None:
    arguments = [faults.__file__, tmp_path, scenario, *(["--all"] if EVERY else [])]
    report = json.loads(run_with(fault_shim, arguments))
    print(report)
    assert {kind for kind, count in report["calls"].items() if count} >= faults.SCENARIOS[scenario]
    assert sum(report["done"].values()) > 30
