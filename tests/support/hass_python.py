"""Runs a script in the Python that has Home Assistant, HASS_PYTHON, and gives the JSON lines that it prints.

The script is handed over as text: that Python may live where this directory cannot be seen. docs/home.md says how to
make one; tests are skipped without.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

PYTHON = os.environ.get("HASS_PYTHON", "")
SUPPORT = Path(__file__).resolve().parent
# Makes a module of a text, as the script that comes next imports it.
MODULE = """
import sys, types
sys.modules[{name!r}] = types.ModuleType({name!r})
exec(compile({text!r}, {name!r}, "exec"), sys.modules[{name!r}].__dict__)
"""


def printed_by(script: str, *arguments: str, needs: str = "homeassistant", imports: tuple[str, ...] = ()) -> list[Any]:
    """What a script of this directory prints there.

    Args:
        script: its file's name without .py. needs: a module without which the test is skipped. imports: other files of
            this directory that it imports.
    """
    if not PYTHON or subprocess.run([PYTHON, "-c", f"import {needs}"], capture_output=True).returncode:
        pytest.skip(f"{needs} is not there: HASS_PYTHON names a Python that has Home Assistant")
    texts = {name: (SUPPORT / f"{name}.py").read_text(encoding="utf-8") for name in (*imports, script)}
    modules = "".join(MODULE.format(name=name, text=texts[name]) for name in imports)
    command = [PYTHON, "-c", f"{modules}\nexec(compile({texts[script]!r}, {script!r}, 'exec'))", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
