"""What CONTRIBUTING and the architecture say of files is true: they exist and hold the lists that are spoken of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("", "include/smallthinker", "src", "src/kernels", "smallthinker_edge", "smallthinker_edge/_native", "tests")
FILE = re.compile(r"[\w./-]+\.(?:py|pyx|pxd|c|h|md|toml)|\.ci/run|(?:[\w-]+/)+")
WORD = re.compile(r"\w+(?:\(\))?")


def find(name: str) -> Path | None:
    return next((ROOT / folder / name for folder in FOLDERS if (ROOT / folder / name).exists()), None)


def recipes() -> list[str]:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    part = text.partition("## Where things go")[2].partition("\n## ")[0]
    return [recipe for recipe in re.split(r"\n- ", part) if recipe.strip()]


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.partition("**")[2].partition("**")[0])
def test_a_recipes_files_exist_and_hold_what_it_names(recipe: str) -> None:
    words = re.findall(r"`([^`]+)`", recipe)
    files = {word: find(word) for word in words if FILE.fullmatch(word) and "<" not in word}
    assert None not in files.values(), [name for name, path in files.items() if path is None]
    paths = [path for found in files.values() if found for path in ([found] if found.is_file() else found.glob("*.py"))]
    text = "".join(path.read_text(encoding="utf-8") for path in paths)
    names = [word.removesuffix("()") for word in words if WORD.fullmatch(word)]
    missing = [name for name in names if name not in text]
    assert not missing


def test_the_tree_of_the_architecture_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = text.partition("```\n")[2].partition("```")[0]
    named = set(re.findall(r"\b[\w]+\.h\b", tree)) | set(re.findall(r"^(?:\w+/)+", tree, re.MULTILINE))
    assert len(named) > 12
    assert [name for name in sorted(named) if find(name) is None] == []
    for module in re.findall(r"journeys", text) and re.findall(r"`([a-z_]+\.(?:py|pyx))`", text):
        assert list((ROOT / "smallthinker_edge").rglob(module)), module
