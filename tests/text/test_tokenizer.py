"""The tokenizer: exact round trips, special tokens, streaming, and a slow BPE written here to compare with."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gguf_files import MERGES, write_model

from smallthinker_edge.errors import ModelFormatError
from smallthinker_edge.files.gguf import GGUFFile
from smallthinker_edge.text.tokenizer import Tokenizer

TEXTS = [
    "hello world",
    " hello  world\n\n x",
    "don't 1234 !!",
    "Grüße, 世界 🙂",
    "a\tb\r\n",
    "<|im_end|>x",
    "\u00e9e\u0301",
    "",
]


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return GGUFFile(write_model(tmp_path_factory.mktemp("tok") / "m.gguf")).metadata


@pytest.fixture(scope="module")
def tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf_metadata(metadata)


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    for parse_special in (True, False):
        assert tokenizer.decode(tokenizer.encode(text, parse_special=parse_special)) == text


def test_any_bytes_come_back_exactly(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for size in (1, 2, 7, 100, 1000):
        data = rng.randbytes(size)
        assert tokenizer.decode_bytes(tokenizer.encode(data)) == data


def slow_bpe(word: str) -> list[str]:
    """Merges the pair of lowest rank until none is left."""
    parts = list(word)
    while True:
        ranked = [(MERGES.index(pair), i) for i, pair in enumerate(pairwise(parts)) if pair in MERGES]
        if not ranked:
            return parts
        _, i = min(ranked)
        parts[i : i + 2] = ["".join(parts[i : i + 2])]


def test_merges_apply_in_their_order(tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    tokens = list(metadata["tokenizer.ggml.tokens"])
    rng = random.Random(1)
    for _ in range(300):
        word = "".join(rng.choice("helowrdtinao") for _ in range(rng.randrange(1, 12)))
        assert [tokens[i] for i in tokenizer.encode(" " + word)] == slow_bpe("Ġ" + word)


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1024")] == ["1", "0", "2", "4"]


def test_special_tokens_are_parsed_only_when_asked(tokenizer: Tokenizer) -> None:
    end = tokenizer.special_id("<|im_end|>")
    assert tokenizer.encode("<|im_end|>") == [end]
    assert end not in tokenizer.encode("<|im_end|>", parse_special=False)
    assert end in tokenizer.eos_ids


def test_merges_go_through_a_user_defined_token(metadata: dict[str, Any]) -> None:
    tokens, types = list(metadata["tokenizer.ggml.tokens"]), list(metadata["tokenizer.ggml.token_type"])
    hell = tokens.index("hell")
    types[hell] = 4
    tokenizer = Tokenizer(tokens, metadata["tokenizer.ggml.merges"], types)
    assert tokenizer.encode("hello") == [hell, tokens.index("o")]
    assert tokenizer.encode("hello", parse_special=False) == [tokens.index("hello")]


def test_bos_is_added_as_the_file_says(metadata: dict[str, Any]) -> None:
    bos = 275
    for add in (True, False):
        changed = metadata | {"tokenizer.ggml.add_bos_token": add, "tokenizer.ggml.bos_token_id": bos}
        tokenizer = Tokenizer.from_gguf_metadata(changed)
        assert (tokenizer.encode("x")[0] == bos) is add
        assert tokenizer.encode("x", add_bos=not add)[0] == (
            bos if not add else tokenizer.encode("x", add_bos=False)[0]
        )


def test_streaming_never_shows_half_a_character(tokenizer: Tokenizer) -> None:
    text = "Grüße 世界 🙂 hello"
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in tokenizer.encode(text)]
    assert "".join(pieces) + stream.flush() == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_streaming_marks_broken_characters_and_goes_on(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    text = "".join(stream.push(i) for i in tokenizer.encode(b"a\xe4\xb8b\xff")) + stream.flush()
    assert text == b"a\xe4\xb8b\xff".decode("utf-8", "replace")


@pytest.mark.parametrize("token", [-1, 10**6])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer, token: int) -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        tokenizer.decode([token])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", "llama"), ("pre", "gpt-2"), ("tokens", None), ("merges", None), ("token_type", [1]),
        ("merges", ["zz qq"]), ("bos_token_id", 10**6), ("tokens", ["a"]), ("token_type", [[1]]),
        ("token_type", [1.0]), ("token_type", [True]), ("token_type", ["1"]),
    ],
)  # fmt: skip
def test_damaged_metadata_names_its_key(metadata: dict[str, Any], key: str, value: object) -> None:
    changed = metadata | {f"tokenizer.ggml.{key}": value}
    if value == ["a"]:
        changed["tokenizer.ggml.token_type"] = [1]
    if isinstance(value, list) and key == "token_type" and type(value[0]) is not int:  # as many, but of another type
        changed["tokenizer.ggml.token_type"] = value * len(metadata["tokenizer.ggml.tokens"])
    with pytest.raises(ModelFormatError, match=r"tokenizer\.ggml\."):
        Tokenizer.from_gguf_metadata(changed)


def test_qwen2_vocabulary(shared_vocab: Path) -> None:
    tokenizer = Tokenizer.from_gguf_metadata(GGUFFile(shared_vocab).metadata)
    # Ids of the released Qwen2 tokenizer.
    assert tokenizer.encode("Hello world", add_bos=False) == [9707, 1879]
    assert tokenizer.special_id("<|im_end|>") == 151645
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text, add_bos=False)) == text
