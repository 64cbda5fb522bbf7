"""What the embedded demo model can do, as docs/demo-model.md states it: on sentences that training never showed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import demo_grammar
import demo_slots
import pytest

from smallthinker_edge import SmallThinker


@pytest.fixture(scope="module")
def model(demo_model: Path) -> Iterator[SmallThinker]:
    with SmallThinker(demo_model) as opened:
        yield opened


def answer(model: SmallThinker, sentence: str) -> str:
    return model.chat([{"role": "user", "content": sentence}], max_tokens=256).text


def test_it_has_the_architecture_of_the_real_models(model: SmallThinker, demo_model: Path) -> None:
    config = model.config
    assert config.n_experts >= 8
    assert config.gating == "sigmoid"
    assert config.rope_layout == tuple(layer % 4 != 0 for layer in range(config.n_layers))
    assert config.n_layers > 4  # llama.cpp gives a hybrid of exactly four layers RoPE on all of them
    assert demo_model.stat().st_size <= 8_000_000


def test_a_name_has_the_same_tokens_in_the_sentence_and_in_the_json(model: SmallThinker) -> None:
    for name in demo_slots.HELD_OUT_NAMES + demo_slots.ROOMS + demo_slots.ITEMS:
        alone = model.tokenize(name)
        spoken, written = model.tokenize(f"in the {name} at"), model.tokenize(f'"room":"{name}"')
        assert spoken[len(model.tokenize("in the ")) :][: len(alone)] == alone
        assert written[len(model.tokenize('"room":"')) :][: len(alone)] == alone


def test_it_answers_unseen_sentences_as_documented(model: SmallThinker) -> None:
    pairs = demo_grammar.held_out_set(200, seed=7)
    right = sum(answer(model, sentence) == expected for sentence, expected in pairs)
    assert right / len(pairs) > 0.9


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        (
            "dim the bedroom lamp to thirty percent at half past seven",
            {"action": "set", "device": "lamp", "room": "bedroom", "level": 30, "time": "07:30"},
        ),
        ("we are out of maple syrup and almonds", {"action": "add", "items": ["maple syrup", "almonds"]}),
        ("my knee hurts a bit", {"action": "unknown"}),
    ],
)
def test_it_answers_as_the_readme_says(model: SmallThinker, sentence: str, expected: object) -> None:
    assert json.loads(answer(model, sentence)) == expected
