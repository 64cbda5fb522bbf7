"""Sessions that last: forks, rewinds, marks, files of saved sessions (and damaged ones), and prompts not paid twice."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf_files import write_model
from small_model import SHAPE, tokens

from smallthinker_edge import Session, SessionFormatError, SmallThinker
from smallthinker_edge.files.session_file import HEADER

KINDS = ("f16", "q8_0", "q8_0-all")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One full layer to three window layers of 64 positions: rings of 512."""
    return write_model(tmp_path_factory.mktemp("sessions") / "model.gguf", **SHAPE | {"window": 64})


@pytest.fixture(scope="module", params=KINDS)
def model(path: str, request: pytest.FixtureRequest) -> Iterator[SmallThinker]:
    with SmallThinker(path, kv=request.param, context=1024, threads=2) as model:
        yield model


def after(model: SmallThinker, ids: np.ndarray) -> Session:
    session = model.session()
    session.decode(ids)
    return session


def test_a_fork_and_its_origin_go_their_own_ways(model: SmallThinker) -> None:
    ids, other = tokens(700), tokens(300, seed=1)
    session = after(model, ids[:400])
    fork = session.fork()
    a, b = session.decode(ids[400:], all_logits=True), fork.decode(other, all_logits=True)
    assert np.array_equal(a, after(model, ids[:400]).decode(ids[400:], all_logits=True))
    assert np.array_equal(b, after(model, ids[:400]).decode(other, all_logits=True))
    assert session.tokens == ids.tolist()
    assert fork.tokens == [*ids[:400].tolist(), *other.tolist()]


def test_rewind_forgets(model: SmallThinker) -> None:
    session = after(model, tokens(400))
    session.rewind(150)
    assert session.tokens == tokens(400)[:250].tolist()
    assert np.array_equal(session.decode([7, 8]), after(model, tokens(400)[:250]).decode([7, 8]))
    with pytest.raises(ValueError, match="rewind"):
        session.rewind(253)


def test_a_mark_is_a_place_to_go_back_to(model: SmallThinker) -> None:
    ids = tokens(1000)
    session = after(model, ids[:600])
    assert session.fork().rewindable(0)
    session.mark()
    session.decode(ids[600:])
    assert not session.rewindable(900)
    session.rewind(400)
    expected = after(model, ids[:600]).decode(ids[700:], all_logits=True)
    assert np.array_equal(session.decode(ids[700:], all_logits=True), expected)
    session.rewind(300)  # the mark is still there
    assert np.array_equal(session.decode([3]), after(model, ids[:600]).decode([3]))
    session.reset()
    assert not session._marks


@pytest.mark.parametrize("count", [0, 1, 256, 300, 900])
def test_a_loaded_session_continues_bit_for_bit(model: SmallThinker, count: int, tmp_path: Path) -> None:
    session = model.session()
    if count:
        session.decode(tokens(count))
    session.save(tmp_path / "s")
    loaded = model.load_session(tmp_path / "s")
    assert loaded.tokens == session.tokens
    more = tokens(100, seed=2)
    assert np.array_equal(loaded.decode(more, all_logits=True), session.decode(more, all_logits=True))


def test_a_session_rewound_in_a_full_ring_is_saved_whole(model: SmallThinker, tmp_path: Path) -> None:
    session = after(model, tokens(520))
    session.rewind(200)
    session.save(tmp_path / "s")
    loaded = model.load_session(tmp_path / "s")
    assert np.array_equal(loaded.decode(tokens(50)), session.decode(tokens(50)))


def test_a_session_of_another_model_or_type_is_refused(path: str, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other.gguf", **SHAPE | {"window": 64, "seed": 1})
    with SmallThinker(path, context=300) as model, SmallThinker(other) as stranger:
        after(model, tokens(260)).save(tmp_path / "s")
        with pytest.raises(SessionFormatError, match="another model"):
            stranger.load_session(tmp_path / "s")
        with pytest.raises(SessionFormatError, match="context"):
            model.load_session(tmp_path / "s", context=100)
        with SmallThinker(path, kv="q8_0") as small, pytest.raises(SessionFormatError, match="KV cache"):
            small.load_session(tmp_path / "s")
        with pytest.raises(FileNotFoundError):
            model.load_session(tmp_path / "none")


def test_damaged_files_are_refused_and_change_nothing(path: str, tmp_path: Path) -> None:
    with SmallThinker(path) as model:
        after(model, tokens(300)).save(tmp_path / "good")
        good = (tmp_path / "good").read_bytes()
        session = after(model, tokens(20))
        expected = after(model, tokens(20)).decode([1])
        rng = np.random.default_rng(0)
        for trial in range(300):
            raw = bytearray(good)
            if trial % 3 == 0:
                del raw[rng.integers(0, len(raw)) :]
            else:  # half of the damage in the header
                at = rng.integers(0, HEADER.size if trial % 3 == 1 else len(raw))
                raw[at] ^= 1 << rng.integers(0, 8)
            if trial % 2:  # a checksum that fits does not make it right
                raw[-4:] = zlib.crc32(raw[:-4]).to_bytes(4, "little")
            (tmp_path / "bad").write_bytes(raw)
            if trial % 3 == 2 and trial % 2 and at < len(raw) - 4:
                continue  # other numbers, properly written: nothing to find wrong
            with pytest.raises(SessionFormatError):
                session.load(tmp_path / "bad")
        raw = bytearray(good)
        raw[HEADER.size : HEADER.size + 4] = (512).to_bytes(4, "little")
        raw[-4:] = zlib.crc32(raw[:-4]).to_bytes(4, "little")
        (tmp_path / "bad").write_bytes(raw)
        with pytest.raises(SessionFormatError, match="outside the vocabulary"):
            session.load(tmp_path / "bad")
        assert np.array_equal(session.decode([1]), expected)


def test_saving_keeps_the_old_file_when_it_fails(path: str, tmp_path: Path) -> None:
    with SmallThinker(path) as model, pytest.raises(OSError, match=r"."):
        after(model, tokens(5)).save(tmp_path / "no such folder" / "s")
    assert not list(tmp_path.iterdir())


def test_the_next_turn_computes_only_what_is_new(path: str) -> None:
    with SmallThinker(path, keep_sessions=1) as model, SmallThinker(path, keep_sessions=0) as fresh:
        prompt = tokens(200).tolist()
        first = model.generate(prompt, max_tokens=10)
        assert first.timings.reused_tokens == 0
        following = [*prompt, *first.tokens, 5, 6, 7]
        second = model.generate(following, max_tokens=10)
        assert second.timings.reused_tokens == 209  # the last token of the answer was never decoded
        assert second.tokens == fresh.generate(following, max_tokens=10).tokens
        other = [*prompt[:120], 9, 9]
        third = model.generate(other, max_tokens=10)
        assert third.timings.reused_tokens == 120
        assert third.tokens == fresh.generate(other, max_tokens=10).tokens
        again = model.generate(other, max_tokens=10)
        assert again.timings.reused_tokens == 121
        assert again.tokens == third.tokens
        assert fresh.generate(prompt, max_tokens=1).timings.reused_tokens == 0


def test_a_prefix_that_window_layers_have_lost_is_computed_again(path: str) -> None:
    with SmallThinker(path, context=1024) as model, SmallThinker(path, keep_sessions=0, context=1024) as fresh:
        model.generate(tokens(900).tolist(), max_tokens=2)
        other = [*tokens(900)[:300].tolist(), 4]
        result = model.generate(other, max_tokens=5)
        assert result.timings.reused_tokens == 0
        assert result.tokens == fresh.generate(other, max_tokens=5).tokens


def test_several_conversations_are_kept(path: str) -> None:
    with SmallThinker(path, keep_sessions=2) as model:
        system, a, b = tokens(100).tolist(), [1, 2, 3], [4, 5, 6]
        model.generate(system + a, max_tokens=3)
        assert model.generate(system + b, max_tokens=3).timings.reused_tokens == 100
        assert model.generate([*system, *a, 7], max_tokens=3).timings.reused_tokens == 103
        assert model.generate([*system, *b, 7], max_tokens=3).timings.reused_tokens >= 100


def test_closing_the_model_frees_what_was_kept(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Session] = []
    monkeypatch.setattr("smallthinker_edge.model.Session", lambda *given: made.append(Session(*given)) or made[-1])
    model = SmallThinker(path)
    model.generate([1, 2, 3], max_tokens=2)
    assert made[0].position == 4
    model.close()
    with pytest.raises(ValueError, match="closed"):
        made[0].decode([1])


def test_prefill_is_decoding_without_logits(path: str) -> None:
    ids = tokens(700)
    with SmallThinker(path) as model, model.session() as plain, model.session() as filled:
        expected = [plain.decode(ids), plain.decode([5])]
        filled.prefill(ids[:-1])
        assert filled.position == 699
        assert np.array_equal(filled.decode(ids[-1:]), expected[0])
        assert np.array_equal(filled.decode([5]), expected[1])


def test_a_session_may_have_another_kv_type_than_the_model(path: str, tmp_path: Path) -> None:
    ids = tokens(300)
    with SmallThinker(path, kv="q8_0") as other, SmallThinker(path) as model:
        expected = other.session().decode(ids)
        session = model.session(512, kv="q8_0")
        assert np.array_equal(session.decode(ids), expected)
        session.save(tmp_path / "session")
        assert model.load_session(tmp_path / "session", kv="q8_0").position == 300
        with pytest.raises(ValueError, match="kv must be one of"):
            model.session(kv="q4")


def test_states_are_those_of_every_token_whatever_the_chunks(path: str) -> None:
    ids = tokens(700)  # two chunks of 512
    with SmallThinker(path) as model:
        whole, single = (np.empty((n, model.config.d_model), np.float32) for n in (700, 1))
        model.session().decode(ids, states=whole)
        session = model.session()
        for i in (0, 1, 2):
            session.decode(ids[i : i + 1], states=single)
            assert np.array_equal(single[0], whole[i])
        for bad in (whole, single.astype(np.float64)):
            with pytest.raises(ValueError, match="states must be"):
                session.decode([1], states=bad)
        assert session.position == 3
