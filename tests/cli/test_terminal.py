"""What files and models say reaches the terminal as text: nothing that it would obey, and no lines of its own."""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path

import gguf_files
import pytest

from smallthinker_edge import cli
from smallthinker_edge.cli.arguments import show_text
from smallthinker_edge.errors import ChatTemplateError, ModelFormatError
from smallthinker_edge.files import hot_experts
from smallthinker_edge.files.checkpoint import CheckpointConfig
from smallthinker_edge.printable import printable
from smallthinker_edge.text.template import render

# Clears the screen, sets the window's title, the same in C1, writes backwards, goes back to the line's beginning.
COMMANDS = "\x1b[2J\x1b]0;owned\x07\x9b2J\u202egnp.\u2066\r\b"
FORGED = "nothing\nerror: forged\u2028error: forged too"
HOSTILE = COMMANDS + FORGED
OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return code, output.out, output.err


def assert_harmless(text: str) -> None:
    assert not OBEYED.search(text), ascii(text)
    assert not re.search(r"^(error: )?forged", text, re.MULTILINE), text


def test_only_characters_that_a_terminal_obeys_are_escaped() -> None:
    assert printable("\x1b[1m\x9b\u202e\ud800\n") == r"\x1b[1m\x9b\u202e\ud800" + r"\n"
    shown = "naïve — \u4f60\u597d\u3000\u05e9\u05dc\u05d5\u05dd 👩\u200d🔬 C:\\new"
    assert printable(shown) == shown
    assert printable("a\tb\nc\rd", keep="\n\t") == "a\tb\nc\\rd"


def test_info_shows_hostile_keys_names_and_values_on_lines_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"{HOSTILE}.gguf"
    keys = {
        HOSTILE: "a value",
        "general.name": HOSTILE,
        "general.tags": [HOSTILE, HOSTILE],
        "x" * 60000: 1,
    }
    gguf_files.write_model(path, metadata=keys)
    code, out, err = run(capsys, "info", "--tensors", path)
    assert (code, err) == (0, "")
    assert_harmless(out)
    assert "\\x1b[2J" in out
    assert max(map(len, out.splitlines())) < 400


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": HOSTILE},
        {"replace_tensors": {f"{HOSTILE}.weight": (gguf_files.np.zeros(32, "f4"), "F32")}},
        {"metadata": {"tokenizer.ggml.pre": HOSTILE}},
        {"metadata": {"smallthinker.block_count": HOSTILE}},
    ],
    ids=["architecture", "tensor", "tokenizer", "value"],
)
@pytest.mark.parametrize("command", [["plan"], ["verify"], ["generate", "-p", "x", "-m"]], ids=lambda c: c[0])
def test_an_error_about_a_hostile_file_is_one_line(
    command: list[str], change: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = gguf_files.write_model(tmp_path / f"{HOSTILE}.gguf", **change)
    code, _, err = run(capsys, *command, path)
    assert code == 1
    assert_harmless(err)
    assert err.count("\n") == 1


def test_a_hostile_type_or_key_of_a_raw_file_is_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = gguf_files.RawGGUF().u32(HOSTILE, 1).u32(HOSTILE, 2)
    code, _, err = run(capsys, "info", raw.write(tmp_path / "twice.gguf"))
    assert code == 1
    assert "occurs twice" in err
    assert_harmless(err)


@pytest.mark.parametrize("command", [["info"], ["doctor"], ["convert", "-o", "x.gguf"], ["bench"]], ids=lambda c: c[0])
def test_a_hostile_argument_is_escaped(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *command, tmp_path / "nowhere" / HOSTILE)
    assert code in (1, 2)
    assert_harmless(out + err)
    assert err.count("\n") == 1


def test_messages_of_exceptions_are_escaped_and_their_attributes_are_not() -> None:
    error = ModelFormatError(f"is {HOSTILE}", path=HOSTILE, field=HOSTILE)
    assert_harmless(str(error))
    assert (error.path, error.field) == (HOSTILE, HOSTILE)
    with pytest.raises(ChatTemplateError) as caught:
        render("{{ raise_exception(text) }}", {"text": HOSTILE})
    assert_harmless(str(caught.value))


def test_logs_and_warnings_are_escaped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    profile = tmp_path / f"{HOSTILE}.hot"
    profile.write_text('{"format": "other"}')
    with caplog.at_level(logging.WARNING):
        assert hot_experts.load_profile(profile, 8) is None
    assert len(caplog.messages) == 1
    assert_harmless(caplog.messages[0])
    (tmp_path / "config.json").write_text(
        '{"model_type": "smallthinker", "rope_theta": 1, "\\u001b[2J\\nforged": 1}', encoding="utf-8"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CheckpointConfig(str(tmp_path))
    assert len(caught) == 1
    assert_harmless(str(caught[0].message))


def test_generated_text_is_escaped_on_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "two\n\tlines \x1b[2J"
    show_text(said)
    assert capsys.readouterr().out == said
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    show_text(said)
    assert capsys.readouterr().out == "two\n\tlines \\x1b[2J"
