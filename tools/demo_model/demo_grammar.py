"""Sentences of the demo model and their JSON: a seeded grammar of spoken-style home commands.

Called by train_demo.py for training data and for the held-out set; run by itself it writes the demo's commands:

    python tools/demo_model/demo_grammar.py > smallthinker_edge/data/demo_commands.json

A sentence is held out when it uses a held-out wording or a held-out slot value; those never occur in training.
Names (rooms, lamps, things to buy, music, colours) are open slots: training fills most of them with invented ones, so
that a model has to learn to copy them. Nothing here knows about models.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import demo_wordings as wordings
from demo_slots import CLOSE, OPEN, Slots, typo

Command = dict[str, object]
Part = tuple[str, Command]  # a sentence with its names between OPEN and CLOSE, and what it means


@dataclass
class Draw:
    """One random source that knows whether held-out wordings and values may be, and were, used."""

    rng: random.Random
    held_out: bool
    slots: Slots = field(init=False)
    used: list[tuple[str, str]] = field(default_factory=list)  # (intent, wording)

    def __post_init__(self) -> None:
        self.slots = Slots(self.rng, self.held_out)

    def wording(self, intent: str) -> str:
        """A sentence pattern; a held-out one in half of the held-out draws, by hand or by lot in equal parts."""
        chosen = wordings.INTENTS[intent]
        pool = chosen.common
        if self.held_out and self.rng.random() < 0.5:
            kind = "wording by hand" if self.rng.random() < 0.5 or not chosen.by_lot else "wording by lot"
            pool = chosen.by_hand if kind == "wording by hand" else chosen.by_lot
            self.slots.unseen.add(kind)
        pattern = self.rng.choice(pool)
        self.used.append((intent, pattern))
        return pattern

    def room_and_light(self, pattern: str) -> tuple[str, str]:
        """Names for those of the two that the pattern has.

        Where two open names stand side by side, at most one of them is a name that nobody can know.
        """
        room, known = self.slots.room() if "{room}" in pattern else ("", True)
        plain = "{color} {device}" in pattern or ("{room} {device}" in pattern and not known)
        return room, self.slots.light(plain) if "{device}" in pattern else ""

    def when(self, text: str, command: Command) -> Part:
        """Now and then a time of day, after the command or before it."""
        chance = self.rng.random()
        if chance < 0.2:
            command["time"], spoken = self.slots.time()
            return f"{text} at {spoken}", command
        # "at one fifty five twenty five degrees ..." could be cut in two ways.
        if chance < 0.25 and text.split(" ")[0] in wordings.IMPERATIVES | {"the", "in", "i"}:
            command["time"], spoken = self.slots.time()
            return f"at {spoken} {text}", command
        return text, command


def switch_word(rng: random.Random) -> str:
    return rng.choice(["on", "off"])


def article(color: str) -> str:
    return "an" if color.strip(OPEN)[0] in "aeiou" else "a"


def _light(d: Draw) -> Part:
    kind = d.rng.choice(["switch", "switch", "dim", "dim", "color"])
    pattern = d.wording("light " + kind)
    room, device = d.room_and_light(pattern)
    command: Command = {"action": "set", "device": bare(device), "room": bare(room)}
    if kind == "switch":
        command["action"] = on = switch_word(d.rng)
        text = pattern.format(room=room, device=device, on=on)
    elif kind == "dim":
        command["level"], level = d.slots.level()
        text = pattern.format(room=room, device=device, level=level)
    else:
        color = d.slots.color()
        command["color"] = bare(color)
        text = pattern.format(room=room, device=device, color=color, a=article(color))
    return d.when(text, command)


def _heating(d: Draw) -> Part:
    room, _ = d.slots.room()
    if d.rng.random() < 0.2:
        on = switch_word(d.rng)
        text = d.wording("heating switch").format(room=room, on=on)
        return d.when(text, {"action": on, "device": "heating", "room": bare(room)})
    degrees, spoken = d.slots.degrees()
    text = d.wording("heating").format(room=room, deg=spoken)
    return d.when(text, {"action": "set", "device": "heating", "room": bare(room), "degrees": degrees})


def _cover(d: Draw) -> Part:
    device, (room, _) = d.slots.cover(), d.slots.room()
    if d.rng.random() < 0.25:
        level, spoken = d.slots.level()
        text = d.wording("cover level").format(room=room, device=device, level=spoken)
        return d.when(text, {"action": "set", "device": device, "room": bare(room), "level": level})
    action = d.rng.choice(["open", "close"])
    verb = d.rng.choice(wordings.COVER_VERBS[action])
    text = d.wording("cover").format(room=room, device=device, verb=verb)
    return d.when(text, {"action": action, "device": device, "room": bare(room)})


def _media(d: Draw) -> Part:
    kind = d.rng.choice(["play", "play", "play", "play on", "volume", "volume", "volume", "playback", "player switch"])
    (room, _), device = d.slots.room(), d.slots.player()
    pattern = d.wording(kind)
    command: Command = {"action": kind, "device": device, "room": bare(room)}
    if kind in ("play", "play on"):
        music = d.slots.music()
        command = {"action": "play", "media": bare(music)}
        command |= {"room": bare(room)} if kind == "play" else {"device": device, "room": bare(room)}
        return d.when(pattern.format(room=room, music=music, device=device), command)
    if kind == "volume":
        command["level"], level = d.slots.level()
        return pattern.format(room=room, device=device, level=level), command
    if kind == "playback":
        command["action"] = d.rng.choice(["pause", "stop", "resume"])
        verb = d.rng.choice(wordings.PLAYBACK_VERBS[str(command["action"])])
        return pattern.format(room=room, device=device, verb=verb), command
    command["action"] = on = switch_word(d.rng)
    return d.when(pattern.format(room=room, device=device, on=on), command)


def _timer(d: Draw) -> Part:
    pattern = d.wording("timer")
    minutes, duration, compound = d.slots.duration()
    return pattern.format(dur=duration, durn=compound), {"action": "timer", "minutes": minutes}


def _alarm(d: Draw) -> Part:
    clock, spoken = d.slots.time()
    return d.wording("alarm").format(time=spoken), {"action": "alarm", "time": clock}


def _shopping(d: Draw) -> Part:
    items = list(dict.fromkeys(d.slots.item() for _ in range(d.rng.choice([1, 1, 2, 2, 3, 4]))))
    spoken = items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
    action = "remove" if d.rng.random() < 0.3 else "add"
    return d.wording(action).format(items=spoken), {"action": action, "items": [bare(item) for item in items]}


def _query(d: Draw) -> Part:
    what = d.rng.choice(["time", "weather", "temperature", "list", "state", "timer", "alarm"])
    pattern = d.wording("query " + what)
    command: Command = {"action": "query", "what": what}
    room, device = d.room_and_light(pattern)
    if "{device}" in pattern:
        command["device"] = bare(device)
    if "{room}" in pattern:
        command["room"] = bare(room)
    return pattern.format(room=room, device=device), command


def _unknown(d: Draw) -> Part:
    return d.slots.nonsense(), {"action": "unknown"}


MAKERS: list[tuple[float, Callable[[Draw], Part]]] = [
    (0.24, _light), (0.11, _heating), (0.11, _cover), (0.14, _media), (0.07, _timer), (0.07, _alarm),
    (0.13, _shopping), (0.05, _query), (0.1, _unknown),
]  # fmt: skip


def bare(text: str) -> str:
    return text.replace(OPEN, "").replace(CLOSE, "")


def _polite(d: Draw, text: str) -> str:
    """Noise before and after. A request frame fits only what starts with a verb in the imperative."""
    rng = d.rng
    if rng.random() < 0.25 and text.split(" ")[0] in wordings.IMPERATIVES:
        text = rng.choice(wordings.FRAMES) + text
    elif rng.random() < 0.2:
        text = rng.choice(wordings.BEFORE) + text
    if rng.random() < 0.2:
        text += rng.choice(wordings.AFTER)
    return text


@dataclass
class Example:
    sentence: str
    answer: str
    wordings: list[tuple[str, str]]  # (intent, pattern) of each command that has them
    unseen: set[str]  # kinds of held-out wordings and values in it


def compose(rng: random.Random, held_out: bool = False) -> Example:
    """One sentence and its JSON: an object, or a list of them when the sentence holds several commands."""
    while True:
        d = Draw(rng, held_out)
        count = rng.choices([1, 2, 3], [0.74, 0.2, 0.06])[0]
        makers = rng.choices([m for _, m in MAKERS], [w for w, _ in MAKERS], k=count)
        if count > 1 and _unknown in makers:
            continue
        parts = [make(d) for make in makers]
        if held_out and not d.slots.unseen:
            continue
        text = parts[0][0]
        for (part, _), maker in zip(parts[1:], makers[1:], strict=True):
            # After a list of things a bare "and", or a command that starts with a name, could go on with the list.
            if _shopping in makers and maker is not _shopping and part.startswith(OPEN):
                part = "the " + part
            joins = wordings.CLEAR_JOINS if _shopping in makers else wordings.JOINS
            text += rng.choice(joins) + part
        if _unknown not in makers:
            text = _polite(d, text)
            if rng.random() < 0.15:
                text = typo(rng, text)
        if rng.random() < 0.3 and not text.startswith(OPEN):
            text = text[0].upper() + text[1:]
        if rng.random() < 0.25:
            text += rng.choice([".", ".", "!"])
        commands = [command for _, command in parts]
        answer = json.dumps(commands[0] if count == 1 else commands, separators=(",", ":"))
        return Example(bare(text), answer, d.used, d.slots.unseen)


def example(rng: random.Random, held_out: bool = False) -> tuple[str, str]:
    """One (sentence, JSON). held_out: uses at least one wording or slot value that training never shows."""
    made = compose(rng, held_out)
    return made.sentence, made.answer


def chat(sentence: str, answer: str = "") -> str:
    """The ChatML text of one exchange; without an answer it ends where the model starts."""
    prompt = f"<|im_start|>user\n{sentence}<|im_end|>\n<|im_start|>assistant\n"
    return prompt + (answer + "<|im_end|>" if answer else "")


def held_out_examples(count: int, seed: int = 1) -> list[Example]:
    """Distinct held-out sentences, the same ones for the same seed."""
    rng = random.Random(f"held-out {seed}")
    found: dict[str, Example] = {}
    while len(found) < count:
        made = compose(rng, held_out=True)
        found.setdefault(made.sentence, made)
    return list(found.values())


def held_out_set(count: int, seed: int = 1) -> list[tuple[str, str]]:
    """The same as pairs (sentence, JSON)."""
    return [(made.sentence, made.answer) for made in held_out_examples(count, seed)]


def demo_set() -> list[tuple[str, str]]:
    """The demo's commands: of another held-out set the first of some actions, and the first two with several."""
    wanted = {"set": 1, "open": 1, "play": 1, "add": 1, "alarm": 1, "unknown": 1, "several": 2}
    chosen: list[tuple[str, str]] = []
    for sentence, answer in held_out_set(200, seed=2):
        kind = "several" if answer.startswith("[") else json.loads(answer)["action"]
        if wanted.get(kind, 0) > 0:
            wanted[kind] -= 1
            chosen.append((sentence, answer))
    return chosen


if __name__ == "__main__":
    shown = [{"command": text, "expected": json.loads(answer)} for text, answer in demo_set()]
    json.dump(shown, sys.stdout, indent=1)
    print()
