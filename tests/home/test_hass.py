"""Commands as Home Assistant's intents: names and slots against Home Assistant's own list of them."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest

from smallthinker_edge.home.hass import LATER, NONE, ROWS, TIMED, HassIntent, NoIntent, hass_intents
from smallthinker_edge.home.names import Device, Home
from smallthinker_edge.home.schema import ACTIONS

HOME = Home(
    areas=("Kitchen", "Living Room"),
    devices=(
        Device("Reading Lamp", "Living Room", "light", ("the bright one",)),
        Device("Front Door", "Hall", "lock"),
        Device("Big Blind", "Living Room", "cover"),
        Device("Fountain", "Garden", "valve"),
    ),
)
# Slots that components/*/intent.py take beyond those of the sentences, and handlers that no sentence names.
CLASSED = {"domain", "device_class"}
MORE: dict[str, set[str]] = {
    "HassToggle": {"name", "area", "floor", *CLASSED},
    "HassStopMoving": {"name", "area", "floor", *CLASSED},
    "HassShoppingListLastItems": set(),
    **{f"HassMedia{what}": {"floor", *CLASSED} for what in ("Pause", "Unpause", "Next", "Previous")},
    **{f"Hass{what}": {"floor", *CLASSED} for what in ("SetVolume", "MediaPlayerMute", "MediaPlayerUnmute")},
    "HassMediaSearchAndPlay": {"floor"},
    "HassVacuumReturnToBase": {"floor"},
}
EXAMPLES: dict[str, Any] = {
    "level": 30, "color": "blue", "scene": "movie night", "degrees": 21.5, "item": "espresso", "media": "jazz radio",
    "artist": "nina simone", "genre": "jazz", "duration": 3725, "name": "pasta", "items": ["milk", "eggs"],
    "list": "shopping", "message": "dinner",
}  # fmt: skip


def one(command: dict[str, Any], text: str = "") -> tuple[str, dict[str, Any]]:
    (intent,) = hass_intents([command], HOME, text)
    return intent.name, intent.slots


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    """Slots by intent, of the package home-assistant-intents and MORE."""
    package = pytest.importorskip("home_assistant_intents")
    intents = json.loads(resources.files(package).joinpath("intents.json").read_text(encoding="utf-8"))
    slots = {name: set(entry.get("slots", {})) for name, entry in intents.items()}
    return {name: slots.get(name, set()) | MORE.get(name, set()) for name in slots | MORE}


def test_every_action_has_an_intent_or_says_why_not() -> None:
    assert set(ROWS) | set(NONE) == set(ACTIONS)
    assert not set(ROWS) & set(NONE)


@pytest.mark.parametrize("action", ROWS)
@pytest.mark.parametrize("device", ["lights", "blinds", "tv", "music", "reading lamp", "thing"])
def test_intents_and_slots_are_home_assistants(action: str, device: str, known: dict[str, set[str]]) -> None:
    command = {"action": action, "device": device, "area": "kitchen", "floor": "upstairs"}
    slots = ["items" if slot == "item" and action.startswith("list") else slot for slot in ACTIONS[action]]
    command |= {slot: EXAMPLES[slot] for slot in slots if slot in EXAMPLES and (action in TIMED or slot not in LATER)}
    for intent in hass_intents([command], HOME):
        assert set(intent.slots) <= known[intent.name]


@pytest.mark.parametrize("action", NONE)
def test_what_has_no_intent_says_so(action: str) -> None:
    with pytest.raises(NoIntent, match=r"\w+ \w+"):
        hass_intents([{"action": action, "device": "lights", "level": 10}])


def test_a_kind_is_a_domain_and_a_name_of_the_home_a_name() -> None:
    kitchen = {"action": "on", "device": "lights", "area": "Kitchen"}
    assert one(kitchen) == ("HassTurnOn", {"domain": ["light"], "area": "Kitchen"})
    named = {"action": "off", "device": "THE bright one"}
    assert one(named) == ("HassTurnOff", {"name": "Reading Lamp", "domain": ["light"]})
    assert one({"action": "brightness_set", "device": "lights", "level": 40, "all": True}) == (
        "HassLightSet",
        {"domain": ["light"], "brightness": 40},
    )
    assert one({"action": "pause", "device": "tv"}) == ("HassMediaPause", {"device_class": ["tv"]})
    assert one({"action": "volume_down", "device": "tv"}) == (
        "HassSetVolumeRelative",
        {"name": "tv", "volume_step": "down"},
    )


def test_off_unlocks_and_opens_nothing() -> None:
    for action in ("on", "off", "toggle"):
        for device in ("front door", "big blind", "fountain", "something"):
            _, slots = one({"action": action, "device": device})
            assert slots["domain"]
            assert not {"lock", "cover", "valve", "alarm_control_panel"} & set(slots["domain"]), (action, device)
    _, slots = one({"action": "off", "area": "Kitchen"})
    assert slots["domain"] == ["light"]
    with pytest.raises(NoIntent):
        one({"action": "off"})


def test_doors_open_as_covers_and_lock_as_locks() -> None:
    assert one({"action": "open", "device": "garage door"}) == (
        "HassTurnOn",
        {"domain": ["cover"], "device_class": ["garage"]},
    )
    assert one({"action": "close", "device": "front door"}) == (
        "HassTurnOff",
        {"name": "Front Door", "domain": ["cover", "valve"]},
    )
    assert one({"action": "lock", "device": "front door"}) == ("HassTurnOn", {"name": "Front Door", "domain": ["lock"]})
    assert one({"action": "unlock", "device": "doors"}) == ("HassTurnOff", {"domain": ["lock"]})
    assert one({"action": "unlock", "device": "door"}) == ("HassTurnOff", {"name": "Front Door", "domain": ["lock"]})
    with pytest.raises(NoIntent):  # not every door of a home that is not known
        hass_intents([{"action": "unlock", "device": "door"}])
    assert one({"action": "open", "area": "garden"})[1]["domain"] == ["cover"]


def test_durations_are_hours_minutes_and_seconds() -> None:
    assert one({"action": "timer_set", "duration": 3725, "name": "pasta"}) == (
        "HassStartTimer",
        {"hours": 1, "minutes": 2, "seconds": 5, "name": "pasta"},
    )
    assert one({"action": "timer_cancel", "duration": 300}) == ("HassCancelTimer", {"start_minutes": 5})
    assert one({"action": "timer_cancel", "all": True}) == ("HassCancelAllTimers", {})
    assert one({"action": "timer_query"}) == ("HassTimerStatus", {})
    with pytest.raises(NoIntent):
        one({"action": "timer_set", "duration": 0})


def test_an_item_is_an_intent() -> None:
    items = {"action": "list_add", "items": ["milk", "eggs"], "list": "shopping"}
    assert [(i.name, i.slots) for i in hass_intents([items])] == [
        ("HassShoppingListAddItem", {"item": "milk"}),
        ("HassShoppingListAddItem", {"item": "eggs"}),
    ]
    assert one({"action": "list_remove", "items": ["call mum"], "list": "to do"}) == (
        "HassListRemoveItem",
        {"item": "call mum", "name": "to do"},
    )


def test_the_sentence_says_which_state_and_whether_the_date() -> None:
    lights = {"action": "state", "device": "lights", "area": "Kitchen"}
    assert one(lights, "which lights are on in the kitchen") == (
        "HassGetState",
        {"domain": ["light"], "area": "Kitchen", "state": ["on"]},
    )
    assert one({"action": "state", "device": "doors"}, "are the doors locked")[1]["domain"] == ["lock"]
    assert one({"action": "temperature_query", "area": "Kitchen"}) == ("HassClimateGetTemperature", {"area": "Kitchen"})
    assert one({"action": "clock"}, "what day is it")[0] == "HassGetCurrentDate"
    assert one({"action": "clock"}, "what time is it")[0] == "HassGetCurrentTime"


@pytest.mark.parametrize(
    "command",
    [
        {"action": "on", "device": "lights", "time": "19:00"},
        {"action": "off", "device": "lights", "duration": 600},
        {"action": "weather", "date": "tomorrow"},
        {"action": "clock", "place": "tokyo"},
        {"action": "brightness_set", "device": "lights"},
        {"action": "list_add", "items": []},
    ],
)
def test_what_would_be_done_wrongly_is_refused(command: dict[str, Any]) -> None:
    with pytest.raises(NoIntent):
        hass_intents([command])


def test_half_a_sentence_is_not_done() -> None:
    with pytest.raises(NoIntent):
        hass_intents([{"action": "on", "device": "lights"}, {"action": "coffee"}])
    with pytest.raises(NoIntent):
        hass_intents([])


def test_no_text_holds_what_was_said() -> None:
    """Home Assistant renders it as a template of its own."""
    said = "{{ states }}"
    for action, slots in ACTIONS.items():
        if action in ROWS:
            command: dict[str, Any] = {"action": action, "device": said, "area": said, "items": [said]}
            free = set(slots) - {"item", "list", "date", "time", "event", "duration", "level", "degrees"}
            command |= {slot: said for slot in free if (action, slot) != ("clock", "place")}
            command |= {slot: 60 for slot in ("level", "degrees") if slot in slots}
            command |= {"duration": 60} if action in TIMED else {}
            intents: list[HassIntent] = hass_intents([command], text=said)
            assert all(said not in (intent.text or "") for intent in intents)


@pytest.mark.parametrize("action", list(ACTIONS))
def test_words_that_are_no_numbers_are_no_surprise(action: str) -> None:
    for words in ("a bit", "the night", "warm", "7"):
        command = {"action": action} | {"items" if slot == "item" else slot: words for slot in ACTIONS[action]}
        for kept in [tuple(command), *(("action", slot) for slot in command)]:
            some = {key: [words] if key == "items" else command[key] for key in kept}
            try:
                intents = hass_intents([some], Home(), words)
            except NoIntent as refused:
                assert str(refused)
            else:
                assert all(intent.name.startswith("Hass") for intent in intents)


def test_a_timer_that_is_called_by_its_length() -> None:
    (intent,) = hass_intents([{"action": "timer_cancel", "name": "five minute"}])
    assert (intent.name, intent.slots) == ("HassCancelTimer", {"start_minutes": 5})


def test_robots_that_mow_are_not_those_that_clean() -> None:
    home = Home(devices=(Device("Shaun", domain="lawn_mower"), Device("Rosie", domain="vacuum")))
    for command, name in (
        ({"action": "vacuum_start", "device": "Shaun"}, "HassLawnMowerStartMowing"),
        ({"action": "vacuum_start", "device": "Rosie"}, "HassVacuumStart"),
        ({"action": "vacuum_dock", "device": "mower"}, "HassLawnMowerDock"),
        ({"action": "vacuum_dock"}, "HassVacuumReturnToBase"),
    ):
        assert [intent.name for intent in hass_intents([command], home)] == [name]
    assert hass_intents([{"action": "vacuum_start"}], home, "mow the lawn")[0].name == "HassLawnMowerStartMowing"
