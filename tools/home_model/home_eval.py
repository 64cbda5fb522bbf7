"""Scores the home model on sentences that nobody here wrote: files of SLURP's form, and Home Assistant's own templates.

    python tools/home_model/home_eval.py devel.jsonl [--held-out] [--json scores.json]
    python tools/home_model/home_eval.py --hass 1000 [--seen]

A file of SLURP's form has one JSON object a line with sentence, sentence_annotation, intent, scenario and action.
slurp.py says which of our actions are right for an intent and which slot an entity's type is. Answers are taken as the
model gives them, greedily, unless --constrained keeps them to the grammar; one that is no valid document is wrong
whatever the sentence is.

home_action_accuracy  share of the sentences of home scenarios (slurp.HOME) whose commands all have a right action
unknown_recall        share of all others that are answered as unknown
entity_f1             micro-averaged F1 of the entities of home sentences, slot and words both right
invalid_json          answers that are no valid document
intent_accuracy       share of Home Assistant's sentences whose action is right
area_accuracy         share of those with an area whose areas are right
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import slurp
import words

from smallthinker_edge import SmallThinker
from smallthinker_edge.home.names import Device, Home
from smallthinker_edge.home.schema import UNKNOWN, Spoken, pairs
from smallthinker_edge.home.text_form import model_form
from smallthinker_edge.home.understand import HomeModel, open_home_model

if TYPE_CHECKING:
    from hass_sentences import Hass

Entities = Counter[tuple[str, str]]
# SLURP's intent says it, so it marks no entity: what the volume and the lights are of, and things on lists.
UNMARKED = {"light", "lights", "lighting", "lamp", "lamps", "volume", "sound", "audio", "music", "alarm", "alarms"}
UNCOUNTED_SLOTS = {"message", "degrees", "scene"}  # which SLURP has no type for


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, help="JSON lines of SLURP's form")
    parser.add_argument("--hass", type=int, metavar="N", help="N sentences of held-out templates with unseen names")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--held-out", action="store_true", help="of the file, only wordings that training left out")
    part.add_argument(
        "--seen", action="store_true", help="only those that it had; with --hass, its templates and names"
    )
    parser.add_argument("--model", help="GGUF file (default: the embedded model)")
    parser.add_argument("--constrained", action="store_true", help="keep answers to the grammar (extra `structured`)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--wrong", action="store_true", help="print what is answered wrong")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N first, right and wrong marked")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores there")
    args = parser.parse_args()
    if args.file is None and not args.hass:
        parser.error("a file, or --hass N")
    opened = SmallThinker(args.model, threads=args.threads) if args.model else open_home_model(threads=args.threads)
    scores: dict[str, Any] = {}
    with opened as model:
        if args.file is not None:
            spoken = slurp.read_slurp(args.file)
            if args.held_out or args.seen:
                spoken = [one for one in spoken if slurp.is_held_out(one.sentence.kind) == args.held_out]
            home_model = HomeModel(model, constrained=args.constrained)
            show(home_model, random.Random("show").sample(spoken, min(args.show, len(spoken))))
            scores |= slurp_scores(home_model, spoken, args.wrong)
        if args.hass:
            scores |= hass_scores(model, args.hass, not args.seen, args.constrained, args.wrong)
    for name, value in scores.items():
        print(f"{name:24} {value:.4f}" if isinstance(value, float) else f"{name:24} {value}")
    if args.json:
        args.json.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


def show(home_model: HomeModel, spoken: list[slurp.Spoken]) -> None:
    """Prints people's sentences with the commands they become."""
    for one in spoken:
        commands = home_model.understand(one.text)
        right = one.accepts(commands)
        verdict = "right" if right else f"wrong: {' or '.join(one.accepted)}"
        print(f"> {one.text}\n  {json.dumps(commands, ensure_ascii=False)}\n  ({verdict})\n", flush=True)


def slurp_scores(home_model: HomeModel, spoken: list[slurp.Spoken], wrong: bool = False) -> dict[str, Any]:
    """The scores on sentences of SLURP's form. Raises ValueError for none."""
    if not spoken:
        raise ValueError("no sentences")
    right_home = home = right_unknown = unknown = invalid = 0
    found: Counter[str] = Counter()
    for one in spoken:
        commands = home_model.said(model_form(one.text))
        invalid += commands is None
        right = commands is not None and one.accepts(commands)
        if wrong and not right:
            print(f"{one.intent} | {one.text} | {commands}")
        if one.accepted == (UNKNOWN,):
            unknown += 1
            right_unknown += right
        else:
            home += 1
            right_home += right
            found += entity_counts(one, commands or [])
    precision = found["both"] / max(found["both"] + found["only ours"], 1)
    recall = found["both"] / max(found["both"] + found["only theirs"], 1)
    return {
        "home_sentences": home, "home_action_accuracy": right_home / max(home, 1), "other_sentences": unknown,
        "unknown_recall": right_unknown / max(unknown, 1), "entities": found["both"] + found["only theirs"],
        "entity_f1": 2 * precision * recall / max(precision + recall, 1e-9), "entity_precision": precision,
        "entity_recall": recall, "invalid_json": invalid,
    }  # fmt: skip


def entity_counts(one: slurp.Spoken, commands: list[Spoken]) -> Counter[str]:
    """How many entities both have, only the answer, only the annotation."""
    theirs = _entities(one.entities)
    ours = _entities(pair for command in commands for pair in pairs(command))
    marked = {slot for slot, _ in theirs}
    for slot, value in list(ours):
        if slot in UNCOUNTED_SLOTS or (slot not in marked and (value in UNMARKED or slot == "item")):
            del ours[slot, value]
    both = (ours & theirs).total()
    return Counter({"both": both, "only ours": ours.total() - both, "only theirs": theirs.total() - both})


def _entities(pairs: Iterable[tuple[str, str]]) -> Entities:
    # SLURP has one type for times of day and durations.
    return Counter(("time" if slot == "duration" else slot, _plain(value)) for slot, value in pairs)


def _plain(value: str) -> str:
    return re.sub(r"^(?:the|a|an|my|to|all|by|in|at) ", "", model_form(value))


def hass_scores(
    model: SmallThinker, count: int, held_out: bool, constrained: bool, wrong: bool = False
) -> dict[str, Any]:
    """The scores on Home Assistant's sentences, in a home whose names are in the prompt. Needs the extra home-data."""
    from hass_sentences import Hass

    rng = random.Random(f"hass {count} {held_out}")
    source = Hass(rng, held_out, invent=False)
    home = _home_of(source)
    home_model = HomeModel(model, home, constrained=constrained)
    right = area_right = with_area = 0
    for _ in range(count):
        drawn = source.draw()
        commands = home_model.understand(drawn.sentence.text)
        action_right = [command["action"] for command in commands] == [drawn.sentence.action]
        right += action_right
        same = [command["area"] for command in commands if "area" in command] == drawn.areas
        if drawn.areas:
            with_area += 1
            area_right += same
        if wrong and not (action_right and same):
            print(f"{drawn.intent} | {drawn.sentence.text} | {drawn.sentence.answer} | {commands}")
    return {
        "hass_sentences": count, "intent_accuracy": right / count, "hass_with_area": with_area,
        "area_accuracy": area_right / max(with_area, 1),
    }  # fmt: skip


def _home_of(source: Hass) -> Home:
    """A home that has every name the sentences may use."""
    devices = [
        Device(name, domain=domain) for domain, listed in words.DEVICES.items() if domain not in ("scene", "todo",
        "weather")
        for name in source.names(listed)
    ]  # fmt: skip
    return Home(
        areas=tuple(source.names(words.AREAS)), floors=tuple(source.names(words.FLOORS)), devices=tuple(devices),
        scenes=tuple(source.names(words.DEVICES["scene"])), lists=tuple(source.names(words.DEVICES["todo"])),
    )  # fmt: skip


if __name__ == "__main__":
    main()
