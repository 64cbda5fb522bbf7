"""The check before `make` sets up .venv names what is missing and what to install."""

from __future__ import annotations

import sys
from pathlib import Path

import check_setup
import pytest


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -pthread")
    problem = check_setup.compiler_problem()
    assert "no-such-compiler" in problem
    assert "build-essential" in problem


def test_missing_headers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CPATH", raising=False)
    monkeypatch.setattr(check_setup, "headers", lambda: str(tmp_path))
    assert "python3-dev" in check_setup.compiler_problem()


def test_missing_venv_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    assert "python3-venv" in check_setup.venv_problem()


def test_old_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    assert "3.10" in check_setup.python_problem()


def test_machine_that_runs_these_tests_has_everything() -> None:
    assert check_setup.main() == 0
