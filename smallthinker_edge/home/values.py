"""What the words of an answer mean: only what was said, in the slots whose names they are, as values.

Called by understand.py with what the model said. Knows nothing of models.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable
from typing import Any

from smallthinker_edge.home import spoken
from smallthinker_edge.home.names import Home
from smallthinker_edge.home.schema import ACTIONS, Command, Spoken

NAMED = {"device": "devices", "area": "areas", "floor": "floors", "scene": "scenes", "list": "lists"}
VALUES: dict[str, Callable[[str], Any]] = {
    "level": spoken.percent, "degrees": spoken.degrees, "duration": spoken.seconds, "time": spoken.clock,
}  # fmt: skip
WHOLE = ("time", "date", "duration")  # whose words belong together, wherever they stand
_PLACES = ("area", "floor")
_MOVED = ("device", "area", "floor", "name")  # whose words may be a name of another kind
_ALIKE = 0.65  # similarity (difflib's ratio) from which words that nobody said are taken for a slip of what was said
_ALL = re.compile(r"(?:all|every|each|both)\b(?: (?:one|of|and|each|every|single|the|my|our))*\s*")
# Words for a kind of thing belong to these actions, also where the answer left them out.
_OF_A_KIND = {"on", "off", "toggle", "brightness_set", "brightness_up", "brightness_down", "color_set", "open", "close"}
_KIND = re.compile(
    rf"\b(?:{_ALL.pattern})?"
    r"(?:lights?|lighting|lamps?|fans?|blinds?|curtains?|shutters?|shades?|windows?|doors?)\b(?! up)"
)
_EVERYWHERE = re.compile(
    r"\b(?:everywhere|(?:whole|entire|all over the) (?:house|home|apartment|flat|place)|every room|all rooms)\b"
)
_EVERY = re.compile(r"\b(?:all|every|each)\b")
# What is done to a device of a domain, where the model took its name for another kind of thing.
_STARTED = {"vacuum_start": "on", "vacuum_stop": "off"}
_FITTING = {
    "light": _STARTED | {
        f"{other}_{change}": f"brightness_{change}"
        for other in ("position", "volume", "speed") for change in ("set", "up", "down")
    },
    "switch": _STARTED,
    "fan": _STARTED | {f"{other}_set": "speed_set" for other in ("position", "volume", "brightness")},
    "media_player": _STARTED | {"position_set": "volume_set"},
    "cover": {f"{other}_set": "position_set" for other in ("brightness", "volume", "speed")},
}  # fmt: skip
_SEVERAL = ("timer_cancel", "alarm_cancel")  # of which there may be several, without a word for the device


def command_of(said: Spoken, sentence: str, home: Home, *, alone: bool) -> Command:
    """A command with its values.

    said: as heard() gives it. sentence: in the model's form. alone: it is the only command of the sentence, so that a
    name of the home in the sentence belongs to it.
    """
    words = {slot: list(values) for slot, values in said.items() if slot != "action"}
    action: str = said["action"]
    placed(action, words, sentence if alone else "", home)
    if alone and action in _OF_A_KIND and "device" not in words and (kind := _KIND.search(sentence)):
        words["device"] = [kind[0]]
    command: Command = {"action": action}
    for slot, values in words.items():
        if slot == "item":
            command["items"] = values
            continue
        text = " ".join(values) if slot in WHOLE else values[0]
        if slot == "device":
            text, everything = without_all(text)
            command |= {"all": True} if everything else {}
        command[slot] = value_of(slot, text, home)
    command["action"] = action = _FITTING.get(home.domain_of(command.get("device", "")), {}).get(action, action)
    everywhere = _EVERY if action in _SEVERAL else _EVERYWHERE
    if everywhere.search(sentence) and "area" not in command and ACTIONS[action]:
        command["all"] = True
    return command


def each(said: Spoken) -> list[Spoken]:
    """The commands of one with several areas, floors, devices or scenes: one for each."""
    several = next((slot for slot in ("device", "area", "floor", "scene") if len(said.get(slot, ())) > 1), None)
    if several is None:
        return [said]
    return [command for value in said[several] for command in each({**said, several: [value]})]


def heard(said: Spoken, sentence: str, earlier: str = "") -> Spoken:
    """A command of schema.read_answer() with the values that were said, in the sentence or the commands before; one
    that was nearly said becomes what was, any other is left out."""
    words = {slot: _heard(values, sentence, earlier) for slot, values in said.items() if slot != "action"}
    return {"action": said["action"]} | {slot: values for slot, values in words.items() if values}


def _heard(values: list[str], sentence: str, earlier: str) -> list[str]:
    found = []
    for value in values:
        if contains(sentence, value) or contains(earlier, value):
            found.append(value)
        elif near := _closest(value, sentence):
            found.append(near)
    return list(dict.fromkeys(found))


def contains(sentence: str, words: str) -> bool:
    """Whether words stand in a sentence, whole and in a row; commas do not count."""
    return f" {words} ".replace(",", "") in f" {sentence} ".replace(",", "")


def _closest(value: str, sentence: str) -> str | None:
    """The words of a sentence that are most like a value: as many, or one more or less; None where none are alike."""
    value = " ".join(word for word, _ in itertools.groupby(value.split()))  # "harry potter potter"
    words, count = sentence.replace(",", "").split(), len(value.split())
    spans = [
        " ".join(words[start : start + size])
        for size in (count, count - 1, count + 1) if size > 0
        for start in range(len(words) - size + 1)
    ]  # fmt: skip
    near = difflib.get_close_matches(value, spans, n=1, cutoff=_ALIKE)
    return near[0] if near else None


def placed(action: str, words: dict[str, list[str]], sentence: str, home: Home) -> None:
    """Moves words into the slots whose names they are, in place.

    A part of a name that was said becomes the name, and words around a name leave it; a name that was said and is in no
    slot is the area or floor.
    """
    allowed = ACTIONS[action]
    for slot, kind in NAMED.items():
        for name in home.said(kind, sentence):
            if slot in words and name not in words[slot] and contains(name, words[slot][0]):
                words[slot][0] = name
                break
    for slot in [slot for slot in _MOVED if slot in words]:
        own, text = NAMED.get(slot), words[slot][0]
        if len(words[slot]) != 1 or (own and home.own_name(own, text)):
            continue
        for to in ("area", "floor", "device"):
            found = text if home.own_name(NAMED[to], text) else None
            if found is None and slot in _PLACES:
                found = _within(home, to, text)
            if found and to in allowed and (to == slot or to not in words):
                del words[slot]
                words[to] = [found]
                break
    _part_from_device(words, home, with_area="area" in allowed)
    for slot in _PLACES:
        if slot in allowed and slot not in words and sentence:
            taken = [v for s, values in words.items() for v in values if s not in _MOVED or _is_own(home, s, v)]
            free = _within(home, slot, _without(sentence, taken))
            words |= {slot: [free]} if free else {}


def _part_from_device(words: dict[str, list[str]], home: Home, *, with_area: bool) -> None:
    """ "bathroom fan" is the fan in the bathroom; where the home has a device of that name, it is in no area."""
    device, area = words.get("device", [""])[0], words.get("area", [""])[0]
    if not device:
        return
    if home.own_name("devices", device):
        if area and area != device and contains(device, area):
            del words["area"]
    elif with_area and (name := area if area and contains(device, area) else _within(home, "area", device)):
        rest = " ".join(_without(device, [name]).split())
        words |= {"area": [name], "device": [rest]} if rest and area in ("", name) else {}


def _within(home: Home, slot: str, text: str) -> str | None:
    """The longest of the home's names of a slot that stands in a text."""
    return next(iter(home.said(NAMED[slot], text)), None)


def _is_own(home: Home, slot: str, words: str) -> bool:
    return slot in NAMED and home.own_name(NAMED[slot], words) is not None


def _without(text: str, pieces: list[str]) -> str:
    for piece in pieces:
        text = re.sub(rf"\b{re.escape(piece)}\b", " ", text)
    return text


def without_all(words: str) -> tuple[str, bool]:
    """ "all the lights" is "lights", and all of them."""
    found = _ALL.match(words)
    return (words[found.end() :], True) if found and found.end() < len(words) else (words, False)


def value_of(slot: str, words: str, home: Home) -> Any:
    """The home's own name, or a number where the words are one, or the words."""
    if slot in NAMED:
        return home.own_name(NAMED[slot], words) or words
    value = VALUES[slot](words) if slot in VALUES else None
    return words if value is None else value
