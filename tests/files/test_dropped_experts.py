"""Packed files without some of the experts: what they hold, which experts the router chooses, what is measured."""

from __future__ import annotations

import os
from pathlib import Path

import gguf_files
import numpy as np
import pytest
from reference import Reference
from small_model import divergence

from smallthinker_edge import ModelFormatError, SessionFormatError, SmallThinker
from smallthinker_edge.cli import main
from smallthinker_edge.files.config import ModelConfig
from smallthinker_edge.files.gguf import GGUFFile
from smallthinker_edge.files.hot_experts import profile_path
from smallthinker_edge.files.pack import pack, unpack
from smallthinker_edge.files.packed import PackedFile, unpack_layer, verify
from smallthinker_edge.measure import evaluate
from smallthinker_edge.measure.trace import Trace, record

L, E, K = 3, 8, 2
SHAPE = {"n_layers": L, "n_experts": E, "n_experts_used": K, "d_model": 64, "d_ffn": 64, "context_length": 256}
TOKENS = np.random.default_rng(3).integers(0, 300, 120).tolist()
DROP = np.array([[1, 0, 0, 1, 1, 0, 1, 1], [0] * E, [0, 1, 1, 1, 0, 1, 1, 1]], np.bool_)  # three left, all, two


@pytest.fixture(scope="module", params=["sigmoid", "softmax"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "m.gguf"
    return Path(gguf_files.write_model(path, gating=request.param, **SHAPE))


@pytest.fixture
def dropped(model: Path, tmp_path: Path) -> Path:
    pack(model, tmp_path / "dropped.stpk", drop=DROP)
    return tmp_path / "dropped.stpk"


class Without(Reference):
    """The reference model, whose router does not see some experts."""

    def route(self, x: np.ndarray, layer: int) -> tuple[np.ndarray, np.ndarray]:
        logits = x @ self.weights[f"blk.{layer}.ffn_gate_inp.weight"].T
        logits = np.where(DROP[layer], -np.inf, logits)
        chosen = np.argsort(-logits, axis=-1, kind="stable")[:, :K]
        top = np.take_along_axis(logits, chosen, axis=-1)
        scores = np.exp(top - top.max(-1, keepdims=True)) if self.params.gating == "softmax" else 1 / (1 + np.exp(-top))
        return chosen, scores / scores.sum(-1, keepdims=True)


def logits_of(path: Path, tokens: list[int] = TOKENS, **options: object) -> np.ndarray:
    with SmallThinker(path, **options) as opened, opened.session() as session:
        return session.decode(tokens, all_logits=True)


def test_the_router_chooses_among_those_that_are_left(dropped: Path) -> None:
    with SmallThinker(dropped) as opened:
        routing = record(opened, TOKENS, 20).routing
    for layer in range(L):
        used = set(routing[:, layer].ravel().tolist())
        assert used <= set(np.flatnonzero(~DROP[layer]).tolist())
        assert all(len(set(token.tolist())) == K for token in routing[:, layer])
    assert set(routing[:, 2].ravel().tolist()) == {0, 4}


@pytest.mark.parametrize("gating", ["sigmoid", "softmax"])
def test_logits_are_those_of_a_reference_without_them(gating: str, tmp_path: Path) -> None:
    """Weights are float32, so that rounding turns no more than a few near-ties of a router."""
    model = gguf_files.write_model(tmp_path / "m.gguf", gating=gating, types="F32", **SHAPE)
    pack(model, tmp_path / "m.stpk", drop=DROP)
    found = logits_of(tmp_path / "m.stpk")
    assert np.quantile(divergence(Without.from_gguf(model).logits(TOKENS, kv="f16"), found), 0.95) < 1e-4
    assert np.quantile(divergence(Reference.from_gguf(model).logits(TOKENS, kv="f16"), found), 0.05) > 1e-2


def test_dropping_what_a_text_does_not_use_changes_nothing_for_it(model: Path, tmp_path: Path) -> None:
    tokens = TOKENS[:6]
    with SmallThinker(model) as opened:
        rare = record(opened, tokens).rarely_used(1e-9)
    assert 3 < rare.sum() < L * (E - K)
    pack(model, tmp_path / "m.stpk", drop=rare)
    assert (logits_of(tmp_path / "m.stpk", tokens) == logits_of(model, tokens)).all()


def test_dropping_nothing_writes_the_same_file(model: Path, tmp_path: Path) -> None:
    pack(model, tmp_path / "a.stpk")
    pack(model, tmp_path / "b.stpk", drop=np.zeros((L, E), np.bool_))
    assert (tmp_path / "a.stpk").read_bytes() == (tmp_path / "b.stpk").read_bytes()


def test_the_file_is_smaller_by_the_experts(model: Path, dropped: Path, tmp_path: Path) -> None:
    pack(model, tmp_path / "whole.stpk")
    with GGUFFile(dropped) as gguf:
        packed = PackedFile(gguf)
        config = ModelConfig.from_gguf(packed)
        offsets, size = packed.experts(config)
        assert (packed.absent(config) == DROP).all()
        there = offsets[~DROP.ravel()]
        assert len(set(there.tolist())) == (~DROP).sum()
        assert (np.diff(there) >= size).all()
    saved = os.path.getsize(tmp_path / "whole.stpk") - os.path.getsize(dropped)
    assert abs(saved - DROP.sum() * size) <= 4096
    assert verify(dropped) == verify(tmp_path / "whole.stpk") - DROP.sum()


def test_logits_do_not_depend_on_budget_threads_or_chunks(dropped: Path) -> None:
    expected = logits_of(dropped, threads=1)
    with SmallThinker(dropped, memory="1GiB", threads=2, verify=True) as opened, opened.session() as session:
        rows = [session.decode(TOKENS[at : at + 7], all_logits=True) for at in range(0, len(TOKENS), 7)]
        assert (np.concatenate(rows) == expected).all()
        assert opened.plan.slots == (~DROP).sum()
        one = [session.decode([token]) for token in TOKENS[:20]]
        assert len(one) == 20
        stats = opened.stats()
        assert stats["read_errors"] == 0


def test_every_expert_is_read_at_the_opening_but_the_absent(dropped: Path) -> None:
    with SmallThinker(dropped) as opened, opened.session() as session:
        session.decode(TOKENS)
        opened.save_profile()
        stats = opened.stats()
    with GGUFFile(dropped) as gguf:
        _, size = PackedFile(gguf).experts(ModelConfig.from_gguf(PackedFile(gguf)))
    assert stats["read_bytes"] == (~DROP).sum() * size
    assert os.path.exists(profile_path(dropped))
    assert (logits_of(dropped, memory="1GiB") == logits_of(dropped)).all()


def test_it_cannot_be_unpacked(dropped: Path, tmp_path: Path) -> None:
    for undo in (lambda: unpack(dropped, tmp_path / "back.gguf"), lambda: unpack_layer(dropped, 0)):
        with pytest.raises(ModelFormatError, match="11 experts were dropped"):
            undo()
    assert not (tmp_path / "back.gguf").exists()


def test_a_session_of_the_whole_model_is_another_models(model: Path, dropped: Path, tmp_path: Path) -> None:
    with SmallThinker(model) as opened, opened.session() as session:
        session.decode(TOKENS[:9])
        session.save(tmp_path / "s")
    with SmallThinker(dropped) as opened, pytest.raises(SessionFormatError):
        opened.load_session(tmp_path / "s")


@pytest.mark.parametrize("drop", [np.zeros((L, E - 1), np.bool_), np.arange(L * E).reshape(L, E) >= 1])
def test_what_would_leave_no_model_is_refused(drop: np.ndarray, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        pack(model, tmp_path / "m.stpk", drop=drop)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ids", [[L * E], [0, 0, 1], list(range(7)), [9]])
def test_a_list_of_absent_experts_that_does_not_fit_is_refused(ids: list[int], dropped: Path) -> None:
    """Out of range, fewer than the file lacks, too many of a layer, one of a whole layer."""
    written = np.flatnonzero(DROP).astype("<u4").tobytes()
    other = np.resize(np.array(ids, "<u4"), DROP.sum()).tobytes()
    content = dropped.read_bytes()
    assert content.count(written) == 1
    dropped.write_bytes(content.replace(written, other))
    with pytest.raises(ModelFormatError):
        SmallThinker(dropped)
    with pytest.raises(ModelFormatError):
        verify(dropped)


def test_the_least_used_go_and_as_many_as_a_token_uses_stay() -> None:
    routing = np.array([[[0, 1]], [[0, 1]], [[0, 2]], [[0, 3]]], np.uint16)
    trace = Trace(routing, 5)
    assert trace.rarely_used(0.3).tolist() == [[False, False, True, True, True]]
    assert trace.rarely_used(0.25).tolist() == [[False, False, False, False, True]]
    assert trace.rarely_used(2).tolist() == [[False, False, True, True, True]]


def test_the_command_prints_what_it_costs(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, trace, out = tmp_path / "t.txt", tmp_path / "t.npz", tmp_path / "m.stpk"
    text.write_bytes(b"hello world in other words the hero on the land " * 5)
    assert main(["trace", "-m", str(model), "-p", text.read_text(), "-o", str(trace)]) == 0
    capsys.readouterr()
    command = ["pack", str(model), "-o", str(out), "--drop-below", "0.3"]
    assert main([*command, "--trace", str(trace)]) == 2
    assert not out.exists()
    capsys.readouterr()
    assert main([*command, "--trace", str(trace), "--kl", str(text)]) == 0
    printed = capsys.readouterr().out
    rare = Trace.load(trace).rarely_used(0.3)
    assert f"{rare.sum()} of {L * E} experts dropped" in printed
    with SmallThinker(model) as a, SmallThinker(out) as b:
        tokens = evaluate.text_tokens(a, text.read_bytes())
        kl = evaluate.compare(a, b, tokens, len(tokens))["kl"].mean()
    assert kl > 1e-4
    assert f"{kl:.6f}" in printed


def test_a_trace_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    Trace(np.zeros((4, 2, 1), np.uint16), E).save(tmp_path / "t.npz")
    (tmp_path / "t.txt").write_text("hello")
    command = ["pack", str(model), "-o", str(tmp_path / "m.stpk"), "--drop-below", "0.3", "--trace"]
    assert main([*command, str(tmp_path / "t.npz"), "--kl", str(tmp_path / "t.txt")]) == 2
