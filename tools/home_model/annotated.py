"""Sentences with their slots marked, "[slot : value]", as SLURP writes them; called by the other files of this folder.

A sentence file has sections, "= action", and one sentence a line. Knows nothing of models or of training.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from smallthinker_edge.home.schema import ACTIONS, command_json
from smallthinker_edge.home.text_form import model_form

MARK = re.compile(r"\[\s*(\w+)\s*:\s*([^\[\]]*?)\s*\]")
FOLDER = Path(__file__).parent / "sentences"


@dataclass(frozen=True)
class Piece:
    """Some words of a sentence, and the slot that they fill ("" for none)."""

    words: str
    slot: str = ""


@dataclass(frozen=True)
class Sentence:
    """One command (or none) in a person's words."""

    action: str
    pieces: tuple[Piece, ...]
    kind: str = ""  # which wording it is: sentences that share one are held out together

    @property
    def text(self) -> str:
        """In the model's form."""
        return model_form(" ".join(piece.words for piece in self.pieces))

    @property
    def slots(self) -> list[tuple[str, str]]:
        """(slot, value) as the answer has them, in the model's form."""
        allowed = ACTIONS[self.action]
        pairs = [(piece.slot, model_form(piece.words)) for piece in self.pieces if piece.slot in allowed]
        return [(slot, value) for slot, value in pairs if value]

    @property
    def answer(self) -> str:
        return command_json(self.action, self.slots)

    def with_pieces(self, pieces: list[Piece]) -> Sentence:
        return replace(self, pieces=tuple(piece for piece in pieces if piece.words))


def pieces_of(marked: str) -> Iterator[Piece]:
    """What is in the marks of a sentence and between them, in its order; words may be ""."""
    start = 0
    for mark in MARK.finditer(marked):
        yield Piece(marked[start : mark.start()].strip())
        yield Piece(mark[2], mark[1])
        start = mark.end()
    yield Piece(marked[start:].strip())


def parse(action: str, text: str, kind: str = "") -> Sentence:
    """A marked sentence. Raises ValueError for an action that the schema lacks."""
    if action not in ACTIONS:
        raise ValueError(f"no action {action!r}")
    kept = tuple(piece for piece in pieces_of(text) if piece.words)
    return Sentence(action, kept, kind or MARK.sub(r"<\1>", text))


def read_sentences(path: Path) -> list[Sentence]:
    """All sentences of a file of ours. Raises ValueError with file and line for one that cannot be read."""
    action, sentences = "", []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("= "):
            action = line[2:].strip()
        elif line.strip():
            try:
                sentences.append(parse(action, line.strip()))
            except ValueError as error:
                raise ValueError(f"{path.name}:{number}: {error}") from None
    return sentences


def own_sentences() -> list[Sentence]:
    """The sentences of this folder."""
    return [sentence for path in sorted(FOLDER.glob("*.txt")) for sentence in read_sentences(path)]
