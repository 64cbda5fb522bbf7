"""What the documents say is true where it can be looked up: files, lists, links, commands, measured figures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import arm_pages
import pytest
import report

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
NOTES, MEASUREMENTS = DOCS / "notes", DOCS / "measurements"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
FOLDERS = ("", "include/smallthinker", "src", "src/kernels", "smallthinker_edge", "smallthinker_edge/_native", "tests")
FILE = re.compile(r"[\w./-]+\.(?:py|pyx|pxd|c|h|md|toml)|\.ci/run|(?:[\w-]+/)+")
WORD = re.compile(r"\w+(?:\(\))?")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def find(name: str) -> Path | None:
    return next((ROOT / folder / name for folder in FOLDERS if (ROOT / folder / name).exists()), None)


def code_of(document: Path) -> Iterator[str]:
    """What stands in backticks, and the lines of fenced blocks."""
    text = document.read_text(encoding="utf-8")
    for block in FENCED.findall(text):
        yield from block.splitlines()[1:-1]
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCED.sub("", text)))


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
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    tree = text.partition("```\n")[2].partition("```")[0]
    named = set(re.findall(r"\b[\w]+\.h\b", tree)) | set(re.findall(r"^(?:\w+/)+", tree, re.MULTILINE))
    assert len(named) > 12
    assert [name for name in sorted(named) if find(name) is None] == []
    for module in re.findall(r"journeys", text) and re.findall(r"`([a-z_]+\.(?:py|pyx))`", text):
        assert list((ROOT / "smallthinker_edge").rglob(module)), module


# Links, files and commands


def headings(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    text = FENCED.sub("", document.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def links(document: Path) -> Iterator[tuple[str, str]]:
    """(path, anchor) of every link to a file of this repository."""
    text = FENCED.sub("", document.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield path, anchor


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    for path, anchor in links(document):
        target = document.parent / path if path else document
        assert target.exists(), path
        assert not anchor or anchor in headings(target), f"{path}#{anchor}"


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.parent != NOTES], ids=name_of)
def test_files_that_a_document_names_exist(document: Path) -> None:
    """Notes are left out: they are of their day."""
    words = {word for code in code_of(document) for word in code.split() if "/" in word}
    named = sorted(word for word in words if FILE.fullmatch(word) and not word.endswith("/"))
    assert [word for word in named if find(word) is None] == []


def test_documents_that_sources_name_exist() -> None:
    folders = ("smallthinker_edge", "src", "include", "tools", "tests", "benchmarks", "examples")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.*")]
    sources = [path for path in sources if path.suffix in {".py", ".pyx", ".pxd", ".h", ".c"} and not generated(path)]
    named = {name for path in sources for name in re.findall(r"docs/[\w/-]+\.md", path.read_text(encoding="utf-8"))}
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def generated(source: Path) -> bool:
    """Whether Cython wrote it, from an earlier state perhaps."""
    return source.suffix == ".c" and source.parent.name == "_native"


def make_targets() -> set[str]:
    front = re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    targets = set(front)
    for prefix, folder in (("bench", "benchmarks"), ("test", "tests")):
        names = re.findall(r"^NAMES := (.*)$", (ROOT / folder / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        targets |= {f"{prefix}-{name}" for name in names[0].split()}
    return targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_make_targets_that_a_document_names_exist(document: Path) -> None:
    named = {name for code in code_of(document) for name in re.findall(r"\bmake ([a-z][a-z0-9-]*)", code)}
    assert named <= make_targets()


# Figures


def test_every_measurement_has_its_page_and_the_page_shows_it() -> None:
    """`make bench-docs` was run: it would write the same text again, and leaves no .json out."""
    made = report.pages() | report.pictures() | arm_pages.pages()
    assert {path.with_suffix("") for path in made} == {path.with_suffix("") for path in MEASUREMENTS.rglob("*.json")}
    stale = [path.name for path, text in made.items() if path.read_text(encoding="utf-8") != text]
    assert not stale


@pytest.mark.parametrize("folder", [MEASUREMENTS, NOTES], ids=name_of)
def test_a_folders_index_lists_its_pages(folder: Path) -> None:
    listed = {path for path, _ in links(folder / "README.md")}
    assert {path.name for path in folder.glob("*.md")} - {"README.md"} <= listed


def test_notes_are_dated() -> None:
    names = [path.name for path in NOTES.iterdir() if path.name != "README.md"]
    assert names
    assert [name for name in names if not re.fullmatch(r"20\d\d-\d\d-\d\d-[a-z0-9-]+\.md", name)] == []


def test_the_performance_document_is_short() -> None:
    assert len((DOCS / "performance.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_headline_figures_are_those_of_the_measurements() -> None:
    """Columns of the Xeon: "ours, llama.cpp" and "**ratio** (range)" of a model and a job."""
    text = (DOCS / "performance.md").read_text(encoding="utf-8")
    shown = {}
    for line in text.splitlines():
        if match := re.match(r"\| (4B|21B), ([^|]+) \| ([\d., ]+) \| ([^|]+) \|", line):
            model, job, speeds, ratio = match.groups()
            shown[model.lower(), job] = (speeds, ratio)
    measured = {}
    for model in ("4b", "21b"):
        result = json.loads((MEASUREMENTS / f"{model}.json").read_text(encoding="utf-8"))
        for job in report.jobs_of(result):
            values = report.summary(result, job)
            ratio, _, spread = report.spread(values["ratios"], 2).partition(" ")
            speeds = f"{values['ours']:.1f}, {values['rival']:.1f}"
            measured[model, report.job_name(job)] = (speeds, f"**{ratio}** {spread}")
    assert shown == measured
