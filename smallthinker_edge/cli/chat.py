"""`chat`: a conversation in the terminal, with commands that begin with a slash."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from smallthinker_edge.cli.arguments import (
    OK,
    Command,
    add_model_arguments,
    checking_arguments,
    one_line,
    open_model,
    show_text,
)
from smallthinker_edge.cli.generate import add_sampling_arguments, print_stats, sampling_options
from smallthinker_edge.errors import ChatTemplateError, ContextFull
from smallthinker_edge.files.atomic import atomic_file
from smallthinker_edge.generation.stream import TextStream
from smallthinker_edge.model import SmallThinker
from smallthinker_edge.text.chat import plain_messages


def chat_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message to start with")
    add_sampling_arguments(parser)


class Conversation:
    """Messages so far and the model that answers. Methods whose names begin with `do_` are its commands."""

    def __init__(self, model: SmallThinker, system: str | None, options: dict[str, Any]) -> None:
        self._model, self._options = model, options
        self._opening = [{"role": "system", "content": system}] if system else []
        self._messages: list[dict[str, Any]] = list(self._opening)
        self._stream: TextStream | None = None

    def do_reset(self, _: str) -> None:
        """forget the conversation"""
        self._messages = list(self._opening)

    def do_system(self, text: str) -> None:
        """TEXT: start anew with this system message; without a text, with none"""
        self._opening = [{"role": "system", "content": text}] if text else []
        self._messages = list(self._opening)

    def do_save(self, path: str) -> None:
        """FILE: write the conversation as JSON"""
        with atomic_file(path) as file:
            file.write(0, (json.dumps(self._messages, ensure_ascii=False, indent=1) + "\n").encode())

    def do_load(self, path: str) -> None:
        """FILE: go on with a conversation that was saved"""
        with open(path, encoding="utf-8") as file:
            messages = json.load(file)
        self._messages = plain_messages(messages)

    def do_stats(self, _: str) -> None:
        """tell speed and memory"""
        print_stats(self._model, None if self._stream is None else self._stream.result)

    def do_help(self, _: str) -> None:
        """tell what there is"""
        for name, command in self.commands().items():
            print(f"{name} {command.__doc__}", file=sys.stderr)
        print("A line that ends with \\ goes on in the next one.", file=sys.stderr)

    def commands(self) -> dict[str, Callable[[str], None]]:
        """Each by what is typed for it."""
        names = [name for name in dir(self) if name.startswith("do_")]
        return {"/" + name.removeprefix("do_"): getattr(self, name) for name in names}

    def command(self, line: str) -> None:
        """Does what a line with a slash says; tells what is wrong in one line."""
        name, _, rest = line.partition(" ")
        command = self.commands().get(name)
        if command is None:
            print(f"error: there is no {one_line(name)}; /help tells what there is", file=sys.stderr)
            return
        try:
            command(rest.strip())
        except (OSError, ValueError, ChatTemplateError) as error:
            print(f"error: {one_line(error)}", file=sys.stderr)

    def answer(self, text: str) -> None:
        """Prints the answer to a message and keeps both; Ctrl-C ends an answer early."""
        question = {"role": "user", "content": text}
        pieces: list[str] = []
        try:
            with checking_arguments():
                self._stream = self._model.stream_chat([*self._messages, question], **self._options)
            for piece in self._stream:
                pieces.append(piece)
                show_text(piece)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except ContextFull as error:
            print(f"error: {one_line(error)}; /reset starts anew", file=sys.stderr)
            return
        print(flush=True)
        self._messages += [question, {"role": "assistant", "content": "".join(pieces)}]


def read_message() -> str | None:
    """The next message of the user, of several lines where they end with a backslash; None at the end of the input."""
    lines: list[str] = []
    while True:
        try:
            line = input(("... " if lines else "> ") if sys.stdin.isatty() else "")
        except EOFError:
            return "\n".join(lines) if lines else None
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


def complete_commands(names: list[str]) -> None:
    """Line editing, history and completion of commands, where Python has readline."""
    with suppress(ImportError):
        import readline

        def complete(text: str, state: int) -> str | None:
            return next(iter([name for name in names if name.startswith(text)][state:]), None)

        readline.set_completer(complete)
        readline.set_completer_delims(" ")
        readline.parse_and_bind("tab: complete")


def chat(arguments: argparse.Namespace) -> int:
    options = sampling_options(arguments)
    with open_model(arguments) as model:
        conversation = Conversation(model, arguments.system, options)
        if sys.stdin.isatty():
            complete_commands(list(conversation.commands()))
            print("Type a message. /help tells more; Ctrl-C stops an answer, Ctrl-D ends.")
        while (message := read_message()) is not None:
            if message.startswith("/"):
                conversation.command(message)
            elif message.strip():
                conversation.answer(message)
    return OK


COMMANDS = (Command("chat", "talk with a model in the terminal", chat_arguments, chat),)
