"""Model files that are cut short, or become unreadable, while a model uses them: exceptions, and never a crash."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import write_model
from small_model import SHAPE

from smallthinker_edge import ExpertReadError, ModelFormatError, SmallThinker, SmallThinkerError
from smallthinker_edge._native.gguf_reader import Part
from smallthinker_edge.files import gguf
from smallthinker_edge.files.gguf import GGUFFile
from smallthinker_edge.files.pack import pack, unpack

UNTIED = SHAPE | {"tied": False}


def write(tmp_path: Path, packed: bool, **changes: Any) -> str:
    path = write_model(tmp_path / "model.gguf", **(UNTIED | changes))
    if packed:
        pack(path, tmp_path / "model.stpk")
        return str(tmp_path / "model.stpk")
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_a_row_of_the_embedding_that_is_cut_off_is_an_error_and_the_model_goes_on(tmp_path: Path, packed: bool) -> None:
    path = write(tmp_path, packed)
    with GGUFFile(path) as file:
        info = file.tensors["token_embd.weight"]
    whole = Path(path).read_bytes()
    row = info.nbytes // UNTIED["vocab_size"]
    with SmallThinker(path, threads=2) as model, model.session() as session:
        expected = session.decode([1, 2, 500])
        session.reset()
        os.truncate(path, info.offset + 100 * row)
        with pytest.raises(ExpertReadError, match="embedding"):
            session.decode([1, 2, 500])
        with pytest.raises(ExpertReadError, match="embedding"):
            session.decode([100])
        assert session.position == 0
        with open(path, "r+b") as file:
            file.write(whole)
        np.testing.assert_array_equal(session.decode([1, 2, 500]), expected)


def test_rows_from_the_file_give_the_bits_that_rows_in_memory_give(tmp_path: Path) -> None:
    """An untied model whose head is its embedding is the tied model."""
    tied = write_model(tmp_path / "tied.gguf", **SHAPE)
    with GGUFFile(tied) as file:
        same = np.frombuffer(file.data("token_embd.weight").tobytes(), np.uint8)
    untied = write_model(tmp_path / "untied.gguf", **UNTIED)
    with GGUFFile(untied) as file, open(untied, "r+b") as raw:
        for name in ("token_embd.weight", "output.weight"):
            raw.seek(file.tensors[name].offset)
            raw.write(same.tobytes())
        with GGUFFile(tied) as source:
            for name, info in source.tensors.items():
                raw.seek(file.tensors[name].offset)
                raw.write(source.data(name).tobytes())
                assert file.tensors[name].nbytes == info.nbytes
    ids = np.arange(200) * 7 % 512
    with SmallThinker(tied) as one, SmallThinker(untied) as other:
        np.testing.assert_array_equal(
            one.session().decode(ids, all_logits=True), other.session().decode(ids, all_logits=True)
        )


def cut(monkeypatch: pytest.MonkeyPatch, path: str, size: int) -> None:
    """The file has only so many bytes as soon as its header has been read."""

    def opened(*arguments: Any) -> Part:
        part = Part(*arguments)
        os.truncate(path, size)
        return part

    monkeypatch.setattr(gguf, "Part", opened)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.99])
def test_a_file_cut_short_while_it_is_loaded_is_an_error(
    tmp_path: Path, packed: bool, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, packed, lm_head_profiler=32)
    cut(monkeypatch, path, int(os.path.getsize(path) * share))
    with pytest.raises((ModelFormatError, ExpertReadError)), SmallThinker(path, verify=packed) as model:
        model.generate("hello", max_tokens=4)


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_cut_short_while_it_is_written_anew_leaves_nothing(
    tmp_path: Path, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, packed)
    target = tmp_path / "out"
    cut(monkeypatch, path, os.path.getsize(path) - 5000)
    with pytest.raises(ModelFormatError, match="cut short"):
        unpack(path, target) if packed else pack(path, target)
    assert not list(tmp_path.glob("*out*"))


def test_a_session_of_a_file_cut_short_is_neither_saved_nor_loaded(tmp_path: Path) -> None:
    path = write(tmp_path, True)
    with SmallThinker(path) as model, model.session() as session:
        session.decode([1, 2, 3])
        os.truncate(path, 100)
        with pytest.raises(SmallThinkerError):
            session.save(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_no_model_file_is_mapped(tmp_path: Path) -> None:
    for packed in (False, True):
        path = write(tmp_path, packed)
        with SmallThinker(path, verify=packed) as model, model.session() as session:
            session.decode([1, 2, 3])
            session.save(tmp_path / "saved")
            model.load_session(tmp_path / "saved").close()
            assert path not in Path("/proc/self/maps").read_text()
