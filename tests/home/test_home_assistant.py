"""Home Assistant's own conversation agent for Wyoming, with our service behind it: what it does at home, what it says.

It runs in a Python of its own, HASS_PYTHON, with pytest-homeassistant-custom-component and the requirements of Home
Assistant's components wyoming and conversation; docs/home.md says how to make one. Skipped without.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("wyoming")
from hass_python import printed_by

from smallthinker_edge import SmallThinker
from smallthinker_edge.home.names import Device, Home
from smallthinker_edge.home.schema import Command
from smallthinker_edge.home.wyoming import Settings, WyomingService

HOME = Home(devices=(Device("Desk Lamp", "Office", "light"), Device("Front Door", "Hall", "lock")))
LAMP, CEILING = {"entity_id": "light.lamp"}, {"entity_id": "light.ceiling"}
RADIO = {"entity_id": "media_player.kitchen"}
# Sentence, its commands, the services that Home Assistant calls, what it says (a part of it).
CASES: list[tuple[str, list[Command], list[Any], str]] = [
    ("kitchen lights on", [{"action": "on", "device": "lights", "area": "kitchen"}],
     [["homeassistant", "turn_on", CEILING]], "Turned on"),
    ("all the lights off", [{"action": "off", "device": "lights", "all": True}],
     [["homeassistant", "turn_off", CEILING], ["homeassistant", "turn_off", LAMP]], "Turned off"),
    ("lamp to forty", [{"action": "brightness_set", "device": "desk lamp", "level": 40}],
     [["light", "turn_on", {**LAMP, "brightness_pct": 40}]], "Brightness set"),
    ("kitchen lights blue", [{"action": "color_set", "device": "lights", "area": "kitchen", "color": "light blue"}],
     [["light", "turn_on", {**CEILING, "rgb_color": [173, 216, 230]}]], "Color set"),
    ("warm white in the kitchen", [{"action": "color_set", "area": "kitchen", "color": "warm white"}],
     [["light", "turn_on", {**CEILING, "color_temp_kelvin": 2700}]], "Color set"),
    ("lock the door", [{"action": "lock", "device": "front door"}],
     [["lock", "lock", {"entity_id": "lock.front"}]], "Locking"),
    ("unlock the doors", [{"action": "unlock", "device": "doors"}],
     [["lock", "unlock", {"entity_id": "lock.front"}]], "Unlocking"),
    ("turn off the front door", [{"action": "off", "device": "front door"}], [], ""),
    ("open the blinds", [{"action": "open", "device": "blinds", "area": "office"}],
     [["cover", "open_cover", {"entity_id": "cover.front"}]], "Opening"),
    ("blind to thirty", [{"action": "position_set", "device": "big blind", "level": 30}],
     [["cover", "set_cover_position", {"entity_id": "cover.front", "position": 30}]], "Position set"),
    ("stop the blinds", [{"action": "cover_stop", "device": "blinds"}],
     [["cover", "stop_cover", {"entity_id": "cover.front"}]], "Stopped"),
    ("movie night", [{"action": "scene", "scene": "movie night"}],
     [["homeassistant", "turn_on", {"entity_id": "scene.movie"}]], "Activated"),
    ("twenty one degrees", [{"action": "temperature_set", "device": "heating", "area": "kitchen", "degrees": 21.5}],
     [["climate", "set_temperature", {"entity_id": "climate.kitchen", "temperature": 21.5}]], "Temperature set"),
    ("fan to half", [{"action": "speed_set", "device": "fan", "level": 50}],
     [["fan", "turn_on", {"entity_id": "fan.kitchen", "percentage": 50}]], "Speed set"),
    ("start robby", [{"action": "vacuum_start", "device": "robby"}],
     [["vacuum", "start", {"entity_id": "vacuum.robot"}]], "Started"),
    ("send the vacuum home", [{"action": "vacuum_dock", "device": "vacuum"}],
     [["vacuum", "return_to_base", {"entity_id": "vacuum.robot"}]], "Returning"),
    ("pause", [{"action": "pause"}], [["media_player", "media_pause", RADIO]], "Paused"),
    ("next", [{"action": "next", "area": "kitchen"}], [["media_player", "media_next_track", RADIO]], "Playing next"),
    ("louder to forty", [{"action": "volume_set", "level": 40}],
     [["media_player", "volume_set", {**RADIO, "volume_level": 0.4}]], "Volume set"),
    ("mute the radio", [{"action": "mute", "device": "radio"}],
     [["media_player", "volume_mute", {**RADIO, "is_volume_muted": True}]], "Muted"),
    ("two at once", [{"action": "on", "device": "desk lamp"}, {"action": "lock", "device": "front door"}],
     [["homeassistant", "turn_on", LAMP], ["lock", "lock", {"entity_id": "lock.front"}]], "Turned on\nLocking"),
    ("which lights are on", [{"action": "state", "device": "lights"}], [], "Desk Lamp"),
    ("is the desk lamp on", [{"action": "state", "device": "desk lamp"}], [], "Desk Lamp is on"),
    ("is the door locked", [{"action": "state", "device": "front door"}], [], "Front Door is locked"),
    ("are any blinds closed", [{"action": "state", "device": "blinds"}], [], "Big Blind is open"),
    ("how warm is it in the kitchen", [{"action": "temperature_query", "area": "kitchen"}], [], "20.5 degrees"),
    ("the weather", [{"action": "weather"}], [], "11 °C, rainy"),
    ("the time", [{"action": "clock"}], [], ":"),
    ("the date", [{"action": "clock"}], [], time.strftime("%B")),
    ("how long is the timer", [{"action": "timer_query"}], [], "No timer is running"),
    ("timer", [{"action": "timer_set", "duration": 5400, "name": "pasta"}], [], "Timer set"),
    ("longer", [{"action": "timer_add", "duration": 1800}], [], "Timer changed"),
    ("how long now", [{"action": "timer_query", "name": "pasta"}], [], "pasta: 2 hours left"),
    ("hold it", [{"action": "timer_pause"}], [], "Timer paused"),
    ("go on", [{"action": "timer_resume"}], [], "Timer resumed"),
    ("no timer", [{"action": "timer_cancel"}], [], "Timer cancelled"),
    ("milk and eggs", [{"action": "list_add", "items": ["milk", "eggs"], "list": "shopping"}], [], "Added"),
    ("what to buy", [{"action": "list_query", "list": "shopping"}], [], "eggs, milk"),
    ("no eggs", [{"action": "list_remove", "items": ["eggs"], "list": "shopping"}], [], "Removed"),
    ("some jazz", [{"action": "play", "genre": "jazz", "artist": "nina simone"}],
     [["media_player", "play_media", {**RADIO, "media_content_id": "nina simone jazz", "media_content_type": "music"}]],
     "Playing"),
    ("clean the kitchen", [{"action": "vacuum_start", "area": "kitchen"}],
     [["vacuum", "clean_area", {"entity_id": ["vacuum.robot"], "cleaning_area_id": ["kitchen"]}]], "Cleaning"),
    ("never mind", [{"action": "nevermind"}], [], ""),
    ("coffee", [{"action": "coffee"}], [], "coffee"),
    ("gibberish", [{"action": "unknown"}], [], "understand"),
]  # fmt: skip


@contextmanager
def service(model: SmallThinker | None = None) -> Iterator[int]:
    """A service in a thread; gives its port."""
    known = {sentence: commands for sentence, commands, _, _ in CASES}
    started, port, loops = threading.Event(), [0], list[asyncio.AbstractEventLoop]()

    async def main() -> None:
        wyoming = WyomingService(lambda text, previous: known[text], HOME, model, Settings(most_tokens=8))
        async with await asyncio.start_server(wyoming.serve, "127.0.0.1", 0) as server:
            port[0], stop = server.sockets[0].getsockname()[1], asyncio.Event()
            loops.append(asyncio.get_running_loop())
            stops.append(stop)
            started.set()
            await stop.wait()
        await wyoming.end()

    stops: list[asyncio.Event] = []
    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert started.wait(10)
    try:
        yield port[0]
    finally:
        loops[0].call_soon_threadsafe(stops[0].set)
        thread.join()


def answered(sentences: list[str], model: SmallThinker | None = None) -> list[dict[str, Any]]:
    """What Home Assistant did and said to each sentence."""
    with service(model) as port:
        lines = printed_by("hass_home", "127.0.0.1", str(port), json.dumps(sentences))
    assert len(lines) == len(sentences)
    return lines


@pytest.fixture(scope="module")
def answers() -> dict[str, dict[str, Any]]:
    sentences = [sentence for sentence, *_ in CASES]
    return dict(zip(sentences, answered(sentences), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_home_assistant_does_and_says_it(
    case: tuple[str, list[Command], list[Any], str], answers: dict[str, dict[str, Any]]
) -> None:
    sentence, _, calls, said = case
    answer = answers[sentence]
    assert sorted(answer["calls"], key=str) == sorted(calls, key=str), answer
    assert said in answer["said"], answer
    assert "{" not in answer["said"]


def test_home_assistant_speaks_what_the_large_model_says(tiny_model: Path) -> None:
    with SmallThinker(tiny_model, threads=1) as model:
        lamp, other = answered(["lamp to forty", "gibberish"], model)
    assert lamp["calls"]
    assert (other["error"], other["calls"]) == (None, [])
    assert other["said"]
