"""Packed files: a pure permutation, the same logits at every budget, and damage that is noticed."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import write_model

from smallthinker_edge import ExpertReadError, MemoryBudgetError, ModelFormatError, SmallThinker, budget, packed
from smallthinker_edge._native.gguf import GGUFFile
from smallthinker_edge.packed import PackedFile

SHAPE: dict[str, Any] = {"n_layers": 4, "d_model": 256, "head_dim": 32, "n_experts": 16, "n_experts_used": 2,
                         "d_ffn": 128, "window": 64, "context_length": 1024}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 300, 200)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("packed") / "model.gguf", **SHAPE)


@pytest.fixture(scope="module")
def stpk(gguf: str) -> str:
    target = gguf.replace(".gguf", ".stpk")
    packed.pack(gguf, target)
    return target


@pytest.mark.parametrize("options", [{}, {"types": "Q8_0"}, {"down_transposed": True}, {"d_model": 160, "head_dim": 16},
                                     {"types": "F16", "tied": False}])  # fmt: skip
def test_unpacking_gives_the_source_back(tmp_path: Path, options: dict[str, Any]) -> None:
    source, target = write_model(tmp_path / "m.gguf", **SHAPE | options), tmp_path / "m.stpk"
    packed.pack(source, target)
    with GGUFFile(source) as file:
        for layer in range(4):
            for got, info in zip(packed.unpack_layer(target, layer), packed.expert_infos(file, layer), strict=True):
                assert got.tobytes() == file.data(info.name).tobytes()
        with GGUFFile(target) as container:
            dense = [name for name in file.tensors if "_exps" not in name]
            assert all(container.data(name).tobytes() == file.data(name).tobytes() for name in dense)
            assert list(PackedFile(container).tensors.values()) == list(file.tensors.values())
    packed.verify(target)
    assert np.array_equal(*(SmallThinker(path).session().decode(TOKENS, True) for path in (source, target)))


@pytest.mark.parametrize("slots", [16, 20, 40, 64])
def test_logits_do_not_depend_on_the_slots(gguf: str, stpk: str, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with SmallThinker(gguf) as model:
        expected = model.session().decode(TOKENS, all_logits=True)
    plan = budget.make_plan
    monkeypatch.setattr(budget, "make_plan", lambda *arguments: replace(plan(*arguments), slots=slots))
    with SmallThinker(stpk, threads=2) as model:
        with model.session() as session:
            got = np.stack([session.decode(TOKENS[i : i + 1]) for i in range(100)])
            got = np.concatenate([got, session.decode(TOKENS[100:], all_logits=True)])
        stats = model.stats()
    assert np.array_equal(got, expected)
    assert stats["bytes_read"] == stats["misses"] * model.plan.slot_bytes
    assert (stats["evictions"] > 0) == (slots < 64)


def test_a_budget_is_divided_into_slots(stpk: str) -> None:
    with pytest.raises(MemoryBudgetError) as caught:
        SmallThinker(stpk, memory=1)
    needed = int(str(caught.value).split("needs ")[1].split(" ")[0])
    memory = needed + (4 << 20)  # what the process itself takes changes a little between two calls
    with SmallThinker(stpk, memory=memory) as model:
        assert model.plan.slots >= 16
        assert model.plan.total <= memory


def test_a_read_error_is_an_exception_and_the_session_goes_on(gguf: str, stpk: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.stpk"
    whole = Path(stpk).read_bytes()
    broken.write_bytes(whole)
    with SmallThinker(gguf) as model:
        expected = model.session().decode(TOKENS)
    with SmallThinker(broken) as model, model.session() as session:
        os.truncate(broken, len(whole) // 2)
        with pytest.raises(ExpertReadError):
            session.decode(TOKENS)
        assert session.position == 0
        broken.write_bytes(whole)
        assert np.array_equal(session.decode(TOKENS), expected)
        assert model.stats()["read_errors"] > 0


def test_verify_finds_a_flipped_bit(stpk: str, tmp_path: Path) -> None:
    damaged = bytearray(Path(stpk).read_bytes())
    with GGUFFile(stpk) as file:
        info = file.tensors[packed.blob_name(2)]
    damaged[info.offset + 3 * (info.nbytes // 16) + 100] ^= 4
    copy = tmp_path / "damaged.stpk"
    copy.write_bytes(damaged)
    with pytest.raises(ModelFormatError, match="expert 3 of layer 2"):
        packed.verify(copy)


def test_a_failed_pack_leaves_nothing_behind(gguf: str, tmp_path: Path) -> None:
    target = tmp_path / "m.stpk"

    def fail(done: int, total: int) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        packed.pack(gguf, target, fail)
    assert list(tmp_path.iterdir()) == []


def test_packing_twice_is_refused(stpk: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="already"):
        packed.pack(stpk, tmp_path / "again.stpk")


def test_a_budget_below_one_layers_experts_is_refused(stpk: str) -> None:
    with pytest.raises(MemoryBudgetError, match="16 expert slots"):
        SmallThinker(stpk, memory="1MiB")


@pytest.mark.parametrize("where", range(24, 2000, 97))
def test_a_damaged_header_is_an_error_or_harmless(stpk: str, tmp_path: Path, where: int) -> None:
    damaged = bytearray(Path(stpk).read_bytes())
    with GGUFFile(stpk) as file:
        where = file.key_ranges["stpk.source_tensors"][0] + where
    damaged[where] ^= 0x11
    copy = tmp_path / "damaged.stpk"
    copy.write_bytes(damaged)
    with contextlib.suppress(ModelFormatError):
        SmallThinker(copy).close()
