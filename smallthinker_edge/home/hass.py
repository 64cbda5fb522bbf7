"""Commands as Home Assistant's intents: ROWS says which action is which, NONE what Home Assistant has no intent for.

Names and slots are those of Home Assistant 2026.11 (homeassistant.helpers.intent, components/*/intent.py) and of the
package home-assistant-intents 2026.11.25. It reads no state: which lights a home has is Home Assistant's to know.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any

from smallthinker_edge.home.names import Device, Home
from smallthinker_edge.home.schema import UNKNOWN, Command
from smallthinker_edge.home.spoken import duration_parts
from smallthinker_edge.home.spoken import seconds as words_to_seconds

Slots = dict[str, Any]


class NoIntent(Exception):
    """Home Assistant has no intent for a command; the message is for the speaker's ears."""


@dataclass(frozen=True)
class HassIntent:
    """An intent of Home Assistant's.

    Attributes:
        name: such as "HassTurnOn". slots: their values by name.
        text: what Home Assistant says once it is done, where the intent has no words of its own: one of Home
            Assistant's templates over slots, state and query. It never holds what was said, which would be a template
            of a stranger's.
    """

    name: str
    slots: Slots = field(default_factory=dict)
    text: str | None = None


# What words for a kind of thing stand for: domain and device class ("" for any). In the singular.
KINDS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("light", "lamp", "bulb", "lighting"), ("light", "")),
    **dict.fromkeys(("fan", "ventilator"), ("fan", "")),
    "switch": ("switch", ""),
    **dict.fromkeys(("plug", "outlet", "socket"), ("switch", "outlet")),
    **{kind: ("cover", kind) for kind in ("awning", "blind", "curtain", "door", "gate", "shade", "shutter", "window")},
    **dict.fromkeys(("garage", "garage door"), ("cover", "garage")),
    "cover": ("cover", ""),
    "valve": ("valve", ""),
    "lock": ("lock", ""),
    **dict.fromkeys(
        ("heating", "heat", "heater", "radiator", "thermostat", "climate", "temperature", "ac", "aircon"),
        ("climate", ""),
    ),
    **dict.fromkeys(("air conditioning", "air conditioner"), ("climate", "")),
    **dict.fromkeys(("vacuum", "vacuum cleaner", "robot vacuum", "robot", "hoover", "roomba"), ("vacuum", "")),
    **dict.fromkeys(("tv", "television", "telly"), ("media_player", "tv")),
    "speaker": ("media_player", "speaker"),
    **dict.fromkeys(("music", "media", "media player", "player", "radio", "volume", "sound"), ("media_player", "")),
    "humidifier": ("humidifier", ""),
}
# HassTurnOff unlocks locks and closes covers, so that "off" must name what may be switched.
SWITCHED = ("light", "switch", "fan", "media_player", "input_boolean", "climate", "humidifier", "water_heater",
            "remote", "siren", "automation", "group")  # fmt: skip
EVERYTHING = ("light", "switch", "fan", "media_player")  # that "everything in the kitchen" means
STARTED = (*SWITCHED, "scene", "script", "button", "input_button")
MOVED = ("cover", "valve")
COLOR_TEMPERATURES = {"candle light": 1900, "candlelight": 1900, "warm white": 2700, "warm": 2700, "cool white": 4000,
                      "cold white": 4000, "cool": 4000, "cold": 4000, "daylight": 6500, "day light": 6500}  # fmt: skip
SHOPPING = frozenset({"", "shopping", "shopping list", "grocery", "groceries", "grocery list"})
STATES = {"on": ["on"], "off": ["off"], "open": ["open", "on"], "closed": ["closed", "off"], "shut": ["closed", "off"],
          "locked": ["locked"], "unlocked": ["unlocked"]}  # fmt: skip
LATER = frozenset({"time", "date", "duration"})
MOWING = re.compile(r"\b(?:lawn|mow\w*)\b")
CALENDAR = re.compile(r"\b(date|day|month|year)\b")

SAY_STATE = (
    "{% set found = query.matched + query.unmatched %}"
    "{% if found | length == 1 %}{{ found[0].name }} is {{ found[0].state }}"
    "{% elif slots.state is defined %}{% if query.matched %}{{ query.matched | map(attribute='name') | join(', ') }}"
    "{% else %}None of them{% endif %}"
    "{% else %}{% for one in found[:5] %}{{ one.name }} is {{ one.state }}{% if not loop.last %}, {% endif %}"
    "{% else %}I know of none{% endfor %}{% endif %}"
)
SAY_TEMPERATURE = (
    "{% set now = state_attr(state.entity_id, 'current_temperature') %}"
    "{{ state.state if now is none else now }} degrees"
)
SAY_WEATHER = (
    "{{ state.attributes.temperature }} {{ state.attributes.temperature_unit }}, "
    "{{ state.state | replace('partlycloudy', 'partly cloudy') | replace('-', ' ') }}"
)
SAY_TIMERS = (
    "{% for one in slots.timers | sort(attribute='total_seconds_left') %}{% if one.name %}{{ one.name }}: {% endif %}"
    "{% if one.rounded_hours_left %}{{ one.rounded_hours_left }} hours {% endif %}"
    "{% if one.rounded_minutes_left %}{{ one.rounded_minutes_left }} minutes {% endif %}"
    "{% if one.rounded_seconds_left %}{{ one.rounded_seconds_left }} seconds {% endif %}"
    "{% if not one.is_active %}(paused) {% endif %}left. {% else %}No timer is running{% endfor %}"
)


@dataclass(frozen=True)
class Spoken:
    """A command where it was said: the home it is for and the sentence it came from, "" where that is not known."""

    command: Command
    home: Home
    text: str

    def get(self, slot: str) -> Any:
        return self.command.get(slot)

    def number(self, slot: str) -> Any:
        """A slot's value where it is a number; None where there is none, or only words ("a bit")."""
        value = self.command.get(slot)
        return value if isinstance(value, (int, float)) else None

    def need_number(self, slot: str, missing: str) -> Any:
        """A slot's number. Raises NoIntent where the command has none."""
        value = self.number(slot)
        if value is None:
            raise NoIntent(missing)
        return value

    def need(self, slot: str, missing: str) -> Any:
        """A slot's value. Raises NoIntent where the command has none."""
        value = self.command.get(slot)
        if value is None or value in ("", []):
            raise NoIntent(missing)
        return value


def named(word: str, home: Home) -> Device | None:
    """The home's own device of that name or alias."""
    wanted = word.casefold()
    return next((d for d in home.devices if wanted in (d.name.casefold(), *(a.casefold() for a in d.aliases))), None)


def kind_of(word: str) -> tuple[str, str] | None:
    """Domain and device class of a word for a kind, singular or plural."""
    word = " ".join(word.casefold().split())
    return KINDS.get(word) or KINDS.get(word.removesuffix("s")) or KINDS.get(word.removesuffix("es"))


def place(spoken: Spoken) -> Slots:
    return {slot: spoken.get(slot) for slot in ("area", "floor") if spoken.get(slot)}


def things(spoken: Spoken, domains: Sequence[str], *, classes: bool = True) -> Slots:
    """name or domain and device_class, area and floor of what a command is for.

    Args:
        domains: that the action makes sense for. A word for a kind of another domain is taken for a name.
        classes: the intent has slots for domain and device class; without, a kind that needs a class is a name.
    """
    word, where = spoken.get("device") or "", place(spoken)
    device, kind = named(word, spoken.home), kind_of(word)
    if device is not None:
        known = [device.domain] if device.domain in domains else list(domains)
        return {"name": device.name, **({"domain": known} if classes else {}), **where}
    if kind is not None and kind[0] in domains and (classes or not kind[1]):
        if not classes:
            return where
        return {"domain": [kind[0]], **({"device_class": [kind[1]]} if kind[1] else {}), **where}
    return {**({"name": word} if word else {}), **({"domain": list(domains)} if classes else {}), **where}


def some_things(spoken: Spoken, domains: Sequence[str]) -> Slots:
    """things(); NoIntent where the command says neither what nor where."""
    if not any(spoken.get(slot) for slot in ("device", "area", "floor", "all")):
        raise NoIntent("Say which device you mean")
    return things(spoken, domains)


def switch(name: str, text: str) -> Callable[[Spoken], list[HassIntent]]:
    def make(spoken: Spoken) -> list[HassIntent]:
        domains: Sequence[str] = STARTED if name == "HassTurnOn" else SWITCHED
        if not spoken.get("device"):  # "turn off the kitchen" means its lights, "everything in the kitchen" more
            domains = EVERYTHING if spoken.get("all") else ("light",)
        return [HassIntent(name, some_things(spoken, domains), text)]

    return make


def moved(spoken: Spoken) -> Slots:
    return some_things(spoken, MOVED if spoken.get("device") else ("cover",))  # water runs only where it is named


def move(name: str, text: str) -> Callable[[Spoken], list[HassIntent]]:
    return lambda spoken: [HassIntent(name, moved(spoken), text)]


def lock(name: str, text: str) -> Callable[[Spoken], list[HassIntent]]:
    """Locks are turned on and off in Home Assistant, on being locked. "The doors" are their locks."""

    def make(spoken: Spoken) -> list[HassIntent]:
        word, where = (spoken.get("device") or "").casefold(), place(spoken)
        if word in ("door", "lock") and name == "HassTurnOff" and not where and not spoken.get("all"):
            locks = [device.name for device in spoken.home.devices if device.domain == "lock"]
            if len(locks) != 1:
                raise NoIntent("Say which door")  # and not all of them
            return [HassIntent(name, {"name": locks[0], "domain": ["lock"]}, text)]
        if word in ("door", "doors"):
            return [HassIntent(name, {"domain": ["lock"], **where}, text)]
        return [HassIntent(name, some_things(spoken, ("lock",)), text)]

    return make


def only(name: str, domain: str, text: str, *, classes: bool = False) -> Callable[[Spoken], list[HassIntent]]:
    """An intent of one domain, which needs nothing but what it is for."""

    def make(spoken: Spoken) -> list[HassIntent]:
        slots = things(spoken, (domain,), classes=classes)
        return [HassIntent(name, {key: slots[key] for key in slots if key != "domain"}, text)]

    return make


def value(
    name: str, domain: str, slot: str, source: str, text: str, missing: str, *, classes: bool = False
) -> Callable[[Spoken], list[HassIntent]]:
    """only(), with a value of the command in a slot."""

    def make(spoken: Spoken) -> list[HassIntent]:
        (intent,) = only(name, domain, text, classes=classes)(spoken)
        return [HassIntent(name, {**intent.slots, slot: spoken.need_number(source, missing)}, text)]

    return make


def brightness(spoken: Spoken) -> list[HassIntent]:
    level = spoken.need_number("level", "Say how bright, in percent")
    return [HassIntent("HassLightSet", {**light(spoken), "brightness": level}, "Brightness set")]


def color(spoken: Spoken) -> list[HassIntent]:
    wanted = " ".join(spoken.need("color", "Say which color").casefold().split())
    kelvin = COLOR_TEMPERATURES.get(wanted)
    slots = {"color": wanted} if kelvin is None else {"temperature": kelvin}
    return [HassIntent("HassLightSet", {**light(spoken), **slots}, "Color set")]


def light(spoken: Spoken) -> Slots:
    slots = things(spoken, ("light",))
    return {**slots, "domain": ["light"]}


def position(spoken: Spoken) -> list[HassIntent]:
    level = spoken.need_number("level", "Say how far, in percent")
    return [HassIntent("HassSetPosition", {**moved(spoken), "position": level}, "Position set")]


def scene(spoken: Spoken) -> list[HassIntent]:
    slots = {"name": spoken.need("scene", "Say which scene"), "domain": ["scene", "script"], **place(spoken)}
    return [HassIntent("HassTurnOn", slots, "Activated")]


def mows(spoken: Spoken) -> bool:
    """Whether a robot is meant that mows."""
    word = (spoken.get("device") or "").casefold()
    device = named(word, spoken.home)
    if device is not None:
        return device.domain == "lawn_mower"
    return bool(MOWING.search(word) or (not word and MOWING.search(spoken.text.casefold())))


def dock(spoken: Spoken) -> list[HassIntent]:
    if mows(spoken):
        return only("HassLawnMowerDock", "lawn_mower", "Returning")(spoken)
    return only("HassVacuumReturnToBase", "vacuum", "Returning")(spoken)


def clean(spoken: Spoken) -> list[HassIntent]:
    if mows(spoken):
        return only("HassLawnMowerStartMowing", "lawn_mower", "Started")(spoken)
    (start,) = only("HassVacuumStart", "vacuum", "Started")(spoken)
    if spoken.get("area"):
        slots: Slots = {key: start.slots[key] for key in ("name", "area") if key in start.slots}
        return [HassIntent("HassVacuumCleanArea", slots, "Cleaning")]
    return [start]


def play(spoken: Spoken) -> list[HassIntent]:
    wanted = [spoken.get(slot) for slot in ("media", "artist", "genre") if spoken.get(slot)]
    (resume,) = only("HassMediaUnpause", "media_player", "Resumed")(spoken)
    if not wanted:
        return [resume]
    slots = {**resume.slots, "search_query": " ".join(wanted)}
    if not spoken.get("media") and not spoken.get("genre"):
        slots["media_class"] = "artist"
    return [HassIntent("HassMediaSearchAndPlay", slots, "Playing")]


def volume(sign: int) -> Callable[[Spoken], list[HassIntent]]:
    def make(spoken: Spoken) -> list[HassIntent]:
        level = spoken.number("level")
        step: str | int = ("up" if sign > 0 else "down") if level is None else sign * level
        (intent,) = only("HassSetVolumeRelative", "media_player", "Volume set")(spoken)
        return [HassIntent(intent.name, {**intent.slots, "volume_step": step}, intent.text)]

    return make


def duration(seconds: int, prefix: str = "") -> Slots:
    return {prefix + unit: count for unit, count in duration_parts(seconds).items()}


def timer(name: str, text: str, *, takes_time: bool) -> Callable[[Spoken], list[HassIntent]]:
    """takes_time: the duration is what to set or change, and must be there; otherwise it tells which timer."""

    def make(spoken: Spoken) -> list[HassIntent]:
        called = spoken.get("name") or ""
        started = words_to_seconds(called)  # "my five minute timer"
        own = {"name": called} if called and started is None else duration(started or 0, "start_")
        seconds = spoken.need_number("duration", "Say how long") if takes_time else spoken.number("duration") or 0
        time = duration(seconds, "" if takes_time else "start_")
        if takes_time and not time:
            raise NoIntent("Say how long")
        if name == "HassCancelTimer" and spoken.get("all"):
            return [HassIntent("HassCancelAllTimers", {}, "Timers cancelled")]
        return [HassIntent(name, {**time, **own}, text)]

    return make


def on_list(shopping: str, other: str, text: str) -> Callable[[Spoken], list[HassIntent]]:
    """An intent an item; the shopping list has intents of its own."""

    def make(spoken: Spoken) -> list[HassIntent]:
        items, target = spoken.need("items", "Say which item"), spoken.get("list") or ""
        if target.casefold() in SHOPPING:
            found = [HassIntent(shopping, {"item": item}) for item in items]
        else:
            found = [HassIntent(other, {"item": item, "name": target}) for item in items]
        return [replace(found[0], text=text), *found[1:]]  # said once

    return make


def read_list(spoken: Spoken) -> list[HassIntent]:
    if (spoken.get("list") or "").casefold() not in SHOPPING:
        raise NoIntent("Home Assistant only reads out the shopping list")
    return [HassIntent("HassShoppingListLastItems")]


def weather(spoken: Spoken) -> list[HassIntent]:
    if spoken.get("time") or spoken.get("date") not in (None, "", "today", "now", date.today().isoformat()):
        raise NoIntent("Home Assistant only tells the weather of now")
    slots = {"name": spoken.get("place")} if spoken.get("place") else {}
    return [HassIntent("HassGetWeather", slots, SAY_WEATHER)]


def clock(spoken: Spoken) -> list[HassIntent]:
    if spoken.get("place") or spoken.get("event") or spoken.get("date") not in (None, "", "today"):
        raise NoIntent("Home Assistant only tells the time and date of now and here")
    if spoken.get("date") or CALENDAR.search(spoken.text.casefold()):
        return [HassIntent("HassGetCurrentDate", {}, "{{ slots.date.strftime('%A, %-d %B %Y') }}")]
    return [HassIntent("HassGetCurrentTime", {}, "{{ slots.time.strftime('%-H:%M') }}")]


def state(spoken: Spoken) -> list[HassIntent]:
    """A question for a state; the sentence tells which, as commands do not."""
    word, said = (spoken.get("device") or "").casefold(), spoken.text.casefold()
    if not word and not place(spoken):
        raise NoIntent("Say which device you mean")
    device, kind, slots = named(word, spoken.home), kind_of(word), place(spoken)
    if device is not None:
        slots["name"] = device.name
    elif kind is None:
        slots |= {"name": word} if word else {}
    else:
        slots["domain"] = [kind[0], *(["binary_sensor"] if kind[1] in ("door", "window", "garage") else [])]
        slots |= {"device_class": [kind[1]]} if kind[1] else {}
    asked = [one for one in STATES if re.search(rf"\b{one}\b", said)]
    if len(asked) == 1:
        slots["state"] = STATES[asked[0]]
        if asked[0] in ("locked", "unlocked") and device is None and kind is not None:
            slots["domain"] = ["lock"]
            slots.pop("device_class", None)
    return [HassIntent("HassGetState", slots, SAY_STATE)]


def temperature(spoken: Spoken) -> list[HassIntent]:
    slots = things(spoken, ("climate",), classes=False)
    if named(spoken.get("device") or "", spoken.home) is None:
        slots.pop("name", None)  # "the temperature", "the inside": no name
    return [HassIntent("HassClimateGetTemperature", slots, SAY_TEMPERATURE)]


def broadcast(spoken: Spoken) -> list[HassIntent]:
    return [HassIntent("HassBroadcast", {"message": spoken.need("message", "Say what to announce")}, "Done")]


# What makes the intents of an action.
ROWS: dict[str, Callable[[Spoken], list[HassIntent]]] = {
    "on": switch("HassTurnOn", "Turned on"),
    "off": switch("HassTurnOff", "Turned off"),
    "toggle": switch("HassToggle", "Done"),
    "brightness_set": brightness,
    "color_set": color,
    "scene": scene,
    "temperature_set": value(
        "HassClimateSetTemperature", "climate", "temperature", "degrees", "Temperature set", "Say how many degrees"
    ),
    "open": move("HassTurnOn", "Opening"),
    "close": move("HassTurnOff", "Closing"),
    "cover_stop": move("HassStopMoving", "Stopped"),
    "position_set": position,
    "lock": lock("HassTurnOn", "Locking"),
    "unlock": lock("HassTurnOff", "Unlocking"),
    "speed_set": value("HassFanSetSpeed", "fan", "percentage", "level", "Speed set", "Say how fast, in percent"),
    "vacuum_start": clean,
    "vacuum_dock": dock,
    "play": play,
    "pause": only("HassMediaPause", "media_player", "Paused", classes=True),
    "resume": only("HassMediaUnpause", "media_player", "Resumed", classes=True),
    "stop": only("HassMediaPause", "media_player", "Paused", classes=True),  # there is no intent that stops
    "next": only("HassMediaNext", "media_player", "Playing next", classes=True),
    "previous": only("HassMediaPrevious", "media_player", "Playing previous", classes=True),
    "volume_set": value(
        "HassSetVolume", "media_player", "volume_level", "level", "Volume set", "Say how loud", classes=True
    ),
    "volume_up": volume(1),
    "volume_down": volume(-1),
    "mute": only("HassMediaPlayerMute", "media_player", "Muted", classes=True),
    "unmute": only("HassMediaPlayerUnmute", "media_player", "Unmuted", classes=True),
    "timer_set": timer("HassStartTimer", "Timer set", takes_time=True),
    "timer_add": timer("HassIncreaseTimer", "Timer changed", takes_time=True),
    "timer_subtract": timer("HassDecreaseTimer", "Timer changed", takes_time=True),
    "timer_cancel": timer("HassCancelTimer", "Timer cancelled", takes_time=False),
    "timer_pause": timer("HassPauseTimer", "Timer paused", takes_time=False),
    "timer_resume": timer("HassUnpauseTimer", "Timer resumed", takes_time=False),
    "timer_query": timer("HassTimerStatus", SAY_TIMERS, takes_time=False),
    "list_add": on_list("HassShoppingListAddItem", "HassListAddItem", "Added"),
    "list_remove": on_list("HassShoppingListCompleteItem", "HassListRemoveItem", "Removed"),
    "list_complete": on_list("HassShoppingListCompleteItem", "HassListCompleteItem", "Done"),
    "list_query": read_list,
    "weather": weather,
    "clock": clock,
    "state": state,
    "temperature_query": temperature,
    "broadcast": broadcast,
    "nevermind": lambda spoken: [HassIntent("HassNevermind")],
}
# Actions whose time, date and duration are their own business; any other with one of these is for later.
TIMED = frozenset({"weather", "clock", *(action for action in ROWS if action.startswith("timer_"))})
# Actions that Home Assistant has no intent for, and what to say then.
NONE: dict[str, str] = {
    **dict.fromkeys(
        ("brightness_up", "brightness_down"), "Home Assistant does not know brighter and dimmer; say a percentage"
    ),
    **dict.fromkeys(
        ("temperature_up", "temperature_down"), "Home Assistant does not know warmer and cooler; say the degrees"
    ),
    **dict.fromkeys(("speed_up", "speed_down"), "Home Assistant does not know faster and slower; say a percentage"),
    "vacuum_stop": "Home Assistant can start a vacuum and send it home, but not stop it",
    "coffee": "Home Assistant has no intent for coffee",
    **dict.fromkeys(("shuffle", "repeat"), "Home Assistant has no intent to shuffle or repeat"),
    **dict.fromkeys(("like", "dislike"), "Home Assistant keeps no tastes"),
    "media_query": "Home Assistant does not answer questions about music",
    **dict.fromkeys(("alarm_set", "alarm_cancel", "alarm_query"), "Home Assistant has no alarm clock"),
    "list_create": "Home Assistant makes no lists by voice",
    UNKNOWN: "I did not understand that",
}


def hass_intents(commands: Sequence[Command], home: Home | None = None, text: str = "") -> list[HassIntent]:
    """Home Assistant's intents for the commands of one sentence, in their order; a list of items is one intent an item.

    Args:
        home: whose names are names, and not words for a kind. text: the sentence, which tells which state or whether
            time or date is asked for.

    Raises NoIntent where one of them has none, since half a sentence is not what was asked for, or there are none.
    """
    found: list[HassIntent] = []
    for command in commands:
        found += _intents(Spoken(command, home or Home(), text))
    if not found:
        raise NoIntent(NONE[UNKNOWN])
    return found


def _intents(spoken: Spoken) -> list[HassIntent]:
    action = spoken.command["action"]
    make = ROWS.get(action)
    if make is None:
        raise NoIntent(NONE.get(action, NONE[UNKNOWN]))
    if action not in TIMED and any(spoken.get(slot) for slot in LATER):
        raise NoIntent("Home Assistant has no intent for later or for a while")
    return make(spoken)
