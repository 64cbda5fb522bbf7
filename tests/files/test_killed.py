"""kill -9 at random moments of convert, pack and save; see tests/support/killed.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import killed
import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("writer", killed.WRITERS)
def test_a_killed_writer_damages_nothing_and_leaves_nothing_for_long(tmp_path: Path, writer: str) -> None:
    command = [sys.executable, killed.__file__, tmp_path, writer]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["kills"] >= 30
    assert report["leavers"] > 0, "some were killed while they wrote"
