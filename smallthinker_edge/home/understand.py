"""A sentence becomes commands: the prompt, the constraint on the answer, and (values.py) what its words mean.

Sits on a SmallThinker with the embedded model (docs/home-model.md). The services and the demo call it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from smallthinker_edge.errors import ContextFull, MissingExtra
from smallthinker_edge.home.names import Home
from smallthinker_edge.home.schema import (
    MOST_COMMANDS,
    UNKNOWN,
    Command,
    Spoken,
    answer_grammar,
    answer_json,
    command_json,
    pairs,
    read_answer,
)
from smallthinker_edge.home.spoken import duration_parts
from smallthinker_edge.home.text_form import model_form
from smallthinker_edge.home.values import command_of, each, heard
from smallthinker_edge.model import SmallThinker

EMBEDDED = Path(__file__).resolve().parents[1] / "data" / "demo.gguf"
MAX_TOKENS = 256
# Where a sentence goes on with another command. Each is understood by itself, where that is a command.
_NEXT_COMMAND = re.compile(
    r"(?:,| and| then| also)+ (?=(?:turn|switch|set|dim|open|close|shut|lock|unlock|play|pause|start|stop|mute|add|put"
    r"|remove|wake|lower|raise|activate|cancel|brew|vacuum|announce) )"
)


def open_home_model(**settings: Any) -> SmallThinker:
    """The embedded model. settings: as of SmallThinker, such as threads.

    Raises FileNotFoundError where it is not installed.
    """
    if not EMBEDDED.is_file():
        raise FileNotFoundError(f"the embedded model is not part of this installation ({EMBEDDED} is missing)")
    return SmallThinker(EMBEDDED, **settings)


class HomeModel:
    """Understands home commands with an opened model. For one thread at a time, as the model's calls are.

    model: the embedded model (open_home_model()) or one trained like it. home: names of the user's own home.
    constrained: keep answers to the grammar by llguidance (extra `structured`); None does where it is installed.
    Without it an answer that is no valid document counts as unknown.
    """

    def __init__(self, model: SmallThinker, home: Home | None = None, *, constrained: bool | None = None) -> None:
        self.model, self.home = model, home or Home()
        if constrained is None:
            constrained = _has_grammars(model)
        self._grammars = model.grammars() if constrained else None

    def understand(self, text: str, previous: Iterable[Command] = ()) -> list[Command]:
        """The commands in a sentence; [{"action": "unknown"}] where there is none.

        text: what was said or typed, at most text_form.MOST_CHARACTERS of it count. previous: the commands understood
        just before, for sentences like "and the kitchen too".
        """
        sentence = model_form(text)
        if not sentence:
            return [{"action": UNKNOWN}]
        earlier = [_spoken_again(command) for command in previous if command.get("action") != UNKNOWN]
        parts = _NEXT_COMMAND.split(sentence)
        if len(parts) > 1:
            each_part = [self._understood(part, earlier) for part in parts[:MOST_COMMANDS]]
            if all(command["action"] != UNKNOWN for commands in each_part for command in commands):
                return [command for commands in each_part for command in commands]
        return self._understood(sentence, earlier)

    def _understood(self, sentence: str, earlier: list[Spoken]) -> list[Command]:
        commands = [one for command in self.said(sentence, earlier) or [] for one in each(command)]
        if not commands:
            return [{"action": UNKNOWN}]
        alone = len(commands) == 1
        return [command_of(command, sentence, self.home, alone=alone) for command in commands]

    def said(self, sentence: str, earlier: list[Spoken] | None = None) -> list[Spoken] | None:
        """What the model understood of a sentence in its form, in words that were said; None for no valid answer."""
        answer = self.answer(sentence, earlier)
        commands = None if answer is None else read_answer(answer)
        if commands is None:
            return None
        before = " \n ".join(_words_of(earlier or []))
        return [heard(command, sentence, before) for command in commands]

    def answer(self, sentence: str, earlier: list[Spoken] | None = None) -> str | None:
        """The model's own words for a sentence in its form: JSON as in schema.py; None where they came to no end."""
        earlier = earlier or []
        messages = self._messages(sentence, earlier)
        words = " \n ".join([sentence, *_words_of(earlier)])
        constraint = self._grammars.lark(answer_grammar(words)) if self._grammars else None
        try:
            result = self.model.chat(messages, max_tokens=MAX_TOKENS, constraint=constraint)
        except ContextFull:
            return None
        return result.text if result.finish_reason == "stop" else None

    def _messages(self, sentence: str, earlier: list[Spoken]) -> list[dict[str, str]]:
        """The conversation."""
        messages = []
        shown = self.home.shown(sentence)
        if shown:
            messages.append({"role": "system", "content": shown})
        if earlier:
            answer = answer_json([command_json(command["action"], pairs(command)) for command in earlier])
            messages.append({"role": "user", "content": " ".join(_words_of(earlier))})
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": sentence})
        return messages


def _has_grammars(model: SmallThinker) -> bool:
    try:
        model.grammars()
    except MissingExtra:
        return False
    return True


def _words_of(commands: list[Spoken]) -> list[str]:
    return [words for command in commands for _, words in pairs(command)]


def _spoken_again(command: Mapping[str, Any]) -> Spoken:
    """A command with values as the model would have said it."""
    said: Spoken = {"action": command["action"]}
    for slot, value in command.items():
        if slot not in ("action", "all"):
            values = value if isinstance(value, list) else [value]
            said["item" if slot == "items" else slot] = [model_form(_words(slot, v)) for v in values]
    return said


def _words(slot: str, value: Any) -> str:
    if slot == "level" and isinstance(value, int):
        return f"{value} percent"
    if slot == "duration" and isinstance(value, int):
        return " ".join(f"{count} {unit}" for unit, count in duration_parts(value).items())
    return f"{value:g}" if isinstance(value, float) else str(value)
