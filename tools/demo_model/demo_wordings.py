"""Wordings of the demo's commands, most of them for training, some held out.

Read by demo_grammar.py only. A pattern may hold alternatives, (turn|switch), and stands for every combination. Of the
combinations about one in seven is held out by lot (a checksum) if all its words occur in others of the same intent, and
those of `by_hand` are held out by decision. A model that starts from nothing can only know words that it has seen.
"""

from __future__ import annotations

import itertools
import re
import zlib
from dataclasses import dataclass


def expand(patterns: str) -> list[str]:
    """Every combination of the alternatives of every line."""
    found = []
    for line in patterns.strip().splitlines():
        pieces = [piece.split("|") for piece in re.split(r"[()]", line.strip())]
        found += ["".join(choice) for choice in itertools.product(*pieces)]
    return list(dict.fromkeys(" ".join(text.split()) for text in found))


@dataclass
class Wordings:
    """The patterns of one intent: those of training, those held out by hand, and those held out by lot."""

    common: list[str]
    by_hand: list[str]
    by_lot: list[str]

    @classmethod
    def of(cls, patterns: str, by_hand: str = "") -> Wordings:
        hand = expand(by_hand)
        rest = [text for text in expand(patterns) if text not in hand]
        lot = [text for text in rest if zlib.crc32(text.encode()) % 7 == 0]
        known = {word for text in rest if text not in lot for word in text.split()}
        lot = [text for text in lot if known.issuperset(text.split())]
        return cls([text for text in rest if text not in lot], hand, lot)


INTENTS = {
    "light switch": Wordings.of(
        """(turn|switch|put) {on} the {room} {device}
        (turn|switch|flip|put) the {room} {device} {on}
        (turn|switch|flip|put) the {device} in the {room} {on}
        (turn|switch|put|flip) {on} the {device} in the {room}
        (turn|switch|flip) the {device} {on} in the {room}
        (|the ){room} {device} {on}
        (|the ){device} in the {room} {on}
        in the {room} (switch|put|flip) {on} the {device}
        in the {room} (turn|switch|put) the {device} {on}
        (i want|i need|i'd like|i would like) the {device} in the {room} {on}
        (i need|i'd like|i would like) the {room} {device} {on}
        {on} with the {device} in the {room}""",
        """put the {device} {on} in the {room}
        in the {room} turn {on} the {device}
        i want the {room} {device} {on}""",
    ),
    "light dim": Wordings.of(
        """(dim|set|turn|put|bring) the {room} {device} to {level}
        (dim|set|turn|put) the {device} in the {room} to {level}
        (|the ){room} {device} (to|at) {level}
        (|the ){device} in the {room} (to|at) {level}
        make the {room} {device} {level} bright
        make the {device} in the {room} {level} bright
        (i want|i need|i would like) the {room} {device} (at|to be at) {level}
        (i want|i'd like|i need|i would like) the {device} in the {room} (at|to be at) {level}
        in the {room} (set|dim|bring|turn) the {device} to {level}
        {level} (for|on) the {device} in the {room}""",
        """bring the {device} in the {room} to {level}
        i'd like the {room} {device} at {level}""",
    ),
    "light color": Wordings.of(
        """(make|paint|color) the {room} {device} {color}
        (make|turn|paint|color) the {device} in the {room} {color}
        (set|change|switch|turn) the {room} {device} to {color}
        (set|change|switch|turn) the {device} in the {room} to {color}
        (give me|i need|i'd like|i would like) {a} {color} {device} in the {room}
        (i want|i'd like|i need) the {device} in the {room} (|to be ){color}
        (i want|i'd like|i need) the {room} {device} (|to be ){color}
        in the {room} (make|turn|set) the {device} {color}
        (|the ){room} {device} (to|in) {color}""",
        """turn the {room} {device} {color}
        i want {a} {color} {device} in the {room}""",
    ),
    "heating": Wordings.of(
        """(set|turn|put|bring) the heating in the {room} to {deg}
        (set|turn|put) the {room} heating to {deg}
        (heat|warm|cool) the {room} to {deg}
        (heat|cool) the {room} (up|down) to {deg}
        (heat up|warm up|cool down) the {room} to {deg}
        (make it|give me|i need|i'd like|i would like|let's have) {deg} in the {room}
        in the {room} (make it|i need|i want|give me) {deg}
        (|the ){room} heating (to|at|on) {deg}
        (|the ){room} (to|at) {deg}
        (set|bring|put) the {room} to {deg}
        (set|turn|bring|change) the temperature (in|of) the {room} to {deg}
        {deg} (in|for) the {room}
        (i want|i need|i'd like) the {room} (at|to be) {deg}""",
        """i want {deg} in the {room}
        warm the {room} up to {deg}""",
    ),
    "heating switch": Wordings.of(
        """(turn|switch) {on} the heating in the {room}
        (turn|switch|put) the heating in the {room} {on}
        (turn|switch|put) the {room} heating {on}
        (turn|switch) the heating {on} in the {room}
        (|the ){room} heating {on}
        (i want|i need|i'd like) the heating in the {room} {on}""",
        "in the {room} (turn|put) the heating {on}",
    ),
    "cover": Wordings.of(
        """{verb} the {room} {device}
        {verb} the {device} in the {room}
        {verb} the {device} of the {room}
        i need you to {verb} the {device} in the {room}
        (i want you to|i'd like you to|let's|i want to) {verb} the {room} {device}
        (i want you to|i'd like you to|let's|i want to) {verb} the {device} in the {room}""",
        """in the {room} {verb} the {device}
        i need you to {verb} the {room} {device}""",
    ),
    "cover level": Wordings.of(
        """(set|put|bring|move) the {room} {device} to {level}
        (set|put|bring|move) the {device} in the {room} to {level}
        (|the ){room} {device} (to|at) {level}
        in the {room} (set|put|move) the {device} to {level}
        (i want|i need|i'd like) the {device} in the {room} at {level}
        (i want|i need|i'd like) the {room} {device} at {level}""",
        "(|the ){device} in the {room} (to|at) {level}",
    ),
    "play": Wordings.of(
        """(play|put on|start playing) {music} in the {room}
        (i want to|i'd like to|i would like to|we want to|let's) (hear|listen to) {music} in the {room}
        (let me|let us) listen to {music} in the {room}
        let us hear {music} in the {room}
        in the {room} (play|put on|start playing) {music}
        (i want|i'd like|give me) {music} playing in the {room}
        start (playing|with) {music} in the {room}""",
        """start {music} in the {room}
        let me hear {music} in the {room}""",
    ),
    "play on": Wordings.of(
        """(play|put|start|put on|start playing) {music} on the {device} in the {room}
        (i want to|i'd like to|let me|let us) (hear|listen to) {music} on the {device} in the {room}
        (play|put|start) {music} on the {room} {device}
        on the {device} in the {room} (play|start) {music}""",
        "(let us|let me) hear {music} on the {room} {device}",
    ),
    "volume": Wordings.of(
        """(set|turn|put|change|bring) the volume of the {room} {device} to {level}
        (set|turn|put|change|bring) the volume of the {device} in the {room} to {level}
        (|the ){device} in the {room} volume (|to |at ){level}
        (|the ){room} {device} volume (|to |at ){level}
        (set|turn|put) the {device} in the {room} (|up |down )to {level}
        (set|turn|put) the {room} {device} (|up |down )to {level}
        (i want|i need|i'd like) the {room} {device} (as loud as|at) {level}
        make the {device} in the {room} (as loud as {level}|{level} loud)
        make the {room} {device} {level} loud
        volume (|of the ){room} {device} to {level}
        in the {room} set the {device} to {level}""",
        "make the {room} {device} as loud as {level}",
    ),
    "playback": Wordings.of(
        """{verb} the {device} in the {room}
        {verb} the {room} {device}
        (i want you to|i'd like you to|let's) {verb} the {device} in the {room}
        (i want you to|i'd like you to) {verb} the {room} {device}""",
        """let's {verb} the {room} {device}
        in the {room} {verb} the {device}""",
    ),
    "player switch": Wordings.of(
        """(turn|switch) {on} the {room} {device}
        (turn|switch|put) {on} the {device} in the {room}
        (turn|switch|put) the {device} in the {room} {on}
        (turn|switch|put) the {room} {device} {on}
        (|the ){device} in the {room} {on}
        (|the ){room} {device} {on}
        (i want|i need|i'd like) the {device} in the {room} {on}""",
        "in the {room} (turn|put) {on} the {device}",
    ),
    "timer": Wordings.of(
        """(set|start|make|give me|i need|i want) a timer (for|of) {dur}
        (set|start|make|give me|i need) a {durn} timer
        (set|start) the timer (for|to) {dur}
        (|a )timer (|for |of ){dur}
        (|a ){durn} timer
        (call|tell|ping|alert) me (in|after) {dur}
        remind me after {dur}
        (start|begin) (a countdown of|counting down) {dur}
        count {dur} down
        countdown (|of |for ){dur}
        {dur} on the timer""",
        """count down {dur}
        remind me in {dur}""",
    ),
    "alarm": Wordings.of(
        """(wake|get) me (|up )at {time}
        (wake|get) me (|up )by {time}
        (set|make|i need|give me) an alarm (for|at) {time}
        (set|put) (the|my) alarm (for|to|at) {time}
        (|an )alarm (|at |for ){time}
        i (need to|want to|must|would like to) (get up|be up|wake up) (at|by) {time}
        i have to (be up|wake up) (at|by) {time}
        (ring me|ring the alarm|let it ring|ring the bell) at {time}
        at {time} (wake me|wake me up|ring the alarm|i have to be up)""",
        """i have to get up at {time}
        ring at {time}""",
    ),
    "add": Wordings.of(
        """(add|put) {items} (to|on) (the|my|our) (shopping list|list|grocery list)
        (we need|i need|buy|get|order) {items}
        (we need|i need|we have|i have|don't forget|i want) to buy {items}
        remember {items}
        (don't let me forget|remind me to buy|remind me to get) {items}
        (we ran|i ran|we are running|we're running) out of {items}
        (i am|i'm|we're) out of {items}
        (we are|we're|i am) running low on {items}
        {items} (on|to) (the|my|our) (shopping list|list)
        (write|note) {items} (on|down on) the (shopping list|list)""",
        """remember to buy {items}
        we are out of {items}""",
    ),
    "remove": Wordings.of(
        """(take|remove|cross|strike|delete|drop) {items} (off|from) (the|my|our) (shopping list|list)
        we no longer (have to buy|have to get|want) {items}
        i no longer (have to buy|need|want) {items}
        (we|i) don't (need|want) {items} (any more|anymore|any longer)
        (no need to buy|no need for|forget about|don't buy) {items}
        (we have|i have|there is) enough {items}
        {items} off (the|my) (shopping list|list)""",
        """we no longer need {items}
        (we|i) don't have to buy {items}""",
    ),
    "query time": Wordings.of(
        """what (time is it|is the time) (|now|right now)
        (tell me|do you know|say|give me) (|what )the time
        how late is it (|now)
        (tell me|do you know) what time it is""",
        "say what time it is",
    ),
    "query weather": Wordings.of(
        """(what's|what is) the weather (|like )(|today|outside|now)
        how is the weather (|today|outside|now)
        (tell me|give me) the weather (|report)
        (will it|does it|is it going to) rain (|today)
        (do i need|should i take) an umbrella""",
        "(do you know|say) the weather",
    ),
    "query temperature": Wordings.of(
        """how (warm|cold|hot) is it in the {room}
        how (warm|cold) is the {room}
        (what's|what is|tell me) the temperature (in|of) the {room}
        (what's|what is) the {room} temperature
        how many degrees (are there|is it|are it) in the {room}
        (tell me|do you know) how (warm|cold) it is in the {room}""",
        "how hot is the {room}",
    ),
    "query list": Wordings.of(
        """(what's|what is) on (the|my|our) (shopping list|list)
        (read|show|tell) me (the|my|our) (shopping list|list)
        what do (we|i) (need|have) to buy
        what (should|must) (we|i) buy
        read (the|my) shopping list""",
        "(show|read) us the shopping list",
    ),
    "query state": Wordings.of(
        """is the {device} in the {room} (on|off)
        is the {room} {device} (|still )(on|off)
        (check|tell me) (if|whether) the {device} in the {room} is (on|off)
        (check|tell me) if the {room} {device} is (on|off)
        did i (turn|switch) (on|off) the {device} in the {room}
        did (i|we) leave the {device} in the {room} on""",
        """is the {device} in the {room} still (on|off)
        did we leave the {room} {device} on""",
    ),
    "query timer": Wordings.of(
        """how (much time|long) is left on the timer
        how long (does|will) the timer (run|take)
        (what's|what is) left on the timer
        when is the timer (done|over|finished)
        (check|show me) the timer""",
        "when does the timer end",
    ),
    "query alarm": Wordings.of(
        """when (is|does) (my|the) alarm (|ring|go off)
        (what time|when) (will|do) you wake me
        (is there|do i have|is) an alarm (|set)
        (check|show me) (my|the) alarm""",
        "what time is my alarm",
    ),
}  # fmt: skip

COVER_VERBS = {
    "open": ["open", "raise", "pull up", "lift", "roll up"],
    "close": ["close", "lower", "pull down", "shut", "roll down"],
}
PLAYBACK_VERBS = {
    "pause": ["pause", "hold", "interrupt"],
    "stop": ["stop", "end", "silence"],
    "resume": ["resume", "continue", "unpause"],
}

JOINS = [" and ", " and then ", ", then ", ", and ", " then ", ", after that ", " and also "]
CLEAR_JOINS = [" and then ", ", then ", " then ", ", after that ", " and also "]
FRAMES = ["please ", "could you ", "can you please ", "would you ", "can you ", "could you please ", "will you ",
          "go and ", "would you please ", "kindly ", "you should ", "now "]  # fmt: skip
BEFORE = ["hey, ", "okay, ", "computer, ", "hello, ", "hi, ", "so, ", "um, ", "well, ", "hey computer, ", "ah, ",
          "good morning, ", "right, ", "listen, ", "all right, ", "uh, "]  # fmt: skip
AFTER = [" please", " thanks", ", thank you", " now", " for me", ", please", " thank you", " right now", ", will you",
         " if you can", ", that would be nice", " immediately"]  # fmt: skip
IMPERATIVES = set(
    """turn switch put flip dim set bring make paint color change heat warm cool give open raise pull lift
roll close lower shut move play start let pause hold interrupt stop end silence resume continue unpause call tell ping
alert remind begin count wake get ring add buy order write note take remove cross strike delete drop read show check
""".split()
)

NONSENSE = expand(
    """{who} {verb} (a|the|my|our) {noun} (|yesterday|last week|in the {other}|with {name}|every day|again|at {time})
    the {noun} (is|was|looks|seems) (|very |too |not |rather ){adj}
    (the|my|your|our) {noun} and the {other} (are|were) {adj}
    (do|did|can|will|would|should) {who} (like|know|have|see|find|want) (a|the|my) {noun}
    (what|who|where) (is|was) (a|the|my|your) {noun}
    (why|when|how) (did|does|is) {who} (leave|laugh|sleep|work|travel|wait|answer)
    (why|how) is the {noun} (so |){adj}
    (tell me|talk|write|sing) (about|something about) (the|a|my) {noun}
    (i|we|they) (think|believe|hope|guess|know|said) (that |){who} {verb} (a|the) {noun}
    {name} (lives|works|sleeps|waits) in (the|a) {adj} {noun}
    {name} (is|was) (in|at) the (|{adj} ){noun} (|today|yesterday|tomorrow|this morning)
    (how many|how much|which) {noun} (did|does|can) {who} (eat|carry|see|own|remember)
    (the|my) (train|film|game|lesson|meeting|bus) (leaves|starts|ends|begins) at {time}
    (i|we|{name}) (have|has|had) to (leave|go|work|call {name}|be there) at {time}
    (i am|she is|he is|it is) {n} years old
    it (takes|took) {n} minutes to (get there|the {noun}|find it)
    (we|i|they) (bought|like|painted|sold|broke|saw|cleaned) (a|the|our) {device} (|last week|in the {noun}|yesterday)
    the {device} in the {room} (was expensive|is very pretty|is made of {noun}|came from {name}|is too {adj})
    (who|why did {name}) (painted|bought|broke|built|cleaned) the {room}
    (i like|we love|she hates|nobody needs) (the|our|this) {room}
    {name} (is|sleeps|plays|works) in the {room}
    (do you like|have you tried|i hate|she loves|we never eat|is there a song about) {item}
    {music} (is|was) (great|boring|my favourite|too long|on television)
    (she|he|{name}) (wrote|knows|dislikes) {music}
    the {player} (is|was) (a gift|too {adj}|from {name}|older than me)
    (i|we) (sewed|ordered|chose) the {cover} (together|from a catalogue|last summer)
    (please |)(dance|jump|swim|smile|laugh|pray|fly) (|with {name}|like a {noun}|for the {noun})
    {noun} {other} {adj} {verb}
    {adj} {noun}
    (that|this|it) (is|was|sounds|feels) (|so |really ){adj}
    (thank you|thanks|sorry|congratulations) (for|about) the {noun}
    (see|call|meet) you (at {time}|tomorrow|next week|in the {noun})
    (the {noun}|{name}) (needs|wants) (a|more|some) (|{adj} ){noun}
    (does|is) (life|love|the {noun}|a {noun}) (matter|hurt|help|real|safe|{adj})
    (we|you|they) (could|might|may|must) (visit|meet|ask|follow) (the|my|our) {noun} (|in spring|one day|later)
    (some|many|most|few) people (like|fear|have|eat) {noun}"""
)
