"""Floats to Q4_0, Q8_0 and F16, against the `gguf` package's own quantiser, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from smallthinker_edge._native.quantize import quantize

TYPES = ("Q4_0", "Q8_0", "F16")


def expected(values: np.ndarray, type_: str) -> bytes:
    with np.errstate(over="ignore", invalid="ignore"):
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType[type_]).tobytes()


def blocks() -> np.ndarray:
    """Ordinary rows, and rows where rounding, ties, signs and zeros decide."""
    rng = np.random.default_rng(3)
    rows = [rng.standard_normal((500, 32)) * rng.choice([1e-6, 1e-3, 1.0, 100.0], (500, 1))]
    rows += [rng.integers(-8, 9, (300, 32)) / 16.0, rng.integers(-127, 128, (300, 32)) * 1.0]
    rows += [rng.choice([-1.0, 1.0, 0.5, -0.5, 0.0, -0.0], (300, 32)), np.zeros((2, 32)), -np.zeros((2, 32))]
    rows += [rng.standard_normal((50, 32)) * 1e-9, np.full((1, 32), -3.0), np.full((1, 32), 65000.0)]
    return np.concatenate(rows).astype(np.float32)


@pytest.mark.parametrize("type_", TYPES)
def test_blocks_are_those_of_the_gguf_package(type_: str) -> None:
    values = blocks()
    assert quantize(type_, values).tobytes() == expected(values, type_)


@pytest.mark.parametrize("type_", TYPES)
def test_bfloat16_is_read_as_it_is(type_: str) -> None:
    bits = (blocks().view(np.uint32) >> 16).astype(np.uint16)
    assert quantize(type_, bits).tobytes() == expected((bits.astype(np.uint32) << 16).view(np.float32), type_)


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38, -3e38])
@pytest.mark.parametrize("place", [0, 31, 95])
def test_what_the_type_cannot_hold_is_an_error(type_: str, bad: float, place: int) -> None:
    values = np.ones(96, np.float32)
    values[place] = bad
    with pytest.raises(OverflowError, match=type_):
        quantize(type_, values)
    with pytest.raises(OverflowError, match=type_):
        quantize(type_, (values.view(np.uint32) >> 16).astype(np.uint16))


def test_other_types_and_sizes_are_refused() -> None:
    for type_, values in (
        ("Q6_K", np.ones(32, np.float32)), ("Q4_0", np.ones(31, np.float32)), ("Q8_0", np.ones(0, np.float32)),
        ("Q4_0", np.ones(32, np.float64)), ("F16", np.ones(4, np.int16)),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            quantize(type_, values)
