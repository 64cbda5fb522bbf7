"""The sparse LM head: which logits the predictor lets through, that they are the full head's, and what is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_model
import train_lm_head_predictor
from gguf_files import write_model
from reference import Reference
from small_model import HEADS, SHAPE, tokens

from smallthinker_edge import ModelFormatError, SmallThinker
from smallthinker_edge._native import kernels
from smallthinker_edge.files.gguf import GGUFFile
from smallthinker_edge.files.pack import pack, unpack
from smallthinker_edge.generation.speculation import BatchCosts
from smallthinker_edge.opening import plan_memory

INNER = 64
PREDICTED: dict[str, Any] = SHAPE | {"window": 64, "lm_head_profiler": INNER}
VARIANTS: dict[str, dict[str, Any]] = HEADS | {
    "F32 predictor": {"types": {"default": "Q4_0", "profiler": "F32"}},
}
open_session = partial(small_model.open_session, predictor=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("head") / "model.gguf", **PREDICTED)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_are_selected_as_the_reference_scores_them(variant: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", **PREDICTED | VARIANTS[variant])
    ids = tokens(60)
    reference = Reference.from_gguf(model)
    trace = reference.run(ids.tolist(), kv="f16")
    scores = reference.head_scores(trace.states)
    session = open_session(model, table="ref", exact=True)
    got = session.decode(ids, all_logits=True, head_threshold=0.3)
    session.reset()
    full = session.decode(ids, all_logits=True)
    selected = np.isfinite(got)
    assert np.array_equal(got[selected], full[selected])
    assert np.all(got[~selected] == -np.inf)
    # Where the router took the other of two near-equal experts, everything differs: see test_engine.py.
    same = np.linalg.norm(full - trace.logits, axis=1) < 1e-3 * np.linalg.norm(trace.logits, axis=1)
    clear = np.abs(scores - 0.3) > 1e-3
    assert same.mean() > 0.9
    assert np.array_equal((selected == (scores > 0.3))[same][clear[same]], np.full(clear[same].sum(), True))
    assert 0.1 < selected.mean() < 0.9


@pytest.mark.parametrize("table", kernels.tables())
@pytest.mark.parametrize("variant", VARIANTS)
def test_selected_logits_are_those_of_the_full_head(variant: str, table: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", **PREDICTED | VARIANTS[variant])
    ids = tokens(20)
    session = open_session(model, table=table)
    states = np.empty((20, SHAPE["d_model"]), np.float32)
    full = session.decode(ids, all_logits=True, states=states)
    scores = Reference.from_gguf(model).head_scores(states.astype(np.float64))
    for threads, batch in ((1, 512), (2, 512), (3, 7), (2, 1)):
        session = open_session(model, table=table, threads=threads, batch=batch)
        got = session.decode(ids, all_logits=True, head_threshold=0.1)
        selected = np.isfinite(got)
        assert np.array_equal(got, np.where(selected, full, -np.inf)), f"{threads} threads, chunks of {batch}"
        # Scores come from inputs rounded to Q8_0.
        clear = np.abs(scores - 0.1) > 0.05 * scores.std()
        assert np.array_equal(selected[clear], scores[clear] > 0.1)
        session.reset()
        assert np.array_equal(session.decode(ids, head_threshold=0.1), got[-1])


def test_full_logits_do_not_depend_on_the_predictor(path: str) -> None:
    ids = tokens(50)
    with_it, without = (open_session(path, predictor=p).decode(ids, all_logits=True) for p in (True, False))
    # The rows stand in another layout, whose kernel adds in another order.
    assert np.allclose(with_it, without, rtol=1e-5, atol=1e-5)


def test_where_no_row_is_selected_all_are(path: str) -> None:
    ids = tokens(12)
    with SmallThinker(path, threads=2) as model, model.session() as session:
        full = session.decode(ids, all_logits=True)
        session.reset()
        assert np.array_equal(session.decode(ids, all_logits=True, head_threshold=np.inf), full)
        assert model.stats()["head_share"] == 1.0
    scores = open_session(path).decode(ids, all_logits=True, head_threshold=-np.inf)
    assert np.array_equal(scores, full)


def test_one_token_without_rows_leaves_the_others_sparse(path: str) -> None:
    ids = tokens(40)
    session = open_session(path)
    states = np.empty((40, SHAPE["d_model"]), np.float32)
    full = session.decode(ids, all_logits=True, states=states)
    best = np.sort(Reference.from_gguf(path).head_scores(states.astype(np.float64)).max(1))
    threshold = float((best[20] + best[19]) / 2)
    got = open_session(path, threads=3).decode(ids, all_logits=True, head_threshold=threshold)
    whole = np.isfinite(got).all(1)
    assert 15 <= whole.sum() <= 25
    assert np.array_equal(got[whole], full[whole])
    assert (np.isfinite(got[~whole]).sum(1) < 20).all()


def test_a_session_gives_its_user_all_logits(path: str) -> None:
    with SmallThinker(path) as model, model.session() as session:
        assert model.head_threshold == 0.0
        assert np.isfinite(session.decode(tokens(5))).all()
        assert "head_share" not in model.stats()
        assert np.isinf(session.decode([1], head_threshold=model.head_threshold)).any()
        assert 0 < model.stats()["head_share"] < 1  # type: ignore[operator]


@pytest.mark.parametrize("options", [{}, {"temperature": 5.0, "seed": 1}, {"temperature": 1.0, "top_k": 9, "seed": 2}])
def test_generation_chooses_among_selected_rows(path: str, options: dict[str, Any]) -> None:
    prompt = tokens(30).tolist()
    with SmallThinker(path, head_threshold=0.2, keep_sessions=0) as model, model.session() as session:
        for speculate in (0, 4):
            got = model.generate(prompt, max_tokens=40, speculate=speculate, **options).tokens
            session.reset()
            logits = session.decode([*prompt, *got[:-1]], all_logits=True, head_threshold=0.2)[len(prompt) - 1 :]
            assert np.isfinite(logits[np.arange(len(got)), got]).all()
            if not options:
                assert logits.argmax(1).tolist() == got


def test_speculation_with_a_sparse_head_changes_no_token(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BatchCosts, "worthwhile", True)
    monkeypatch.setattr(BatchCosts, "seconds", lambda self, tokens: 1.0)
    prompt = tokens(20).tolist() * 3
    with SmallThinker(path, head_threshold=0.4, keep_sessions=0) as model:
        for options in ({}, {"temperature": 1.0, "seed": 5}):
            plain = model.generate(prompt, max_tokens=60, repetition_penalty=0.5, **options)
            guessed = model.generate(prompt, max_tokens=60, repetition_penalty=0.5, speculate=5, **options)
            assert guessed.tokens == plain.tokens
            assert guessed.timings.accepted_tokens > 0


def test_a_bias_reaches_tokens_that_the_predictor_leaves_out(path: str) -> None:
    with SmallThinker(path) as model, model.session() as session:
        logits = session.decode(tokens(30), head_threshold=0.0)
        left_out = int(np.flatnonzero(np.isinf(logits))[0])
        assert model.generate(tokens(30).tolist(), max_tokens=1, logit_bias={left_out: 1000.0}).tokens == [left_out]


def test_it_can_be_turned_off_and_then_takes_no_memory(path: str) -> None:
    size = INNER * (SHAPE["d_model"] + SHAPE["vocab_size"]) // 32 * 18
    with SmallThinker(path, head_threshold=None) as off, SmallThinker(path) as on:
        assert off.head_threshold is None
        assert on.stats()["model_bytes"] - off.stats()["model_bytes"] >= size  # type: ignore[operator]
        assert on.plan.weights - off.plan.weights == size
        with off.session() as session:
            assert np.isfinite(session.decode(tokens(9), head_threshold=0.0)).all()
        assert plan_memory(path).weights == on.plan.weights


def test_a_packed_file_carries_the_predictor(path: str, tmp_path: Path) -> None:
    packed, back = tmp_path / "model.stpk", tmp_path / "back.gguf"
    pack(path, packed)
    unpack(packed, back)
    assert back.read_bytes() == Path(path).read_bytes()
    prompt = tokens(30).tolist()
    with SmallThinker(path) as model, SmallThinker(packed) as paged:
        assert paged.head_threshold == 0.0
        logits = []
        for opened in (model, paged):
            with opened.session() as session:
                logits.append(session.decode(prompt, head_threshold=0.0))
        assert np.isinf(logits[0]).any()
        assert np.array_equal(*logits)


def test_a_file_may_name_its_threshold(tmp_path: Path) -> None:
    key = {"smallthinker.lm_head_profiler.threshold": -0.25}
    model = write_model(tmp_path / "model.gguf", **PREDICTED, metadata=key)
    with SmallThinker(model) as opened:
        assert opened.head_threshold == -0.25
    with SmallThinker(model, head_threshold=1.5) as opened:
        assert opened.head_threshold == 1.5
    with pytest.raises(ValueError, match="head_threshold"):
        SmallThinker(model, head_threshold=float("nan"))


@pytest.mark.parametrize("value", ["0", float("nan"), float("inf"), True])
def test_a_threshold_that_is_no_number_is_refused(tmp_path: Path, value: Any) -> None:
    key = {"smallthinker.lm_head_profiler.threshold": value}
    with pytest.raises(ModelFormatError, match=r"lm_head_profiler\.threshold"):
        SmallThinker(write_model(tmp_path / "model.gguf", **PREDICTED, metadata=key))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"types": {"default": "Q4_0", "profiler": "Q4_1"}}, "type Q4_1"),
        ({"lm_head_profiler": 288}, "inner width of 288"),
    ],
)
def test_a_predictor_of_another_kind_is_refused(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelFormatError, match=match):
        SmallThinker(write_model(tmp_path / "model.gguf", **PREDICTED | options))


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "F16", "BF16", "F32"])
@pytest.mark.parametrize("place", [0, -1])
def test_a_predictor_that_is_not_made_of_numbers_is_refused(tmp_path: Path, kind: str, place: int) -> None:
    model = write_model(tmp_path / "model.gguf", **PREDICTED | {"types": {"default": "Q4_0", "profiler": kind}})
    with GGUFFile(model) as gguf:
        info = gguf.tensors["lm_head_profiler.weight"]
    size = {"Q4_0": 18, "Q8_0": 34, "F32": 4}.get(kind, 2)
    nan = {"F32": b"\0\0\x80\x7f", "BF16": b"\x80\xff"}.get(kind, b"\0\x7e")
    with open(model, "r+b") as file:
        file.seek(info.offset + place % (info.nbytes // size) * size)
        file.write(nan)
    with pytest.raises(ModelFormatError, match="lm_head_profiler"):
        SmallThinker(model)
    SmallThinker(model, head_threshold=None).close()


def test_a_predictor_is_trained_and_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = write_model(tmp_path / "model.gguf", **SHAPE | {"seed": 3}), tmp_path / "with.gguf"
    options = ["--inner", "256", "--type", "q8_0", "--states", "2048", "--steps", "100", "--lost", "1"]
    monkeypatch.setattr("sys.argv", ["train", source, "-o", str(target), *options, "--agreement", "0.99"])
    train_lm_head_predictor.main()
    with GGUFFile(source) as before, GGUFFile(target) as after:
        assert set(after.tensors) - set(before.tensors) == {"lm_head_profiler.weight"}
        for name in before.tensors:
            assert np.array_equal(after.data(name), before.data(name)), name
        added = set(after.metadata) - set(before.metadata)
        assert added == {"smallthinker.lm_head_profiler.threshold"}
    ids = tokens(400, seed=8)
    with SmallThinker(target) as model, model.session() as session:
        full = session.decode(ids, all_logits=True)
        session.reset()
        sparse = session.decode(ids, all_logits=True, head_threshold=model.head_threshold)
    # As many inner dimensions as the state has: the scores can be the logits themselves.
    assert (sparse.argmax(1) == full.argmax(1)).mean() > 0.97
    assert np.isfinite(sparse).mean() < 0.2


def test_the_low_rank_start_is_the_log_probability_where_the_rank_suffices() -> None:
    rng = np.random.default_rng(0)
    head = rng.standard_normal((300, 8)).astype(np.float32)
    # The normaliser must be linear in x for an exact fit: states with a constant, and a normaliser that is one number.
    x = np.concatenate([rng.standard_normal((500, 7)), np.ones((500, 1))], 1).astype(np.float32)
    states = train_lm_head_predictor.States(x, np.zeros((500, 1), np.int32), np.ones((500, 1), np.float32),
                                            np.full(500, 5.0, np.float32))  # fmt: skip
    first, second = train_lm_head_predictor.low_rank(head, states, 8, 0.01)
    assert np.allclose(x @ first.T @ second.T, x @ head.T - 5 - np.log(0.01), atol=1e-2)
