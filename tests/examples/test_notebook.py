"""The notebook of the examples runs from top to bottom and shows what it has saved."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ipykernel", reason="ipykernel is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "tour.ipynb"


def shown(notebook: Any) -> list[str]:
    """The texts under each cell."""
    return [
        "".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in cell["outputs"])
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_it_runs_and_shows_what_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    saved = shown(notebook)
    assert len(saved) >= 6
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    assert shown(notebook) == saved
