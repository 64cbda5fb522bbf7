"""Packed files: a pure permutation, the same logits at every budget, and damage that is noticed."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import replay
from gguf_files import write_model, write_split_model

from smallthinker_edge import ExpertReadError, MemoryBudgetError, ModelFormatError, SmallThinker
from smallthinker_edge._native.paging import ExpertPaging
from smallthinker_edge.files import packed
from smallthinker_edge.files.gguf import GGUFFile
from smallthinker_edge.files.pack import pack, unpack
from smallthinker_edge.files.packed import PackedFile
from smallthinker_edge.machine.memory import process_memory
from smallthinker_edge.measure.trace import traced
from smallthinker_edge.model import stall_share
from smallthinker_edge.plan import make_plan

SHAPE: dict[str, Any] = {"n_layers": 4, "d_model": 256, "head_dim": 32, "n_experts": 16, "n_experts_used": 2,
                         "d_ffn": 128, "window": 64, "context_length": 1024}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 300, 200)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("packed") / "model.gguf", **SHAPE)


@pytest.fixture(scope="module")
def stpk(gguf: str) -> str:
    target = gguf.replace(".gguf", ".stpk")
    pack(gguf, target)
    return target


@pytest.mark.parametrize("options", [{}, {"types": "Q8_0"}, {"down_transposed": True}, {"d_model": 160, "head_dim": 16},
                                     {"types": "F16", "tied": False},
                                     *({"types": {"gate": up, "up": up, "down": down}, "d_model": 256, "d_ffn": 256}
                                       for up, down in (("Q4_K", "Q4_K"), ("Q4_K", "Q6_K"), ("Q5_K", "Q5_K"),
                                                        ("Q5_K", "Q6_K"), ("Q6_K", "Q6_K"), ("Q4_0", "Q5_K"),
                                                        ("Q4_K", "Q8_0")))])  # fmt: skip
def test_unpacking_gives_the_source_back(tmp_path: Path, options: dict[str, Any]) -> None:
    source, target = write_model(tmp_path / "m.gguf", **SHAPE | options), tmp_path / "m.stpk"
    pack(source, target)
    with GGUFFile(source) as file:
        for layer in range(4):
            for got, info in zip(packed.unpack_layer(target, layer), packed.expert_infos(file, layer), strict=True):
                assert got.tobytes() == file.data(info.name).tobytes()
        with GGUFFile(target) as container:
            dense = [name for name in file.tensors if "_exps" not in name]
            assert all(container.data(name).tobytes() == file.data(name).tobytes() for name in dense)
            assert list(PackedFile(container).tensors.values()) == list(file.tensors.values())
    packed.verify(target)
    unpack(target, tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == Path(source).read_bytes()
    assert np.array_equal(*(SmallThinker(path).session().decode(TOKENS, True) for path in (source, target)))


def set_slots(monkeypatch: pytest.MonkeyPatch, slots: int, **paging: Any) -> None:
    """Opens packed files with that many slots, and other options of ExpertPaging where given."""
    monkeypatch.setattr(
        "smallthinker_edge.opening.make_plan", lambda *a, **options: replace(make_plan(*a, **options), slots=slots)
    )

    def with_options(*arguments: Any, **options: Any) -> ExpertPaging:
        return ExpertPaging(*arguments, **options | {"sessions": None} | paging)

    monkeypatch.setattr("smallthinker_edge.opening.ExpertPaging", with_options)


def read_when_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps experts from being read at the opening, as they are where all have room."""
    monkeypatch.setattr("smallthinker_edge.opening.warm_up", lambda *_: None)


def test_files_of_an_earlier_layout_are_refused(tmp_path: Path, stpk: str) -> None:
    target = tmp_path / "m.stpk"
    assert b"tile16-6" in Path(stpk).read_bytes()
    target.write_bytes(Path(stpk).read_bytes().replace(b"tile16-6", b"tile16-2"))
    for open_ in (SmallThinker, packed.verify, lambda path: unpack(path, tmp_path / "back.gguf")):
        with pytest.raises(ModelFormatError, match=r"stpk\.layout.*tile16-2.*: pack the model again"):
            open_(target)
    assert not (tmp_path / "back.gguf").exists()


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize(("slots", "io_threads"), [(16, 1), (20, 2), (40, 4), (64, 1)])
def test_logits_do_not_depend_on_slots_and_reading_ahead(
    gguf: str, stpk: str, slots: int, io_threads: int, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_logits_at_slots(gguf, stpk, slots, io_threads, ahead, monkeypatch)


def test_logits_do_not_depend_on_slots_where_down_is_transposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = write_model(tmp_path / "m.gguf", **SHAPE | {"down_transposed": True}), tmp_path / "m.stpk"
    pack(source, target)
    check_logits_at_slots(source, str(target), 16, 2, 1, monkeypatch)


def check_logits_at_slots(
    gguf: str, stpk: str, slots: int, io_threads: int, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SmallThinker(gguf) as model:
        expected = model.session().decode(TOKENS, all_logits=True)
    set_slots(monkeypatch, slots, ahead=ahead, io_threads=io_threads, piece=4096, give_way_ns=0)
    read_when_wanted(monkeypatch)
    with SmallThinker(stpk, threads=2) as model:
        with model.session() as session:
            got = np.stack([session.decode(TOKENS[i : i + 1]) for i in range(100)])
            got = np.concatenate([got, session.decode(TOKENS[100:], all_logits=True)])
        stats = model.stats()
    assert np.array_equal(got, expected)
    assert stats["read_bytes"] >= stats["misses"] * model.plan.slot_bytes
    assert (stats["evictions"] > 0) == (slots < 64)
    assert (stats["prediction_accuracy"] > 0) == (stats["ahead_reads"] > 0) == (ahead > 0)


@pytest.mark.parametrize("slots", [18, 24, 40])
def test_experts_go_as_the_replay_of_their_trace_says(stpk: str, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_slots(monkeypatch, slots, ahead=0)
    read_when_wanted(monkeypatch)
    tokens = np.random.default_rng(5).integers(0, 250, 400).tolist()
    with SmallThinker(stpk, threads=1) as model:
        with model.recording() as chunks, model.session() as session:
            for token in tokens:
                session.decode([token])
        trace, hits = traced(model, chunks), model.stats()["hits"]
    expected = replay.hit_rate("forecast", trace, slots) * trace.routing.size
    assert hits == pytest.approx(expected, rel=0.01)  # which of two equal ones goes is open


def test_memory_of_an_empty_kv_cache_holds_experts_until_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = write_model(tmp_path / "m.gguf", **SHAPE | {"window": None}), tmp_path / "m.stpk"
    pack(source, target)
    tokens = np.resize(TOKENS, 1000)
    with SmallThinker(source) as model:
        expected = model.session().decode(tokens)
        block = model.plan.kv_cache // 4  # a context of 1024 is four blocks of 256 positions
    held = 2 * 4 * 1024 + 4 * 300  # what two sessions remember of their tokens, and a row of logits
    set_slots(monkeypatch, 20, sessions=4 * block + held + (2 << 20), lend=True)
    with SmallThinker(target) as model:
        seen = [model.stats()["slots"]]
        with model.session() as session:
            for i, token in enumerate(tokens):
                logits = session.decode([token])
                if i % 256 == 128:
                    seen.append(model.stats()["slots"])
        assert np.array_equal(logits, expected)
        model.session().decode([1])
        seen.append(model.stats()["slots"])
    assert seen == [20 + left * block // model.plan.slot_bytes for left in (4, 3, 2, 1, 0, 3)]


def test_what_the_kv_cache_takes_back_is_given_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"window": None, "d_ffn": 1024, "head_dim": 128, "context_length": 4096}  # 1 MiB for 256 positions
    source, target = write_model(tmp_path / "m.gguf", **SHAPE | shape), tmp_path / "m.stpk"
    pack(source, target)
    set_slots(monkeypatch, 20, sessions=18 << 20, lend=True)
    with SmallThinker(target) as model, model.session() as session:
        session.decode(np.resize(TOKENS, 256))
        before = process_memory()["rss_bytes"]
        slots = int(str(model.stats()["slots"]))
        session.decode(np.resize(TOKENS, 15 * 256))
        after = process_memory()["rss_bytes"]
        returned = (slots - int(str(model.stats()["slots"]))) * model.plan.slot_bytes
        assert session.kv_bytes == 16 << 20
        assert returned > 14 << 20
    assert after - before < 6 << 20  # 15 MiB more of keys and values, and as much less of experts


def resident_pages(path: str | os.PathLike[str], offset: int, nbytes: int) -> int:
    """How many of a file's pages are in the system's cache."""
    size = os.path.getsize(path)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapping:
        states = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), states) == 0
    return sum(state & 1 for state in states[offset // mmap.PAGESIZE + 1 : (offset + nbytes) // mmap.PAGESIZE])


@pytest.mark.skipif(sys.platform != "linux", reason="mincore and posix_fadvise as Linux has them")
def test_rows_of_an_untied_embedding_do_not_pile_up_in_the_page_cache(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m.gguf", **SHAPE | {"tied": False, "vocab_size": 8000, "types": "Q8_0"})
    target = tmp_path / "m.stpk"
    pack(source, target)  # to the disk, too: pages that are not written yet cannot be dropped
    with GGUFFile(target) as file:
        info = file.tensors["token_embd.weight"]
        place = target, info.offset, info.nbytes
        file.forget("token_embd.weight")
        if resident_pages(*place):
            pytest.skip("this file system drops nothing from the cache")
    with SmallThinker(target) as model, model.session() as session:
        session.decode(np.arange(0, 8000, 8)[:1000])
        assert resident_pages(*place) > 100
        session.reset()
        session.decode(np.arange(24))
        assert resident_pages(*place) == 0


def test_a_budget_is_divided_into_slots(stpk: str) -> None:
    with pytest.raises(MemoryBudgetError) as caught:
        SmallThinker(stpk, memory=1)
    needed = int(str(caught.value).split("needs ")[1].split(" ")[0])
    memory = needed + (4 << 20)  # what the process itself takes changes a little between two calls
    with SmallThinker(stpk, memory=memory) as model:
        assert model.plan.slots >= 16
        assert model.plan.total <= memory


def test_experts_that_all_have_room_are_read_at_the_opening(stpk: str) -> None:
    with SmallThinker(stpk) as model, model.session() as session:
        everything = model.plan.slots * model.plan.slot_bytes
        wait_until(lambda: model.stats()["read_bytes"] == everything)
        session.decode(TOKENS)
        stats = model.stats()
    assert (stats["read_bytes"], stats["misses"], stats["ahead_reads"]) == (everything, 0, 0)


def test_a_read_error_is_an_exception_and_the_session_goes_on(
    gguf: str, stpk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_when_wanted(monkeypatch)
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


def test_a_read_error_in_the_middle_of_a_chat_costs_one_step(
    gguf: str, stpk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_when_wanted(monkeypatch)
    broken = tmp_path / "broken.stpk"
    whole = Path(stpk).read_bytes()
    broken.write_bytes(whole)
    with SmallThinker(gguf) as model, model.session() as session:
        expected = [session.decode([token]) for token in TOKENS]
    with SmallThinker(broken) as model, model.session() as session:
        failed = 0
        for i, token in enumerate(TOKENS):
            if i == 10:  # most experts have not been read by now
                os.truncate(broken, 4096)
            try:
                logits = session.decode([token])
            except ExpertReadError:
                failed += 1
                assert session.position == i
                broken.write_bytes(whole)
                logits = session.decode([token])
            assert np.array_equal(logits, expected[i])
        assert failed == 1


def test_verify_finds_a_flipped_bit(stpk: str, tmp_path: Path) -> None:
    damaged = bytearray(Path(stpk).read_bytes())
    with GGUFFile(stpk) as file:
        info = file.tensors[packed.blob_name(2)]
    damaged[info.offset + 3 * (info.nbytes // 16) + 100] ^= 4
    copy = tmp_path / "damaged.stpk"
    copy.write_bytes(damaged)
    with pytest.raises(ModelFormatError, match="expert 3 of layer 2"):
        packed.verify(copy)


def test_a_damaged_expert_met_while_warming_up_is_read_once(stpk: str, tmp_path: Path) -> None:
    """All experts are read at the opening. The others stay usable, and who needs it tries again."""
    whole = bytearray(Path(stpk).read_bytes())
    with GGUFFile(stpk) as file:
        whole[file.tensors[packed.blob_name(2)].offset + 100] ^= 4
    copy = tmp_path / "damaged.stpk"
    copy.write_bytes(whole)
    with SmallThinker(copy, verify=True) as model:
        experts = model.config.n_layers * model.config.n_experts
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and model.stats()["misses"] == 0:  # until what could be read is there
            time.sleep(0.01)
            if int(str(model.stats()["read_bytes"])) >= experts * model.plan.slot_bytes:
                break
        time.sleep(0.2)
        assert model.stats()["read_errors"] == 1
        with pytest.raises(ExpertReadError), model.session() as session:
            session.decode(TOKENS)
        assert model.stats()["read_errors"] == 2


def test_verify_while_running_refuses_damaged_weights_when_they_are_read(
    gguf: str, stpk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SmallThinker(gguf) as model:
        expected = model.session().decode(TOKENS)
    set_slots(monkeypatch, 20)
    with SmallThinker(stpk, verify=True) as model:
        assert np.array_equal(model.session().decode(TOKENS), expected)
    whole = bytearray(Path(stpk).read_bytes())
    copy = tmp_path / "damaged.stpk"
    with GGUFFile(stpk) as file:
        expert, dense = file.tensors[packed.blob_name(2)].offset + 100, file.tensors["blk.1.attn_q.weight"].offset
    whole[expert] ^= 4
    copy.write_bytes(whole)
    with SmallThinker(copy, verify=True) as model, model.session() as session:
        with pytest.raises(ExpertReadError, match="damaged"):
            session.decode(TOKENS)
        assert session.position == 0
    whole[dense] ^= 4
    copy.write_bytes(whole)
    with pytest.raises(ModelFormatError, match="attn_q"):
        SmallThinker(copy, verify=True)


def test_a_failed_pack_leaves_nothing_behind(gguf: str, tmp_path: Path) -> None:
    target = tmp_path / "m.stpk"

    def fail(done: int, total: int) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        pack(gguf, target, fail)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_pack_is_started_again(gguf: str, stpk: str, tmp_path: Path) -> None:
    target = tmp_path / "m.stpk"
    wait = "lambda done, total: (print(done, flush=True), time.sleep(60)) if done == 20 else None"
    code = f"import sys, time; from smallthinker_edge.files.pack import pack; pack(*sys.argv[1:], {wait})"
    with subprocess.Popen([sys.executable, "-c", code, gguf, target], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "20\n"
        process.send_signal(signal.SIGKILL)
    assert not target.exists()
    pack(gguf, target)
    assert target.read_bytes() == Path(stpk).read_bytes()
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_a_full_disk_leaves_nothing_behind(gguf: str, stpk: str, tmp_path: Path, command: str) -> None:
    source, target = (gguf, tmp_path / "m.stpk") if command == "pack" else (stpk, tmp_path / "m.gguf")
    room = os.path.getsize(source) // 2
    run = subprocess.run(
        [sys.executable, "-m", "smallthinker_edge", command, source, "-o", target],
        capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_packed_file_is_not_unpacked(stpk: str, tmp_path: Path) -> None:
    damaged = bytearray(Path(stpk).read_bytes())
    damaged[-5000] ^= 4
    (tmp_path / "damaged.stpk").write_bytes(damaged)
    with pytest.raises(ModelFormatError, match="does not give its source back"):
        unpack(tmp_path / "damaged.stpk", tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("name", ["back.gguf", "back", "back-00001-of-{count:05d}.gguf"])
def test_what_was_packed_from_a_split_model_gives_the_same_parts(tmp_path: Path, name: str) -> None:
    parts, target = write_split_model(tmp_path / "split.gguf", **SHAPE), tmp_path / "m.stpk"
    pack(parts[1], target)
    assert np.array_equal(*(SmallThinker(path).session().decode(TOKENS) for path in (parts[0], target)))
    folder = tmp_path / "back"
    folder.mkdir()
    written = unpack(target, folder / name.format(count=len(parts)))
    assert written == [str(folder / Path(part).name.replace("split", "back")) for part in parts]
    assert sorted(folder.iterdir()) == sorted(Path(path) for path in written)
    for part, back in zip(parts, written, strict=True):
        assert Path(back).read_bytes() == Path(part).read_bytes()


def test_a_split_model_whose_tensors_begin_in_its_second_part(tmp_path: Path) -> None:
    parts = write_split_model(tmp_path / "m.gguf", tensors_per_part=20, small_first=True, **SHAPE)
    target = tmp_path / "m.stpk"
    with GGUFFile(parts[0]) as file:
        assert len(parts) > 2
        assert all(info.part > 0 for info in file.tensors.values())
    pack(parts[0], target)
    written = unpack(target, tmp_path / "back.gguf")
    assert [Path(back).read_bytes() for back in written] == [Path(part).read_bytes() for part in parts]


def test_a_damaged_split_model_leaves_no_part_behind(tmp_path: Path) -> None:
    parts, target = write_split_model(tmp_path / "split.gguf", **SHAPE), tmp_path / "m.stpk"
    pack(parts[0], target)
    damaged = bytearray(target.read_bytes())
    damaged[-5000] ^= 4
    target.write_bytes(damaged)
    with pytest.raises(ModelFormatError, match="does not give its source back"):
        unpack(target, tmp_path / "back.gguf")
    assert not list(tmp_path.glob("back*"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("part_of", [9] * 42), ("part_of", [0]), ("part_of", ["0"]), ("parts", []), ("parts", 3), ("parts", [{}])],
)
def test_a_damaged_list_of_parts_is_an_error(tmp_path: Path, key: str, value: object) -> None:
    parts, target = write_split_model(tmp_path / "split.gguf", **SHAPE), tmp_path / "m.stpk"
    pack(parts[0], target)
    with GGUFFile(target) as file:
        layout = str(file.metadata["stpk.source_layout"])
    assert len(json.loads(layout)["part_of"]) == 42
    changed = json.dumps(json.loads(layout) | {key: value})
    assert len(changed) <= len(layout)
    target.write_bytes(target.read_bytes().replace(layout.encode(), changed.ljust(len(layout)).encode()))
    with pytest.raises(ModelFormatError, match=r"stpk\.source_layout"):
        unpack(target, tmp_path / "back.gguf")


@pytest.mark.parametrize(
    ("decode", "stall", "disk", "tail", "share"),
    [
        (10, 0, 3, 0, 0.0),  # nothing waited: computing took it all
        (10, 8, 6, 0, 0.4),  # two threads waited 4 s each: 6 s of computing and 6 s of reading fit into 6 s
        (10, 8, 9, 0, 0.1),  # the disk was busy nine tenths of the time: only a tenth could be hidden
        (10, 4, 1, 0, 0.2),
        (10, 8, 6, 2, 0.2),  # 2 of the 6 s of computing come after all reading: 6 s of reading beside 4, then 2
        (10, 8, 3, 2, 0.4),  # reading fits beside the other 4
        (10, 8, 8, 2, 0.0),  # the disk was busy whenever it could be
        (0, 0, 0, 0, 0.0),
    ],
)
def test_stall_share_is_what_a_perfect_overlap_would_save(
    decode: int, stall: int, disk: int, tail: int, share: float
) -> None:
    assert stall_share(decode, stall, disk, 2, tail) == pytest.approx(share)


def test_the_share_within_tokens_leaves_out_what_follows_a_tokens_last_expert(
    stpk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_slots(monkeypatch, 20)
    with SmallThinker(stpk, threads=2) as model, model.session() as session:
        for token in TOKENS:
            session.decode([token])
        stats = model.stats()
    decode, stall, disk, tail = (float(str(stats[f"{n}_seconds"])) for n in ("decode", "stall", "disk", "tail"))
    assert 0 < tail <= decode
    assert stats["stall_share_within_tokens"] == stall_share(decode, stall, disk, 2, tail)
    assert float(str(stats["stall_share_within_tokens"])) <= float(str(stats["stall_share"]))


def test_packing_twice_is_refused(stpk: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="already"):
        pack(stpk, tmp_path / "again.stpk")


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


def test_two_sessions_in_two_threads_share_the_slots(gguf: str, stpk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    halves = TOKENS[:100], TOKENS[100:]
    with SmallThinker(gguf) as model:
        expected = [model.session().decode(half) for half in halves]
    set_slots(monkeypatch, 18)
    got: dict[int, np.ndarray] = {}
    with SmallThinker(stpk, threads=2) as model:

        def work(i: int) -> None:
            with model.session() as session:
                for token in halves[i]:
                    got[i] = session.decode([token])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert np.array_equal(got[0], expected[0])
    assert np.array_equal(got[1], expected[1])


def test_a_profile_warms_the_next_start(stpk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_slots(monkeypatch, 24)
    path = tmp_path / "m.stpk"
    path.write_bytes(Path(stpk).read_bytes())
    with SmallThinker(path) as model:
        model.session().decode(TOKENS)
        expected = model.session().decode(TOKENS[:50])
        assert model.save_profile() == f"{path}.hot"
    with SmallThinker(path) as model:
        wait_until(lambda: model.stats()["read_bytes"] == 24 * model.plan.slot_bytes)
        assert np.array_equal(model.session().decode(TOKENS[:50]), expected)
        assert model.stats()["ahead_hits"]
    for damage in ("", "{}", '{"format": "smallthinker-hot-experts-1", "uses": [1e999]}', "\xff"):
        Path(f"{path}.hot").write_text(damage, encoding="latin-1")
        with SmallThinker(path) as model:
            assert np.array_equal(model.session().decode(TOKENS[:50]), expected)


def wait_until(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
