"""Checkpoint folders as they come: shards, stray files, hostile headers, tokenizers and chat templates."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import VOCAB, D, write_checkpoint
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from smallthinker_edge import ModelFormatError, SmallThinker
from smallthinker_edge.files.atomic import atomic_file
from smallthinker_edge.files.checkpoint import Checkpoint, read_header
from smallthinker_edge.files.checkpoint_tokenizer import chat_templates, read_vocabulary, special_ids
from smallthinker_edge.files.convert import convert
from smallthinker_edge.files.gguf import GGUFFile

INDEX = "model.safetensors.index.json"


def refused(folder: Path, target: Path) -> ModelFormatError:
    with pytest.raises(ModelFormatError) as caught:
        convert(folder, target)
    assert not target.exists()
    return caught.value


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text()) if path.exists() else {}
    change(data)
    path.write_text(json.dumps(data))


# Files of a folder


def test_shards_without_an_index_are_found(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "one")
    write_checkpoint(tmp_path / "hf", shards=3)
    (tmp_path / "hf" / INDEX).unlink()
    convert(tmp_path / "one", tmp_path / "one.gguf")
    convert(tmp_path / "hf", tmp_path / "shards.gguf")
    with GGUFFile(tmp_path / "one.gguf") as one, GGUFFile(tmp_path / "shards.gguf") as shards:
        assert one.tensors.keys() == shards.tensors.keys()
        assert all(np.array_equal(one.data(name), shards.data(name)) for name in one.tensors)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", shards=3)
    (tmp_path / "hf" / "model-00002-of-00003.safetensors").unlink()
    error = refused(tmp_path / "hf", tmp_path / "m.gguf")
    assert "model-00002-of-00003.safetensors" in str(error)
    (tmp_path / "hf" / INDEX).unlink()
    assert "number 2 of 3" in str(refused(tmp_path / "hf", tmp_path / "m.gguf"))


def test_files_of_others_are_left_alone_and_told(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", shards=2)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "adapter.safetensors", "notes.txt"):
        (tmp_path / "hf" / name).write_bytes(b"nothing that anybody should read")
    with pytest.warns(UserWarning, match="adapter.safetensors, consolidated.safetensors, pytorch_model.bin$"):
        convert(tmp_path / "hf", tmp_path / "m.gguf")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    assert "no model.safetensors" in str(refused(tmp_path / "hf", tmp_path / "m.gguf"))


def test_two_sets_of_weights_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", shards=2)
    shard = tmp_path / "hf" / "model-00001-of-00002.safetensors"
    shutil.copy(shard, tmp_path / "hf" / "model.safetensors")
    assert refused(tmp_path / "hf", tmp_path / "m.gguf").field == "model.safetensors"
    (tmp_path / "hf" / "model.safetensors").unlink()
    shutil.copy(shard, tmp_path / "hf" / "model-00001-of-00003.safetensors")
    (tmp_path / "hf" / INDEX).unlink()
    assert "more than one set" in str(refused(tmp_path / "hf", tmp_path / "m.gguf"))


def test_a_tensor_in_two_shards_is_refused_by_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", shards=2)
    first, second = (tmp_path / "hf" / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    shutil.copy(first, second)
    (tmp_path / "hf" / INDEX).unlink()
    error = refused(tmp_path / "hf", tmp_path / "m.gguf")
    assert error.field is not None
    assert error.field.startswith("model.")
    assert "model-00001-of-00002.safetensors as well" in str(error)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("model.norm.weight", "model-00002-of-00002.safetensors"),
        ("model.more.weight", "model-00001-of-00002.safetensors"),
        ("model.norm.weight", "../hf/model-00001-of-00002.safetensors"), ("model.norm.weight", "/etc/passwd"),
        ("model.norm.weight", 7), ("model.norm.weight", "config.json"),
    ],
)  # fmt: skip
def test_an_index_that_lies_is_refused_by_name(tmp_path: Path, name: str, file: object) -> None:
    write_checkpoint(tmp_path / "hf", shards=2)
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    if index["weight_map"].get(name) == file:
        file = "model-00001-of-00002.safetensors"
    change_json(tmp_path / "hf" / INDEX, lambda data: data["weight_map"].update({name: file}))
    assert refused(tmp_path / "hf", tmp_path / "m.gguf").field == name


@pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": []}', "{}", '{"weight_map": {}}', "[" * 100000])
def test_an_index_that_is_none_is_refused(tmp_path: Path, index: str) -> None:
    write_checkpoint(tmp_path / "hf", shards=2)
    (tmp_path / "hf" / INDEX).write_text(index)
    assert INDEX in str(refused(tmp_path / "hf", tmp_path / "m.gguf"))


# Headers of safetensors files


def safetensors(header: str | bytes, data: bytes = bytes(64), length: int | None = None) -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: object = "F32", shape: object = (2, 8), offsets: object = (0, 64)) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


HUGE = 2**63
HOSTILE = {
    "empty": b"", "short": b"\x08\0\0", "endless": safetensors("{}", length=2**64 - 1),
    "beyond the file": safetensors("{}", length=1000), "not JSON": safetensors("{"), "not UTF-8": safetensors(b"\xff"),
    "UTF-16": safetensors('{"a": 1}'.encode("utf-16")), "a list": safetensors("[1]"), "null": safetensors("null"),
    "nested": safetensors("[" * 200000), "nested objects": safetensors('{"a":' * 100000),
    "a number of many digits": safetensors('{"a": ' + "9" * 5000 + "}"),
    "twice": safetensors(f'{{"a": {entry()}, "a": {entry()}}}'), "an entry of null": safetensors('{"a": null}'),
    "an entry of text": safetensors('{"a": "F32"}'), "an empty entry": safetensors('{"a": {}}'),
    **{
        f"{key} {value!r:.30}": safetensors(f'{{"a": {entry(**{key: value})}}}')
        for key, values in {
            "dtype": ("F64", "f32", 1, None, ["F32"], {}),
            "shape": (16, "16", [-2, -8], [2.0, 8], ["2", 8], [True, 16], [[2, 8]], None, [HUGE, 8], [1] * 100 + [16],
                      [2, 9], [], [2**62, 2**62, 4], {"0": 2}, [2**47, 0], [2**47] * 8),
            "offsets": ([0], [0, 64, 64], [0, 65], [1, 65], [-64, 0], [64, 0], [0, HUGE], [HUGE, HUGE + 64], [0.0, 64],
                        ["0", 64], [False, 64], None, "0-64", [0, None], [2**64, 2**64 + 64]),
        }.items()
        for value in values
    },
    "overlap": safetensors(f'{{"a": {entry(shape=[8], offsets=[0, 32])}, "b": {entry(shape=[8], offsets=[28, 60])}}}'),
    "the same data": safetensors(f'{{"a": {entry()}, "b": {entry()}}}'),
    "one within another": safetensors(f'{{"a": {entry()}, "b": {entry(shape=[1], offsets=[8, 12])}}}'),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_a_format_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(ModelFormatError, match=r"model\.safetensors"):
        read_header(str(path))


def test_an_honest_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    data = np.arange(16, dtype=np.float32)
    header = f'{{"__metadata__": {{"format": "pt"}}, "none": {entry(shape=[0, 4], offsets=[0, 0])}, "a": {entry()}}}'
    path.write_bytes(safetensors(header, data.tobytes()))
    assert read_header(str(path))["a"].shape == (2, 8)
    checkpoint = Checkpoint(str(tmp_path))
    assert np.array_equal(checkpoint.elements("a"), data)
    assert np.array_equal(checkpoint.elements("a", 5, 3), data[5:8])
    assert checkpoint.size("none") == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from(["F32", "BF16", "a", ""]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a", "__metadata__"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), JSON, max_size=3))
@example(header={"a": {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]}})
def test_any_header_is_read_or_refused(tmp_path: Path, header: dict[str, Any]) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(json.dumps(header)))
    try:
        places = read_header(str(path))
    except ModelFormatError:
        return
    assert all(place.offset >= 8 and place.offset + place.bytes <= path.stat().st_size for place in places.values())


# Tokenizers


def token(id_: int, text: str, **more: object) -> dict[str, object]:
    return {"id": id_, "content": text, **more}


def test_added_tokens_are_control_where_they_are_special(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf")
    change_json(
        tmp_path / "hf" / "tokenizer.json",
        lambda data: data["added_tokens"].extend(
            [
                token(303, "<think>", special=False),
                token(304, "<tool>"),
                token(262 - 1, list(data["model"]["vocab"])[261]),
            ]
        ),
    )
    change_json(
        tmp_path / "hf" / "tokenizer_config.json",
        lambda data: data.update(
            added_tokens_decoder={
                "305": {"content": "<extra>", "special": True},
                "301": {"content": "<|im_start|>", "special": False},
            }
        ),
    )
    vocabulary = read_vocabulary(str(tmp_path / "hf"), VOCAB)
    assert vocabulary.tokens[301:307] == ["<|im_start|>", "<|im_end|>", "<think>", "<tool>", "<extra>", "[PAD306]"]
    assert vocabulary.types[301:307] == [3, 3, 4, 4, 3, 5]
    assert vocabulary.types[261] == 4, "an added token may repeat an entry of the vocabulary"
    convert(tmp_path / "hf", tmp_path / "m.gguf")
    with SmallThinker(tmp_path / "m.gguf") as model:
        assert model.tokenize("<think>hello") == [303, *model.tokenize("hello")]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda t: t.pop("model"), "model.type"), (lambda t: t["model"].update(type="Unigram"), "model.type"),
        (lambda t: t["model"].update(vocab=[]), "model.vocab"), (lambda t: t["model"].update(vocab={}), "model.vocab"),
        (lambda t: t["model"]["vocab"].update(x="1"), "model.vocab"),
        (lambda t: t["model"]["vocab"].update(x=-1), "model.vocab"),
        (lambda t: t["model"]["vocab"].update(x=0), "model.vocab"),
        (lambda t: t["model"]["vocab"].update(x=2**40), "model.vocab"),
        (lambda t: t["model"].pop("merges"), "model.merges"),
        (lambda t: t["model"].update(merges=[]), "model.merges"), (lambda t: t["model"]["vocab"].pop("A"), "model"),
        (lambda t: t["model"].update(merges=["ab"]), "model.merges"),
        (lambda t: t["model"].update(merges=["x y"]), "model"),
        (lambda t: t["model"].update(merges=[["a", 1]]), "model.merges"),
        (lambda t: t["model"].update(merges=[["a", "b", "c"]]), "model.merges"),
        (lambda t: t["model"].update(end_of_word_suffix="</w>"), "model.end_of_word_suffix"),
        (lambda t: t.update(added_tokens={}) or t.update(added_tokens=3), "added_tokens"),
        (lambda t: t.update(added_tokens=["<x>"]), "added_tokens"),
        (lambda t: t.update(added_tokens=[token(True, "<x>")]), "added_tokens"),
        (lambda t: t.update(added_tokens=[token(303, "")]), "added_tokens"),
        (lambda t: t.update(added_tokens=[token(303, "<x>", special="yes")]), "added_tokens"),
        (lambda t: t.update(added_tokens=[token(303, "<x>"), token(303, "<y>")]), "added_tokens"),
        (lambda t: t.update(added_tokens=[token(0, "<x>")]), "added_tokens"),
        (lambda t: t.update(added_tokens=[token(303, next(iter(t["model"]["vocab"])))]), "added_tokens"),
        (lambda t: t.update(added_tokens=[token(VOCAB, "<x>")]), "model.vocab"),
    ],
)  # fmt: skip
def test_a_bad_tokenizer_is_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], field: str
) -> None:
    write_checkpoint(tmp_path / "hf")
    change_json(tmp_path / "hf" / "tokenizer.json", change)
    error = refused(tmp_path / "hf", tmp_path / "m.gguf")
    assert error.field == field
    assert error.path is not None
    assert error.path.endswith("tokenizer.json")


def test_other_rules_for_words_are_told(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf")
    change_json(
        tmp_path / "hf" / "tokenizer.json",
        lambda data: data["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\p{N}{1,3}"}),
    )
    with pytest.warns(UserWarning, match="pre_tokenizer is not Qwen2's"):
        convert(tmp_path / "hf", tmp_path / "m.gguf")


def test_end_tokens_come_from_generation_config_first(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert special_ids(str(tmp_path / "hf"), config, VOCAB) == (300, [300, 302], False)
    (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": 302, "bos_token_id": 301}')
    assert special_ids(str(tmp_path / "hf"), config, VOCAB) == (300, [302], False)
    (tmp_path / "hf" / "generation_config.json").write_text(f'{{"eos_token_id": [302, {VOCAB}]}}')
    assert refused(tmp_path / "hf", tmp_path / "m.gguf").field == "eos_token_id"


# Chat templates


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": {"chat_template": "A"}}, {"default": "A"}),
        ({"tokenizer_config.json": {"chat_template": None}}, {}),
        ({"tokenizer_config.json": {}}, {}),
        (
            {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "A"},
                                                         {"name": "tool_use", "template": "B"}]}},
            {"default": "A", "tool_use": "B"},
        ),
        ({"tokenizer_config.json": {"chat_template": [{"name": "only", "template": "A"}]}}, {"default": "A"}),
        (
            {"tokenizer_config.json": {"chat_template": "A"}, "chat_template.json": {"chat_template": "B"}},
            {"default": "B"},
        ),
        (
            {"tokenizer_config.json": {"chat_template": "A"}, "chat_template.json": {"chat_template": "B"},
             "chat_template.jinja": "C", "additional_chat_templates/rag.jinja": "D"},
            {"default": "C", "rag": "D"},
        ),
    ],
)  # fmt: skip
def test_chat_templates_are_found_wherever_they_are(
    tmp_path: Path, files: dict[str, Any], expected: dict[str, str]
) -> None:
    write_checkpoint(tmp_path / "hf")
    for name, content in files.items():
        path = tmp_path / "hf" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert chat_templates(str(tmp_path / "hf")) == expected
    convert(tmp_path / "hf", tmp_path / "m.gguf")
    with GGUFFile(tmp_path / "m.gguf") as gguf:
        assert gguf.metadata.get("tokenizer.chat_template") == expected.get("default")
        assert gguf.metadata.get("tokenizer.chat_template.tool_use") == expected.get("tool_use")


@pytest.mark.parametrize(
    "template",
    [5, ["A"], [{"name": "a"}], [{"template": "a"}], [{"name": ["a"], "template": "a"}], {"default": 1},
     [{"name": "a", "template": "A"}, {"name": "b", "template": "B"}], "x" * ((1 << 20) + 1)],
    ids=lambda template: repr(template)[:30],
)  # fmt: skip
def test_a_bad_chat_template_is_refused(tmp_path: Path, template: object) -> None:
    write_checkpoint(tmp_path / "hf")
    change_json(tmp_path / "hf" / "tokenizer_config.json", lambda data: data.update(chat_template=template))
    assert refused(tmp_path / "hf", tmp_path / "m.gguf").field == "chat_template"


# Writing


def test_values_that_a_type_cannot_hold_are_refused_by_name(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    values = np.zeros((D, D), np.float32)
    for bad in (np.inf, np.nan, 1e30):
        values[3, 5] = bad
        shutil.rmtree(tmp_path / "hf", ignore_errors=True)
        write_checkpoint(tmp_path / "hf", extra={name: values})
        assert refused(tmp_path / "hf", tmp_path / "m.gguf").field == name
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_two_conversions_to_one_file_do_not_mix(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf")
    target = tmp_path / "m.gguf"
    with atomic_file(target) as file:
        file.write(0, b"of the other one")
        convert(tmp_path / "hf", target)
        assert target.read_bytes()[:4] == b"GGUF"
    assert target.read_bytes() == b"of the other one"


def test_a_full_disk_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "hf")
    space = os.statvfs(tmp_path)
    full = types.SimpleNamespace(f_bavail=10, f_frsize=space.f_frsize)
    monkeypatch.setattr(os, "fstatvfs", lambda file: full)
    done: list[int] = []
    with pytest.raises(OSError, match="no room"):
        convert(tmp_path / "hf", tmp_path / "m.gguf", progress=lambda i, n, name: done.append(i))
    assert done == []
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_killed_conversion_leaves_the_old_file_and_can_be_repeated(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf")
    target = tmp_path / "m.gguf"
    target.write_bytes(b"old")
    program = (
        "import os, signal, sys; from smallthinker_edge.files.convert import convert\n"
        "def die(done, total, name):\n    done == total // 2 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "convert(sys.argv[1], sys.argv[2], progress=die)"
    )
    ended = subprocess.run([sys.executable, "-c", program, tmp_path / "hf", target], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert target.read_bytes() == b"old"
    convert(tmp_path / "hf", target)
    with SmallThinker(target) as model:
        assert model.generate("hello", max_tokens=2).tokens
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "m.gguf"]
