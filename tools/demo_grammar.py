"""Sentences of the demo model and their JSON: a seeded grammar of spoken-style home commands.

Called by train_demo.py for training data and for the held-out set; run by itself it writes the demo's commands:

    python tools/demo_grammar.py 8 > smallthinker_edge/data/demo_commands.json

A sentence is held out when it uses a held-out
wording or a held-out slot value; those never occur in training. Nothing here knows about models.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass

Command = dict[str, object]

ROOMS = ["kitchen", "bedroom", "living room", "bathroom", "hallway", "office", "nursery", "garage", "dining room",
         "guest room", "study", "cellar"]  # fmt: skip
LIGHTS = ["light", "lamp", "ceiling light", "floor lamp", "spotlight", "desk lamp"]
COVERS = ["blinds", "curtains", "shutters", "awning"]
PLAYERS = ["radio", "television", "speaker", "record player"]
MUSIC = ["jazz", "the news", "classical music", "some rock", "my running playlist", "the beatles", "white noise",
         "a podcast", "piano music", "folk songs"]  # fmt: skip
ITEMS = ["milk", "bread", "eggs", "butter", "apples", "coffee", "rice", "tomatoes", "cheese", "onions", "pasta",
         "toothpaste", "olive oil", "dish soap", "paper towels", "yoghurt", "bananas", "oat milk", "chocolate",
         "lemons", "carrots", "flour", "sugar", "tea", "batteries", "chicken", "salad", "honey"]  # fmt: skip
COLORS = ["red", "blue", "green", "warm white", "orange", "purple", "yellow"]
QUERIES = {
    "time": ["what time is it", "tell me the time", "how late is it"],
    "weather": ["what's the weather like", "how is the weather today", "tell me the weather"],
    "temperature": ["how warm is it in the {room}", "what's the temperature in the {room}"],
    "list": ["what's on the shopping list", "read me the shopping list", "what do we need to buy"],
}
NONSENSE = ["the cat is asleep on the sofa", "i had a long day", "my sister lives in another town", "never mind",
            "that film was really good", "i think it will be fine", "we went to the market yesterday",
            "she said she would call", "why is the sky blue", "tell me a story", "hello there", "thanks a lot",
            "the train was late again", "do you like football", "write me a poem about trees", "i am hungry",
            "he forgot his keys", "how old are you", "what is the capital of france", "my phone is broken",
            "it smells nice in here", "my neighbour has a dog", "see you tomorrow", "i love this song"]  # fmt: skip
HELD_OUT_VALUES = {
    "rooms": ["attic", "laundry room"],
    "lights": ["reading lamp"],
    "music": ["soul classics"],
    "items": ["peppers", "almonds", "shampoo", "orange juice"],
    "colors": ["pink"],
    "levels": [35, 85],
    "nonsense": ["the soup needs more salt", "i will be at the library", "who won the match last night"],
}

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


def invented(rng: random.Random) -> str:
    """One or two pronounceable words that mean nothing: training on them teaches copying unseen names."""
    words = []
    for _ in range(rng.choice([1, 1, 2])):
        syllables = range(rng.choice([1, 2, 2, 3]))
        word = "".join(rng.choice("b c d f g h l m n p r s sh st t tr w al am or".split()) + rng.choice("aeiou")
                       for _ in syllables)  # fmt: skip
        words.append(word + rng.choice(["", "n", "s", "r", "t", "nd"]))
    return " ".join(words)


@dataclass
class Draw:
    """One random source that knows whether held-out wordings and values may be (and were) used."""

    rng: random.Random
    held_out: bool
    used_held_out: bool = False

    def value(self, kind: str, common: list) -> object:  # type: ignore[type-arg]
        """A slot value; a held-out one in a quarter of the held-out draws."""
        if self.held_out and self.rng.random() < 0.25:
            self.used_held_out = True
            return self.rng.choice(HELD_OUT_VALUES[kind])
        if not self.held_out and kind in ("items", "rooms", "music") and self.rng.random() < 0.2:
            return invented(self.rng)
        return self.rng.choice(common)

    def wording(self, common: list[str], held: list[str]) -> str:
        """A sentence pattern; a held-out one in half of the held-out draws."""
        if self.held_out and held and self.rng.random() < 0.5:
            self.used_held_out = True
            return self.rng.choice(held)
        return self.rng.choice(common)

    def room(self) -> str:
        return str(self.value("rooms", ROOMS))

    def level(self) -> tuple[int, str]:
        levels = [n for n in range(5, 101, 5) if n not in HELD_OUT_VALUES["levels"]]
        n = int(str(self.value("levels", levels)))
        spoken = number_words(n) if self.rng.random() < 0.6 else str(n)
        return n, spoken + self.rng.choice([" percent", " percent", "%" if spoken.isdigit() else " percent"])

    def time(self) -> tuple[str, str]:
        """("07:30", "half past seven"); twelve-hour phrases without am/pm mean the morning."""
        hour, minute = self.rng.randrange(1, 12), self.rng.choice([0, 15, 30, 45, 10, 20, 5, 50])
        evening = self.rng.random() < 0.4
        clock = f"{hour + 12 if evening else hour:02d}:{minute:02d}"
        suffix = (
            self.rng.choice([" pm", " in the evening"]) if evening else self.rng.choice(["", " am", " in the morning"])
        )
        style = self.rng.random()
        if style < 0.25:
            return clock, clock
        if minute == 0:
            return clock, self.rng.choice([f"{number_words(hour)} o'clock", number_words(hour), str(hour)]) + suffix
        if minute == 30:
            return clock, f"half past {number_words(hour)}{suffix}"
        if minute == 15:
            return clock, f"quarter past {number_words(hour)}{suffix}"
        if minute == 45:
            return clock, f"quarter to {number_words(hour % 12 + 1)}{suffix}"
        if minute < 30:
            return clock, f"{number_words(minute)} past {number_words(hour)}{suffix}"
        return clock, f"{number_words(60 - minute)} to {number_words(hour % 12 + 1)}{suffix}"


def _light(d: Draw) -> tuple[str, Command]:
    device, room = str(d.value("lights", LIGHTS)), d.room()
    kind = d.rng.random()
    command: Command = {"action": "", "device": device, "room": room}
    if kind < 0.45:
        on = d.rng.random() < 0.5
        command["action"] = "on" if on else "off"
        word = "on" if on else "off"
        text = d.wording(
            [f"turn {word} the {room} {device}", f"turn the {device} in the {room} {word}",
             f"switch {word} the {device} in the {room}", f"{room} {device} {word}",
             f"switch the {room} {device} {word}"],
            [f"put the {device} {word} in the {room}", f"in the {room} turn {word} the {device}",
             f"i want the {room} {device} {word}"],
        )  # fmt: skip
    elif kind < 0.8:
        level, spoken = d.level()
        command |= {"action": "set", "level": level}
        text = d.wording(
            [f"dim the {room} {device} to {spoken}", f"set the {device} in the {room} to {spoken}",
             f"{room} {device} to {spoken}", f"make the {room} {device} {spoken} bright"],
            [f"bring the {device} in the {room} to {spoken}", f"i'd like the {room} {device} at {spoken}"],
        )  # fmt: skip
    else:
        color = str(d.value("colors", COLORS))
        command |= {"action": "set", "color": color}
        text = d.wording(
            [f"make the {room} {device} {color}", f"set the {device} in the {room} to {color}",
             f"change the {room} {device} to {color}"],
            [f"turn the {room} {device} {color}", f"i want a {color} {device} in the {room}"],
        )  # fmt: skip
    if d.rng.random() < 0.2:
        clock, spoken = d.time()
        command["time"] = clock
        text += f" at {spoken}"
    return text, command


def _heating(d: Draw) -> tuple[str, Command]:
    room, degrees = d.room(), d.rng.randrange(15, 26)
    spoken = (number_words(degrees) if d.rng.random() < 0.6 else str(degrees)) + " degrees"
    command: Command = {"action": "set", "device": "heating", "room": room, "degrees": degrees}
    text = d.wording(
        [f"set the heating in the {room} to {spoken}", f"heat the {room} to {spoken}",
         f"make it {spoken} in the {room}", f"{room} heating to {spoken}"],
        [f"i want {spoken} in the {room}", f"warm the {room} up to {spoken}"],
    )  # fmt: skip
    if d.rng.random() < 0.3:
        clock, when = d.time()
        command["time"] = clock
        text += f" at {when}"
    return text, command


def _cover(d: Draw) -> tuple[str, Command]:
    device, room = d.rng.choice(COVERS), d.room()
    if d.rng.random() < 0.25:
        level, spoken = d.level()
        return f"set the {room} {device} to {spoken}", {
            "action": "set",
            "device": device,
            "room": room,
            "level": level,
        }
    opening = d.rng.random() < 0.5
    verb = d.rng.choice(["open", "raise", "pull up"] if opening else ["close", "lower", "pull down"])
    text = d.wording(
        [f"{verb} the {room} {device}", f"{verb} the {device} in the {room}"],
        [f"in the {room} {verb} the {device}", f"i need you to {verb} the {room} {device}"],
    )
    return text, {"action": "open" if opening else "close", "device": device, "room": room}


def _media(d: Draw) -> tuple[str, Command]:
    kind = d.rng.random()
    room, device = d.room(), d.rng.choice(PLAYERS)
    if kind < 0.4:
        music = str(d.value("music", MUSIC))
        text = d.wording(
            [
                f"play {music} in the {room}",
                f"put on {music} in the {room}",
                f"i'd like to hear {music} in the {room}",
            ],
            [f"start {music} in the {room}", f"let me hear {music} in the {room}"],
        )
        return text, {"action": "play", "media": music, "room": room}
    if kind < 0.7:
        level, spoken = d.level()
        text = d.wording(
            [f"set the volume of the {room} {device} to {spoken}", f"{device} in the {room} volume {spoken}"],
            [f"make the {room} {device} as loud as {spoken}"],
        )
        return text, {"action": "volume", "device": device, "room": room, "level": level}
    verb = d.rng.choice(["pause", "stop"])
    return f"{verb} the {device} in the {room}", {"action": verb, "device": device, "room": room}


def _timer(d: Draw) -> tuple[str, Command]:
    minutes = d.rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 25, 30, 40, 45, 50, 60])
    spoken = f"{number_words(minutes) if d.rng.random() < 0.6 else minutes} minute"
    plural = "s" if minutes != 1 else ""
    text = d.wording(
        [f"set a timer for {spoken}{plural}", f"start a {spoken} timer", f"timer {spoken}{plural}"],
        [f"count down {spoken}{plural}", f"remind me in {spoken}{plural}"],
    )
    return text, {"action": "timer", "minutes": minutes}


def _alarm(d: Draw) -> tuple[str, Command]:
    clock, spoken = d.time()
    text = d.wording(
        [
            f"wake me at {spoken}",
            f"set an alarm for {spoken}",
            f"alarm at {spoken}",
            f"wake me up at {spoken}",
        ],
        [f"i have to get up at {spoken}", f"ring at {spoken}"],
    )
    return text, {"action": "alarm", "time": clock}


def _shopping(d: Draw) -> tuple[str, Command]:
    items = [str(d.value("items", ITEMS)) for _ in range(d.rng.choice([1, 1, 2, 3]))]
    items = list(dict.fromkeys(items))
    spoken = items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
    if d.rng.random() < 0.25:
        text = d.wording(
            [f"take {spoken} off the shopping list", f"remove {spoken} from the shopping list"],
            [f"we no longer need {spoken}"],
        )
        return text, {"action": "remove", "items": items}
    text = d.wording(
        [f"add {spoken} to the shopping list", f"put {spoken} on the list", f"we need {spoken}"],
        [f"remember to buy {spoken}", f"we are out of {spoken}"],
    )
    return text, {"action": "add", "items": items}


def _query(d: Draw) -> tuple[str, Command]:
    what = d.rng.choice(list(QUERIES))
    text = d.rng.choice(QUERIES[what])
    command: Command = {"action": "query", "what": what}
    if "{room}" in text:
        room = d.room()
        text, command = text.format(room=room), command | {"room": room}
    return text, command


def _unknown(d: Draw) -> tuple[str, Command]:
    return str(d.value("nonsense", NONSENSE)), {"action": "unknown"}


INTENTS: list[tuple[float, Callable[[Draw], tuple[str, Command]]]] = [
    (0.26, _light), (0.12, _heating), (0.12, _cover), (0.13, _media), (0.07, _timer), (0.08, _alarm),
    (0.12, _shopping), (0.04, _query), (0.06, _unknown),
]  # fmt: skip


def _typo(rng: random.Random, text: str) -> str:
    """One slip of the finger in a longer word: two letters swapped, or one left out or doubled."""
    words = text.split(" ")
    long = [i for i, word in enumerate(words) if len(word) > 4 and word.isalpha()]
    if not long:
        return text
    i = rng.choice(long)
    word, at, kind = words[i], rng.randrange(1, len(words[i]) - 2), rng.random()
    if kind < 0.4:
        words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    elif kind < 0.7:
        words[i] = word[:at] + word[at + 1 :]
    else:
        words[i] = word[:at] + word[at] + word[at:]
    return " ".join(words)


def _polite(d: Draw, text: str) -> str:
    before = ["please ", "could you ", "hey, ", "can you please ", "okay, ", "would you ", "computer, "]
    after = [" please", " thanks", ", thank you", " now", " for me"]
    if d.rng.random() < 0.3:
        text = d.rng.choice(before) + text
    if d.rng.random() < 0.2:
        text += d.rng.choice(after)
    return text


def example(rng: random.Random, held_out: bool = False) -> tuple[str, str]:
    """One (sentence, JSON). held_out: uses at least one wording or slot value that training never shows.

    The JSON is one object, or a list of them when the sentence holds several commands.
    """
    while True:
        d = Draw(rng, held_out)
        count = rng.choice([1, 1, 1, 1, 2]) if rng.random() < 0.95 else 3
        makers = rng.choices([m for _, m in INTENTS], [w for w, _ in INTENTS], k=count)
        if count > 1 and _unknown in makers:
            continue
        parts = [make(d) for make in makers]
        if held_out and not d.used_held_out:
            continue
        text = parts[0][0]
        for part, _ in parts[1:]:
            text += rng.choice([" and ", " and then ", ", then ", ", and "]) + part
        if _unknown not in makers:
            text = _polite(d, text)
            if rng.random() < 0.12 and _shopping not in makers and not d.used_held_out:
                text = _typo(rng, text)
        if rng.random() < 0.3:
            text = text[0].upper() + text[1:] + rng.choice(["", ".", "!"])
        commands = [command for _, command in parts]
        return text, json.dumps(commands[0] if count == 1 else commands, separators=(",", ":"))


def chat(sentence: str, answer: str = "") -> str:
    """The ChatML text of one exchange; without an answer it ends where the model starts."""
    prompt = f"<|im_start|>user\n{sentence}<|im_end|>\n<|im_start|>assistant\n"
    return prompt + (answer + "<|im_end|>" if answer else "")


def held_out_set(count: int, seed: int = 1) -> list[tuple[str, str]]:
    """Distinct held-out pairs, the same ones for the same seed."""
    rng = random.Random(f"held-out {seed}")
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        pairs.setdefault(*example(rng, held_out=True))
    return list(pairs.items())


if __name__ == "__main__":
    chosen = held_out_set(int(sys.argv[1]), seed=2)
    print(json.dumps([{"command": text, "expected": json.loads(answer)} for text, answer in chosen], indent=1))
