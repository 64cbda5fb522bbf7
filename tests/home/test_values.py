"""What the words of an answer mean: only what was said, in the right slots, as values."""

from __future__ import annotations

from typing import Any

import pytest

from smallthinker_edge.home.names import Device, Home
from smallthinker_edge.home.values import command_of, heard

HOME = Home(
    areas=("Walk In Closet", "Bathroom", "Dad's Office", "Office", "Attic"),
    floors=("First", "Upstairs"),
    devices=(Device("Sun Shade", domain="cover"), Device("Kitchen Speaker"), Device("Desk Lamp", aliases=("Zwirbel",))),
    scenes=("Movie Night",),
    lists=("Groceries",),
)


@pytest.mark.parametrize(
    ("said", "sentence", "kept"),
    [
        ({"area": ["kitchen"]}, "lights in the kitchen", {"area": ["kitchen"]}),
        ({"area": ["kitchen"]}, "lights on", {}),
        ({"area": ["sickption"]}, "lights in the reception on", {"area": ["reception"]}),
        ({"area": ["itchen"]}, "the kitchen light", {"area": ["kitchen"]}),  # a part of a word was not said
        ({"item": ["milk", "eggs", "wine"]}, "milk, eggs", {"item": ["milk", "eggs"]}),
        ({"time": ["half past six", "half past six"]}, "at half past six", {"time": ["half past six"]}),
        ({"media": ["harry potter potter"]}, "play harry potter now", {"media": ["harry potter"]}),
    ],
)  # fmt: skip
def test_only_what_was_said_counts(said: dict[str, list[str]], sentence: str, kept: dict[str, list[str]]) -> None:
    assert heard({"action": "on"} | said, sentence) == {"action": "on"} | kept


def test_what_was_said_before_counts_too() -> None:
    said = {"action": "on", "device": ["lamp"], "area": ["bedroom"]}
    assert heard(said, "and the bedroom", "lamp \n kitchen") == said


@pytest.mark.parametrize(
    ("said", "sentence", "command"),
    [
        # The whole of a name whose part was copied, also where the part is a name as well.
        ({"action": "state", "area": ["walk"]}, "what is on in the walk in closet", {"area": "Walk In Closet"}),
        ({"action": "on", "area": ["office"]}, "lights in dad's office", {"device": "lights", "area": "Dad's Office"}),
        ({"action": "on", "area": ["office"]}, "lights in the office", {"device": "lights", "area": "Office"}),
        # A name in another's slot.
        ({"action": "timer_pause", "name": ["attic"]}, "pause the attic timer", {"area": "Attic"}),
        ({"action": "timer_pause", "name": ["pasta"]}, "pause the pasta timer", {"name": "pasta"}),
        ({"action": "on", "floor": ["attic"]}, "attic on", {"area": "Attic"}),
        ({"action": "on", "area": ["upstairs"]}, "upstairs on", {"floor": "Upstairs"}),
        ({"action": "volume_up", "area": ["kitchen speaker"]}, "kitchen speaker up", {"device": "Kitchen Speaker"}),
        # A device that has its area in its words, and one whose name has an area's.
        ({"action": "on", "device": ["bathroom fan"]}, "bathroom fan on", {"device": "fan", "area": "Bathroom"}),
        ({"action": "on", "device": ["zwirbel"]}, "zwirbel on", {"device": "Desk Lamp"}),
        ({"action": "play", "device": ["kitchen speaker"], "area": ["kitchen"]}, "play on kitchen speaker in the attic",
         {"device": "Kitchen Speaker", "area": "Attic"}),
        ({"action": "off", "floor": ["attic lights"]}, "attic lights off", {"device": "lights", "area": "Attic"}),
        # A name that the answer left out; not one within another's words.
        ({"action": "on", "device": ["lights"]}, "lights on in the attic", {"device": "lights", "area": "Attic"}),
        ({"action": "play", "media": ["the office"]}, "play the office", {"media": "the office"}),
        ({"action": "weather"}, "is it raining in the attic", {}),
        ({"action": "scene", "scene": ["movie night"]}, "movie night", {"scene": "Movie Night"}),
    ],
)  # fmt: skip
def test_names_of_the_home(said: dict[str, Any], sentence: str, command: dict[str, Any]) -> None:
    assert command_of(said, sentence, HOME, alone=True) == {"action": said["action"]} | command


def test_a_name_belongs_to_nobody_where_there_are_several_commands() -> None:
    said = {"action": "on", "device": ["lights"]}
    assert command_of(said, "lights on and close the attic", HOME, alone=False) == {"action": "on", "device": "lights"}


@pytest.mark.parametrize(
    ("said", "sentence", "command"),
    [
        ({"action": "off", "device": ["all the lights"]}, "all the lights off", {"device": "lights", "all": True}),
        ({"action": "off", "device": ["lights"]}, "lights off in the whole house", {"device": "lights", "all": True}),
        ({"action": "timer_cancel"}, "cancel all my timers", {"all": True}),
        ({"action": "timer_cancel"}, "cancel the timer", {}),
        ({"action": "off", "device": ["all"]}, "all off", {"device": "all"}),
        ({"action": "unknown"}, "everywhere i go", {}),
        # A kind that the answer left out.
        ({"action": "off"}, "turn off all the lights", {"device": "lights", "all": True}),
        ({"action": "close"}, "the curtains please", {"device": "curtains"}),
        ({"action": "on"}, "light up the kitchen", {}),
        ({"action": "off", "device": ["tv"]}, "the tv that stands by the lamp off", {"device": "tv"}),
    ],
)  # fmt: skip
def test_all(said: dict[str, Any], sentence: str, command: dict[str, Any]) -> None:
    assert command_of(said, sentence, Home(), alone=True) == {"action": said["action"]} | command


@pytest.mark.parametrize(
    ("domain", "said", "done"),
    [
        ("light", "vacuum_start", "on"), ("light", "vacuum_stop", "off"), ("light", "position_set", "brightness_set"),
        ("light", "volume_down", "brightness_down"), ("switch", "vacuum_start", "on"),
        ("fan", "volume_set", "speed_set"),
        ("cover", "brightness_set", "position_set"), ("media_player", "position_set", "volume_set"),
        ("vacuum", "vacuum_start", "vacuum_start"), ("light", "on", "on"), ("", "vacuum_start", "vacuum_start"),
    ],
)  # fmt: skip
def test_what_is_done_fits_the_kind_of_device(domain: str, said: str, done: str) -> None:
    home = Home(devices=(Device("Zwirbel", domain=domain), Device("Desk Lamp", domain="light")))
    command = command_of({"action": said, "device": ["zwirbel"]}, "the zwirbel please", home, alone=True)
    assert command == {"action": done, "device": "Zwirbel"}


def test_devices_of_several_kinds_with_one_name_say_nothing() -> None:
    home = Home(devices=(Device("Zwirbel", domain="light"), Device("Zwirbel", domain="vacuum")))
    command = command_of({"action": "vacuum_start", "device": ["zwirbel"]}, "the zwirbel please", home, alone=True)
    assert command["action"] == "vacuum_start"
