"""The home model's data: sentences that parse, answers that can be copied, nothing held out in training."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import islice
from pathlib import Path

import annotated
import augment
import pytest
import slurp
import words
from annotated import Piece, parse

from smallthinker_edge.home.schema import ACTIONS, pairs, read_answer
from smallthinker_edge.home.text_form import model_form

SLURP = Path(__file__).parents[3] / "shared" / "data" / "slurp" / "devel.jsonl"
needs_slurp = pytest.mark.skipif(not SLURP.is_file(), reason="SLURP's devel.jsonl is not there")


@pytest.fixture(scope="module")
def own() -> list[annotated.Sentence]:
    return annotated.own_sentences()


def test_our_sentences_use_the_schema(own: list[annotated.Sentence]) -> None:
    assert len(own) > 20000
    seen = Counter(sentence.action for sentence in own)
    assert set(seen) == set(ACTIONS)
    assert min(seen.values()) >= 10
    for sentence in own:
        assert {piece.slot for piece in sentence.pieces if piece.slot} <= set(ACTIONS[sentence.action]), sentence
        assert read_answer(sentence.answer), sentence
        assert sentence.text


def test_no_sentence_is_there_twice(own: list[annotated.Sentence]) -> None:
    counts = Counter(sentence.text for sentence in own)
    # Punctuation and hyphens, which the model does not see, still tell a few apart.
    assert sum(n - 1 for n in counts.values()) < 30


def test_a_marked_sentence() -> None:
    sentence = parse("alarm_set", "wake me at [time : half past six] on [date:monday]")
    assert sentence.text == "wake me at half past six on monday"
    assert sentence.answer == '{"action":"alarm_set","time":"half past six","date":"monday"}'
    with pytest.raises(ValueError, match="fly"):
        parse("fly", "to the moon")


def test_a_file_that_cannot_be_read_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.txt"
    path.write_text("= on\nlamp on\n= fly\nto the moon\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.txt:4"):
        annotated.read_sentences(path)


def copied(example: augment.Example) -> bool:
    """Whether every value of the answer stands in the conversation."""
    said = " ".join(content for _, content in example.turns)
    commands = read_answer(example.answer)
    assert commands is not None
    return all(value in said for command in commands for _, value in pairs(command))


def test_every_value_of_an_answer_can_be_copied(own: list[annotated.Sentence]) -> None:
    rng = random.Random(5)
    source = augment.Augment(rng, own)
    home = [sentence for sentence in own if sentence.action not in ("unknown", "nevermind")]
    examples = [source.example(rng.choice(own)) for _ in range(3000)]
    examples += [source.joined(rng.sample(home, 2)) for _ in range(500)]
    examples += [made for made in (source.follow_up(rng.choice(home)) for _ in range(800)) if made]
    assert all(copied(example) for example in examples)
    for example in examples:
        for role, content in example.turns:
            assert role == "assistant" or content == model_form(content) or role == "system"


def test_slips_and_digits() -> None:
    assert augment.in_digits("half past six on twenty one may") == "half past 6 on 21 may"
    assert augment.in_digits("twenty") == "20"
    assert augment.in_digits("one twenty") == "1 20"
    rng = random.Random(2)
    assert {augment.slip(rng, "turn") for _ in range(50)} > {"tunr", "trn", "turrn"} - {"turn"}
    assert augment.slip(rng, "on it") == "on it"


def test_held_out_names_are_not_in_training() -> None:
    for listed in (words.AREAS, words.MEDIA, *words.DEVICES.values()):
        assert not set(words.names_of(listed, True)) & set(words.names_of(listed, False))
    assert len(words.names_of(words.AREAS, True)) > 10


def test_home_assistants_sentences() -> None:
    pytest.importorskip("home_assistant_intents", reason="the extra `home-data`")
    from hass_sentences import Hass

    known, unseen = Hass(random.Random(1)), Hass(random.Random(1), held_out=True)
    kinds = [{t.kind for found in source.by_intent.values() for t in found} for source in (known, unseen)]
    assert not kinds[0] & kinds[1]
    assert len(kinds[0]) > 500
    assert len(kinds[1]) > 80
    intents = set()
    for drawn in islice((known.draw() for _ in range(10**6)), 3000):
        intents.add(drawn.intent)
        assert read_answer(drawn.sentence.answer), drawn
        assert all(model_form(area) in drawn.sentence.text for area in drawn.areas)
        assert "[" not in drawn.sentence.text
    assert len(intents) > 30
    forbidden = set(words.names_of(words.AREAS, False))
    assert not any(set(unseen.draw().areas) & forbidden for _ in range(1000))


@pytest.mark.parametrize(
    ("intent", "marked", "action", "accepted"),
    [
        ("play_audiobook", "[player_setting : resume] my [media_type : audiobook]", "resume", "resume"),
        ("play_podcasts", "skip to [podcast_descriptor : next podcast]", "next", "next"),
        ("iot_hue_lightoff", "please turn [house_place : bedroom] lights off", "off", "off"),
        ("lists_createoradd", "create a new list", "list_create", "list_add"),
        ("calendar_set", "add [event_name : lunch] to my calendar", "unknown", "unknown"),
        ("alarm_set", "wake me in [time : two hours]", "alarm_set", "alarm_set"),
    ],
)
def test_slurps_intents(tmp_path: Path, intent: str, marked: str, action: str, accepted: str) -> None:
    scenario, _, rest = intent.partition("_")
    row = {"sentence": "", "sentence_annotation": marked, "intent": intent, "scenario": scenario, "action": rest}
    path = tmp_path / "file.jsonl"
    path.write_text(json.dumps(row) + "\n\n", encoding="utf-8")
    (spoken,) = slurp.read_slurp(path)
    assert spoken.sentence.action == action
    assert accepted in spoken.accepted
    assert read_answer(spoken.sentence.answer)


@pytest.mark.parametrize("line", ["x", "[]", "{}", '{"intent": 3}', '{"sentence_annotation": "a"}', "null"])
def test_a_file_of_another_form_is_refused_by_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"file\.jsonl:1"):
        slurp.read_slurp(path)


def test_intents_of_slurp_have_actions_of_ours() -> None:
    assert {action for actions in slurp.ACTIONS_OF.values() for action in actions} <= set(ACTIONS)
    assert set(slurp.SLOT_OF.values()) <= {slot for slots in ACTIONS.values() for slot in slots}


@needs_slurp
def test_none_of_peoples_sentences_is_among_ours(own: list[annotated.Sentence]) -> None:
    ours = {sentence.text for sentence in own}
    theirs = [spoken.sentence.text for spoken in slurp.read_slurp(SLURP)]
    # "play music" and the like anybody says; ours were written without looking.
    assert sum(text in ours for text in theirs) < 10


@needs_slurp
def test_training_leaves_a_fifth_of_peoples_wordings_out() -> None:
    pytest.importorskip("home_assistant_intents", reason="the extra `home-data`")
    from mixture import Mixture

    held_out = [s.sentence for s in slurp.read_slurp(SLURP) if slurp.is_held_out(s.sentence.kind)]
    assert 300 < len(held_out) < 500
    texts = {sentence.text for sentence in held_out}
    kinds = {sentence.kind for sentence in held_out}
    mixture = Mixture("test", SLURP)
    assert not {sentence.kind for sentence in mixture.people} & kinds
    drawn = [content for example in islice(mixture, 3000) for role, content in example.turns if role == "user"]
    assert sum(text in texts for text in drawn) < 30  # some that our own wordings and Home Assistant's make by chance


def test_a_piece_without_a_slot_is_no_entity() -> None:
    assert annotated.Sentence("on", (Piece("lamp", "device"), Piece("on"))).slots == [("device", "lamp")]
