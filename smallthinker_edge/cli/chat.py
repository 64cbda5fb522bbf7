"""`chat`: a conversation in the terminal, with commands that begin with a slash."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
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
from smallthinker_edge.cli.progress import progress
from smallthinker_edge.errors import ChatTemplateError, ContextFull, ExpertReadError, MemoryBudgetError
from smallthinker_edge.files.atomic import atomic_file
from smallthinker_edge.generation.stream import TextStream
from smallthinker_edge.model import SmallThinker
from smallthinker_edge.text.chat import plain_messages


def chat_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message to start with")
    parser.add_argument("--no-history", action="store_true", help="do not keep what is typed for the next time")
    add_sampling_arguments(parser)


class Conversation:
    """Messages so far and the model that answers. Methods whose names begin with `do_` are its commands."""

    def __init__(self, model: SmallThinker, system: str | None, options: dict[str, Any]) -> None:
        self._model, self._options = model, options
        self._opening = [{"role": "system", "content": system}] if system else []
        self._messages: list[dict[str, Any]] = list(self._opening)
        self._stream: TextStream | None = None
        self._uses = Counter[str]()  # of experts, for the newest answer

    def do_reset(self, _: str) -> None:
        """forget the conversation"""
        self._messages = list(self._opening)

    def do_system(self, text: str) -> None:
        """TEXT: start anew with this system message; without a text, with none"""
        self._opening = [{"role": "system", "content": text}] if text else []
        self._messages = list(self._opening)

    def do_save(self, path: str) -> None:
        """FILE: write the conversation as JSON"""
        with atomic_file(named_file(path)) as file:
            file.write(0, (json.dumps(self._messages, ensure_ascii=False, indent=1) + "\n").encode())

    def do_load(self, path: str) -> None:
        """FILE: go on with a conversation that was saved"""
        with open(named_file(path), encoding="utf-8") as file:
            messages = plain_messages(json.load(file))
        if messages:
            self._model.encode_chat(messages)  # which tells what the model's template refuses
        self._messages = messages
        self._opening = list(itertools.takewhile(lambda message: message["role"] == "system", messages))

    def do_stats(self, _: str) -> None:
        """tell speed and memory"""
        print(f"conversation: {self.used} of {self._model.context} tokens", file=sys.stderr)
        print_stats(self._model, None if self._stream is None else self._stream.result)

    def do_help(self, _: str) -> None:
        """tell what there is"""
        for name, command in self.commands().items():
            print(f"{name} {command.__doc__}", file=sys.stderr)
        print("A line that ends with \\ goes on in the next one.", file=sys.stderr)

    @property
    def used(self) -> int:
        """Positions of the context that the conversation takes."""
        return min(len(self._model.encode_chat(self._messages)), self._model.context) if self._messages else 0

    def status(self) -> str:
        """Speed and hit rate of the newest answer, the context and the memory, on one line."""
        stats: dict[str, Any] = self._model.stats()
        result = None if self._stream is None else self._stream.result
        parts = [] if result is None else [f"{result.timings.tokens_per_second:.1f} tokens/s"]
        parts.append(f"context {self.used} of {self._model.context}")
        budget = self._model.plan.limit
        whole = "" if budget is None else f" of {budget / 2**20:,.0f}"
        parts.append(f"memory {stats['rss_bytes'] / 2**20:,.0f}{whole} MiB")
        if uses := self._uses.total():
            parts.append(f"experts in memory {self._uses['hits'] / uses:.0%}")
        return " | ".join(parts)

    @classmethod
    def commands(cls) -> dict[str, Callable[[Conversation, str], None]]:
        """Each by what is typed for it."""
        return {"/" + name.removeprefix("do_"): getattr(cls, name) for name in dir(cls) if name.startswith("do_")}

    def command(self, line: str) -> None:
        """Does what a line with a slash says; tells what is wrong in one line."""
        name, _, rest = line.partition(" ")
        command = self.commands().get(name)
        if command is None:
            print(f"error: there is no {one_line(name)}; /help tells what there is", file=sys.stderr)
            return
        try:
            command(self, rest.strip())
        except (OSError, ValueError, ChatTemplateError) as error:
            print(f"error: {one_line(error)}", file=sys.stderr)

    def answer(self, text: str) -> None:
        """Prints the answer to a message and keeps both; Ctrl-C ends an answer early."""
        question = {"role": "user", "content": text}
        pieces: list[str] = []
        before = expert_uses(self._model)
        try:
            with checking_arguments(), progress(transient=True) as show:
                on_prompt = partial(show, name="tokens of the prompt")
                self._stream = self._model.stream_chat(
                    [*self._messages, question], **{**self._options, "on_prompt": on_prompt}
                )
                for piece in self._stream:
                    pieces.append(piece)
                    show_text(piece)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except (ContextFull, ChatTemplateError, ExpertReadError, MemoryBudgetError) as error:
            print("\n" if pieces else "", end="", flush=True)
            hint = "; /reset starts anew" if isinstance(error, ContextFull) else ""
            print(f"error: {one_line(error)}{hint}", file=sys.stderr)
            return
        finally:
            self._uses = expert_uses(self._model) - before
        print(flush=True)
        self._messages += [question, {"role": "assistant", "content": "".join(pieces)}]


def named_file(path: str) -> str:
    """A file's name as a command gives it. ValueError for none."""
    if not path:
        raise ValueError("name a FILE")
    return os.path.expanduser(path)


def expert_uses(model: SmallThinker) -> Counter[str]:
    """Uses of experts so far, by how they were found; empty where none is paged."""
    stats: dict[str, Any] = model.stats()
    return Counter({name: stats[name] for name in ("hits", "ahead_hits", "misses") if name in stats})


def message_reader(keep_history: bool) -> Callable[[Callable[[], str]], str | None]:
    """What reads messages, given what tells the status: the best that there is for this input."""
    commands = {name: str(command.__doc__) for name, command in Conversation.commands().items()}
    if not sys.stdin.isatty():
        return read_message
    if sys.stdout.isatty():
        with suppress(ImportError):
            from smallthinker_edge.cli.terminal import Prompt, history_file

            return Prompt(commands, ("/save", "/load"), history_file() if keep_history else None).read
    complete_commands(list(commands))
    return read_message


def read_message(_: Callable[[], str]) -> str | None:
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
    read = message_reader(not arguments.no_history)  # before the model, so that a memory budget counts what it takes
    with open_model(arguments) as model:
        conversation = Conversation(model, arguments.system, options)
        if sys.stdin.isatty():
            print("Type a message. /help tells more; Ctrl-C stops an answer, Ctrl-D ends.")
        while (message := read(conversation.status)) is not None:
            if message.startswith("/"):
                conversation.command(message)
            elif message.strip():
                conversation.answer(message)
    return OK


COMMANDS = (Command("chat", "talk with a model in the terminal", chat_arguments, chat),)
