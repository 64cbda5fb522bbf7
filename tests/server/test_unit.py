"""The systemd unit of the examples: its command is one of ours, and systemd knows every word of it."""

from __future__ import annotations

import configparser
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from smallthinker_edge.cli import build_parser
from smallthinker_edge.machine.memory import parse_memory

UNIT = Path(__file__).resolve().parents[2] / "examples" / "smallthinker-edge.service"


def test_its_command_is_ours_and_its_budget_below_the_limit() -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=False)  # a word may stand twice
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT)
    program, *words = shlex.split(unit["Service"]["ExecStart"])
    assert program.endswith("/smallthinker-edge")
    arguments = build_parser().parse_args(words)
    assert arguments.command == "serve"
    assert arguments.memory < parse_memory(unit["Service"]["MemoryMax"].replace("M", "MiB"))
    for name, option in (("StateDirectory", arguments.model), ("CacheDirectory", arguments.prefix_folder)):
        assert f"/{unit['Service'][name]}/" in option


def test_systemd_knows_all_of_it(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    # The program has to be there for systemd, which looks for it.
    text = UNIT.read_text(encoding="utf-8").replace(
        "/opt/smallthinker/bin/smallthinker-edge", shutil.which("true") or ""
    )
    (tmp_path / UNIT.name).write_text(text, encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / UNIT.name], capture_output=True, text=True, check=False
    )
    ours = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert (done.returncode, ours) == (0, []), done.stderr


def test_it_may_do_little() -> None:
    """At most 2.0 of systemd's 10 points of exposure; a service without any bounds has 9.6."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", str(UNIT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unrecognized option" in done.stderr:
        pytest.skip("systemd is older than 250")
    assert done.returncode == 0, done.stdout + done.stderr
