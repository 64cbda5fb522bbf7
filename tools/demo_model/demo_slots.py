"""What fills the slots of the demo's wordings: names, numbers, times, nonsense, and slips of the finger.

Called by demo_grammar.py only. Names that the model has to copy stand between OPEN and CLOSE until the sentence is
done, so that no slip falls into one: nobody could tell what was meant.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

import demo_wordings as wordings
import demo_words as words

OPEN, CLOSE = "\x02", "\x03"


def listed(text: str) -> list[str]:
    return [" ".join(entry.split()) for entry in text.split(";")]


ROOMS, LIGHTS, COVERS, PLAYERS = (listed(t) for t in (words.ROOMS, words.LIGHTS, words.COVERS, words.PLAYERS))
MUSIC, ITEMS, COLORS, NONSENSE = (listed(t) for t in (words.MUSIC, words.ITEMS, words.COLORS, words.NONSENSE))
HELD_OUT = {kind: listed(text) for kind, text in words.HELD_OUT.items()}
HELD_OUT_LEVELS, HELD_OUT_DEGREES = [35, 85, 17, 42, 64, 93, 28, 71], [17, 23]
HELD_OUT_NAMES = [name for kind in ("rooms", "lights", "music", "items", "colors") for name in HELD_OUT[kind]]

ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen").split()  # fmt: skip
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()


def number_words(n: int) -> str:
    """0..100 in English words."""
    if n < 20:
        return ONES[n]
    if n == 100:
        return "one hundred"
    return TENS[n // 10] + (f" {ONES[n % 10]}" if n % 10 else "")


NUMBERS = {word for n in range(101) for word in number_words(n).split()}
# Words of wordings: a name made of general words may not hold one, or nobody could say where it ends.
CARRIERS = NUMBERS | set(COVERS) | set(PLAYERS) | set("""percent degrees minute minutes hour hours quarter half past
o'clock morning afternoon evening night am pm at to heating in the of a and then""".split())  # fmt: skip
for _group in wordings.INTENTS.values():
    for _pattern in _group.common + _group.by_hand + _group.by_lot:
        CARRIERS |= set(re.findall(r"[a-z']+", re.sub(r"{\w+}", " ", _pattern)))
# Nor the first half of a lamp: of "wall light" nobody could say whether the room is the wall.
_TAKEN = CARRIERS | {word for name in LIGHTS for word in name.split()}
NOUNS, ADJECTIVES = ([w for w in pool if w not in _TAKEN] for pool in (words.NOUNS, words.ADJECTIVES))
PIECES = sorted({word for name in ITEMS + NOUNS + ADJECTIVES + words.NAMES for word in name.split() if word.isalpha()})


def slips(word: str) -> Iterator[str]:
    """What one slip of the finger makes of a word: two letters swapped, one left out, or one doubled."""
    for i in range(1, len(word) - 1):
        if word[i] != word[i + 1]:
            yield word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    for i in range(1, len(word)):
        yield word[:i] + word[i + 1 :]
        yield word[:i] + word[i] + word[i:]


# A slip that could come from two words, such as "fifteen" and "fifty" might share, is never made.
_SOURCES: dict[str, set[str]] = {}
for _word in sorted(CARRIERS | {piece for name in COVERS + PLAYERS for piece in name.split()}):
    for _slip in {_word, *slips(_word)}:
        _SOURCES.setdefault(_slip, set()).add(_word)


def typo(rng: random.Random, text: str) -> str:
    """One slip in a word of more than four letters that is no name."""
    tokens = text.split(" ")
    inside, candidates = False, []
    for i, token in enumerate(tokens):
        inside |= OPEN in token
        if not inside and token in CARRIERS and len(token) > 4 and token.isalpha():
            candidates.append(i)
        inside &= CLOSE not in token
    if not candidates:
        return text
    i = rng.choice(candidates)
    clear = [slip for slip in slips(tokens[i]) if _SOURCES.get(slip) == {tokens[i]} and slip != tokens[i]]
    if clear:
        tokens[i] = rng.choice(clear)
    return " ".join(tokens)


class Slots:
    """Draws slot values; a held-out one in 30 % of the held-out draws."""

    def __init__(self, rng: random.Random, held_out: bool) -> None:
        self.rng, self.held_out = rng, held_out
        self.unseen: set[str] = set()  # kinds of held-out things that were used: "name", "number", "nonsense"

    def lot(self, kind: str) -> bool:
        """Whether this value is a held-out one."""
        if self.held_out and self.rng.random() < 0.3:
            self.unseen.add(kind)
            return True
        return False

    # Names -------------------------------------------------------------------------------------------------------

    def invented_word(self) -> str:
        """A word that means nothing: of syllables, or of the halves of two real words."""
        rng = self.rng
        if rng.random() < 0.5:
            syllables = range(rng.choice([1, 2, 2, 3]))
            onset = "b c d f g h j k l m n p r s sh st t tr w ch qu v y z bl gr pl th".split()
            word = "".join(rng.choice(onset) + rng.choice("a e i o u ai ea oo ou".split()) for _ in syllables)
            return word + rng.choice(["", "n", "s", "r", "t", "nd", "l", "ck", "ng", "x", "m", "er", "ing", "y"])
        first, second = rng.choice(PIECES), rng.choice(PIECES)
        return first[: rng.randint(1, max(1, len(first) - 1))] + second[rng.randint(0, len(second) - 1) :]

    def free_name(self, most: int = 3) -> str:
        """One to `most` words, invented or from general lists."""
        rng = self.rng
        count = rng.choices([1, 2, 3][:most], [6, 3, 1][:most])[0]
        pools = (NOUNS, ADJECTIVES, words.NAMES)
        return " ".join(
            self.invented_word() if rng.random() < 0.6 else rng.choice(rng.choices(pools, [5, 4, 1])[0])
            for _ in range(count)
        )  # fmt: skip

    def name(self, kind: str, common: list[str], strange: float, templates: list[str]) -> tuple[str, bool]:
        """(a name, whether it is one of the common ones). strange: share in training of invented names.

        templates: forms with {} for a free name and {c} for a common one.
        """
        rng = self.rng
        if self.lot("name"):
            return OPEN + rng.choice(HELD_OUT[kind]) + CLOSE, False
        if self.held_out or rng.random() >= strange:
            return OPEN + rng.choice(common) + CLOSE, True
        while True:
            form = rng.choice(templates)
            most = 3 if form == "{}" else 2
            text = form.format(
                self.free_name(most), c=rng.choice(common), a=rng.choice(ADJECTIVES), w=self.invented_word()
            )
            clash = form == "{}" and set(text.split()) & _TAKEN
            if not clash and not any(name in text for name in HELD_OUT_NAMES):
                return OPEN + text + CLOSE, False

    def room(self) -> tuple[str, bool]:
        return self.name("rooms", ROOMS, 0.55, ["{}", "{}", "{}", "{} room", "{a} {c}", "{}'s room"])

    def light(self, plain: bool) -> str:
        """plain: only one of the common lamps."""
        if plain:
            return OPEN + self.rng.choice(LIGHTS) + CLOSE
        return self.name("lights", LIGHTS, 0.3, ["{} lamp", "{} light", "{} lights", "{a} {c}"])[0]

    def music(self) -> str:
        forms = ["{}", "{}", "{}", "some {}", "the {}", "my {} playlist", "a {}", "{a} {c}", "{} music", "{} songs"]
        return self.name("music", MUSIC, 0.6, forms)[0]

    def item(self) -> str:
        return self.name("items", ITEMS, 0.55, ["{}", "{}", "{}", "{a} {c}", "{} {c}", "{c} {}"])[0]

    def color(self) -> str:
        return self.name("colors", COLORS, 0.45, ["{w}", "{w}", "light {w}", "dark {w}"])[0]

    def cover(self) -> str:
        return self.rng.choice(COVERS)

    def player(self) -> str:
        return self.rng.choice(PLAYERS)

    # Numbers and times -------------------------------------------------------------------------------------------

    def spoken(self, n: int) -> str:
        return number_words(n) if self.rng.random() < 0.6 else str(n)

    def level(self) -> tuple[int, str]:
        if self.lot("number"):
            n = self.rng.choice(HELD_OUT_LEVELS)
        else:
            round_ones = self.rng.random() < 0.5
            n = self.rng.choice([n for n in range(0, 101, 5 if round_ones else 1) if n not in HELD_OUT_LEVELS])
        text = self.spoken(n)
        return n, text + ("%" if text.isdigit() and self.rng.random() < 0.5 else " percent")

    def degrees(self) -> tuple[int, str]:
        choice = HELD_OUT_DEGREES if self.lot("number") else [n for n in range(5, 31) if n not in HELD_OUT_DEGREES]
        n = self.rng.choice(choice)
        return n, self.spoken(n) + " degrees"

    def duration(self) -> tuple[int, str, str]:
        """(minutes, "ten minutes", "ten minute" as in "a ten minute timer")."""
        rng = self.rng
        if rng.random() < 0.15:
            hours = [(60, "an hour", "one hour"), (30, "half an hour", "half hour"), (120, "two hours", "two hour"),
                     (180, "three hours", "three hour"), (60, "one hour", "one hour")]  # fmt: skip
            return rng.choice(hours)
        n = rng.choice([5, 10, 15, 20, 25, 30, 40, 45, 50, 60]) if rng.random() < 0.4 else rng.randint(1, 99)
        text = self.spoken(n) + " minute"
        return n, text + ("s" if n != 1 else ""), text

    def time(self) -> tuple[str, str]:
        """("07:30", "half past seven"); twelve-hour phrases without am/pm mean the morning."""
        rng = self.rng
        hour, minute = rng.randrange(1, 12), rng.choice([0, 0, 15, 30, 45, 10, 20, 5, 25, 35, 40, 50, 55])
        late = rng.random() < 0.4
        clock = f"{hour + 12 if late else hour:02d}:{minute:02d}"
        after = " in the afternoon" if hour < 6 else " in the evening"
        suffix = rng.choice([" pm", after]) if late else rng.choice(["", "", " am", " in the morning"])
        style = rng.random()
        if style < 0.25:
            return clock, clock
        to = number_words(hour % 12 + 1)
        if minute == 0:
            return clock, rng.choice([f"{number_words(hour)} o'clock", number_words(hour), str(hour)]) + suffix
        if style < 0.45:
            return clock, f"{number_words(hour)} {'oh five' if minute == 5 else number_words(minute)}{suffix}"
        if minute == 30:
            return clock, f"half past {number_words(hour)}{suffix}"
        if minute in (15, 45):
            return (
                clock,
                f"quarter {'past' if minute == 15 else 'to'} {number_words(hour) if minute == 15 else to}{suffix}",
            )
        if minute < 30:
            return clock, f"{number_words(minute)} past {number_words(hour)}{suffix}"
        return clock, f"{number_words(60 - minute)} to {to}{suffix}"

    # What is no command ------------------------------------------------------------------------------------------

    def nonsense(self) -> str:
        """A held-out sentence, a common one, or one made of general words, some of them close to a command."""
        rng = self.rng
        if self.held_out:
            self.unseen.add("nonsense")
            return rng.choice(HELD_OUT["nonsense"])
        chance = rng.random()
        if chance < 0.15:
            return rng.choice(NONSENSE)
        if chance < 0.5:
            return self.salad()
        noun, other = self.thing(), self.thing()
        adjective, verb = rng.choice(ADJECTIVES), rng.choice(words.VERBS)
        who = rng.choice(["i", "she", "he", "we", "they", "you", "my " + noun, "the " + noun, "our neighbour",
                          rng.choice(words.NAMES), "somebody", "everybody", "nobody", "a " + noun])  # fmt: skip
        room, device = bare(self.room()[0]), bare(self.light(plain=True))
        text = rng.choice(wordings.NONSENSE).format(
            who=who, noun=noun, other=other, adj=adjective, verb=verb, room=room, device=device, time=self.time()[1],
            n=self.spoken(rng.randint(2, 99)), item=bare(self.item()), music=bare(self.music()),
            name=rng.choice(words.NAMES), player=self.player(), cover=self.cover(),
        )  # fmt: skip
        return text if not any(name in text for name in HELD_OUT_NAMES + HELD_OUT["nonsense"]) else "never mind"

    def salad(self) -> str:
        """Words in no order: what nothing can be made of is unknown, whatever words it has."""
        rng = self.rng
        pools = (words.FUNCTION_WORDS, words.NOUNS, words.VERBS, ADJECTIVES, words.NAMES)
        chosen = [
            self.invented_word() if rng.random() < 0.12 else rng.choice(rng.choices(pools, [9, 5, 4, 2, 1])[0])
            for _ in range(rng.randint(2, 9))
        ]
        text = " ".join(chosen)
        return text if not any(name in text for name in HELD_OUT_NAMES) else "never mind"

    def thing(self) -> str:
        return self.invented_word() if self.rng.random() < 0.35 else self.rng.choice(words.NOUNS)


def bare(text: str) -> str:
    return text.replace(OPEN, "").replace(CLOSE, "")
