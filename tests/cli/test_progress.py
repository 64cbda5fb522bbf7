"""Progress on stderr: with tqdm and without, of every long command, and on a terminal only."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path

import pytest
from gguf_files import write_model

from smallthinker_edge import cli
from smallthinker_edge.cli.progress import progress

HOSTILE = "\x1b[2J\u202egnp.\nerror: forged" + "x" * 1000


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smallthinker_edge.cli.progress.on_terminal", lambda: True)


@pytest.fixture(params=["tqdm", "line"])
def view(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, terminal: None) -> str:
    if request.param == "line":
        monkeypatch.setitem(sys.modules, "tqdm", None)
    return str(request.param)


def lines(text: str) -> list[str]:
    """What a terminal would show in the end."""
    shown = []
    for line in text.split("\n"):
        last = ""
        for part in line.split("\r"):
            last = part.removeprefix("\x1b[K") if part.startswith("\x1b[K") else part + last[len(part) :]
        shown.append(last.rstrip())
    return shown


def test_it_tells_how_much_of_what_is_done(view: str, capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as show:
        for done in range(5):
            show(done, 4, f"part {done}")
    (line, rest) = lines(capsys.readouterr().err)
    assert "4/4" in line
    assert "part 4" in line
    assert rest == ""


def test_other_work_has_a_line_of_its_own(view: str, capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as show:
        for total in (2, 3, 3):
            for done in range(total + 1):
                show(done, total, "parts")
    first, second, third, rest = lines(capsys.readouterr().err)
    assert "2/2" in first
    assert "3/3" in second
    assert "3/3" in third
    assert rest == ""


def test_what_is_said_after_an_error_has_a_line_of_its_own(view: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with progress() as show:
            show(0, 4, "parts")
            show(1, 4, "parts")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    print("error: full", file=sys.stderr)
    line, error, _ = lines(capsys.readouterr().err)
    assert "1/4" in line
    assert error == "error: full"


def test_a_transient_one_leaves_nothing(view: str, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(transient=True) as show:
        show(0, 2, "parts")
        show(1, 2, "parts")
        show(2, 2, "parts")
        show(1, 1, "done at once")
        show(1, 3, "interrupted")
    assert not "".join(lines(capsys.readouterr().err)).strip()


def test_a_hostile_name_is_shown_on_its_line(view: str, capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as show:
        show(0, 2, HOSTILE)
        show(1, 2, HOSTILE)
    text = capsys.readouterr().err
    assert not re.search("[\x00-\x09\x0b\x0c\x0e-\x1a\x1c-\x1f\u202e]|\x1b(?!\\[[KA])", text)
    assert not any(line.startswith("error") for line in lines(text))


def test_nothing_is_shown_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as show:
        show(1, 2, "parts")
        show(2, 2, "parts")
    assert capsys.readouterr().err == ""


def test_it_starts_no_thread(view: str) -> None:
    before = threading.active_count()
    with progress() as show:
        show(0, 2)
        assert threading.active_count() == before


def test_every_long_command_shows_it(view: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, packed, text = tmp_path / "m.gguf", tmp_path / "m.stpk", tmp_path / "text.txt"
    write_model(model, context_length=1024)
    text.write_text("hello world " * 200, encoding="utf-8")
    prompt = "hello world " * 250  # of more tokens than are computed at once
    for command, shown in [
        (["pack", model, "-o", packed], "32/32"),
        (["verify", packed], r"(\d+)/\1"),
        (["unpack", packed, "-o", tmp_path / "back.gguf"], "32/32"),
        (["convert", model, "-o", tmp_path / "q8.gguf", "--type", "q8_0"], r"(\d+)/\1.*done"),
        (["perplexity", model, text, "--context", "64"], r"(\d+)/\1.*windows, perplexity"),
        (["trace", "-m", model, "--random", "600", "--context", "1024"], r"4/4.*layers loaded[\s\S]*600/600"),
        (["generate", "-m", model, "-p", prompt, "--max-tokens", "1"], r"512/(\d+) [\s\S]*tokens of the prompt"),
        (["report", "-m", model, "-p", prompt, "--max-tokens", "3", "-o", tmp_path / "r.html"], "1/1.*done"),
    ]:
        capsys.readouterr()
        assert cli.main([str(argument) for argument in command]) == 0
        assert re.search(shown, capsys.readouterr().err), command
