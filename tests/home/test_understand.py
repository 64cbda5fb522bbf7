"""What the embedded model makes of sentences, as docs/home-model.md states it, and how answers become commands."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import home_eval
import pytest
import slurp
import words

from smallthinker_edge import SmallThinker
from smallthinker_edge.home import ACTIONS, Command, Device, Home, HomeModel
from smallthinker_edge.home.schema import read_answer

SLURP = Path(__file__).parents[3] / "shared" / "data" / "slurp" / "devel.jsonl"


@pytest.fixture(scope="module")
def model(demo_model: Path) -> Iterator[SmallThinker]:
    with SmallThinker(demo_model) as opened:
        yield opened


@pytest.fixture(scope="module")
def home_model(model: SmallThinker) -> HomeModel:
    return HomeModel(model)


class Said:
    """A model that says what it is told to."""

    def __init__(self, text: str, finish_reason: str = "stop") -> None:
        self.text, self.finish_reason = text, finish_reason
        self.messages: list[dict[str, str]] = []

    def chat(self, messages: list[dict[str, str]], **options: Any) -> Said:
        self.messages = messages
        return self


def understood(answer: str, sentence: str, home: Home | None = None, **options: Any) -> list[Command]:
    model: Any = Said(answer, **options)
    return HomeModel(model, home, constrained=False).understand(sentence)


def test_it_has_the_architecture_of_the_real_models(model: SmallThinker, demo_model: Path) -> None:
    config = model.config
    assert config.n_experts >= 8
    assert config.gating == "sigmoid"
    assert config.rope_layout == tuple(layer % 4 != 0 for layer in range(config.n_layers))
    assert config.n_layers > 4  # llama.cpp gives a hybrid of exactly four layers RoPE on all of them
    assert demo_model.stat().st_size <= 8_000_000


def test_a_name_has_the_same_tokens_in_the_sentence_and_in_the_json(model: SmallThinker) -> None:
    for name in (*words.names_of(words.AREAS, True), *words.names_of(words.ITEMS, True)):
        alone = model.tokenize(name)
        spoken, written = model.tokenize(f"in the {name} at"), model.tokenize(f'"area":"{name}"')
        assert spoken[len(model.tokenize("in the ")) :][: len(alone)] == alone
        assert written[len(model.tokenize('"area":"')) :][: len(alone)] == alone


@pytest.mark.skipif(not SLURP.is_file(), reason="SLURP's devel.jsonl is not there")
def test_peoples_sentences(model: SmallThinker) -> None:
    spoken = [one for one in slurp.read_slurp(SLURP) if slurp.is_held_out(one.sentence.kind)]
    scores = home_eval.slurp_scores(HomeModel(model, constrained=False), spoken)
    assert scores["home_action_accuracy"] >= 0.85
    assert scores["unknown_recall"] >= 0.93
    assert scores["entity_f1"] >= 0.65
    assert scores["invalid_json"] <= 0.01 * len(spoken)


def test_home_assistants_sentences(model: SmallThinker) -> None:
    pytest.importorskip("home_assistant_intents", reason="the extra `home-data`")
    scores = home_eval.hass_scores(model, 300, held_out=True, constrained=False)
    assert scores["intent_accuracy"] >= 0.9
    assert scores["area_accuracy"] >= 0.95


def test_constrained_answers_are_always_valid(model: SmallThinker) -> None:
    pytest.importorskip("llguidance", reason="the extra `structured`")
    rng = random.Random(3)
    home_model = HomeModel(model, constrained=True)
    letters = "abcdefghij klmnopqrstuv wxyz,' 0123456789 äß日"
    for _ in range(60):
        sentence = " ".join("".join(rng.choices(letters, k=rng.randint(1, 60))).split())
        answer = home_model.answer(sentence) if sentence else None
        assert answer is None or read_answer(answer) is not None, sentence  # None: it came to no end
        assert all(command["action"] in ACTIONS for command in home_model.understand(sentence))


@pytest.mark.parametrize(
    ("sentence", "command"),
    [
        ("Turn on the kitchen lights!", {"action": "on", "device": "lights", "area": "kitchen"}),
        ("turn off all the lights", {"action": "off", "device": "lights", "all": True}),
        ("I'd like 21.5° in the bedroom", {"action": "temperature_set", "area": "bedroom", "degrees": 21.5}),
        ("set a timer for an hour and a half", {"action": "timer_set", "duration": 5400}),
        ("dim the bedroom lamp to 30%", {"action": "brightness_set", "device": "lamp", "area": "bedroom", "level": 30}),
        ("who wrote hamlet", {"action": "unknown"}),
        ("never mind", {"action": "nevermind"}),
    ],
)
def test_plain_commands(home_model: HomeModel, sentence: str, command: Command) -> None:
    assert home_model.understand(sentence) == [command]


@pytest.mark.parametrize(
    ("sentence", "commands"),
    [
        ("close the blinds and turn off the tv", [("close", "blinds"), ("off", "tv")]),
        ("lock the front door, turn off the lights, and set the alarm for six",
         [("lock", "front door"), ("off", "lights"), ("alarm_set", None)]),
        ("turn off the tv and the radio", [("off", "tv"), ("off", "radio")]),
    ],
)  # fmt: skip
def test_several_commands_in_one_sentence(
    home_model: HomeModel, sentence: str, commands: list[tuple[str, str | None]]
) -> None:
    understood = home_model.understand(sentence)
    assert [(command["action"], command.get("device")) for command in understood] == commands


def test_several_areas_are_a_command_each(home_model: HomeModel) -> None:
    commands = home_model.understand("turn off the lights in the kitchen and the bedroom")
    assert [(command["action"], command["area"]) for command in commands] == [("off", "kitchen"), ("off", "bedroom")]


def test_a_follow_up_takes_the_command_before_it(home_model: HomeModel) -> None:
    first = home_model.understand("turn on the lights in the kitchen")
    assert home_model.understand("and in the bedroom too", first) == [
        {"action": "on", "device": "lights", "area": "bedroom"}
    ]


def test_words_become_the_homes_own_names(model: SmallThinker) -> None:
    home = Home(areas=("Kitchen",), devices=(Device("Zwirbel", "Kitchen", "light"), Device("Desk Lamp")))
    assert HomeModel(model, home).understand("turn on the zwirbel") == [{"action": "on", "device": "Zwirbel"}]


@pytest.mark.parametrize("sentence", ["", "   ", "?!", "\u200b", "\n"])
def test_nothing_said_is_unknown(home_model: HomeModel, sentence: str) -> None:
    assert home_model.understand(sentence) == [{"action": "unknown"}]


@pytest.mark.parametrize("answer", ["", "{", '{"action":"fly"}', '{"action":"on","media":"x"}', "on"])
def test_what_is_no_answer_is_unknown(answer: str) -> None:
    assert understood(answer, "turn on the lamp") == [{"action": "unknown"}]


def test_an_answer_that_does_not_end_is_unknown() -> None:
    assert understood('{"action":"on"}', "turn on the lamp", finish_reason="length") == [{"action": "unknown"}]


def test_what_nobody_said_is_left_out() -> None:
    assert understood('{"action":"on","device":"lamp","area":"kitchen"}', "turn on the lamp") == [
        {"action": "on", "device": "lamp"}
    ]


def test_words_become_values() -> None:
    answer = '{"action":"alarm_set","name":"school","time":["half past six","in the morning"],"date":"monday"}'
    sentence = "school alarm at half past six in the morning on monday"
    assert understood(answer, sentence) == [
        {"action": "alarm_set", "name": "school", "time": "06:30", "date": "monday"}
    ]
    assert understood('{"action":"list_add","item":["milk","eggs"]}', "milk and eggs") == [
        {"action": "list_add", "items": ["milk", "eggs"]}
    ]
    assert understood('{"action":"brightness_up","level":"a bit"}', "a bit brighter") == [
        {"action": "brightness_up", "level": "a bit"}
    ]
    assert understood('{"action":"off","device":"every lamp"}', "every lamp off") == [
        {"action": "off", "device": "lamp", "all": True}
    ]
    assert understood('{"action":"off","device":"lights"}', "lights off everywhere") == [
        {"action": "off", "device": "lights", "all": True}
    ]


def test_the_prompt_has_the_names_and_what_was_said_before() -> None:
    said = Said('{"action":"unknown"}')
    model: Any = said
    home_model = HomeModel(model, Home(areas=("Den",)), constrained=False)
    home_model.understand(
        "and the den too", [{"action": "timer_set", "duration": 5400, "name": "Tea"}, {"action": "unknown"}]
    )
    assert [message["role"] for message in said.messages] == ["system", "user", "assistant", "user"]
    assert said.messages[0]["content"] == "areas: den"
    assert said.messages[2]["content"] == '{"action":"timer_set","name":"tea","duration":"1 hours 30 minutes"}'
