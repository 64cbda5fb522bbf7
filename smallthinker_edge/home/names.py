"""The names of a user's own home: areas, floors, devices, scenes and lists, from a file or from Home Assistant.

understand.py shows the model those that a sentence may mean, and finds the home's own name for the words that the model
copied. Knows nothing of models.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from smallthinker_edge.home.text_form import model_form

KINDS = ("areas", "floors", "devices", "scenes", "lists")  # of names, in the order in which a prompt has them
MOST_SHOWN = 8  # of each kind of name, in a prompt
_ALIKE = 0.78  # similarity (difflib's ratio) from which a word is taken for a slip of another
_NO_NAMES = {"the", "a", "an", "of", "in", "on", "my", "light", "lights", "lamp", "room", "and"}


@dataclass(frozen=True)
class Device:
    """Something to command. area: where it is; domain: Home Assistant's kind of it ("light", "cover", ...)."""

    name: str
    area: str = ""
    domain: str = ""
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Home:
    """All names of a home, as the user wrote them."""

    areas: tuple[str, ...] = ()
    floors: tuple[str, ...] = ()
    devices: tuple[Device, ...] = ()
    scenes: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Home:
        """Reads a JSON file {"areas": [...], "floors": [...], "devices": [...], "scenes": [...], "lists": [...]}.

        A device is a name or {"name": ..., "area": ..., "domain": ..., "aliases": [...]}. Home Assistant's list of
        exposed entities is read too: {"exposed_entities": ...} or a list of entities with entity_id, name, area.
        Raises OSError where it cannot be read, ValueError for another content.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls.from_json(content)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"{os.fspath(path)}: not a file of a home's names ({error})") from None

    @classmethod
    def from_json(cls, content: Any) -> Home:
        """See load(). Raises ValueError for what is not of that form."""
        if isinstance(content, list) or "exposed_entities" in content or "entities" in content:
            return cls._from_entities(content)
        unknown = set(content) - set(KINDS)
        if unknown:
            raise ValueError(f"unknown keys: {', '.join(sorted(unknown))}")
        kinds = {kind: _strings(content.get(kind, ())) for kind in KINDS if kind != "devices"}
        return cls(devices=tuple(_device(entry) for entry in content.get("devices", ())), **kinds)

    @classmethod
    def _from_entities(cls, content: Any) -> Home:
        if isinstance(content, Mapping):
            content = content.get("exposed_entities", content.get("entities"))
        if isinstance(content, Mapping):
            content = [{"entity_id": key, **(value or {})} for key, value in content.items()]
        devices, scenes, lists = [], [], []
        for entity in content:
            domain, _, object_id = entity["entity_id"].partition(".")
            name = entity.get("name") or entity.get("original_name") or object_id.replace("_", " ")
            if domain == "scene":
                scenes.append(name)
            elif domain == "todo":
                lists.append(name)
            else:
                area = entity.get("area") or entity.get("area_name") or entity.get("areas") or ""
                devices.append(
                    _device({"name": name, "area": area, "domain": domain, "aliases": entity.get("aliases", [])})
                )
        areas = tuple(dict.fromkeys(device.area for device in devices if device.area))
        return cls(areas=areas, devices=tuple(devices), scenes=tuple(scenes), lists=tuple(lists))

    @cached_property
    def _forms(self) -> dict[str, list[tuple[str, str]]]:
        """(the name itself, which an alias stands for; a name in the model's form), of every name by its kind."""
        names = {kind: [(name, name) for name in getattr(self, kind)] for kind in KINDS if kind != "devices"}
        names["devices"] = [(one.name, name) for one in self.devices for name in (one.name, *one.aliases)]
        return {kind: [(itself, model_form(name)) for itself, name in names[kind]] for kind in KINDS}

    @cached_property
    def _by_plain(self) -> dict[str, dict[str, str]]:
        """The name itself by what _plain() leaves of it, of every name by its kind; the first one where several are."""
        return {kind: {_plain(form): name for name, form in reversed(forms)} for kind, forms in self._forms.items()}

    def shown(self, sentence: str) -> str:
        """The names that a sentence (in the model's form) may mean, as the prompt has them; "" for none."""
        words = [word for word in sentence.replace(",", "").split() if word not in _NO_NAMES]

        @cache  # names of one home share most of their words
        def is_said(word: str) -> bool:
            return any(word == other or _is_alike(word, other) for other in words)

        lines = {}
        for kind, forms in self._forms.items():
            scored = [(_shared(form.split(), is_said), form) for _, form in forms]
            likely = sorted((pair for pair in scored if pair[0] > 0), key=lambda pair: -pair[0])
            lines[kind] = [form for _, form in likely[:MOST_SHOWN]]
        return names_text(lines)

    def own_name(self, kind: str, words: str) -> str | None:
        """The home's own name for words that the model copied; None for none.

        The two may differ in articles, plurals and slips.
        """
        wanted, names = _plain(words), self._by_plain[kind]
        close = [wanted] if wanted in names else difflib.get_close_matches(wanted, names, n=1, cutoff=0.84)
        return names[close[0]] if close else None

    def domain_of(self, name: str) -> str:
        """The domain of the devices with this own name; "" where it is not known, or they have several."""
        domains = {device.domain for device in self.devices if device.name == name}
        return domains.pop() if len(domains) == 1 else ""

    def said(self, kind: str, sentence: str) -> list[str]:
        """The names of a kind that stand word for word in a sentence, both in the model's form; longest first."""
        spaced = f" {sentence.replace(',', '')} "
        return sorted((form for _, form in self._forms[kind] if f" {form} " in spaced), key=len, reverse=True)


def names_text(names: Mapping[str, Iterable[str]]) -> str:
    """Names by their kind, in the model's form, as the system message of a prompt."""
    return "\n".join(f"{kind}: {', '.join(listed)}" for kind, listed in names.items() if listed)


def _shared(name: list[str], is_said: Callable[[str], bool]) -> float:
    """How much of a name a sentence has: 1 for all of it."""
    telling = [word for word in name if word not in _NO_NAMES] or name
    return sum(map(is_said, telling)) / len(telling)


def _is_alike(word: str, other: str) -> bool:
    return abs(len(word) - len(other)) < 3 and difflib.SequenceMatcher(None, word, other).ratio() >= _ALIKE


def _plain(words: str) -> str:
    """Without article and the s of a plural."""
    kept = [word for word in words.split() if word not in ("the", "my", "our", "a", "an")]
    return " ".join(word[:-1] if word.endswith("s") and len(word) > 3 else word for word in kept)


def _strings(value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) and entry.strip() for entry in value):
        raise ValueError("a kind of names is a list of texts")
    return tuple(value)


def _device(entry: Any) -> Device:
    if isinstance(entry, str):
        return Device(entry)
    area = entry.get("area") or ""
    if not isinstance(area, str):
        area = ", ".join(area)
    return Device(str(entry["name"]), area, str(entry.get("domain") or ""), _strings(entry.get("aliases") or ()))
