"""The LM head over allowed rows only: the logits are the full head's, bit for bit, and the others minus infinity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf_files import write_model
from small_model import HEADS, SHAPE, open_session, tokens

from smallthinker_edge import SmallThinker
from smallthinker_edge._native import kernels
from smallthinker_edge.errors import NotFiniteError


def bits_of(allowed: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint32]:
    padded = np.zeros((allowed.size + 31) // 32 * 32, bool)
    padded[: allowed.size] = allowed
    return np.packbits(padded, bitorder="little").view(np.uint32)


def masks(vocab: int) -> list[npt.NDArray[np.bool_]]:
    """None, one, the last, few, half, all but one, a whole unit of 256 and no other, all."""
    rng = np.random.default_rng(3)
    each = np.arange(vocab)
    return [
        each < 0, each == 7, each == vocab - 1, rng.random(vocab) < 0.02, rng.random(vocab) < 0.5, each != 300,
        each // 256 == 1, each >= 0,
    ]  # fmt: skip


@pytest.mark.parametrize("table", kernels.tables())
@pytest.mark.parametrize("variant", HEADS)
def test_allowed_logits_are_those_of_the_full_head(variant: str, table: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", **SHAPE | HEADS[variant])
    session = open_session(model, table=table, threads=2)
    ids = tokens(20)
    full = session.decode(ids)
    for allowed in masks(full.size):
        for pieces in ([ids], [ids[:-1], ids[-1:]]):  # the last of many, and one alone
            session.reset()
            for piece in pieces[:-1]:
                session.prefill(piece)
            got = session.decode(pieces[-1], allowed=bits_of(allowed))
            assert np.array_equal(got[allowed], full[allowed])
            assert np.all(got[~allowed] == -np.inf)


def test_what_is_allowed_must_fit(tmp_path: Path) -> None:
    session = open_session(write_model(tmp_path / "model.gguf", **SHAPE))
    words = (session.decode([1]).size + 31) // 32
    for wrong in (np.zeros(words - 1, np.uint32), np.zeros(words + 1, np.uint32), np.zeros(words, np.int32)):
        with pytest.raises(ValueError, match="allowed"):
            session.decode([1], allowed=wrong)
    with pytest.raises(ValueError, match="last token"):
        session.decode([1, 2], all_logits=True, allowed=np.zeros(words, np.uint32))
    assert session.position == 1


def test_a_nan_among_allowed_logits_is_an_error(tmp_path: Path) -> None:
    norm = np.full(SHAPE["d_model"], np.nan, np.float32)
    model = write_model(tmp_path / "model.gguf", **SHAPE, replace_tensors={"output_norm.weight": (norm, "F32")})
    session = open_session(model)
    for allowed in (np.arange(SHAPE["vocab_size"]) < 5, np.arange(SHAPE["vocab_size"]) >= 0):
        with pytest.raises(NotFiniteError):
            session.decode([1], allowed=bits_of(allowed))


class Only:
    """Allows the tokens of a list, one after the other with an even number, and ends."""

    def __init__(self, vocab: int, length: int, end: int) -> None:
        self.vocab, self.left, self.end = vocab, length, end

    def allowed(self) -> npt.NDArray[np.uint32]:
        each = np.arange(self.vocab)
        return bits_of(each == self.end if self.left == 0 else (each % 2 == 0) & (each != self.end))

    def accept(self, token: int) -> None:
        self.left -= 1

    def forced(self) -> list[int]:
        return []


def test_generations_are_the_same_with_and_without_the_shortcut(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    with SmallThinker(tiny_model) as model:
        vocab, end = model.config.vocab_size, min(model.tokenizer.eos_ids)

        def generate(**options: Any) -> list[int]:
            return model.generate("abc", max_tokens=20, constraint=Only(vocab, 8, end), **options).tokens

        with monkeypatch.context() as patch:
            decode = type(model.session()).decode

            def watched(session: Any, *arguments: Any, **options: Any) -> Any:
                seen.append(options["allowed"] is not None)
                return decode(session, *arguments, **options)

            patch.setattr("smallthinker_edge.session.Session.decode", watched)
            short = generate()
            assert all(seen)
            assert seen
            seen.clear()
            # Probabilities need all logits.
            assert generate(logprobs=1) == short
            assert not any(seen)
            assert generate(logits_processors=[lambda ids, logits: logits]) == short
            assert not any(seen)
        assert len(short) == 9
        assert all(token % 2 == 0 for token in short[:-1])
        assert generate(temperature=0.8, seed=4) == generate(temperature=0.8, seed=4, logprobs=0)
