"""The demo's grammar: deterministic, valid JSON, and a held-out set that training cannot contain."""

from __future__ import annotations

import json
import random
from pathlib import Path

import demo_grammar

COMMANDS = Path(__file__).parents[1] / "smallthinker_edge" / "data" / "demo_commands.json"


def test_the_same_seed_gives_the_same_sentences() -> None:
    assert [demo_grammar.example(random.Random(3)) for _ in range(3)] == [demo_grammar.example(random.Random(3))] * 3
    assert demo_grammar.held_out_set(50) == demo_grammar.held_out_set(50)


def test_answers_are_compact_json_with_an_action() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        sentence, answer = demo_grammar.example(rng)
        value = json.loads(answer)
        assert answer == json.dumps(value, separators=(",", ":"))
        assert sentence.strip() == sentence != ""
        assert all("action" in command for command in (value if isinstance(value, list) else [value]))


def test_training_never_shows_held_out_values() -> None:
    rng = random.Random(1)
    text = "\n".join(" ".join(demo_grammar.example(rng)).lower() for _ in range(5000))
    for kind in ("rooms", "items", "nonsense", "music", "colors"):
        for value in demo_grammar.HELD_OUT_VALUES[kind]:
            assert str(value) not in text


def test_training_and_held_out_sentences_do_not_meet() -> None:
    rng = random.Random(2)
    seen = {demo_grammar.example(rng)[0].lower() for _ in range(20000)}
    assert not seen & {sentence.lower() for sentence, _ in demo_grammar.held_out_set(1000)}


def test_numbers_in_words() -> None:
    words = [demo_grammar.number_words(n) for n in (0, 7, 15, 20, 35, 100)]
    assert words == ["zero", "seven", "fifteen", "twenty", "thirty five", "one hundred"]


def test_the_demo_shows_held_out_commands() -> None:
    pairs = {sentence: json.loads(answer) for sentence, answer in demo_grammar.held_out_set(8, seed=2)}
    assert {entry["command"]: entry["expected"] for entry in json.loads(COMMANDS.read_text())} == pairs
