"""The mixture of training examples: our own, people's (SLURP) and Home Assistant's sentences. Called by train.py."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import slurp
from annotated import Sentence, own_sentences
from augment import Augment, Example
from hass_sentences import Hass

from smallthinker_edge.home.schema import UNKNOWN

# Share of the examples of each source; the rest are sentences of ours.
SHARES = {"slurp": 0.14, "hass": 0.24, "joined": 0.05, "follow_up": 0.05}
UNKNOWN_SHARE = 0.48  # of our plain sentences
NOT_JOINED = {
    UNKNOWN,
    "nevermind",
    "broadcast",
    "like",
    "dislike",
    "state",
    "media_query",
    "clock",
    "weather",
    "list_query",
}


class Mixture:
    """Draws training examples. slurp_file: None trains without people's sentences."""

    def __init__(self, seed: object, slurp_file: Path | None, held_out_percent: int = slurp.HELD_OUT) -> None:
        self.rng = random.Random(f"mixture {seed}")
        own = own_sentences()
        people: list[Sentence] = []
        if slurp_file is not None:
            people = [
                spoken.sentence for spoken in slurp.read_slurp(slurp_file)
                if not slurp.is_held_out(spoken.sentence.kind, held_out_percent)
            ]  # fmt: skip
        self.augment = Augment(self.rng, own + people)
        self.hass = Hass(self.rng)
        self.people = people or own
        self.own_unknown = [s for s in own if s.action == UNKNOWN]
        self.own_home = [s for s in own if s.action != UNKNOWN]
        both = self.own_home + [s for s in people if s.action != UNKNOWN]
        self.commands = [s for s in both if s.action not in NOT_JOINED and len(s.text) < 60]

    def __iter__(self) -> Iterator[Example]:
        while True:
            example = self.draw()
            if example is not None:
                yield example

    def draw(self) -> Example | None:
        rng = self.rng
        source = rng.choices([*SHARES, "own"], [*SHARES.values(), 1 - sum(SHARES.values())])[0]
        if source == "slurp":
            return self.augment.example(rng.choice(self.people))
        if source == "hass":
            return self.augment.hass_example(self.hass.draw())
        if source == "joined":
            count = rng.choice([2, 2, 2, 3])
            drawn = [
                self.hass.draw().sentence if rng.random() < 0.25 else rng.choice(self.commands) for _ in range(count)
            ]
            return self.augment.joined([s for s in drawn if s.action not in NOT_JOINED] or [rng.choice(self.commands)])
        if source == "follow_up":
            return self.augment.follow_up(rng.choice(self.commands))
        return self.augment.example(rng.choice(self.own_unknown if rng.random() < UNKNOWN_SHARE else self.own_home))
