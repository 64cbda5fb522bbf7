"""chat at a terminal: history, several lines, completion and the status line, with prompt_toolkit and without."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf_files import write_model
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput
from pseudo_terminal import in_terminal
from small_model import SHAPE

from smallthinker_edge.cli.chat import Conversation
from smallthinker_edge.cli.terminal import CommandCompleter, Prompt, history_file
from smallthinker_edge.files.pack import pack

COMMANDS = {name: str(command.__doc__) for name, command in Conversation.commands().items()}
WITH_FILE = ("/save", "/load")
CHAT = [sys.executable, "-m", "smallthinker_edge", "chat", "--max-tokens", "40", "-m"]
WITHOUT = "import sys; sys.modules['prompt_toolkit'] = None; from smallthinker_edge import cli; sys.exit(cli.main())"
ALT_ENTER, UP, CTRL_C, CTRL_D = "\x1b\r", "\x1b[A", "\x03", "\x04"


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


def completions(text: str) -> list[str]:
    completer = CommandCompleter(COMMANDS, WITH_FILE)
    found = completer.get_completions(Document(text, len(text)), CompleteEvent(completion_requested=True))
    return [text[: len(text) + completion.start_position] + completion.text for completion in found]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("one\r", "one"),
        (f"one{ALT_ENTER}two\r", "one\ntwo"),
        ("one\\\rtwo\r", "one\ntwo"),
        ("a \\ b\r", "a \\ b"),
        (f"\\{UP}\x1b[D\r\r", "\\"),  # the cursor is not behind the backslash
        ("\x1b[200~pasted\nlines\x1b[201~\r", "pasted\nlines"),
    ],
)
def test_enter_sends_and_lines_go_on(keys: PipeInput, typed: str, message: str) -> None:
    prompt = Prompt(COMMANDS, WITH_FILE, None)
    keys.send_text(typed)
    assert prompt.read(lambda: "") == message


def test_ctrl_d_ends_and_ctrl_c_interrupts(keys: PipeInput) -> None:
    prompt = Prompt(COMMANDS, WITH_FILE, None)
    keys.send_text(CTRL_D)
    assert prompt.read(lambda: "") is None
    keys.send_text(CTRL_C)
    with pytest.raises(KeyboardInterrupt):
        prompt.read(lambda: "")


def test_commands_and_their_files_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "first.json").touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert completions("/s") == ["/save", "/stats", "/system"]
    assert completions("/save ") == ["/save first.json", "/save folder"]
    assert completions("/load fi") == ["/load first.json"]
    assert completions("/load ~/fi") == ["/load ~/first.json"]
    assert completions("/system fi") == completions("fi") == completions("a /s") == completions("") == []


def test_the_history_is_the_owners_alone_and_never_in_the_way(
    keys: PipeInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = history_file()
    assert path == tmp_path / "state" / "smallthinker_edge" / "chat_history"
    prompt = Prompt(COMMANDS, WITH_FILE, path)
    keys.send_text(f"one{ALT_ENTER}two\r")
    prompt.read(lambda: "")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.read_text(encoding="utf-8").endswith("\n+one\n+two\n")
    path.unlink()
    path.mkdir()  # it cannot be written any more
    keys.send_text("three\r")
    assert prompt.read(lambda: "") == "three"
    keys.send_text("four\r")
    assert Prompt(COMMANDS, WITH_FILE, path).read(lambda: "") == "four"


@pytest.mark.parametrize("folder", ["", "relative"])
def test_without_a_state_folder_of_its_own_the_history_is_in_the_usual_one(
    folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_file() == tmp_path / ".local" / "state" / "smallthinker_edge" / "chat_history"


def test_a_conversation_in_a_terminal(demo_model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved conversation.json"
    environment = {"XDG_STATE_HOME": str(tmp_path / "state")}
    with in_terminal([*CHAT, str(demo_model)], environment) as terminal:
        terminal.until(r"context 0 of \d+ \| memory [\d,]+ MiB")
        terminal.type(f"turn on the{ALT_ENTER}kitchen light\r")
        first = terminal.until(r"(\{.*\})[^{]*?tokens/s \| context (\d+) of")
        assert int(first[2]) > 10
        terminal.type("/sav")
        terminal.until("FILE: write the conversation")  # which the menu says
        terminal.type(f"\t {saved}\r")
        terminal.until("tokens/s")
        terminal.type(CTRL_D)
        assert terminal.code() == 0
    messages = json.loads(saved.read_text(encoding="utf-8"))
    assert messages[0] == {"role": "user", "content": "turn on the\nkitchen light"}
    assert messages[1]["content"] == first[1]
    with in_terminal([*CHAT, str(demo_model)], environment) as terminal:
        terminal.until("context 0 of")
        terminal.type(f"/load {tmp_path}/saved")
        terminal.until("saved conversation.json")  # which the menu offers
        terminal.type("\t\r")
        assert int(terminal.until(r"context ([1-9]\d*) of")[1]) >= int(first[2]) - 2
        terminal.type(UP)
        terminal.until("/load")
        terminal.type(UP + UP)
        terminal.until("turn on the")  # what an earlier run was asked
        terminal.type(CTRL_C)
        assert terminal.code() == 130


def test_the_status_tells_the_budget_and_the_hit_rate(tmp_path: Path) -> None:
    pack(write_model(tmp_path / "m.gguf", **SHAPE), tmp_path / "m.stpk")
    with in_terminal(
        [*CHAT, str(tmp_path / "m.stpk"), "--memory", "1GiB", "--no-history"], {"XDG_STATE_HOME": str(tmp_path)}
    ) as terminal:
        terminal.until(r"context 0 of 1024 \| memory \d+ of 1,024 MiB")
        terminal.type("hello\r")
        terminal.until(r"memory \d+ of 1,024 MiB \| experts in memory \d+%")
        terminal.type(CTRL_D)
        assert terminal.code() == 0
    assert not (tmp_path / "smallthinker_edge").exists()


def test_without_the_extra_lines_are_read_all_the_same(demo_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT, *CHAT[3:], str(demo_model)]
    with in_terminal(command, {"XDG_STATE_HOME": str(tmp_path)}) as terminal:
        terminal.until("> ")
        terminal.type("turn on the kitchen light\r")
        terminal.until(r"\{.*\}")
        terminal.type("/stats\r")
        terminal.until(r"conversation: \d+ of \d+ tokens[^>]*> ")
        terminal.type(CTRL_D)
        assert terminal.code() == 0
        assert "context 0 of" not in terminal.shown
    assert os.listdir(tmp_path) == []
