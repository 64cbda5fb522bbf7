"""What the home model can answer: actions, their slots, and the JSON of an answer (docs/home-model.md describes them).

The trainer, the constraint on the model's output and the reader of its answers all take their lists from here. Knows
nothing of models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias

# In the order in which an answer has them. Values are pieces of the sentence, word for word.
SLOTS = (
    "device", "area", "floor", "level", "color", "degrees", "scene", "media", "artist", "genre", "item", "list",
    "message", "name", "place", "event", "weather", "duration", "time", "date",
)  # fmt: skip
WHEN = ("duration", "time", "date")
_WHERE = ("device", "area", "floor")
_LIGHT = (*_WHERE, "level")
_PLAYER = ("media", "artist", "genre", *_WHERE)
_BY_SLOTS: dict[tuple[str, ...], str] = {
    _WHERE: "on off toggle lock unlock vacuum_start vacuum_stop vacuum_dock state temperature_query",
    _LIGHT: "brightness_set brightness_up brightness_down open close position_set cover_stop "
    "speed_set speed_up speed_down volume_set volume_up volume_down mute unmute",
    (*_WHERE, "color"): "color_set",
    ("scene", *_WHERE): "scene",
    (*_LIGHT, "degrees"): "temperature_set temperature_up temperature_down",
    ("item", *_WHERE): "coffee",
    _PLAYER: "play pause resume stop next previous shuffle repeat like dislike media_query",
    ("name", "area"): "timer_set timer_cancel timer_add timer_subtract timer_pause timer_resume timer_query "
    "alarm_set alarm_cancel alarm_query",
    ("item", "list"): "list_add list_create list_remove list_complete list_query",
    ("place", "weather", "event"): "weather",
    ("place", "event"): "clock",
    ("message", "area", "floor"): "broadcast",
}
UNKNOWN = "unknown"
# Action -> the slots that it may have; all but the last two may also say when and for how long.
ACTIONS: dict[str, tuple[str, ...]] = {
    action: (*slots, *WHEN) for slots, actions in _BY_SLOTS.items() for action in actions.split()
} | {"nevermind": (), UNKNOWN: ()}
MOST_COMMANDS = 8  # in one sentence

# One command as the model says it: its action, and the words of each slot.
Spoken: TypeAlias = dict[str, Any]
# One with its values: {"action": "alarm_set", "time": "06:30", "date": "tomorrow"}.
Command: TypeAlias = dict[str, Any]
# What the services call: a sentence and the commands before it become commands.
Understand: TypeAlias = Callable[[str, Sequence[Command]], list[Command]]


def pairs(said: Spoken) -> list[tuple[str, str]]:
    """(slot, words) of a command as the model says it."""
    return [(slot, value) for slot, values in said.items() if slot != "action" for value in values]


def command_json(action: str, slots: Iterable[tuple[str, str]]) -> str:
    """The answer for one command: slots in their order, several values of one slot as a list."""
    values: dict[str, list[str]] = {}
    for slot, value in slots:
        found = values.setdefault(slot, [])
        if value not in found:
            found.append(value)
    command = {"action": action} | {
        slot: values[slot] if len(values[slot]) > 1 else values[slot][0] for slot in SLOTS if slot in values
    }
    return json.dumps(command, separators=(",", ":"), ensure_ascii=False)


def answer_json(commands: list[str]) -> str:
    """An answer of one or several command_json()s."""
    return commands[0] if len(commands) == 1 else "[" + ",".join(commands) + "]"


def answer_grammar(words: str) -> str:
    """The answers about a text, as a grammar in llguidance's dialect of Lark: every value is a piece of `words`.

    words: the sentence and the names that an answer may copy from, in the model's form (no quotes or backslashes).
    """
    return f'{_commands_grammar()}\nWORDS: %regex {{ "substring_words": {json.dumps(words, ensure_ascii=False)} }}'


@cache
def _commands_grammar() -> str:
    """All of an answer's grammar but for WORDS."""
    rules = [
        "start: command | list",
        f'list: "[" command ("," command){{1,{MOST_COMMANDS - 1}}} "]"',
        "command: " + " | ".join(f"c{i}" for i in range(len(ACTIONS))),
        'value: "\\"" WORDS "\\"" | "[\\"" WORDS "\\"" (",\\"" WORDS "\\""){1,15} "]"',
    ]
    for i, (action, slots) in enumerate(ACTIONS.items()):
        optional = " ".join(f'(",\\"{slot}\\":" value)?' for slot in SLOTS if slot in slots)
        rules.append(f'c{i}: "{{\\"action\\":\\"{action}\\"" {optional} "}}"')
    return "\n".join(rules)


def read_answer(text: str) -> list[Spoken] | None:
    """The commands of an answer, every value a list of words; None where the text is not such an answer."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    commands = value if isinstance(value, list) else [value]
    if not 0 < len(commands) <= MOST_COMMANDS:
        return None
    read = [_read_command(command) for command in commands]
    return None if None in read else [command for command in read if command is not None]


def _read_command(command: Any) -> Spoken | None:
    action = command.get("action") if isinstance(command, Mapping) else None
    if not isinstance(action, str) or action not in ACTIONS:
        return None
    spoken: Spoken = {"action": action}
    for slot, value in command.items():
        if slot == "action":
            continue
        values = value if isinstance(value, list) else [value]
        if slot not in ACTIONS[action] or not values or not all(isinstance(v, str) and v for v in values):
            return None
        spoken[slot] = values
    return spoken
