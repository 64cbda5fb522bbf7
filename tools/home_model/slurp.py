"""SLURP's sentences (Bastianelli et al., EMNLP 2020) as sentences of the home model: the mapping table, in the open.

Called by the trainer and by home_eval.py. The data set itself is not part of this repository.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from annotated import MARK, Piece, Sentence, pieces_of
from words import lot

from smallthinker_edge.home.schema import ACTIONS, UNKNOWN

HOME = ("iot", "alarm", "audio", "lists", "play", "music", "weather", "datetime")
HELD_OUT = 20  # percent of the wordings that training does not see
PLAYBACK = ("play", "pause", "resume", "stop", "next", "previous", "shuffle", "repeat")

# Scenario and action of SLURP -> our actions that are right for it; the first is taught where no word decides. SLURP
# has one intent for what we tell apart (an audiobook played, paused, continued), never one of ours for two of its own.
ACTIONS_OF: dict[str, tuple[str, ...]] = {
    "alarm_query": ("alarm_query",),
    "alarm_remove": ("alarm_cancel",),
    "alarm_set": ("alarm_set",),
    "audio_volume_down": ("volume_down", "volume_set"),
    "audio_volume_mute": ("mute",),
    "audio_volume_other": ("volume_set", "volume_up", "volume_down"),
    "audio_volume_up": ("volume_up", "volume_set"),
    "datetime_convert": ("clock",),
    "datetime_query": ("clock",),
    "iot_cleaning": ("vacuum_start",),
    "iot_coffee": ("coffee",),
    "iot_hue_lightchange": ("color_set", "scene", "brightness_set"),
    "iot_hue_lightdim": ("brightness_down", "brightness_set"),
    "iot_hue_lightoff": ("off",),
    "iot_hue_lighton": ("on",),
    "iot_hue_lightup": ("brightness_up", "brightness_set"),
    "iot_wemo_off": ("off",),
    "iot_wemo_on": ("on",),
    "lists_createoradd": ("list_add", "list_create"),
    "lists_query": ("list_query",),
    "lists_remove": ("list_remove", "list_complete"),
    "music_dislikeness": ("dislike",),
    "music_likeness": ("like",),
    "music_query": ("media_query",),
    "music_settings": PLAYBACK,
    "play_audiobook": PLAYBACK,
    "play_game": ("play",),
    "play_music": PLAYBACK,
    "play_podcasts": PLAYBACK,
    "play_radio": PLAYBACK,
    "weather_query": ("weather", "temperature_query"),
}
# Type of SLURP's entities -> our slot. Types that are missing have no slot of ours and are not counted: media_type
# ("podcast"), app_name, person, general_frequency and the descriptors are marked in some sentences and not in others.
SLOT_OF = {
    "device_type": "device", "house_place": "area", "color_type": "color", "change_amount": "level",
    "coffee_type": "item", "date": "date", "time": "time", "timeofday": "time", "place_name": "place",
    "time_zone": "place", "event_name": "event", "list_name": "list", "song_name": "media", "playlist_name": "media",
    "radio_name": "media", "podcast_name": "media", "audiobook_name": "media", "game_name": "media",
    "movie_name": "media",
    "artist_name": "artist", "audiobook_author": "artist", "music_genre": "genre", "weather_descriptor": "weather",
    "alarm_type": "name",
}  # fmt: skip

# Words that decide between the actions of one intent, in this order, where SLURP does not say it.
_DECIDING: dict[tuple[str, ...], tuple[tuple[str, str], ...]] = {
    PLAYBACK: (
        (r"\b(resume|continue|pick up|unpause|where (i|we) (left|stopped|paused))\b", "resume"),
        (r"\b(pause|hold|break)\b", "pause"), (r"\b(stop|end|quit)\b", "stop"),
        (r"\bshuffle\b", "shuffle"), (r"\b(repeat|loop|replay|again)\b", "repeat"),
        (r"\b(go back|back one|previous|rewind|last episode)\b", "previous"),
        (r"\b(next|skip|forward|move to|proceed)\b", "next"),
    ),
    ACTIONS_OF["lists_createoradd"]: (
        (r"\b(create|new list|make (me )?a|start a|make a|list for me|open a)\b", "list_create"),
    ),
    ACTIONS_OF["iot_hue_lightchange"]: (
        (r"\b(mood|mode|night light|scene|party|romantic|reading|sleep|movie|relax)\b", "scene"),
        (r"\b(intensity|brightness|percent|level|bright|opacity)\b", "brightness_set"),
    ),
    ACTIONS_OF["audio_volume_up"]: ((r"\bto (\w+ )?(\w+ )?(percent|\d+|ten|twenty|thirty|fifty|ninety|max)",
    "volume_set"),),
    ACTIONS_OF["audio_volume_down"]: ((r"\bto (\w+ )?(\w+ )?(percent|\d+|ten|twenty|thirty|fifty|low)", "volume_set"),),
    ACTIONS_OF["iot_hue_lightdim"]: ((r"\bto\b.*\b(percent|level|\d+|two|three|seven|ten|twenty|thirty|fifty)",
    "brightness_set"),),
    ACTIONS_OF["iot_hue_lightup"]: ((r"\bto\b.*\b(percent|level|\d+|two|three|seven|ten|twenty|thirty|fifty)",
    "brightness_set"),),
}  # fmt: skip


@dataclass(frozen=True)
class Spoken:
    """One sentence of a file of SLURP's form."""

    text: str
    intent: str  # scenario_action
    accepted: tuple[str, ...]  # our actions that are right
    entities: tuple[tuple[str, str], ...]  # (our slot, words)
    sentence: Sentence

    def accepts(self, commands: Iterable[Mapping[str, Any]]) -> bool:
        """Whether the action of each of the commands is right."""
        return all(command["action"] in self.accepted for command in commands)


def _intent(row: dict[str, str]) -> str:
    # A few rows have an intent that lacks the scenario.
    intent = row["intent"]
    return intent if intent in ACTIONS_OF or "scenario" not in row else f"{row['scenario']}_{row['action']}"


def read_slurp(path: Path) -> list[Spoken]:
    """Every sentence of a JSON-lines file with the fields sentence, sentence_annotation, intent, scenario and action.

    Raises OSError, and ValueError with the line for what is not of that form.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                rows.append(_spoken(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: not a sentence of SLURP's form ({error!r})") from None
    return rows


def _spoken(row: dict[str, str]) -> Spoken:
    intent, marked = _intent(row), row["sentence_annotation"]
    home = row.get("scenario", intent.partition("_")[0]) in HOME
    if not home:
        accepted: tuple[str, ...] = (UNKNOWN,)
    else:
        accepted = ACTIONS_OF.get(intent) or _by_scenario(intent)
    text = MARK.sub(r"\2", marked)
    action = _taught(accepted, text)
    pieces, entities = [], []
    for piece in pieces_of(marked):
        slot = SLOT_OF.get(piece.slot, "") if home else ""
        if slot == "time" and action.startswith(("alarm", "timer")) and _is_duration(piece.words):
            slot = "duration"
        if slot not in ACTIONS[action]:
            slot = ""
        pieces.append(Piece(piece.words, slot))
        if slot:
            entities.append((slot, piece.words))
    sentence = Sentence(action, tuple(p for p in pieces if p.words), wording(marked))
    return Spoken(text, intent, accepted, tuple(entities), sentence)


def _by_scenario(intent: str) -> tuple[str, ...]:
    """For the few rows whose intent is only half there: every action of the scenario."""
    scenario = intent.partition("_")[0]
    found = [a for name, actions in ACTIONS_OF.items() if name.startswith(scenario + "_") for a in actions]
    return tuple(dict.fromkeys(found))


def _taught(accepted: tuple[str, ...], text: str) -> str:
    for pattern, action in _DECIDING.get(accepted, ()):
        if re.search(pattern, text):
            return action
    return accepted[0]


def _is_duration(words: str) -> bool:
    return bool(re.search(r"\b(minutes?|hours?|seconds?)\b", words))


def wording(marked: str) -> str:
    """Which wording a marked sentence has: its words without values, fillers and their order."""
    words = MARK.sub(r"<\1>", marked.lower()).split()
    fillers = "please olly hey siri alexa google ok can could you the a an my me to for is of in on".split()
    return " ".join(sorted(set(words) - set(fillers)))


def is_held_out(kind: str, percent: int = HELD_OUT) -> bool:
    """Whether the sentences of a wording are kept from training: by lot of the wording."""
    return lot("slurp" + kind, 100) < percent
