"""The GGUF reader: what honest writers produce is read exactly, anything damaged is a ModelFormatError.

Honest files come from the `gguf` package (through gguf_files.write_model) and are compared with its
own reader; dishonest ones are built field by field with gguf_files.RawGGUF or by damaging a good file.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import psutil
import pytest
from gguf_files import (
    RawGGUF,
    flip_bytes,
    overwrite,
    tiny_vocabulary,
    truncate,
    write_model,
    write_split_model,
)

from smallthinker_edge._native.layouts import OTHER_TYPES, TYPES
from smallthinker_edge.errors import ModelFormatError
from smallthinker_edge.files.gguf import GGUFFile, TensorInfo, slices

F32, F16, Q4_0, IQ2_XS = 0, 1, 2, 17
U8, I8, U16, I16, U32, I32, FLOAT32, BOOL, STRING, ARRAY, U64, I64, FLOAT64 = range(13)


def tiny_options() -> dict[str, object]:
    """The smallest model worth damaging: about 2 KB of header."""
    return {"n_layers": 1, "n_experts": 2, "d_model": 32, "d_ffn": 64, "n_heads": 2, "with_tokenizer": False,
            "vocab_size": 32}  # fmt: skip


def refuse(path: str, *, field: str | None = None, match: str | None = None) -> ModelFormatError:
    """Opens a bad file and returns the error, after checking that it names the file and the field."""
    with pytest.raises(ModelFormatError, match=match) as caught:
        GGUFFile(path)
    assert caught.value.path == path
    if field is not None:
        assert caught.value.field == field
    return caught.value


@pytest.mark.parametrize("type_name", TYPES)
def test_tensors_of_every_supported_type_match_the_gguf_package(tmp_path: Path, type_name: str) -> None:
    path = write_model(
        tmp_path / "model.gguf", d_model=256, d_ffn=256, head_dim=64, types=type_name, lm_head_profiler=256,
        n_layers=2, n_experts=2, vocab_size=512,
    )  # fmt: skip
    reference = gguf.GGUFReader(path)
    with GGUFFile(path) as model:
        assert list(model.tensors) == [tensor.name for tensor in reference.tensors]
        for tensor in reference.tensors:
            info = model.tensors[tensor.name]
            assert info == TensorInfo(
                tensor.name, tensor.tensor_type.name, tuple(tensor.shape.tolist()), tensor.data_offset,
                tensor.n_bytes, 0,
            )  # fmt: skip
            assert model.data(tensor.name).tobytes() == tensor.data.tobytes()
        assert model.tensors["blk.0.attn_q.weight"].type == type_name


def test_types_are_those_of_the_gguf_package() -> None:
    for name, info in TYPES.items():
        assert (info.columns, info.bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        assert gguf.GGMLQuantizationType(info.number).name == name
    others = {kind.value: kind.name for kind in gguf.GGMLQuantizationType if kind.name not in TYPES}
    assert not {number: name for number, name in others.items() if OTHER_TYPES.get(number) != name}


def test_metadata_of_every_type_is_read(tmp_path: Path) -> None:
    raw = RawGGUF()
    expected: dict[str, object] = {}
    scalars = [
        ("u8", U8, "B", 250), ("i8", I8, "b", -3), ("u16", U16, "H", 65000), ("i16", I16, "h", -30000),
        ("u32", U32, "I", 4_000_000_000), ("i32", I32, "i", -2_000_000_000), ("f32", FLOAT32, "f", 0.5),
        ("u64", U64, "Q", 2**64 - 1), ("i64", I64, "q", -(2**63)), ("f64", FLOAT64, "d", 1e300),
    ]  # fmt: skip
    for name, kind, code, value in scalars:
        encoded = struct.pack("<" + code, value)
        raw.key(name, kind, encoded)
        raw.key(name + "s", ARRAY, raw.array(kind, [encoded] * 3))
        expected |= {name: value, name + "s": [value] * 3}
    raw.key("yes", BOOL, b"\1").key("flags", ARRAY, raw.array(BOOL, [b"\0", b"\1"]))
    raw.key("text", STRING, raw.string("naïve")).key("none", ARRAY, raw.array(U32, []))
    raw.key("texts", ARRAY, raw.array(STRING, [raw.string("a"), raw.string(""), raw.string("ü")]))
    expected |= {"yes": True, "flags": [False, True], "text": "naïve", "none": [], "texts": ["a", "", "ü"]}
    model = GGUFFile(raw.write(tmp_path / "raw.gguf"))
    assert list(model.metadata) == list(expected)
    for key, value in expected.items():
        assert model.metadata[key] == value, key
    assert type(model.metadata["yes"]) is bool
    assert [type(flag) for flag in model.metadata["flags"]] == [bool, bool]  # type: ignore[attr-defined]


def test_string_arrays_are_sequences_of_str_that_outlive_the_file(tmp_path: Path) -> None:
    with GGUFFile(write_model(tmp_path / "model.gguf")) as model:
        tokens = model.metadata["tokenizer.ggml.tokens"]
    expected = tiny_vocabulary(320)[0]
    assert isinstance(tokens, Sequence)
    assert len(tokens) == 320
    assert list(tokens) == expected
    assert tokens == expected
    assert tokens != expected[:-1]
    assert tokens[-1] == expected[-1]
    assert tokens[5:9] == expected[5:9]
    assert list(reversed(tokens)) == expected[::-1]
    assert expected[7] in tokens
    assert "not a token" not in tokens
    assert tokens.index(expected[300]) == 300
    assert tokens.count(expected[300]) == 1
    for index in (320, -321):
        with pytest.raises(IndexError):
            tokens[index]
    with pytest.raises(TypeError):
        tokens["0"]  # type: ignore[call-overload]


def test_strings_that_are_not_utf8_survive(tmp_path: Path) -> None:
    raw = RawGGUF()
    raw.key("token", STRING, raw.string(b"a\xff\xc3"))
    raw.key("tokens", ARRAY, raw.array(STRING, [raw.string(b"\xe4\xbd"), raw.string("ok")]))
    model = GGUFFile(raw.write(tmp_path / "raw.gguf"))
    assert model.metadata["token"].encode("utf-8", "surrogateescape") == b"a\xff\xc3"  # type: ignore[attr-defined]
    tokens = model.metadata["tokens"]
    assert tokens[0].encode("utf-8", "surrogateescape") == b"\xe4\xbd"  # type: ignore[index]
    assert tokens.raw(0) == b"\xe4\xbd"  # type: ignore[attr-defined]


def test_large_string_array_needs_little_memory(tmp_path: Path) -> None:
    raw = RawGGUF()
    for key in ("tokens", "merges"):
        raw.key(key, ARRAY, raw.array(STRING, [raw.string(f"{key} {i}") for i in range(200_000)]))
    path = raw.write(tmp_path / "big.gguf")
    del raw
    process = psutil.Process()
    before = process.memory_info().rss
    model = GGUFFile(path)
    after = process.memory_info().rss
    assert after - before < 20e6  # two lists of str would take 27 MB
    assert model.metadata["merges"][199_999] == "merges 199999"  # type: ignore[index]


def test_data_outlives_close(tmp_path: Path) -> None:
    model = GGUFFile(write_model(tmp_path / "model.gguf"))
    stored = model.stored("output_norm.weight")
    data = model.data("output_norm.weight")
    assert data.dtype == np.uint8
    assert data.shape == (model.tensors["output_norm.weight"].nbytes,)
    np.testing.assert_array_equal(stored[8:20], data[8:20])
    assert stored[20:8].size == 0
    model.close()
    model.close()
    assert model.closed
    assert data.view(np.float32).std() > 0
    with pytest.raises(ValueError, match="closed"):
        model.data("output_norm.weight")
    with pytest.raises(ValueError, match="closed"):
        stored[:]


def test_unknown_tensor_is_a_key_error(tmp_path: Path) -> None:
    with GGUFFile(write_model(tmp_path / "model.gguf")) as model, pytest.raises(KeyError, match="nothing"):
        model.data("nothing")


def test_nothing_of_a_file_stays_in_memory(tmp_path: Path) -> None:
    raw = RawGGUF().tensor("big", [1 << 24])
    raw.data = bytes(range(256)) * (1 << 18)
    path = raw.write(tmp_path / "big.gguf")
    del raw
    process = psutil.Process()
    with GGUFFile(path) as model:
        start = process.memory_info().rss
        total = sum(int(piece.sum(dtype=np.int64)) for piece in slices(model.stored("big")))
        assert total == 255 * 128 * (1 << 18)
        assert process.memory_info().rss - start < 8e6


def test_a_file_that_is_cut_short_while_open_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf")
    with GGUFFile(path) as model:
        info = model.tensors["blk.3.ffn_down_exps.weight"]
        os.truncate(path, info.offset + 10)
        assert model.stored(info.name)[:10].size == 10
        with pytest.raises(ModelFormatError, match="cut short") as caught:
            model.data(info.name)
    assert (caught.value.path, caught.value.field, caught.value.offset) == (path, info.name, info.offset)


def test_a_pipe_is_no_model_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelFormatError, match="not a regular file"):
        GGUFFile(tmp_path / "pipe.gguf")


def test_alignment_of_the_file_is_used(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", alignment=128)
    with GGUFFile(path) as model:
        assert model.alignment == 128
        reference = {tensor.name: tensor.data_offset for tensor in gguf.GGUFReader(path).tensors}
        assert {name: info.offset for name, info in model.tensors.items()} == reference
        assert all(offset % 128 == 0 for offset in reference.values())


def test_version_2_is_read(tmp_path: Path) -> None:
    good = write_model(tmp_path / "model.gguf")
    path = overwrite(good, 4, struct.pack("<I", 2), tmp_path / "v2.gguf")
    assert GGUFFile(path).tensors == GGUFFile(good).tensors


def test_paths_may_be_path_objects_with_any_name(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"mod\xc3\xa8le \xff.gguf")
    write_model(path)
    model = GGUFFile(path)
    assert model.paths == [os.fspath(path)]


# --- malformed files ---


def test_missing_file_and_directory_are_os_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        GGUFFile(tmp_path / "none.gguf")
    with pytest.raises(IsADirectoryError):
        GGUFFile(tmp_path)


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    refuse(str(pipe), match="regular file")


def test_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    refuse(str(tmp_path / "empty.gguf"), field="header")


def test_bad_magic_is_refused(tmp_path: Path) -> None:
    refuse(RawGGUF(magic=b"GGML").write(tmp_path / "bad.gguf"), field="magic", match="GGML")


@pytest.mark.parametrize("version", [0, 1, 4, 1 << 31])
def test_other_versions_are_refused(tmp_path: Path, version: int) -> None:
    error = refuse(RawGGUF(version=version).write(tmp_path / "bad.gguf"), field="version")
    assert error.offset == 4


def test_big_endian_is_refused_by_name(tmp_path: Path) -> None:
    path = RawGGUF(version=3 << 24).write(tmp_path / "bad.gguf")
    refuse(path, field="version", match="big-endian")


@pytest.mark.parametrize("count", [1 << 20, 1 << 63, 2**64 - 1])
def test_counts_larger_than_the_file_are_refused(tmp_path: Path, count: int) -> None:
    raw = RawGGUF().u32("key", 1)
    raw.n_keys = count
    refuse(raw.write(tmp_path / "keys.gguf"), field="metadata count", match=str(count))
    raw.n_keys, raw.n_tensors = None, count
    refuse(raw.write(tmp_path / "tensors.gguf"), field="tensor count", match=str(count))


@pytest.mark.parametrize("length", [100, 1 << 40, 2**64 - 1, 2**64 - 8])
def test_string_lengths_past_the_end_are_refused(tmp_path: Path, length: int) -> None:
    raw = RawGGUF()
    raw.key("text", STRING, raw.string("abc", length))
    error = refuse(raw.write(tmp_path / "text.gguf"), field="text")
    assert error.offset == 24 + 8 + 4 + 4
    raw = RawGGUF()
    raw.key("texts", ARRAY, raw.array(STRING, [raw.string("ok"), raw.string("abc", length)]))
    error = refuse(raw.write(tmp_path / "texts.gguf"), field="texts")
    assert error.offset == 24 + 8 + 5 + 4 + 12 + 10


@pytest.mark.parametrize("kind", [U8, BOOL, STRING, FLOAT64])
@pytest.mark.parametrize("count", [1000, 1 << 61, 2**64 - 1])
def test_array_counts_larger_than_the_file_are_refused(tmp_path: Path, kind: int, count: int) -> None:
    raw = RawGGUF()
    raw.key("list", ARRAY, raw.array(kind, [], count))
    refuse(raw.write(tmp_path / "bad.gguf"), field="list", match="larger than the file")


def test_huge_arrays_are_refused_even_when_the_file_holds_them(tmp_path: Path) -> None:
    raw = RawGGUF()
    raw.key("list", ARRAY, raw.array(U8, [bytes((1 << 24) + 1)], (1 << 24) + 1))
    refuse(raw.write(tmp_path / "bad.gguf"), field="list", match="at most")


def test_unknown_value_types_are_refused(tmp_path: Path) -> None:
    raw = RawGGUF().key("odd", 13, bytes(8))
    refuse(raw.write(tmp_path / "scalar.gguf"), field="odd", match="13")
    raw = RawGGUF().key("odd", ARRAY, RawGGUF.array(77, [bytes(8)]))
    refuse(raw.write(tmp_path / "array.gguf"), field="odd", match="77")


def test_nested_arrays_are_refused(tmp_path: Path) -> None:
    inner = RawGGUF.array(U8, [b"\0"])
    raw = RawGGUF().key("nested", ARRAY, RawGGUF.array(ARRAY, [inner]))
    refuse(raw.write(tmp_path / "bad.gguf"), field="nested", match="arrays of arrays")


def test_bools_other_than_0_and_1_are_refused(tmp_path: Path) -> None:
    refuse(RawGGUF().key("flag", BOOL, b"\2").write(tmp_path / "one.gguf"), field="flag")
    raw = RawGGUF().key("flags", ARRAY, RawGGUF.array(BOOL, [b"\1", b"\7"]))
    error = refuse(raw.write(tmp_path / "many.gguf"), field="flags", match="element 1")
    assert error.offset == 24 + 8 + 5 + 4 + 12 + 1


def test_duplicate_keys_are_refused(tmp_path: Path) -> None:
    refuse(RawGGUF().u32("key", 1).u32("key", 1).write(tmp_path / "bad.gguf"), field="key", match="twice")


@pytest.mark.parametrize("name", [b"", b"a" * 65536, b"\xff\xfe"])
def test_bad_key_names_are_refused(tmp_path: Path, name: bytes) -> None:
    refuse(RawGGUF().key(name, U8, b"\0").write(tmp_path / "bad.gguf"), field="metadata key 0")


def test_duplicate_tensor_names_are_refused(tmp_path: Path) -> None:
    raw = RawGGUF().tensor("same", [8]).tensor("same", [8], offset=32)
    raw.data = bytes(64)
    refuse(raw.write(tmp_path / "bad.gguf"), field="same", match="two tensors")


@pytest.mark.parametrize("n_dims", [0, 5, 2**32 - 1])
def test_bad_numbers_of_dimensions_are_refused(tmp_path: Path, n_dims: int) -> None:
    raw = RawGGUF().tensor("t", [8] * min(n_dims, 5), n_dims=n_dims)
    refuse(raw.write(tmp_path / "bad.gguf"), field="t", match="dimensions")


@pytest.mark.parametrize("shape", [(0,), (32, 0), (1 << 63, 4), (1 << 31, 1 << 31, 1 << 31), (2**64 - 32, 1)])
def test_zero_and_overflowing_dimensions_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    refuse(RawGGUF().tensor("t", shape).write(tmp_path / "bad.gguf"), field="t", match="dimension")


def test_byte_sizes_that_overflow_are_refused(tmp_path: Path) -> None:
    refuse(RawGGUF().tensor("t", (1 << 62,)).write(tmp_path / "bad.gguf"), field="t", match="overflow")


def test_unsupported_tensor_types_are_refused_by_name(tmp_path: Path) -> None:
    path = RawGGUF().tensor("t", (256,), IQ2_XS).write(tmp_path / "known.gguf")
    error = refuse(path, field="t", match="IQ2_XS")
    assert all(name in str(error) for name in TYPES)
    refuse(RawGGUF().tensor("t", (256,), 999).write(tmp_path / "odd.gguf"), field="t", match="999")


def test_rows_that_are_not_whole_blocks_are_refused(tmp_path: Path) -> None:
    raw = RawGGUF().tensor("t", (48, 2), Q4_0)
    raw.data = bytes(1024)
    refuse(raw.write(tmp_path / "bad.gguf"), field="t", match="blocks of 32")


def test_misaligned_data_is_refused(tmp_path: Path) -> None:
    raw = RawGGUF().tensor("t", (8,), offset=16)
    raw.data = bytes(64)
    refuse(raw.write(tmp_path / "bad.gguf"), field="t", match="multiple of 32")


@pytest.mark.parametrize("alignment", [0, 1, 24, 33, 1 << 21, 2**32 - 1])
def test_bad_alignments_are_refused(tmp_path: Path, alignment: int) -> None:
    raw = RawGGUF().u32("general.alignment", alignment)
    refuse(raw.write(tmp_path / "bad.gguf"), field="general.alignment")


def test_alignment_of_the_wrong_type_is_refused(tmp_path: Path) -> None:
    raw = RawGGUF().key("general.alignment", STRING, RawGGUF.string("32"))
    refuse(raw.write(tmp_path / "bad.gguf"), field="general.alignment")


@pytest.mark.parametrize("offset", [0, 64, 1 << 40, 2**64 - 32])
def test_data_past_the_end_is_refused(tmp_path: Path, offset: int) -> None:
    raw = RawGGUF().tensor("t", (17,), offset=offset)
    raw.data = bytes(64)
    refuse(raw.write(tmp_path / "bad.gguf"), field="t", match="cut short")


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    raw = RawGGUF().tensor("late", (8,), offset=32).tensor("early", (16,), offset=0)
    raw.data = bytes(64)
    refuse(raw.write(tmp_path / "bad.gguf"), field="late", match="overlaps that of early")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", **tiny_options())
    size = os.path.getsize(path)
    first_data = min(info.offset for info in GGUFFile(path).tensors.values())
    last = max(info.offset + info.nbytes for info in GGUFFile(path).tensors.values())
    cut = tmp_path / "cut.gguf"
    for length in [*range(first_data + 64), *range(first_data + 64, min(last, size), 97), last - 1]:
        truncate(path, length, cut)
        with pytest.raises(ModelFormatError):
            GGUFFile(cut)


def test_random_damage_never_does_worse_than_an_error(tmp_path: Path) -> None:
    """A damaged header leaves a readable file, every tensor in bounds, or is a ModelFormatError."""
    path = write_model(tmp_path / "model.gguf", **tiny_options())
    header = min(info.offset for info in GGUFFile(path).tensors.values())
    damaged = tmp_path / "damaged.gguf"
    outcomes = {True: 0, False: 0}
    for seed in range(1500):
        flip_bytes(path, 1 + seed % 4, seed, damaged, limit=header)
        try:
            with GGUFFile(damaged) as model:
                for name, info in model.tensors.items():
                    assert model.data(name).nbytes == info.nbytes
                list(map(repr, model.metadata.values()))
            outcomes[True] += 1
        except ModelFormatError as error:
            assert error.path == str(damaged)
            outcomes[False] += 1
    assert min(outcomes.values()) > 50


# --- split files ---


def test_split_model_reads_as_the_whole_one_from_any_part(tmp_path: Path) -> None:
    whole = GGUFFile(write_model(tmp_path / "whole.gguf"))
    parts = write_split_model(tmp_path / "split.gguf")
    assert len(parts) == 4
    for part in parts:
        model = GGUFFile(part)
        assert model.paths == parts
        assert list(model.tensors) == list(whole.tensors)
        assert {info.part for info in model.tensors.values()} == {0, 1, 2, 3}
        assert model.metadata["smallthinker.block_count"] == 4
        for name in whole.tensors:
            np.testing.assert_array_equal(model.data(name), whole.data(name))


def test_missing_part_is_refused_by_name(tmp_path: Path) -> None:
    parts = write_split_model(tmp_path / "split.gguf")
    os.unlink(parts[2])
    with pytest.raises(ModelFormatError, match="part 3 of 4 is missing") as caught:
        GGUFFile(parts[0])
    assert caught.value.path == parts[2]


def test_parts_in_the_wrong_order_are_refused(tmp_path: Path) -> None:
    parts = write_split_model(tmp_path / "split.gguf")
    os.rename(parts[1], tmp_path / "aside")
    os.rename(parts[2], parts[1])
    os.rename(tmp_path / "aside", parts[2])
    with pytest.raises(ModelFormatError, match="wrong order") as caught:
        GGUFFile(parts[0])
    assert caught.value.field == "split.no"
    assert caught.value.path == parts[1]


def test_renamed_part_is_refused(tmp_path: Path) -> None:
    parts = write_split_model(tmp_path / "split.gguf")
    renamed = tmp_path / "model.gguf"
    os.rename(parts[0], renamed)
    refuse(str(renamed), field="split.count", match="keep its name")


def test_parts_of_different_splits_are_refused(tmp_path: Path) -> None:
    parts = write_split_model(tmp_path / "split.gguf")
    whole = Path(write_model(tmp_path / "whole.gguf"))
    os.replace(whole, parts[3])
    with pytest.raises(ModelFormatError) as caught:
        GGUFFile(parts[0])
    assert (caught.value.path, caught.value.field) == (parts[3], "split.count")


def split_part(number: int, count: int, name: str, announced: int | None = None) -> RawGGUF:
    raw = RawGGUF().u32("split.no", number).u32("split.count", count)
    if announced is not None:
        raw.u32("split.tensors.count", announced)
    raw.tensor(name, (8,))
    raw.data = bytes(32)
    return raw


def test_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    first = split_part(0, 2, "same").write(tmp_path / "m-00001-of-00002.gguf")
    second = split_part(1, 2, "same").write(tmp_path / "m-00002-of-00002.gguf")
    with pytest.raises(ModelFormatError, match="also in") as caught:
        GGUFFile(first)
    assert (caught.value.path, caught.value.field) == (second, "same")


def test_announced_number_of_tensors_must_be_there(tmp_path: Path) -> None:
    first = split_part(0, 2, "a", 3).write(tmp_path / "m-00001-of-00002.gguf")
    split_part(1, 2, "b").write(tmp_path / "m-00002-of-00002.gguf")
    refuse(first, field="split.tensors.count", match="3 were announced")


def test_split_key_of_the_wrong_type_is_refused(tmp_path: Path) -> None:
    raw = RawGGUF().key("split.count", STRING, RawGGUF.string("2"))
    refuse(raw.write(tmp_path / "bad.gguf"), field="split.count")
