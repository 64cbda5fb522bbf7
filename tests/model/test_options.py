"""The options of a generation: each is listed once, and everything that takes some reads that list."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import write_model

from smallthinker_edge import SmallThinker
from smallthinker_edge.cli import build_parser
from smallthinker_edge.options import OPTIONS, GenerationOptions, checked_options


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SmallThinker:
    return SmallThinker(write_model(tmp_path_factory.mktemp("options") / "m.gguf", context_length=256), threads=1)


def test_every_option_is_explained() -> None:
    assert set(OPTIONS) == set(GenerationOptions.__annotations__)
    assert all(name in (GenerationOptions.__doc__ or "") for name in OPTIONS)


def test_null_is_the_default(model: SmallThinker) -> None:
    nothing: Any = dict.fromkeys(OPTIONS)
    assert checked_options(nothing) == checked_options({})
    assert model.generate("hello", **nothing | {"max_tokens": 9}).tokens == model.generate("hello", max_tokens=9).tokens


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", [0, -1]),
        ("stop", ["", ["a", ""], [3]]),
        ("temperature", [-0.1, float("nan"), float("inf")]),
        ("top_k", [-1]),
        ("top_p", [0, 1.01]),
        ("min_p", [-1, 2]),
        ("repetition_penalty", [0, -1]),
        ("repetition_window", [-1]),
        ("seed", [-1, 2**64]),
        ("logit_bias", [{3: float("inf")}, {3: float("nan")}]),
        ("overflow", ["drop", 3]),
        ("speculate", [-1, 65]),
    ],
)
def test_values_out_of_range_are_refused_by_name(model: SmallThinker, name: str, values: list[Any]) -> None:
    for value in values:
        options: Any = {name: value}
        with pytest.raises(ValueError, match=name):
            model.stream("hello", **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_tokens", 3.5), ("max_tokens", "3"), ("max_tokens", True), ("temperature", "hot"), ("cancel", 3),
     ("sampler", print), ("max_token", 3)],
)  # fmt: skip
def test_other_types_and_names_are_refused_by_name(model: SmallThinker, name: str, value: object) -> None:
    options: Any = {name: value}
    with pytest.raises(TypeError, match=name):
        model.generate("hello", **options)


def test_numbers_of_numpy_are_numbers(model: SmallThinker) -> None:
    result = model.generate("hello", max_tokens=np.int64(3), temperature=np.float32(0), cancel=threading.Event())
    assert len(result.tokens) <= 3


def test_the_command_line_has_what_can_be_typed() -> None:
    typed = {name: option for name, option in OPTIONS.items() if option.help}
    assert set(OPTIONS) - set(typed) == {"cancel", "sampler"}
    words = ["generate", "-m", "x", "-p", "y"]
    for name, option in typed.items():
        value = {"texts": "a", "bias": "3=1.5", "choice": option.choices[-1] if option.choices else ""}
        words += ["--" + name.replace("_", "-"), value.get(option.kind, "1")]
    given = vars(build_parser().parse_args(words))
    assert {given[name] for name in ("temperature", "top_k", "speculate")} == {1}
    assert given["logit_bias"] == [(3, 1.5)]


def test_near_zero_is_greedy(model: SmallThinker, tmp_path: Path) -> None:
    greedy = model.generate("hello", max_tokens=9).tokens
    assert model.generate("hello", max_tokens=9, temperature=1e-30, seed=1).tokens == greedy
