"""The budget is the process: sessions, forks, marks and logits share it, and what does not fit is refused by number."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from gguf_files import write_model
from small_model import SHAPE, tokens

from smallthinker_edge import MemoryBudgetError, SmallThinker
from smallthinker_edge.files.pack import pack
from smallthinker_edge.plan import Plan, make_plan

ROW = 4 * 512  # bytes of a row of logits
IDS = 4 * 1024  # of the tokens that a session remembers


@pytest.fixture(scope="module")
def stpk(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("budget")
    pack(write_model(folder / "m.gguf", **SHAPE), folder / "m.stpk")
    return str(folder / "m.stpk")


@contextmanager
def opened(path: str, monkeypatch: pytest.MonkeyPatch, spare: int, **options: Any) -> Iterator[SmallThinker]:
    """A model whose budget is what its plan needs at least, and `spare` bytes."""

    def planned(*arguments: Any, **more: Any) -> Plan:
        plan = make_plan(*arguments, **more)
        limit = plan.fixed + plan.least_slots * plan.slot_bytes + spare
        return replace(plan, limit=limit, slots=plan.least_slots + (spare // plan.slot_bytes if plan.slot_bytes else 0))

    monkeypatch.setattr("smallthinker_edge.opening.make_plan", planned)
    with SmallThinker(path, memory="64GiB", context=1024, **options) as model:
        yield model


def in_use(model: SmallThinker) -> int:
    return int(str(model.stats()["session_bytes"]))


def test_what_sessions_take_is_counted_and_given_back(stpk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(stpk, monkeypatch, 64 << 20) as model:
        assert in_use(model) == 0
        session = model.session()
        logits = session.decode(tokens(300), all_logits=True)
        block = session.kv_bytes // 2
        assert in_use(model) == IDS + 2 * block + 300 * ROW
        last = logits[-1]
        del logits
        assert in_use(model) == IDS + 2 * block + 300 * ROW, "a view keeps the whole array"
        del last
        fork = session.fork()
        assert in_use(model) == 2 * IDS + 2 * block
        fork.prefill(tokens(1))
        assert in_use(model) == 2 * IDS + 3 * block, "the fork has its own copy of the block it wrote to"
        fork.close()
        session.close()
        assert in_use(model) == 0


def test_weights_count_once(tmp_path: Path) -> None:
    """They are in memory already when the plan is made, which counts what else the process has."""
    path = write_model(tmp_path / "m.gguf", **SHAPE | {"n_experts": 64, "d_ffn": 512})
    weights = os.stat(path).st_size
    assert weights > 48 << 20
    for memory in (None, "8GiB"):
        before = psutil.Process().memory_info().rss
        with SmallThinker(path, memory=memory) as model:
            assert model.plan.process < before + weights // 2


def test_a_budget_of_what_is_free_does_not_grow_with_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is measured once, before they are in memory."""
    path = write_model(tmp_path / "m.gguf", **SHAPE)
    asked: list[int] = []

    def measured() -> int:
        asked.append(8 << 30 if asked else 4 << 30)
        return asked[-1]

    monkeypatch.setattr("smallthinker_edge.machine.memory.available_memory", measured)
    with SmallThinker(path, memory="auto") as model:
        assert model.plan.limit == 4 << 30


def test_sessions_beyond_the_plan_take_the_place_of_experts(stpk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with SmallThinker(stpk) as model, model.session() as session:
        expected = session.decode(tokens(700), all_logits=True)
    with opened(stpk, monkeypatch, 6 << 20) as model:
        slots, sessions = [], []
        for _ in range(4):
            sessions.append(model.session())
            assert np.array_equal(sessions[-1].decode(tokens(700), all_logits=True), expected)
            slots.append(int(str(model.stats()["slots"])))
        assert slots[0] > slots[-1] >= model.plan.least_slots
        assert slots == sorted(slots, reverse=True)
        taken = in_use(model) - model.plan.sessions + model.plan.slot_bytes * slots[-1]
        assert taken <= model.plan.slot_bytes * model.plan.slots + (6 << 20)
        for session in sessions:
            session.close()
        model.session().decode([1])
        assert int(str(model.stats()["slots"])) >= slots[0]


@pytest.mark.parametrize("packed", [True, False])
def test_more_than_the_budget_is_refused_and_the_rest_goes_on(
    packed: bool, stpk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stpk if packed else stpk.replace(".stpk", ".gguf")
    with opened(path, monkeypatch, 2 << 20) as model:
        limit = model.plan.most_sessions
        assert limit is not None
        sessions = []

        def open_many() -> None:
            for _ in range(20):
                sessions.append(model.session())
                sessions[-1].prefill(tokens(600))

        with pytest.raises(MemoryBudgetError, match=f"KV cache do not fit .* of the {limit} bytes"):
            open_many()
        assert 1 < len(sessions) < 20
        assert in_use(model) <= limit
        expected = sessions[0].decode([5])
        position = sessions[-1].position
        assert position in (0, 512), "chunks that were decoded stay"
        sessions.pop(0).close()
        sessions[-1].prefill(tokens(600)[position:])
        assert np.array_equal(sessions[-1].decode([5]), expected)


def test_logits_that_do_not_fit_are_refused_before_anything_is_computed(
    stpk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(stpk, monkeypatch, 100 * ROW) as model:
        session, other = model.session(1000), model.session(256)
        other.prefill([1])
        with pytest.raises(MemoryBudgetError, match="1000 rows of logits"):
            session.decode(tokens(1000), all_logits=True)
        assert session.position == 0
        other.close()
        assert session.decode(tokens(1000)).shape == (512,)


def test_an_idle_session_makes_room(stpk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(stpk, monkeypatch, 0, keep_sessions=3) as model:
        model.generate(tokens(700).tolist(), max_tokens=2)
        kept = in_use(model)
        assert kept > 0
        with model.session() as session:
            session.prefill(tokens(700, seed=1))
            assert in_use(model) <= kept
            with pytest.raises(MemoryBudgetError, match="close some"), model.session() as second:
                second.prefill(tokens(1000))


def test_a_longer_context_counts_the_buffers_it_needs(stpk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smallthinker_edge.opening.DEFAULT_CONTEXT", 256)
    with opened(stpk, monkeypatch, 64 << 20) as model:
        with model.session(256) as session:
            session.decode([1])
            short = in_use(model)
        assert short == 4 * 256 + session_block(model)
        with model.session(1024, kv="q8_0") as session:
            session.decode([1])
            assert in_use(model) > 4 * 1024 + session.kv_bytes, "queries in Q8_0"


def session_block(model: SmallThinker) -> int:
    with model.session() as session:
        session.prefill([1])
        return session.kv_bytes


def test_a_model_without_a_budget_counts_and_refuses_nothing(stpk: str) -> None:
    with SmallThinker(stpk, context=1024) as model:
        sessions = [model.session() for _ in range(10)]
        for session in sessions:
            session.prefill(tokens(300))
        assert in_use(model) == sum(session.kv_bytes + IDS for session in sessions)


def test_saved_sessions_are_loaded_within_the_budget(
    stpk: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with opened(stpk, monkeypatch, 2 * IDS) as model:
        with model.session() as session:
            session.prefill(tokens(900))
            session.save(tmp_path / "s")
            with pytest.raises(MemoryBudgetError):
                model.load_session(tmp_path / "s")
        with model.load_session(tmp_path / "s") as session:
            assert session.position == 900
