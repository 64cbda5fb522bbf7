"""The demo's grammar: deterministic, valid JSON, and a held-out set that training cannot contain."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import demo_grammar
import demo_slots
import demo_wordings
import pytest

COMMANDS = Path(__file__).parents[2] / "smallthinker_edge" / "data" / "demo_commands.json"


@pytest.fixture(scope="module")
def training() -> list[demo_grammar.Example]:
    rng = random.Random(1)
    return [demo_grammar.compose(rng) for _ in range(20000)]


@pytest.fixture(scope="module")
def held_out() -> list[demo_grammar.Example]:
    return demo_grammar.held_out_examples(1000)


def commands(answer: str) -> list[dict[str, object]]:
    value = json.loads(answer)
    return value if isinstance(value, list) else [value]


def test_the_same_seed_gives_the_same_sentences() -> None:
    assert [demo_grammar.example(random.Random(3)) for _ in range(3)] == [demo_grammar.example(random.Random(3))] * 3
    assert demo_grammar.held_out_set(50) == demo_grammar.held_out_set(50)


def test_answers_are_compact_json_with_an_action(training: list[demo_grammar.Example]) -> None:
    for made in training[:3000]:
        assert made.answer == json.dumps(json.loads(made.answer), separators=(",", ":"))
        assert made.sentence.strip() == made.sentence != ""
        assert all("action" in command for command in commands(made.answer))
        assert not re.search(r"[{}\x02\x03]", made.sentence)


def test_every_name_of_an_answer_stands_in_its_sentence_letter_by_letter(
    training: list[demo_grammar.Example], held_out: list[demo_grammar.Example]
) -> None:
    for made in training[:3000] + held_out:
        for command in commands(made.answer):
            names = [command.get("room"), command.get("media"), command.get("color"), *command.get("items", [])]  # type: ignore[misc]
            for name in names:
                assert name is None or str(name) in made.sentence


def test_training_never_shows_held_out_values(training: list[demo_grammar.Example]) -> None:
    text = "\n".join(made.sentence + made.answer for made in training).lower()
    for name in demo_slots.HELD_OUT_NAMES + demo_slots.HELD_OUT["nonsense"]:
        assert not re.search(rf"\b{name}\b", text)
    found = [command for made in training for command in commands(made.answer)]
    assert not {command.get("level") for command in found} & set(demo_slots.HELD_OUT_LEVELS)
    assert not {command.get("degrees") for command in found} & set(demo_slots.HELD_OUT_DEGREES)


def test_training_never_shows_held_out_wordings(training: list[demo_grammar.Example]) -> None:
    groups = demo_wordings.INTENTS
    unseen = {(intent, p) for intent, group in groups.items() for p in group.by_hand + group.by_lot}
    assert not unseen & {used for made in training for used in made.wordings}
    # Nor does a polite frame in front of a wording of training make a held-out one.
    for frame in demo_wordings.FRAMES + demo_wordings.BEFORE:
        assert not {(intent, frame + p) for intent, group in groups.items() for p in group.common} & unseen
    every_word = {word for group in groups.values() for p in group.common for word in p.split()}
    every_word |= {verb for verbs in demo_wordings.PLAYBACK_VERBS.values() for verb in verbs}
    for group in groups.values():
        assert {word for p in group.common for word in p.split()}.issuperset(w for p in group.by_lot for w in p.split())
        assert every_word.issuperset(word for p in group.by_hand for word in p.split())
    text = "\n".join(made.sentence for made in training).lower()
    for phrase in ("have to get up", "remind me in", "count down", "remember to buy", "we no longer need"):
        assert phrase not in text


def test_every_held_out_sentence_holds_something_unseen(held_out: list[demo_grammar.Example]) -> None:
    seen = demo_grammar.compose(random.Random(0)).unseen
    assert not seen
    assert all(made.unseen for made in held_out)
    kinds = {kind for made in held_out for kind in made.unseen}
    assert kinds == {"name", "number", "nonsense", "wording by hand", "wording by lot"}


def test_training_and_held_out_sentences_do_not_meet(
    training: list[demo_grammar.Example], held_out: list[demo_grammar.Example]
) -> None:
    assert not {made.sentence.lower() for made in training} & {made.sentence.lower() for made in held_out}


def test_numbers_in_words() -> None:
    words = [demo_slots.number_words(n) for n in (0, 7, 15, 20, 35, 100)]
    assert words == ["zero", "seven", "fifteen", "twenty", "thirty five", "one hundred"]


def test_a_slip_never_falls_into_a_name_and_is_never_ambiguous() -> None:
    rng = random.Random(5)
    named = f"{demo_slots.OPEN}fifteen heating{demo_slots.CLOSE}"
    assert {demo_slots.typo(rng, named) for _ in range(50)} == {named}
    long_words = [word for word in sorted(demo_slots.CARRIERS) if len(word) > 4 and word.isalpha()]
    for word in long_words:
        for slipped in {demo_slots.typo(rng, word) for _ in range(20)} - {word}:
            assert [other for other in long_words if slipped in {other, *demo_slots.slips(other)}] == [word]


def test_the_demo_shows_held_out_commands_of_every_kind() -> None:
    shown = json.loads(COMMANDS.read_text())
    assert {entry["command"]: entry["expected"] for entry in shown} == {
        sentence: json.loads(answer) for sentence, answer in demo_grammar.demo_set()
    }
    assert any(isinstance(entry["expected"], list) for entry in shown)
    assert {"action": "unknown"} in [entry["expected"] for entry in shown]
