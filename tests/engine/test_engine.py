"""The engine against the NumPy reference, and the invariants of its results."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import write_model
from reference import Reference
from small_model import SHAPE, divergence, open_session, tokens

from smallthinker_edge._native import kernels
from smallthinker_edge._native.buffers import buffer_sizes, partial_sizes
from smallthinker_edge._native.engine import Engine
from smallthinker_edge._native.locks import Turns
from smallthinker_edge.errors import ContextFull, NotFiniteError, SessionBusy
from smallthinker_edge.files.config import ModelConfig
from smallthinker_edge.files.gguf import GGUFFile
from smallthinker_edge.loading import Loader
from smallthinker_edge.session import Session

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softmax, untied": {"gating": "softmax", "tied": False},
    "window": {"window": 64},
    "fused qkv": {"window": 64, "fused_qkv": True},
    "rope layout": {"window": 32, "rope_layout": [True, True, False, False]},
    "odd heads": {"n_heads": 9, "n_kv_heads": 3, "head_dim": 32},
    "one head each": {"n_heads": 3, "n_kv_heads": 3},
    "d not a multiple of 128": {"d_model": 96, "head_dim": 32},
    "Q8_0": {"types": "Q8_0"},
    "Q4_1": {"types": "Q4_1"},
    "Q4_K": {"types": "Q4_K", "d_model": 256, "d_ffn": 256},
    "Q5_K": {"types": "Q5_K", "d_model": 256, "d_ffn": 256},
    "Q6_K": {"types": "Q6_K", "d_model": 256, "d_ffn": 256},
    "Q4_K_M": {"types": {"default": "Q4_K", "down": "Q6_K", "head": "Q6_K"}, "d_model": 256, "d_ffn": 512},
    "Q5_K_M": {"types": {"default": "Q5_K", "down": "Q6_K", "head": "Q6_K"}, "d_model": 256, "d_ffn": 512},
    "Q4_0, down in Q5_K": {"types": {"default": "Q4_0", "down": "Q5_K"}, "d_ffn": 256},
    "Q2_K": {"types": "Q2_K", "d_model": 256, "d_ffn": 256},
    "Q3_K": {"types": "Q3_K", "d_model": 256, "d_ffn": 256},
    "Q5_0": {"types": "Q5_0"},
    "Q5_1": {"types": "Q5_1"},
    "IQ4_NL": {"types": "IQ4_NL"},
    "IQ4_XS": {"types": "IQ4_XS", "d_model": 256, "d_ffn": 256},
    "F16": {"types": "F16"},
    "BF16": {"types": "BF16"},
    "F32": {"types": "F32"},
    "transposed down": {"down_transposed": True},
    "all experts": {"n_experts_used": 8},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("engine") / "model.gguf", **SHAPE | {"window": 64})


@pytest.mark.parametrize("variant", VARIANTS)
def test_exact_activations_agree_with_the_reference(variant: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", **SHAPE | VARIANTS[variant])
    ids = tokens(100)
    expected = Reference.from_gguf(model).logits(ids.tolist(), kv="f16")
    got = open_session(model, table="ref", exact=True).decode(ids, all_logits=True)
    # A router near-tie may fall to the other side in float32: whole rows then differ, so compare the typical row.
    error = np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert np.median(error) < 1e-4
    assert (error < 1e-3).mean() > 0.9


@pytest.mark.parametrize("table", kernels.tables())
@pytest.mark.parametrize("variant", VARIANTS)
def test_quantised_activations_stay_close_to_the_reference(variant: str, table: str, tmp_path: Path) -> None:
    # All experts are used: random weights route almost at random, so that the noise of quantisation would flip
    # experts, which says nothing about the arithmetic. What rounding activations to Q8_0 costs by itself is told by the
    # reference, in float64: 3e-7 .. 1.6e-3 nats here, and up to 7 % of the positions get another top-1, because random
    # weights have close seconds. The engine must not lose more than that.
    model = write_model(tmp_path / "model.gguf", **SHAPE | VARIANTS[variant] | {"n_experts_used": 8})
    ids = tokens(60 if table != "ref" else 20)
    reference = Reference.from_gguf(model)
    expected = reference.logits(ids.tolist())
    rounded = reference.logits(ids.tolist(), kv="f16", rounding=True)
    got = open_session(model, table=table).decode(ids, all_logits=True)
    assert divergence(expected, got).mean() < 1.5 * divergence(expected, rounded).mean() + 1e-6
    assert divergence(expected, got).mean() < 2e-3
    same, same_rounded = ((expected.argmax(1) == other.argmax(1)).mean() for other in (got, rounded))
    assert same > same_rounded - 0.07


@pytest.mark.parametrize("table", kernels.tables())
@pytest.mark.parametrize("variant", ["plain", "transposed down", "Q8_0", "Q4_K", "Q4_K_M", "Q5_K", "Q6_K"])
def test_logits_do_not_depend_on_threads_or_chunks(path: str, variant: str, table: str, tmp_path: Path) -> None:
    ids = tokens(600 if table != "ref" else 150)
    if VARIANTS[variant]:
        path = write_model(tmp_path / "model.gguf", **SHAPE | {"d_ffn": 224} | VARIANTS[variant] | {"window": 64})
    expected = open_session(path, table=table).decode(ids, all_logits=True)
    assert np.isfinite(expected).all()
    for threads, batch in ((2, 512), (3, 7), (2, 1), (2, 2), (1, 3), (4, 64)):
        got = open_session(path, table=table, threads=threads, batch=batch).decode(ids, all_logits=True)
        assert np.array_equal(got, expected), f"{threads} threads, chunks of {batch}"


def test_last_logits_are_those_of_the_last_row(path: str) -> None:
    ids = tokens(30)
    assert np.array_equal(open_session(path).decode(ids), open_session(path).decode(ids, all_logits=True)[-1])


def test_a_reset_session_starts_anew(path: str) -> None:
    session = open_session(path)
    first = session.decode(tokens(40))
    session.decode(tokens(100, seed=1))
    session.reset()
    assert session.position == 0
    assert np.array_equal(session.decode(tokens(40)), first)


def test_window_layers_forget_what_left_the_window(tmp_path: Path) -> None:
    window_only = SHAPE | {"window": 16, "n_layers": 1, "rope_layout": [True], "window_pattern": [True]}
    model = write_model(tmp_path / "model.gguf", **window_only)
    ids = tokens(700)
    other = ids.copy()
    other[: 700 - 16] = tokens(700 - 16, seed=9)
    assert np.array_equal(open_session(model).decode(ids), open_session(model, batch=5).decode(other))
    other[700 - 16] += 1 if other[700 - 16] < 511 else -1
    assert not np.array_equal(open_session(model).decode(ids), open_session(model).decode(other))


def test_a_full_context_is_an_error_that_changes_nothing(path: str) -> None:
    session = open_session(path, context=50)
    session.decode(tokens(40))
    with pytest.raises(ContextFull, match="50"):
        session.decode(tokens(11))
    assert session.position == 40
    session.decode(tokens(10))
    with pytest.raises(ContextFull):
        session.decode([1])


@pytest.mark.parametrize("bad", [[], [512], [-1], [1.5], [[1, 2]], ["a"]])
def test_bad_tokens_are_refused(path: str, bad: list[Any]) -> None:
    session = open_session(path)
    with pytest.raises(ValueError, match="token"):
        session.decode(bad)
    assert session.position == 0


def test_a_session_serves_one_thread_at_a_time(path: str) -> None:
    session = open_session(path)

    class Intruder:
        """Looked at in the middle of a decode."""

        def is_set(self) -> bool:
            with pytest.raises(SessionBusy):
                session.decode([2])
            return False

    session.decode([1], cancel=Intruder())
    assert session.tokens == [1]


def test_sessions_of_one_model_run_from_several_threads(path: str) -> None:
    gguf = GGUFFile(path)
    config = ModelConfig.from_gguf(gguf)
    engine, turns = Engine(config, 2), Turns()
    Loader(gguf, config, engine).load()
    sessions = [Session(engine, config.vocab_size, 256, turns) for _ in range(3)]
    expected = [open_session(path).decode(tokens(100, seed)) for seed in range(3)]
    got: dict[int, np.ndarray] = {}

    def work(i: int) -> None:
        for token in tokens(100, i):
            got[i] = sessions[i].decode([token])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(3):
        assert np.array_equal(got[i], expected[i])


@pytest.mark.parametrize(
    ("variant", "kv", "options"),
    [
        ("plain", "f16", {}),
        ("plain", "q8_0", {"q8": True}),
        ("Q8_0", "f16", {"experts": {"tiles"}}),
        ("Q4_1", "f16", {"experts": {"rows"}}),
        ("transposed down", "f16", {}),
        ("window", "q8_0", {"q8": True}),
    ],
)
def test_buffers_are_those_that_the_plan_counts(variant: str, kv: str, options: dict[str, Any], tmp_path: Path) -> None:
    session = open_session(write_model(tmp_path / "m.gguf", **SHAPE | VARIANTS[variant]), threads=3, batch=64, kv=kv)
    config = session._engine.config
    counted = buffer_sizes(config, 64, 3, **options) | partial_sizes(config, session.context, 3)
    session.decode(tokens(200), all_logits=True)
    assert session._engine.buffer_bytes == sum(counted.values())


def test_closed_sessions_say_so(path: str) -> None:
    session = open_session(path)
    session.close()
    session.close()
    with pytest.raises(ValueError, match="closed"):
        session.decode([1])


@pytest.mark.parametrize("table", kernels.tables())
@pytest.mark.parametrize("role", ["attn_q", "attn_k", "attn_v", "ffn_up_exps", "output_norm"])
@pytest.mark.parametrize("kv", ["f16", "q8_0-all"])
def test_a_weight_that_is_no_number_is_told(table: str, role: str, kv: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", **SHAPE | {"window": 64})
    with GGUFFile(path) as gguf:
        name = role + ".weight" if role == "output_norm" else f"blk.2.{role}.weight"
        offset = gguf.tensors[name].offset
    with open(path, "r+b") as file:  # the first scale, or the first weight
        file.seek(offset)
        file.write(np.float32(np.nan).tobytes() if role == "output_norm" else np.float16(np.nan).tobytes())
    session = open_session(path, table=table, kv=kv)

    def one_by_one() -> None:
        for token in tokens(300):
            session.decode([token])

    with pytest.raises(NotFiniteError):  # an expert counts only where a token uses it
        one_by_one()
    assert session.position < 300
    with pytest.raises(NotFiniteError):
        open_session(path, table=table, kv=kv).decode(tokens(300))


def test_keys_that_are_too_large_for_f16_are_told(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", **SHAPE | {"types": "F32"})
    with GGUFFile(path) as gguf:
        offset = gguf.tensors["blk.1.attn_v.weight"].offset
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(np.full(256, 1e6, np.float32).tobytes())
    with pytest.raises(NotFiniteError):
        open_session(path).decode(tokens(20))
