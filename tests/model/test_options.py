"""The options of a generation: each is listed once, and everything that takes some reads that list."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import write_model

from smallthinker_edge import Sampler, SmallThinker
from smallthinker_edge.cli import build_parser
from smallthinker_edge.options import OPTIONS, CompletionOptions, GenerationOptions, checked_options


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SmallThinker:
    return SmallThinker(write_model(tmp_path_factory.mktemp("options") / "m.gguf", context_length=256), threads=1)


def test_every_option_is_explained() -> None:
    assert set(OPTIONS) == set(GenerationOptions.__annotations__)
    assert all(name in f"{CompletionOptions.__doc__}{GenerationOptions.__doc__}" for name in OPTIONS)


def test_null_is_the_default(model: SmallThinker) -> None:
    nothing: Any = dict.fromkeys(OPTIONS)
    assert checked_options(nothing) == checked_options({})
    assert model.generate("hello", **nothing | {"max_tokens": 9}).tokens == model.generate("hello", max_tokens=9).tokens


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", [0, -1]),
        ("stop", ["", ["a", ""], [3]]),
        ("temperature", [-0.1, float("nan"), float("inf"), 10**400]),
        ("top_k", [-1]),
        ("top_p", [0, 1.01]),
        ("min_p", [-1, 2]),
        ("repetition_penalty", [0, -1, 1e-50, 1e39]),
        ("repetition_window", [-1]),
        ("seed", [-1, 2**64]),
        ("logit_bias", [{3: float("inf")}, {3: float("nan")}, {3: 1e300}, {-3: 1}]),
        ("overflow", ["drop", 3, np.array(["error", "shift"])]),
        ("speculate", [-1, 65]),
        ("presence_penalty", [101, float("nan")]),
        ("frequency_penalty", [-101]),
        ("dry_multiplier", [-1, float("inf")]),
        ("dry_base", [0.5]),
        ("dry_allowed_length", [-1]),
        ("dry_window", [-1]),
        ("dry_breakers", [""]),
        ("timeout", [0, -1]),
        ("logprobs", [-1, 21]),
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
     ("sampler", print), ("max_token", 3), ("stop", 3), ("logit_bias", 3), ("logit_bias", {"a": 1}),
     ("logit_bias", {1.7: 1}), ("logit_bias", {1: None}), ("logit_bias", {1: True}), ("constraint", 3),
     ("logits_processors", 3), ("logits_processors", [print, 3]), ("on_prompt", 3), ("on_text", "print")],
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
    untyped = {
        "cancel",
        "sampler",
        "logprobs",
        "logits_processors",
        "constraint",
        "shared_prefix",
        "on_prompt",
        "on_text",
    }
    assert set(OPTIONS) - set(typed) == untyped
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


class EmptyList(list[int]):
    """A sampler that is also an empty list: false where one asks for truth."""

    def sample(self, logits: object, history: object) -> int:
        return 5


def test_a_sampler_that_is_false_is_used(model: SmallThinker) -> None:
    assert model.generate("hello", max_tokens=3, sampler=EmptyList()).tokens == [5, 5, 5]


def test_what_json_can_say_is_understood() -> None:
    options = checked_options({"logit_bias": {"7": -100, "8": -1e300}, "max_tokens": 10**30})
    assert options["logit_bias"] == {7: -100, 8: float("-inf")}
    assert options["max_tokens"] >= 2**62


def test_the_sampler_has_the_same_options() -> None:
    own = {name: option for name, option in OPTIONS.items() if option.sampling and name != "seed"}
    nothing: Any = dict.fromkeys(own)
    plain, null = Sampler(), Sampler(**nothing)
    for name, option in own.items():
        assert getattr(plain, name) == getattr(null, name) == option.default
        wrong: Any = {name: object()}
        with pytest.raises(TypeError, match=name):
            Sampler(**wrong)
    assert Sampler(top_k=10**30).top_k >= 2**62


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1.0, 1e300, 1.7e308])
def test_no_temperature_overflows_or_draws_what_is_forbidden(temperature: float) -> None:
    logits = np.array([3e38, -np.inf, 1, -3e38, 3e38, -np.inf], np.float32)
    sampler = Sampler(temperature=temperature, seed=5)
    drawn = {sampler.sample(logits) for _ in range(200)}
    assert drawn <= ({0, 4} if temperature < 1e30 else {0, 2, 3, 4})
    assert {0, 4} <= drawn


SAMPLE = """\
import threading
from smallthinker_edge import GenerationOptions, GenerationResult, Sampler, SmallThinker, TextStream

model = SmallThinker("m.gguf")
options: GenerationOptions = {"max_tokens": 9, "stop": None, "temperature": 0.5, "seed": None}
result: GenerationResult = model.generate("a", **options)
stream: TextStream = model.stream([1, 2], stop=["a", "b"], cancel=threading.Event(), logit_bias={3: 1.5})
result = model.chat([{"role": "user", "content": "a"}], sampler=Sampler(top_k=None), overflow="shift")
stream = model.stream_chat([{"role": "user", "content": "a"}], speculate=None)
model.generate("a", max_token=9)
model.generate("a", max_tokens="9")
model.stream("a", cancel=3)
model.chat([], sampler=print)
"""


def test_types_tell_what_calls_accept(tmp_path: Path) -> None:
    mypy = pytest.importorskip("mypy.api")
    (tmp_path / "sample.py").write_text(SAMPLE)
    settings = Path(__file__).resolve().parents[2] / "pyproject.toml"
    told, _, _ = mypy.run(["--config-file", str(settings), "--cache-dir", str(tmp_path), str(tmp_path / "sample.py")])
    faults = [line for line in told.splitlines() if "error:" in line]
    assert [int(line.split(":")[1]) for line in faults] == [10, 11, 12, 13]
    assert all("sample.py" in line for line in faults)
