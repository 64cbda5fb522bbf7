"""Floats to Q4_0, Q8_0 and F16, against the `gguf` package's own quantiser, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from smallthinker_edge._native.quantize import quantize, quantize_rows

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


def weights_of(data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return gguf.quants.dequantize(data.reshape(-1, 18), gguf.GGMLQuantizationType.Q4_0).reshape(shape)


def test_no_block_errs_more_than_with_the_plain_scale_and_most_err_less() -> None:
    values, rng = blocks(), np.random.default_rng(4)
    for weight in (np.ones(32), rng.exponential(size=32), np.r_[np.full(31, 0.01), 100.0], np.zeros(32)):
        errors = []
        for data in (quantize_rows(values, weight.astype(np.float32)), quantize("Q4_0", values)):
            found = weights_of(data, values.shape).astype(np.float64)
            errors.append((weight * (values - found) ** 2).sum(1))
        assert (errors[0] <= errors[1] * (1 + 1e-5) + 1e-30).all()
        if weight.any():
            assert (errors[0][:500] < 0.999 * errors[1][:500]).mean() > 0.7
    assert errors[0].sum() == 0


def test_rows_are_quantised_alike_alone_together_and_as_bfloat16() -> None:
    rng = np.random.default_rng(5)
    values = (rng.standard_normal((37, 96)).astype(np.float32).view(np.uint32) >> 16 << 16).view(np.float32)
    weight = rng.exponential(size=96).astype(np.float32)
    feedback = np.triu(rng.normal(0, 0.1, (96, 96))).astype(np.float32)
    for more in (None, feedback):
        whole = quantize_rows(values, weight, more).tobytes()
        assert b"".join(quantize_rows(row, weight, more).tobytes() for row in values) == whole
        assert quantize_rows((values.view(np.uint32) >> 16).astype(np.uint16), weight, more).tobytes() == whole
    assert quantize_rows(values, weight, np.eye(96, dtype=np.float32)).tobytes() == (
        quantize_rows(values, weight).tobytes()
    ), "errors that go nowhere change nothing"


def test_feedback_is_the_recurrence_of_gptq() -> None:
    """Column by column in NumPy, with the scales that were chosen."""
    rng = np.random.default_rng(6)
    values = rng.standard_normal((20, 64)).astype(np.float32)
    feedback = np.triu(rng.normal(0, 0.2, (64, 64)), 1).astype(np.float32)
    data = quantize_rows(values, np.ones(64, np.float32), feedback)
    found = weights_of(data, values.shape)
    scales = data.reshape(20, 2, 18)[:, :, :2].copy().view(np.float16).astype(np.float32)
    left, same = values.copy(), 0
    for j in range(64):
        d = scales[:, j // 32, 0]
        code = np.clip(np.floor(left[:, j] / d + 8.5), 0, 15) - 8
        same += int((d * code == found[:, j]).sum())
        left[:, j + 1 :] -= (left[:, j] - found[:, j])[:, None] * feedback[j, j + 1 :]
    assert same > 0.999 * values.size  # 1 / d is rounded once more in C: a tie may fall to the other side


def test_rows_of_other_shapes_and_values_are_refused() -> None:
    ones = np.ones(64, np.float32)
    for source, weight, feedback in (
        (ones, ones[:48], None), (ones[:32], ones, None), (ones, ones[:0], None), (ones[:0], ones, None),
        (ones, ones, np.ones((64, 32), np.float32)), (ones.astype(np.float64), ones, None),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            quantize_rows(source, weight, feedback)
    for bad in (np.nan, np.inf, 3e38):
        with pytest.raises(OverflowError, match="Q4_0"):
            quantize_rows(np.where(np.arange(64) == 40, bad, 1).astype(np.float32), ones)
    with pytest.raises(OverflowError, match="Q4_0"):
        quantize_rows(np.full(64, 0.3, np.float32), ones, np.full((64, 64), 1e30, np.float32))
