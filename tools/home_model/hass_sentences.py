"""Home Assistant's own English sentence templates (PyPI: home-assistant-intents) as sentences of the home model.

Called by the trainer and by home_eval.py. Templates are parsed by hassil and drawn from at random; whole templates and
names are held out.
"""

from __future__ import annotations

import importlib.resources
import json
import random
import re
from dataclasses import dataclass, field
from typing import Any

import words
from annotated import Sentence, parse
from hassil.expression import Alternative, Expression, Group, ListReference, Permutation, RuleReference, TextChunk
from hassil.parse_expression import parse_sentence

# Intent -> our action. None: decided by the template's domain (see action_of). What is missing has no action of ours.
ACTION_OF: dict[str, str | None] = {
    "HassBroadcast": "broadcast",
    "HassCancelAllTimers": "timer_cancel",
    "HassCancelTimer": "timer_cancel",
    "HassClimateGetTemperature": "temperature_query",
    "HassClimateSetTemperature": "temperature_set",
    "HassDecreaseTimer": "timer_subtract",
    "HassFanSetSpeed": "speed_set",
    "HassGetCurrentDate": "clock",
    "HassGetCurrentTime": "clock",
    "HassGetState": "state",
    "HassGetWeather": "weather",
    "HassIncreaseTimer": "timer_add",
    "HassLawnMowerDock": "vacuum_dock",
    "HassLawnMowerStartMowing": "vacuum_start",
    "HassLightSet": None,
    "HassListAddItem": "list_add",
    "HassListCompleteItem": "list_complete",
    "HassListRemoveItem": "list_remove",
    "HassMediaNext": "next",
    "HassMediaPause": None,
    "HassMediaPlayerMute": "mute",
    "HassMediaPlayerUnmute": "unmute",
    "HassMediaPrevious": "previous",
    "HassMediaSearchAndPlay": "play",
    "HassMediaUnpause": "resume",
    "HassNevermind": "nevermind",
    "HassPauseTimer": "timer_pause",
    "HassSetPosition": "position_set",
    "HassSetVolume": "volume_set",
    "HassSetVolumeRelative": None,
    "HassShoppingListAddItem": "list_add",
    "HassShoppingListCompleteItem": None,
    "HassStartTimer": "timer_set",
    "HassTimerStatus": "timer_query",
    "HassTurnOff": None,
    "HassTurnOn": None,
    "HassUnpauseTimer": "timer_resume",
    "HassVacuumCleanArea": "vacuum_start",
    "HassVacuumReturnToBase": "vacuum_dock",
    "HassVacuumStart": "vacuum_start",
}
LEFT_OUT = ("{timer_command", "{zone", "{fan_mode", "bs_occupancy_states")  # a command in a timer, persons, fan modes
_UNIT = r"(?:hours?|minutes?|seconds?)"
_AMOUNT = rf"\u2191?(?:half an?|\d+ and a half|\d+|half|an?|1/2)[ -]{_UNIT}(?: and a half)?"
_DURATION = re.compile(rf"(?<!\w){_AMOUNT}(?:(?: and)? {_AMOUNT})*")
_WHICH = "\u2191"  # before a number that tells which timer is meant
_ALL = r"(?:(?:all|every|each)(?: (?:of|the|my|our|single|and|each|every))* )?"
_KIND = re.compile(rf"\b{_ALL}(?:lights|lighting|lamps?|fans?|light(?! it| up| here| the| my| our))\b(?![^\[]*\])")


@dataclass
class Template:
    intent: str
    expression: Expression
    domains: tuple[str, ...]
    kind: str

    @property
    def held_out(self) -> bool:
        return words.lot(self.kind, 100) < 15


@dataclass
class HassSentence:
    """A sentence of Home Assistant's with what it means there."""

    intent: str
    sentence: Sentence
    areas: list[str] = field(default_factory=list)  # named in the sentence
    names: list[tuple[str, str]] = field(default_factory=list)  # (list of the home's names, name): what the home has


def read_intents() -> dict[str, Any]:
    """Home Assistant's English sentences. Raises ModuleNotFoundError without home-assistant-intents."""
    folder = importlib.resources.files("home_assistant_intents") / "data" / "en.json"
    data: dict[str, Any] = json.loads(folder.read_text(encoding="utf-8"))
    return data


class Hass:
    """Draws sentences from the templates; `held_out` takes only templates and names that training never sees.

    invent: names that are in no list, among them, as training has them.
    """

    def __init__(self, rng: random.Random, held_out: bool = False, *, invent: bool = True) -> None:
        self.rng, self.held_out = rng, held_out
        self.invent = invent and not held_out
        data = read_intents()
        self.lists = data["lists"]
        self.rules = {name: parse_sentence(body).expression for name, body in data["expansion_rules"].items()}
        self.by_intent: dict[str, list[Template]] = {}
        for intent, content in data["intents"].items():
            if intent in ACTION_OF:
                found = [t for block in content["data"] for t in self._templates(intent, block)]
                self.by_intent[intent] = [t for t in found if t.held_out == held_out]
        self.by_intent = {intent: found for intent, found in self.by_intent.items() if found}

    def _templates(self, intent: str, block: dict[str, Any]) -> list[Template]:
        domains = block.get("requires_context", {}).get("domain") or block.get("slots", {}).get("domain") or ()
        domains = (domains,) if isinstance(domains, str) else tuple(d for d in domains if isinstance(d, str))
        return [
            Template(intent, parse_sentence(text).expression, domains, f"{intent} {domains} {text}")
            for text in block["sentences"] if not any(part in text for part in LEFT_OUT)
        ]  # fmt: skip

    def names(self, listed: str) -> list[str]:
        return words.names_of(listed, self.held_out) or words.names_of(listed, not self.held_out)

    def draw(self) -> HassSentence:
        """A random sentence: intents with many templates somewhat more often than others."""
        rng = self.rng
        intents = list(self.by_intent)
        intent = rng.choices(intents, [len(self.by_intent[i]) ** 0.5 for i in intents])[0]
        return self.draw_from(rng.choice(self.by_intent[intent]))

    def draw_from(self, template: Template) -> HassSentence:
        self.areas: list[str] = []
        self.named: list[tuple[str, str]] = []
        self.template = template
        marked = self._tidied(self._text(template.expression))
        action = self._action_of(template, marked)
        sentence = parse(action, marked, template.kind)
        return HassSentence(template.intent, sentence, self.areas, self.named)

    def _tidied(self, text: str) -> str:
        text = re.sub(r"\s+", " ", text).strip().lower()
        text = re.sub(r"\[level : ([^\]]+)\]( percent| ?%)", r"[level : \1 percent]", text)
        text = re.sub(r"\[device : ([^\]]+)\] (lights?|lighting|lamps?)\b", r"[device : \1 \2]", text)
        text = re.sub(r"\[color : (\d+)\] ?(k|kelvin)\b", r"[color : \1 \2]", text)
        text = _DURATION.sub(_marked_duration, text).replace(_WHICH, "")
        if "[device" not in text and set(self.template.domains) & {"light", "fan"}:
            text = _KIND.sub(lambda found: f"[device : {found[0]}]", text, count=1)
        return text

    def _action_of(self, template: Template, marked: str) -> str:
        intent, domains = template.intent, template.domains
        plain = ACTION_OF[intent]
        if plain is not None:
            return plain
        if intent == "HassLightSet":
            return "color_set" if "[color" in marked else "brightness_set"
        if intent == "HassSetVolumeRelative":
            return "volume_down" if re.search(r"\b(down|decrease|lower|quieter|reduce)\b", marked) else "volume_up"
        if intent == "HassShoppingListCompleteItem":
            return "list_complete" if re.search(r"\b(check|complete)\b", marked) else "list_remove"
        if intent == "HassMediaPause":
            return "stop" if marked.startswith("stop") else "pause"
        on = intent == "HassTurnOn"
        kind = domains[0] if len(set(domains)) == 1 else ""
        if re.match(r"(open|raise|lift)\b", marked):
            return "open"
        if re.match(r"(close|shut|lower)\b", marked):
            return "close"
        if kind == "lock" or re.match(r"(un)?lock\b", marked):
            return "unlock" if marked.startswith("unlock") else "lock"
        if kind in ("scene", "script") and on:
            return "scene"
        return "on" if on else "off"

    def _text(self, node: Expression) -> str:
        rng = self.rng
        if isinstance(node, TextChunk):
            return node.original_text
        if isinstance(node, Alternative):
            return self._text(rng.choice(node.items))
        if isinstance(node, Permutation):
            return " ".join(self._text(item) for item in rng.sample(node.items, len(node.items)))
        if isinstance(node, Group):
            return "".join(self._text(item) for item in node.items)
        if isinstance(node, RuleReference):
            return self._text(self.rules[node.rule_name])
        assert isinstance(node, ListReference)
        return self._value(node)

    def _value(self, node: ListReference) -> str:
        rng, name = self.rng, node.list_name
        if name == "area":
            area = self._name("area", self.names(words.AREAS))
            self.areas.append(area)
            return f"[area : {area}]"
        if name == "floor":
            floor = rng.choice(self.names(words.FLOORS)).removesuffix(" floor")
            return f"[floor : {floor}]"
        if name == "name":
            return self._device()
        if node.is_inline_range:
            low, high, step = node.get_inline_range() or (0, 0, 1)
            return str(rng.randrange(low, high + 1, step))
        if node.slot_name.startswith("start_"):
            return _WHICH + self._from_list(name)
        plain = {
            "message": ("message", words.MESSAGES), "search_query": ("media", words.MEDIA), "timer_name": ("name",
            words.TIMER_NAMES),
            "shopping_list_item": ("item", words.ITEMS), "todo_list_item": ("item", words.ITEMS),
        }  # fmt: skip
        if name in plain:
            slot, listed = plain[name]
            return f"[{slot} : {rng.choice(self.names(listed))}]"
        slot = {
            "temperature": "degrees", "position": "level", "fan_speed": "level", "brightness": "level",
            "volume": "level",
            "volume_step_up": "level", "volume_step_down": "level", "brightness_level": "level", "color": "color",
            "color_temperature": "color", "color_temperature_names": "color", "cover_classes": "device",
        }.get(name, "")  # fmt: skip
        value = self._from_list(name)
        if name == "color":
            value = rng.choice(self.names(words.COLORS))
        return f"[{slot} : {value}]" if slot else value

    def _from_list(self, name: str) -> str:
        rng, content = self.rng, self.lists[name]
        if "values" in content:
            value = rng.choice(content["values"])
            return self._text(parse_sentence(value["in"] if isinstance(value, dict) else value).expression)
        if "range" not in content:
            return words.invented_word(rng)
        span = content["range"]
        low, high, step = int(span["from"]), int(span["to"]), int(span.get("step", 1))
        if span.get("type") == "temperature":
            return rng.choice([str(rng.randint(14, 28)), str(rng.randint(14, 28)), f"{rng.randint(14, 28)}.5"])
        return str(rng.randrange(low, high + 1, step))

    def _device(self) -> str:
        domains = ["scene" if d == "script" else d for d in self.template.domains]
        domains = [d for d in domains if d in words.DEVICES]
        if not domains:
            domains = [self.rng.choice(["light", "switch", "fan", "media_player", "sensor"])]
        domain = self.rng.choice(domains)
        listed = self.names(words.DEVICES[domain])
        name = self._name(domain, listed)
        if domain in ("light", "switch", "fan", "cover") and self.rng.random() < 0.2 and not self.areas:
            name = f"{self.rng.choice(self.names(words.AREAS))} {name}"
            self.named[-1] = (domain, name)
        slot = {"scene": "scene", "todo": "list", "weather": "place"}.get(domain, "device")
        return f"[{slot} : {name}]"

    def _name(self, kind: str, listed: list[str]) -> str:
        invented = self.rng.random() < 0.45 and self.invent
        name = words.invented_name(self.rng, listed) if invented else self.rng.choice(listed)
        self.named.append((kind, name))
        return name


def _marked_duration(found: re.Match[str]) -> str:
    slot = "name" if _WHICH in found[0] else "duration"
    return f"[{slot} : {found[0]}]"
