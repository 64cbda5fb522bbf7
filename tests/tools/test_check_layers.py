"""The check of who imports whom: it is quiet about the package and speaks up about what it forbids."""

from __future__ import annotations

from pathlib import Path

import pytest
from check_layers import LAYERS, faults

PACKAGE = Path(__file__).resolve().parents[2] / "smallthinker_edge"


def test_the_package_keeps_to_its_layers() -> None:
    assert faults(PACKAGE) == []
    rooms = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == set(LAYERS)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("text/chat.py", "from smallthinker_edge.model import SmallThinker"),
        ("files/packed.py", "from smallthinker_edge import SmallThinker"),
        ("machine/cgroup.py", "import smallthinker_edge.session"),
        ("generation/stream.py", "def f():\n    from smallthinker_edge.files import gguf"),
        ("generation/stream.py", "from smallthinker_edge.files.gguf import GGUFFile"),
        ("model.py", "from smallthinker_edge.cli import main"),
        ("plan.py", "from smallthinker_edge.files.pack import _write"),
        ("_native/engine.pyx", "from smallthinker_edge.model import SmallThinker"),
        ("_native/engine.pyx", "from ..model import (\n    SmallThinker)"),
        ("_native/engine.pyx", "import os, smallthinker_edge.model as model"),
        ("_native/engine.pyi", "from smallthinker_edge.model import SmallThinker"),
        ("text/chat.py", "from ..model import SmallThinker"),
        ("text/chat.py", "from .. import model"),
        ("plan.py", "from smallthinker_edge.files import gguf\ngguf._read()"),
        ("plan.py", "import smallthinker_edge.files.gguf as reader\nreader._read()"),
        ("plan.py", "import smallthinker_edge.files.gguf\nsmallthinker_edge.files.gguf._read()"),
        ("elsewhere.py", "import os"),
    ],
)
def test_what_is_forbidden_is_found(tmp_path: Path, file: str, line: str) -> None:
    target = tmp_path / file
    target.parent.mkdir(exist_ok=True)
    (tmp_path / "files").mkdir(exist_ok=True)
    (tmp_path / "files" / "gguf.py").touch()
    (tmp_path / "model.py").touch()
    target.write_text(line + "\n")
    assert len(faults(tmp_path)) == 1


def test_what_is_allowed_is_not(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("import os\nfrom smallthinker_edge.files.gguf import GGUFFile\nos._exit(0)\n")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "gguf.py").write_text("from . import config\nfrom .config import read\nself._own()\n")
    (tmp_path / "files" / "config.py").touch()
    assert faults(tmp_path) == []
