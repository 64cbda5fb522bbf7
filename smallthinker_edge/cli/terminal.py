"""Messages of a person at a terminal, read with prompt_toolkit (extra `terminal`): history, several lines, completion
and a status line. Called by chat.py, which does with less where this cannot be imported. It knows no model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

MENU_LINES = 6


class Prompt:
    """Asks for messages.

    Args:
        commands: what may be typed after a slash at the beginning, with what it does. with_file: those of them that a
            file's name follows.
        history: file that keeps what was typed, None for none.
    """

    def __init__(self, commands: Mapping[str, str], with_file: Collection[str], history: Path | None) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=kept_history(history),
            completer=CommandCompleter(commands, with_file),
            key_bindings=bindings(),
            multiline=True,
            prompt_continuation="... ",
            reserve_space_for_menu=MENU_LINES,
        )

    def read(self, status: Callable[[], str]) -> str | None:
        """The next message, under which `status` is shown; None at Ctrl-D. KeyboardInterrupt at Ctrl-C."""
        text = status()
        try:
            return self._session.prompt("> ", bottom_toolbar=text)
        except EOFError:
            return None


class CommandCompleter(Completer):
    """Commands at the beginning of a message, and files after those that take one."""

    def __init__(self, commands: Mapping[str, str], with_file: Collection[str]) -> None:
        self._commands, self._with_file = commands, with_file
        self._files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        name, space, rest = text.partition(" ")
        if space and name in self._with_file:
            file = rest.lstrip()
            yield from self._files.get_completions(Document(file, len(file)), complete_event)
        elif not space and text.startswith("/"):
            for command, meaning in self._commands.items():
                if command.startswith(text):
                    yield Completion(command, -len(text), display_meta=meaning)


def bindings() -> KeyBindings:
    """Enter sends, but for a line that ends with a backslash; Alt-Enter begins a new line."""
    keys = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)

    @keys.add("enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class KeptHistory(FileHistory):
    """A file; a disk that is full costs the history and not the conversation."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


def kept_history(path: Path | None) -> History:
    """The history of a file that only its owner may read; one that ends with the process where there can be no such
    file."""
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError:
        return InMemoryHistory()
    return KeptHistory(str(path))


def history_file() -> Path | None:
    """Where chat keeps its history: in the user's state folder (XDG_STATE_HOME, else ~/.local/state); None without a
    home."""
    folder = os.environ.get("XDG_STATE_HOME", "")
    try:
        state = Path(folder) if os.path.isabs(folder) else Path.home() / ".local" / "state"
    except RuntimeError:
        return None
    return state / "smallthinker_edge" / "chat_history"
