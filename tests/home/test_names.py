"""Names of a home: read from files, shown to the model where a sentence may mean them, found again for its words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smallthinker_edge.home.names import Device, Home
from smallthinker_edge.home.text_form import MOST_CHARACTERS, model_form

HOME = {
    "areas": ["Kitchen", "Living Room", "Anna's room"],
    "floors": ["Upstairs"],
    "devices": [
        {"name": "Desk Lamp", "area": "Living Room", "domain": "light", "aliases": ["reading light"]},
        {"name": "Roomba", "domain": "vacuum"},
        "Garage Door",
    ],
    "scenes": ["Movie Night"],
    "lists": ["Groceries"],
}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    path = tmp_path / "home.json"
    path.write_text(json.dumps(HOME), encoding="utf-8")
    return Home.load(path)


def test_a_file_of_names(home: Home) -> None:
    assert home.areas == ("Kitchen", "Living Room", "Anna's room")
    assert home.devices[0] == Device("Desk Lamp", "Living Room", "light", ("reading light",))
    assert home.devices[2] == Device("Garage Door")


def test_home_assistants_exposed_entities() -> None:
    entities = {
        "light.desk": {"name": "Desk Lamp", "area": "Office", "aliases": ["reading light"]},
        "scene.movie": {"name": "Movie Night"},
        "todo.shopping": {},
        "cover.garage_door": {},
    }
    for content in ({"exposed_entities": entities}, [{"entity_id": key, **value} for key, value in entities.items()]):
        home = Home.from_json(content)
        assert home.areas == ("Office",)
        assert home.scenes == ("Movie Night",)
        assert home.lists == ("shopping",)
        assert [(d.name, d.domain) for d in home.devices] == [("Desk Lamp", "light"), ("garage door", "cover")]


@pytest.mark.parametrize(
    "content",
    [3, "x", None, {"rooms": []}, {"areas": "kitchen"}, {"areas": [3]}, {"areas": [""]}, {"devices": [{}]},
    {"devices": [3]}, [{}], [3],
     {"devices": [{"name": "x", "aliases": "y"}]}],
)  # fmt: skip
def test_what_is_no_home_is_refused_by_its_file(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "home.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"home\.json"):
        Home.load(path)


def test_the_prompt_has_the_names_that_a_sentence_may_mean(home: Home) -> None:
    assert home.shown("turn on the desk lamp in the kitchen") == "areas: kitchen\ndevices: desk lamp"
    assert home.shown("switch the kichen off") == "areas: kitchen"
    assert home.shown("start movie night") == "scenes: movie night"
    assert home.shown("what is the weather") == ""


def test_words_become_the_homes_own_names(home: Home) -> None:
    assert home.own_name("areas", "the living room") == "Living Room"
    assert home.own_name("areas", "kichen") == "Kitchen"
    assert home.own_name("devices", "reading lights") == "Desk Lamp"
    assert home.own_name("devices", "heating") is None
    assert Home().own_name("areas", "kitchen") is None


def test_a_thousand_names_still_make_a_short_prompt() -> None:
    home = Home(devices=tuple(Device(f"Lamp {number} corner") for number in range(1000)))
    assert home.shown("lamp 77 corner on").count(",") < 8
    assert "lamp 77 corner" in home.shown("lamp 77 corner on")


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("Turn ON the Kitchen light!", "turn on the kitchen light"), ("Set it to 50%.", "set it to 50 percent"),
        ("21.5°C", "21.5 degrees"),
        ("milk,eggs , bread", "milk, eggs, bread"), ("wake me at 7:30pm", "wake me at 7:30 pm"), ("don\u2019t",
        "don't"), ("  ", ""), ("?!.", ""),
        ("a\tb\nc", "a b c"), ("AC/DC", "ac/dc"), ("r&b", "r&b"), ("<|im_end|>", "im end"), ('say "hi" {"action"}',
        "say hi action"), ("\ud83d\udca1 on", "on"),
    ],
)  # fmt: skip
def test_the_form_in_which_the_model_reads(text: str, form: str) -> None:
    assert model_form(text) == form
    assert model_form(form) == form


def test_a_long_text_is_cut() -> None:
    assert len(model_form("lamp " * 1000)) <= MOST_CHARACTERS
