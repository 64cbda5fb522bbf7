"""Turns sentences into training examples: other values, slips, fillers, names of a home, several commands, follow-ups.

Called by the trainer. Everything is drawn from one seeded random source.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import words
from annotated import Piece, Sentence
from hass_sentences import HassSentence

from smallthinker_edge.home import spoken
from smallthinker_edge.home.names import KINDS, names_text
from smallthinker_edge.home.schema import answer_json
from smallthinker_edge.home.text_form import model_form
from smallthinker_edge.home.values import NAMED

Turn = tuple[str, str]  # role, content


@dataclass(frozen=True)
class Example:
    """A conversation that ends with the user's sentence, and the right answer to it."""

    turns: tuple[Turn, ...]
    answer: str


BEFORE = words.split("""
please; hey olly; olly; hey; ok; okay; alexa; hey alexa; siri; hey siri; ok google; hey google; google;
computer; um; uh; so; well; now; right; could you; can you; would you; can you please; could you please; would
you please; will you; i want you to; i'd like you to; i need you to; kindly; just; quickly; hello; hi; yes; and;
also; let's; i wanna; go ahead and; be so kind and; be a dear and; go and; do me a favor and; if you can; if
possible; good morning; good evening; listen; excuse me; hey there; assistant; hey assistant; jarvis; hey
jarvis; nabu; okay nabu; oh and; one more thing
""", "; ")  # fmt: skip
# Frames that only fit before a verb in the imperative.
_FRAMES = {before for before in BEFORE if before.endswith((" and", " you", " please", " to"))}
_FRAMES |= {"kindly", "just", "quickly", "let's", "i wanna"}
AFTER = words.split("""
please; now; thanks; thank you; for me; right now; will you; okay; ok; if you can; if you could; real quick;
olly; alexa; siri; would you; pretty please; immediately; at once; thanks a lot; asap; when you can; darling; my
friend; buddy
""", "; ")  # fmt: skip
IMPERATIVE = set("""
turn switch set make put dim change open close shut lower raise lock unlock start stop pause resume play skip
shuffle repeat mute add remove delete cancel create clean brew activate deactivate tell show give increase
decrease adjust bring get check run clear take drop wake announce broadcast save vacuum kill power light
brighten pull roll crank
""".split())  # fmt: skip
POOLED_BY_ACTION = set("device level item duration time date media degrees event weather scene message".split())
_FREE = set("area artist media item name scene list device place color genre message".split())  # may be made up
_NUMBERS = {word: str(value) for word, value in (spoken.UNITS | spoken.TENS).items() if word not in ("oh", "dozen")}
_TENS = {str(value) for value in spoken.TENS.values()}
_KEYS = "qwertyuiop asdfghjkl zxcvbnm".split()


class Augment:
    """Draws examples from sentences whose values it has collected."""

    def __init__(self, rng: random.Random, sentences: Iterable[Sentence]) -> None:
        self.rng = rng
        pools: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
        for sentence in sentences:
            for piece in sentence.pieces:
                if piece.slot:
                    pools[self._pool(sentence.action, piece.slot)][piece.words] = None
        pools["", "area"] |= dict.fromkeys(words.names_of(words.AREAS, False))
        pools["", "color"] |= dict.fromkeys(words.names_of(words.COLORS, False))
        pools["", "name"] |= dict.fromkeys(words.names_of(words.TIMER_NAMES, False))
        self.pools = {key: list(values) for key, values in pools.items()}
        self.vocabulary = sorted({w for values in self.pools.values() for value in values for w in value.split()})

    @staticmethod
    def _pool(action: str, slot: str) -> tuple[str, str]:
        """Values of which sentences are alike enough to take each other's place."""
        if slot not in POOLED_BY_ACTION:
            return "", slot
        family = {
            "on": "switch",
            "off": "switch",
            "toggle": "switch",
            "open": "cover",
            "close": "cover",
            "unlock": "lock",
        }
        return family.get(action, action), slot

    def example(self, sentence: Sentence) -> Example:
        """One example of a sentence, changed at random."""
        return self._finished([self.changed(sentence)], ())

    def hass_example(self, drawn: HassSentence) -> Example:
        """As Home Assistant would ask: mostly with the names of the home in the prompt."""
        kinds = {"area": "areas", "scene": "scenes", "todo": "lists"}  # the others are devices
        own = [(kinds.get(kind, "devices"), model_form(name)) for kind, name in drawn.names if kind != "weather"]
        shown = self._shown_names(own) if self.rng.random() < 0.85 else ""
        return self._finished([drawn.sentence], (("system", shown),) if shown else ())

    def joined(self, sentences: list[Sentence]) -> Example:
        """Several commands in one sentence."""
        return self._finished([self.changed(sentence) for sentence in sentences], ())

    def follow_up(self, sentence: Sentence) -> Example | None:
        """ "and the kitchen too" after a command: the command again with one value changed; None where none can be."""
        rng, first = self.rng, self.changed(sentence)
        targets = [p for p in first.pieces if p.slot in FOLLOW_UPS]
        if not targets or first.action in ("weather", "clock", "list_create", "broadcast"):
            return None
        target = rng.choice(targets)
        fresh = self._other_value(first.action, target)
        text = rng.choice(FOLLOW_UPS[target.slot]).format(fresh)
        pieces = [Piece(fresh, p.slot) if p is target else p for p in first.pieces]
        meant = replace(first, pieces=tuple(pieces))
        # Services that do not keep sentences show the values that were understood instead (understand.HomeModel).
        said = first.text if rng.random() < 0.5 else " ".join(value for _, value in first.slots)
        turns = (("user", said), ("assistant", first.answer), ("user", model_form(text)))
        return Example(turns, meant.answer)

    def changed(self, sentence: Sentence) -> Sentence:
        """With other values, without articles, with slips and fillers: each sometimes."""
        rng = self.rng
        pieces = [
            Piece(self._other_value(sentence.action, p), p.slot) if p.slot and rng.random() < 0.55 else p
            for p in sentence.pieces
        ]  # fmt: skip
        if rng.random() < 0.25:
            pieces = [
                Piece(in_digits(p.words), p.slot)
                if p.slot in ("level", "degrees", "time", "duration", "date", "")
                else p
                for p in pieces
            ]
        if rng.random() < 0.06:
            pieces = [p if p.slot else Piece(re.sub(r"\b(the|a|an|my)\b ?", "", p.words).strip(), "") for p in pieces]
        if rng.random() < 0.08:
            index = rng.randrange(len(pieces))
            pieces[index] = Piece(slip(rng, pieces[index].words), pieces[index].slot)
        pieces = self._with_fillers(pieces)
        return sentence.with_pieces(pieces) if any(p.words for p in pieces) else sentence

    def _with_fillers(self, pieces: list[Piece]) -> list[Piece]:
        rng = self.rng
        first = pieces[0].words.split(" ")[0] if pieces and pieces[0].words else ""
        if rng.random() < 0.15:
            before = rng.choice(BEFORE)
            if before not in _FRAMES or first in IMPERATIVE:
                pieces = [Piece(before), *pieces]
        if rng.random() < 0.08:
            pieces = [*pieces, Piece(rng.choice(AFTER))]
        return pieces

    def _other_value(self, action: str, piece: Piece) -> str:
        if piece.slot in _FREE and self.rng.random() < 0.5:
            return words.invented_name(self.rng, self.vocabulary)
        return self.rng.choice(self.pools.get(self._pool(action, piece.slot)) or [piece.words])

    def _shown_names(self, own: list[tuple[str, str]]) -> str:
        """(kind, name) of a sentence with names that it does not mean, in any order, as names.Home.shown() has them."""
        rng = self.rng
        names = {kind: [name for one, name in own if one == kind] for kind in KINDS}
        areas, devices = (
            words.names_of(words.AREAS, False),
            [n for d in words.DEVICES.values() for n in words.names_of(d, False)],
        )
        for kind, pool in (("areas", areas), ("devices", devices)):
            names[kind] = names[kind] + rng.sample(pool, rng.choice([0, 0, 1, 1, 2, 3]))
            rng.shuffle(names[kind])
        return names_text({kind: list(dict.fromkeys(listed)) for kind, listed in names.items()})

    def _finished(self, sentences: list[Sentence], before: tuple[Turn, ...]) -> Example:
        rng, text = self.rng, sentences[0].text
        for following in sentences[1:]:
            text += (
                rng.choice([" and ", " and ", " and then ", ", ", " then ", " and also ", ", and ", " also "])
                + following.text
            )
        if not before and rng.random() < 0.3:
            named = [(NAMED[slot], value) for sentence in sentences for slot, value in sentence.slots if slot in NAMED]
            shown = self._shown_names([one for one in named if rng.random() < 0.8])
            before = (("system", shown),) if shown else ()
        answer = answer_json([sentence.answer for sentence in sentences])
        return Example((*before, ("user", text)), answer)


FOLLOW_UPS = {
    "area": ["and the {}", "the {} too", "and in the {}", "now the {}", "also in the {} please", "{} as well",
    "and the {} as well", "same for the {}",
             "do the same in the {}", "what about the {}", "and now in the {}", "the {} also", "in the {} too please"],
    "device": ["and the {}", "the {} too", "and the {} as well", "also the {}", "now the {}", "same with the {}",
    "{} too please", "the {} also"],
    "level": ["make it {}", "no {}", "{} please", "{} instead", "make that {}", "i meant {}", "better {}",
    "actually {}"],
    "color": ["no {}", "make it {}", "{} instead", "now {}", "i meant {}", "rather {}", "try {}", "actually {}"],
    "degrees": ["no {}", "make it {}", "{} instead", "{} degrees please", "i meant {}", "actually {} degrees"],
    "duration": ["no {}", "make it {}", "{} instead", "i meant {}", "actually {}"],
    "time": ["no at {}", "make it {}", "{} instead", "i meant {}", "actually {}", "and at {}"],
    "item": ["and {}", "also {}", "{} too", "oh and {}", "{} as well please"],
    "artist": ["no by {}", "something by {} instead", "rather {}", "now {}"],
    "genre": ["no {}", "rather {}", "{} instead", "make it {}", "and now {}"],
}  # fmt: skip


def slip(rng: random.Random, text: str) -> str:
    """With one slip of the finger or of the ear in one of its longer words."""
    parts = text.split(" ")
    longer = [i for i, word in enumerate(parts) if len(word) > 3 and word.isalpha()]
    if not longer:
        return text
    i = rng.choice(longer)
    word, at = parts[i], rng.randrange(1, len(parts[i]) - 1)
    kind = rng.randrange(4)
    if kind == 0:
        word = word[:at] + word[at + 1 :]
    elif kind == 1:
        word = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    elif kind == 2:
        word = word[:at] + word[at] + word[at:]
    else:
        row = next((row for row in _KEYS if word[at] in row), "aeiou")
        word = word[:at] + row[(row.find(word[at]) + 1) % len(row)] + word[at + 1 :]
    parts[i] = word
    return " ".join(parts)


def in_digits(text: str) -> str:
    """Numbers in words as digits: "half past six" becomes "half past 6", "twenty one" "21"."""
    parts: list[str] = []
    for word in text.split(" "):
        digits = _NUMBERS.get(word)
        if digits and parts and parts[-1] in _TENS and len(digits) == 1 and digits != "0":
            parts[-1] = str(int(parts[-1]) + int(digits))
        else:
            parts.append(digits or word)
    return " ".join(parts)
