"""Every kernel of every table that this CPU runs, against the plain-C table and against NumPy.

Outputs are poisoned with NaN and stand between guard zones; inputs include zeros, denormals and extremes.
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf import quants
from gguf_files import encode, random_blocks

from smallthinker_edge._native import kernels
from smallthinker_edge._native.kernels import ACTIVE, FIRED, Q8X4_BYTES, Table
from smallthinker_edge._native.layouts import TYPES as TYPE_INFOS

INFOS = {info.number: info for info in TYPE_INFOS.values() if info.tiled}
TYPES = {number: T(number) for number in INFOS}
SPARSE = [number for number, info in INFOS.items() if info.sparse]
GUARD = 64
pytestmark = pytest.mark.parametrize("name", kernels.tables())


class Guarded:
    """A poisoned array between two guard zones that must stay as they were."""

    def __init__(self, size: int, dtype: type = np.float32) -> None:
        self.whole = np.full(size + 2 * GUARD, np.nan if dtype == np.float32 else 0x5A, dtype)
        self.inner = self.whole[GUARD : GUARD + size]
        self.before = self.whole.copy()

    def check(self) -> np.ndarray:
        for zone in (slice(None, GUARD), slice(-GUARD, None)):
            assert self.whole[zone].tobytes() == self.before[zone].tobytes(), "wrote outside its output"
        return self.inner


def inputs(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    if kind == "zeros":
        x[:] = 0
    elif kind == "extreme":
        x = np.where(rng.random(shape) < 0.5, -1, 1).astype(np.float32) * np.float32(1e4)
    elif kind == "denormal":
        x *= np.float32(1e-39)
    elif kind == "spike":
        x[..., ::32] = 1e6
    return x


KINDS = ("normal", "zeros", "extreme", "denormal", "spike")


def columns(kind: int, cols: int) -> int:
    """cols, or where the type has longer blocks the next number of columns that fits them."""
    return -(-cols // INFOS[kind].columns) * INFOS[kind].columns


def quantized(table: str, x: np.ndarray) -> np.ndarray:
    out = np.zeros((x.shape[0], (x.shape[1] + 127) // 128 * Q8X4_BYTES), np.uint8)
    for row, target in zip(x, out, strict=True):
        Table(table).quantize(row, target)
    return out


def values_of(xq: np.ndarray, cols: int) -> np.ndarray:
    """The numbers that quantised rows stand for, float64."""
    blocks = xq.reshape(len(xq), -1, Q8X4_BYTES)
    q = blocks[..., :128].view(np.int8).reshape(len(xq), -1, 2, 4, 16).transpose(0, 1, 3, 2, 4)
    scale = blocks[..., 192:].copy().view(np.float32)[..., ::4]
    with np.errstate(invalid="ignore"):  # zero times an infinite scale is meant to be NaN
        return (q.reshape(*q.shape[:3], 32) * scale[..., None].astype(np.float64)).reshape(len(xq), -1)[:, :cols]


def weights(kind: int, rows: int, cols: int, seed: int = 1, extreme: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(GGUF bytes, float64 values) of a random quantised matrix."""
    values = np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)
    raw = np.array(encode(values, TYPES[kind].name)[0])
    if extreme:
        block = raw.reshape(-1, INFOS[kind].bytes)
        codes = block[:, :-2] if kind == T.Q6_K else block[:, 4 if kind in (T.Q4_K, T.Q5_K) else 2 :]
        codes[:] = np.random.default_rng(seed).choice([0x00, 0xFF, 0xF0, 0x80, 0x7F], codes.shape)
        raw = block.reshape(raw.shape)
    return np.ascontiguousarray(raw).reshape(-1), quants.dequantize(raw, TYPES[kind]).astype(np.float64).reshape(
        rows, cols
    )


def assert_close(
    result: np.ndarray, expected: np.ndarray, magnitude: np.ndarray | float, tolerance: float = 2e-6
) -> None:
    """Within `tolerance` of the sum of the absolute products: the error that float32 summation may have."""
    assert np.all(np.abs(result - expected) <= tolerance * magnitude + 1e-30)


@pytest.mark.parametrize("type_", [info.number for info in TYPE_INFOS.values()])
def test_rows_of_every_type_are_the_numbers_that_they_stand_for(name: str, type_: int) -> None:
    rng = np.random.default_rng(type_)
    block, size = gguf.GGML_QUANT_SIZES[T(type_)]
    if block == 1:
        raw = np.frombuffer(encode(rng.standard_normal((1, 512)).astype(np.float32), T(type_).name)[0], np.uint8)
    else:
        raw = random_blocks(T(type_), (1, 4 * block), rng).reshape(-1)
    cols = raw.size // size * block
    expected = quants.dequantize(raw.reshape(1, -1), T(type_))[0]
    assert_close(kernels.dequantize(type_, raw, cols), expected, np.abs(expected), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cols", [32, 96, 128, 160, 1536])
def test_quantize_is_that_of_plain_c(name: str, kind: str, cols: int) -> None:
    x = inputs(kind, (1, cols))
    assert quantized(name, x).tobytes() == quantized("ref", x).tobytes()


def test_quantize_error_is_at_most_half_a_step(name: str) -> None:
    x = inputs("normal", (3, 256))
    step = np.abs(x).reshape(3, -1, 32).max(-1).repeat(32, axis=-1) / 127
    assert np.all(np.abs(values_of(quantized(name, x), 256) - x) <= step * 0.5001)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_quantize_carries_what_is_no_number(name: str, bad: float) -> None:
    x = inputs("normal", (1, 64))
    x[0, 5] = bad
    assert not np.isfinite(values_of(quantized(name, x), 64)[0, :32]).all()
    assert np.isfinite(values_of(quantized(name, x), 64)[0, 32:]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "cols"), [(16, 32), (40, 96), (48, 160), (33, 1536)])
@pytest.mark.parametrize("type_", TYPES)
def test_gemm_multiplies(name: str, type_: int, rows: int, cols: int, kind: str) -> None:
    cols = columns(type_, cols)
    raw, w = weights(type_, rows, cols, extreme=kind == "extreme")
    packed = kernels.pack_tile16(type_, raw, rows, cols)
    for n in (1, 2, 3, 7, 8, 13):
        xq = quantized(name, inputs(kind, (n, cols), n))
        x = values_of(xq, cols)
        y = Guarded((n - 1) * (rows + 3) + rows)
        Table(name).gemm(type_, packed, rows, cols, 0, (rows + 15) // 16, xq, y.inner, rows + 3)
        out = y.check()
        for i in range(n):
            got = out[i * (rows + 3) : i * (rows + 3) + rows]
            assert_close(got, w @ x[i], np.abs(w) @ np.abs(x[i]))
            if i:
                assert np.isnan(out[i * (rows + 3) - 3 : i * (rows + 3)]).all(), "wrote between the rows"


@pytest.mark.parametrize("type_", TYPES)
def test_gemm_gives_the_same_bits_for_any_batch_and_any_tiles(name: str, type_: int) -> None:
    rows, cols = 64, 256
    packed = kernels.pack_tile16(type_, weights(type_, rows, cols)[0], rows, cols)
    xq = quantized(name, inputs("normal", (13, cols)))
    whole = np.empty(13 * rows, np.float32)
    Table(name).gemm(type_, packed, rows, cols, 0, 4, xq, whole, rows)
    for i in range(13):
        for tile in range(4):
            one = np.empty(16, np.float32)
            Table(name).gemm(type_, packed, rows, cols, tile, tile + 1, xq[i : i + 1], one, 16)
            assert np.array_equal(one, whole[i * rows + 16 * tile :][:16])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cols", [32, 96, 128, 160, 288, 416, 1280, 1536])
@pytest.mark.parametrize("type_", SPARSE)
def test_rows_multiplies_the_chosen_rows(name: str, type_: int, cols: int, kind: str) -> None:
    cols = columns(type_, cols)
    raw, w = weights(type_, 40, cols, extreme=kind == "extreme")
    xq = quantized(name, inputs(kind, (1, cols)))
    x = values_of(xq, cols)[0]
    for count in (0, 1, 5):
        index = np.random.default_rng(count).permutation(40)[:count].astype(np.int32)
        out = Guarded(count)
        Table(name).rows(type_, kernels.pack_rows(type_, raw, 40, cols), cols, index, xq[0], out.inner)
        assert_close(out.check(), w[index] @ x, np.abs(w[index]) @ np.abs(x))


@pytest.mark.parametrize("cols", [96, 160, 256, 1280, 1536, 8448])
@pytest.mark.parametrize("type_", SPARSE)
def test_up_of_many_tokens_gives_the_bits_of_rows(name: str, type_: int, cols: int) -> None:
    cols = columns(type_, cols)
    table, rows = Table(name), kernels.pack_rows(type_, weights(type_, 32, cols)[0], 32, cols)
    xq = quantized(name, inputs("normal", (16, cols)))
    for n in (1, 5, 16):
        fires = np.random.default_rng(n).integers(0, 1 << n, 32).astype(np.uint32)
        fires[3] = 0
        up = Guarded(32 * n)
        if not table.up(type_, rows, cols, xq[:n], fires, up.inner):
            continue
        for i in range(n):
            index = np.flatnonzero(fires >> i & 1).astype(np.int32)
            expected, values = np.zeros(32, np.float32), np.empty(len(index), np.float32)
            table.rows(type_, rows, cols, index, xq[i], values)
            expected[index] = values
            assert np.array_equal(up.check()[32 * i : 32 * i + 32], expected)


def activated(name: str, g: np.ndarray, up: np.ndarray) -> np.ndarray:
    return np.array(
        [Table(name).activate(a, b) for a, b in zip(g.reshape(-1, 32), up.reshape(-1, 32), strict=True)],
        ACTIVE,
    )


def neuron_values(active: np.ndarray) -> np.ndarray:
    h = np.zeros((len(active), 32))
    for group, entry in enumerate(active):
        for k in range(4 * entry["quads"]):
            h[group, entry["index"][k]] += float(entry["h"][k]) * float(entry["scale"])
    return h.reshape(-1)


@pytest.mark.parametrize("silent", [0.0, 0.6, 0.97, 1.0])
def test_activate_keeps_what_relu_lets_through(name: str, silent: float) -> None:
    g, up = inputs("normal", (320,), 3), inputs("normal", (320,), 4)
    g[np.random.default_rng(5).random(320) < silent] *= -1
    g = np.where(np.random.default_rng(6).random(320) < silent, -np.abs(g), g).astype(np.float32)
    active = activated(name, g, up)
    assert active.tobytes() == activated("ref", g, up).tobytes()
    expected = np.maximum(g, 0).astype(np.float64) * up
    step = np.abs(expected).reshape(-1, 32).max(1).repeat(32) / 127
    assert np.all(np.abs(neuron_values(active) - expected) <= step * 0.5001)
    assert active["count"].sum() == (g > 0).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_activate_is_that_of_plain_c(name: str, kind: str) -> None:
    g, up = inputs(kind, (320,), 1), inputs(kind, (320,), 2)
    assert activated(name, g, up).tobytes() == activated("ref", g, up).tobytes()


def test_activate_carries_nan(name: str) -> None:
    g, up = inputs("normal", (32,), 1), inputs("normal", (32,), 2)
    g[7] = np.nan
    assert np.isnan(activated(name, g, up)["scale"][0])


@pytest.mark.parametrize("silent", [0.0, 0.6, 0.97, 1.0])
@pytest.mark.parametrize(("d", "f"), [(128, 32), (256, 96), (200, 768), (1800, 64)])
@pytest.mark.parametrize("type_", SPARSE)
def test_down_adds_the_weighted_product(name: str, type_: int, d: int, f: int, silent: float) -> None:
    f = columns(type_, f)
    raw, w = weights(type_, d, f, extreme=silent == 0.0)
    packed = kernels.pack_down(type_, raw, d, f)
    g = np.where(np.random.default_rng(2).random(f) < silent, -1, np.abs(inputs("normal", (f,), 3))).astype(np.float32)
    active = activated(name, g, inputs("normal", (f,), 4))
    h = neuron_values(active)
    chunks = (d + 127) // 128
    for c0, c1 in {(0, chunks), (chunks - 1, chunks), (0, 1), (chunks // 2, chunks)}:
        y = Guarded(128 * (c1 - c0))
        start = inputs("normal", (128 * (c1 - c0),), 5)
        y.inner[:] = start
        Table(name).down(type_, packed, d, f, c0, c1, active, 0.37, y.inner)
        rows = w[128 * c0 : 128 * c1]
        got = y.check()[: len(rows)]
        magnitude = 0.37 * (np.abs(rows) @ np.abs(h)) + np.abs(start[: len(rows)])
        assert_close(got, 0.37 * (rows @ h) + start[: len(rows)], magnitude)


def fired(g: np.ndarray, up: np.ndarray) -> np.ndarray:
    return np.array(
        [kernels.multiply(a, b) for a, b in zip(g.reshape(-1, 32), up.reshape(-1, 32), strict=True)],
        FIRED,
    )


def transposed_values(raw: np.ndarray, h: np.ndarray, d: int) -> tuple[np.ndarray, np.ndarray]:
    """(exact, rounded) sums [f / 32][d] of h [f] times GGUF rows [f][d]; rounded: what bytes are multiplied by, the
    products of h and a row's scales, which share their own scale among 32 neurons, is rounded first."""
    blocks = raw.reshape(len(h), d // 32, 18)
    scale = blocks[..., :2].copy().view(np.float16).astype(np.float32)[..., 0]
    codes = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], -1).astype(np.float64) - 8
    exact = (h[:, None] * scale).astype(np.float32).reshape(-1, 32, d // 32)
    top = np.abs(exact).max(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(top > 0, np.float32(127) / top, np.float32(0)).astype(np.float32)
        q = np.rint(exact * inverse)
    rounded = np.where(np.abs(q) <= 127, q, 0) * (top / np.float32(127)).astype(np.float64)
    groups = codes.reshape(-1, 32, d // 32, 32)
    return tuple(np.einsum("gnb,gnbi->gbi", w.astype(np.float64), groups).reshape(-1, d) for w in (exact, rounded))


@pytest.mark.parametrize("kind", [*KINDS, "0.6 silent", "0.97 silent", "silent"])
@pytest.mark.parametrize(("d", "f"), [(128, 32), (256, 96), (224, 768), (1824, 64), (32, 32)])
def test_down_transposed_adds_the_weighted_product(name: str, d: int, f: int, kind: str) -> None:
    raw = weights(2, f, d, extreme=kind == "extreme")[0]
    packed = kernels.pack_down(2, raw, d, f, True)
    g, up = np.abs(inputs(kind, (f,), 3)), inputs(kind, (f,), 4)
    silent = {"0.6 silent": 0.6, "0.97 silent": 0.97, "silent": 1.0}.get(kind, 0.0)
    g[np.random.default_rng(2).random(f) < silent] *= -1
    h = np.where(g > 0, g * up, 0).astype(np.float32)
    exact, rounded = transposed_values(raw, h, d)
    chunks = (d + 127) // 128
    for c0, c1 in {(0, chunks), (chunks - 1, chunks), (0, 1), (chunks // 2, chunks)}:
        y = Guarded(128 * (c1 - c0))
        start = inputs("normal", (128 * (c1 - c0),), 5)
        y.inner[:] = start
        Table(name).down_transposed(2, packed, d, f, c0, c1, fired(g, up), 0.37, y.inner)
        part = slice(128 * c0, min(128 * c1, d))
        count = part.stop - part.start
        got = y.check()[:count]
        # Eight times: the largest nibble. Half a step of rounding each is not all at once of one sign.
        magnitude = 0.37 * np.abs(rounded[:, part]).sum(0) + np.abs(start[:count])
        assert_close(got, 0.37 * rounded[:, part].sum(0) + start[:count], magnitude)
        assert np.array_equal(y.check()[count:], start[count:])
        if silent < 0.9 and kind != "zeros":
            error = np.linalg.norm(got - start[:count] - 0.37 * exact[:, part].sum(0))
            assert error <= 0.02 * np.linalg.norm(0.37 * exact[:, part].sum(0)) + 1e-6 * np.linalg.norm(start)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_down_transposed_carries_what_is_no_number(name: str, bad: float) -> None:
    d, f = 160, 64
    g, up = np.ones(f, np.float32), inputs("normal", (f,), 4)
    up[40] = bad
    y = np.zeros(256, np.float32)
    packed = kernels.pack_down(2, weights(2, f, d)[0], d, f, True)
    Table(name).down_transposed(2, packed, d, f, 0, 2, fired(g, up), 1, y)
    assert not np.isfinite(y[:d]).any()
    g[40] = np.nan
    assert np.isnan(fired(g, up)["h"]).sum() == 1


def test_down_transposed_is_that_of_plain_c(name: str) -> None:
    """But for the order in which floats are added."""
    d, f = 352, 32
    packed = kernels.pack_down(2, weights(2, f, d)[0], d, f, True)
    active, y = fired(inputs("normal", (f,), 1), inputs("normal", (f,), 2)), np.zeros((2, 384), np.float32)
    for table, out in zip((name, "ref"), y, strict=True):
        Table(table).down_transposed(2, packed, d, f, 0, 3, active, 1, out)
    assert np.array_equal(*y)


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_attention_is_softmax_over_the_chunk(name: str, heads: int, head_dim: int) -> None:
    rng = np.random.default_rng(heads)
    for n in (1, 5, 16, 100, 256):
        q = rng.standard_normal((heads, head_dim)).astype(np.float32) * 3
        k, v = (rng.standard_normal((n, head_dim)).astype(np.float16) for _ in range(2))
        acc, m, lsum, scores = Guarded(heads * head_dim), Guarded(heads), Guarded(heads), Guarded(heads * 256)
        Table(name).attention(
            q,
            k.view(np.uint16),
            v.view(np.uint16),
            0.3,
            scores.inner,
            acc.inner.reshape(heads, head_dim),
            m.inner,
            lsum.inner,
        )
        scores.check()
        s = q.astype(np.float64) @ k.T.astype(np.float64) * 0.3
        e = np.exp(s - s.max(1, keepdims=True))
        expected = e @ v.astype(np.float64) / e.sum(1, keepdims=True)
        got = acc.check().reshape(heads, head_dim) / lsum.check()[:, None]
        assert np.abs(got - expected).max() < 2e-5
        assert np.abs(m.check() - s.max(1)).max() < 1e-4


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 8), (2, 40), (5, 24), (6, 64), (7, 128), (3, 136)])
@pytest.mark.parametrize(
    "seen",
    [
        [(0, 1)], [(0, 256), (0, 256)], [(3, 9), (4, 10), (5, 11)], [(0, 253), (0, 254), (0, 255), (0, 256)],
        [(200, 203), (201, 204), (202, 205), (203, 206)], [(100, 256), (101, 256), (102, 256), (103, 256)],
        [(0, 63), (0, 64), (0, 65), (0, 66)], [(60 + i, 120 + i) for i in range(8)],
    ],
)  # fmt: skip
def test_attention_of_many_tokens_has_the_bits_of_one_after_another(
    name: str, heads: int, head_dim: int, seen: list[tuple[int, int]]
) -> None:
    rng = np.random.default_rng(heads)
    n = len(seen)
    q = rng.standard_normal((n, heads, head_dim)).astype(np.float32) * 3
    k, v = (rng.standard_normal((256, head_dim)).astype(np.float16) for _ in range(2))
    written = np.zeros(256, bool)
    written[min(p0 for p0, _ in seen) : max(p1 for _, p1 in seen)] = True
    k[~written], v[~written] = np.nan, np.inf  # what is not written must not be looked at
    first, last = (np.array(ends, np.int32) for ends in zip(*seen, strict=True))
    scratch, acc, m, lsum = (
        Guarded(size) for size in (
            Table.attention_scratch(n * heads, head_dim), n * heads * head_dim, n * heads, n * heads
        )
    )  # fmt: skip
    Table(name).attention_many(
        q, k.view(np.uint16), v.view(np.uint16), first, last, 0.3, scratch.inner,
        acc.inner.reshape(n, heads, head_dim), m.inner.reshape(n, heads), lsum.inner.reshape(n, heads),
    )  # fmt: skip
    scratch.check()
    for i, (p0, p1) in enumerate(seen):
        one = np.empty((heads, head_dim), np.float32)
        one_m, one_l = np.empty(heads, np.float32), np.empty(heads, np.float32)
        Table(name).attention(q[i], k[p0:p1].view(np.uint16), v[p0:p1].view(np.uint16), 0.3,
                              np.empty(heads * 256, np.float32), one, one_m, one_l)  # fmt: skip
        assert np.array_equal(acc.check().reshape(n, heads, head_dim)[i], one)
        assert np.array_equal(m.check().reshape(n, heads)[i], one_m)
        assert np.array_equal(lsum.check().reshape(n, heads)[i], one_l)


def test_attention_survives_far_apart_scores(name: str) -> None:
    q = np.full((1, 32), 100, np.float32)
    k = np.stack([np.full(32, 60), np.full(32, -60)]).astype(np.float16)
    v = np.stack([np.full(32, 1), np.full(32, 2)]).astype(np.float16)
    acc, m, lsum = np.empty((1, 32), np.float32), np.empty(1, np.float32), np.empty(1, np.float32)
    Table(name).attention(q, k.view(np.uint16), v.view(np.uint16), 1.0, np.empty(256, np.float32), acc, m, lsum)
    assert np.allclose(acc / lsum, 1)


def q8_values(x: np.ndarray) -> np.ndarray:
    """What Q8_0 makes of rows, by the gguf package."""
    return np.asarray(quants.dequantize(quants.quantize(x, T.Q8_0), T.Q8_0), np.float64)


def rounded_queries(name: str, q: np.ndarray) -> np.ndarray:
    """Queries as attention_q8 takes them: their quantised rows, then the rests of these."""
    first = quantized(name, q)
    return np.concatenate([first, [kernels.query_rest(*pair) for pair in zip(q, first, strict=True)]])


@pytest.mark.parametrize("head_dim", [32, 128, 160])
def test_two_roundings_of_a_query_are_one_of_sixteen_bits(name: str, head_dim: int) -> None:
    def roundings(x: np.ndarray) -> np.ndarray:
        return values_of(rounded_queries(name, x), head_dim).reshape(2, *x.shape)

    q = np.random.default_rng(2).standard_normal((4, head_dim)).astype(np.float32)
    q *= np.array([[1], [1e-30], [1e30], [3]], np.float32)
    q[3, :32] = 0
    largest = np.repeat(np.abs(q).reshape(4, -1, 32).max(2), 32, axis=1)
    assert np.all(np.abs(roundings(q).sum(0) - q) <= largest * 0.502 / 127 / 254)
    q[0, 1], q[1, 2] = np.nan, np.inf
    assert not np.isfinite(roundings(q)[1][:2, :32]).any()


def test_attention_q8_keeps_to_one_head_what_is_no_number(name: str) -> None:
    rng = np.random.default_rng(1)
    q, keys, values = (rng.standard_normal((n, 64)).astype(np.float32) for n in (5, 40, 40))
    k, v = (np.zeros(kernels.kv_head_bytes(64), np.uint8) for _ in range(2))
    Table(name).kv_store(keys, values, 0, k, v)

    def attend(q: np.ndarray) -> np.ndarray:
        queries = rounded_queries(name, q)
        acc, m, lsum = np.empty((5, 64), np.float32), np.empty(5, np.float32), np.empty(5, np.float32)
        Table(name).attention_q8(queries, 64, k, v, 0, 40, 0.3, np.empty(2 * 5 * 256, np.float32), acc, m, lsum)
        return np.asarray(acc / lsum[:, None])

    good = attend(q)
    assert np.isfinite(good).all()
    for bad in (np.nan, np.inf, -np.inf):
        broken = q.copy()
        broken[1, 7] = bad
        got = attend(broken)
        assert np.isnan(got[1]).all()
        assert np.array_equal(np.delete(got, 1, 0), np.delete(good, 1, 0))


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 160, 288])
def test_attention_q8_is_softmax_over_the_positions(name: str, heads: int, head_dim: int) -> None:
    rng = np.random.default_rng(heads)
    for first, last in ((0, 1), (0, 5), (3, 4), (0, 100), (17, 190), (255, 256), (0, 256), (1, 255)):
        q = rng.standard_normal((heads, head_dim)).astype(np.float32) * 3
        keys, values = (rng.standard_normal((last - first, head_dim)).astype(np.float32) for _ in range(2))
        values[0] *= 100  # one position far above the rest must not cost the others their bits
        k, v = (np.zeros(kernels.kv_head_bytes(head_dim), np.uint8) for _ in range(2))
        older = np.full((256, head_dim), 50, np.float32)
        Table(name).kv_store(older, older, 0, k, v)  # positions around, which must not be looked at
        Table(name).kv_store(keys, values, first, k, v)
        queries = rounded_queries(name, q)
        acc, m, lsum, scores = Guarded(heads * head_dim), Guarded(heads), Guarded(heads), Guarded(2 * heads * 256)
        Table(name).attention_q8(queries, head_dim, k, v, first, last, 0.3, scores.inner,
                                 acc.inner.reshape(heads, head_dim), m.inner, lsum.inner)  # fmt: skip
        scores.check()
        s = q.astype(np.float64) @ q8_values(keys).T * 0.3
        e = np.exp(s - s.max(1, keepdims=True))
        expected = e @ q8_values(values) / e.sum(1, keepdims=True)
        got = acc.check().reshape(heads, head_dim) / lsum.check()[:, None]
        # Weights are rounded to 1/32767 of the largest scale, or 1/32639: n independent errors of at most half of that.
        rounding = 2 * np.sqrt(last - first) * np.abs(values).max() / 32639 / e.sum(1, keepdims=True)
        # Queries are rounded to 1/(127 * 254): a score, and with it a weight, is off by the sum of so many of these.
        rounding += 0.3 * np.sqrt(head_dim) * np.abs(q).max() / (127 * 254) / 4 * np.abs(values).max()
        assert np.all(np.abs(got - expected) < rounding + 2e-5 * np.abs(values).max())
        assert np.abs(m.check() - s.max(1)).max() < 1e-3


@pytest.mark.parametrize("heads", [1, 2, 5])
def test_arm_tables_give_attention_q8_the_same_bits(name: str, heads: int) -> None:
    if name not in ("dotprod", "i8mm"):
        pytest.skip("for ARM64 tables other than neon")
    rng = np.random.default_rng(heads)
    for first, last in ((0, 256), (3, 4), (17, 190)):
        q, keys, values = (rng.standard_normal((n, 96)).astype(np.float32) for n in (heads, 256, 256))
        found = []
        for table in (Table(name), Table("neon")):
            k, v = (np.zeros(kernels.kv_head_bytes(96), np.uint8) for _ in range(2))
            table.kv_store(keys, values, 0, k, v)
            acc, m, lsum = np.empty((heads, 96), np.float32), np.empty(heads, np.float32), np.empty(heads, np.float32)
            scores = np.empty(2 * heads * 256, np.float32)
            table.attention_q8(rounded_queries(name, q), 96, k, v, first, last, 0.3, scores, acc, m, lsum)
            found.append(acc.tobytes() + m.tobytes() + lsum.tobytes())
        assert found[0] == found[1]


# Types of gate, up and down, and whether down is transposed: those that files have, and others that may stand together.
EXPERTS = [
    (T.Q4_0, T.Q4_0, T.Q4_0, False),
    (T.Q4_0, T.Q4_0, T.Q4_0, True),
    (T.Q4_K, T.Q4_K, T.Q4_K, False),
    (T.Q4_K, T.Q4_K, T.Q6_K, False),
    (T.Q5_K, T.Q5_K, T.Q5_K, False),
    (T.Q5_K, T.Q5_K, T.Q6_K, False),
    (T.Q6_K, T.Q6_K, T.Q6_K, False),
    (T.Q8_0, T.Q4_0, T.Q5_K, False),
    (T.Q8_0, T.Q4_K, T.Q4_0, True),
]


@pytest.mark.parametrize("types", EXPERTS)
@pytest.mark.parametrize("silent", [-1, 0.0, 0.6, 1.0])
@pytest.mark.parametrize(("d", "f"), [(32, 32), (96, 64), (160, 224), (1280, 64), (1536, 384)])
def test_ffn_gives_the_bits_of_its_kernels_one_after_the_other(
    name: str, d: int, f: int, silent: float, types: tuple[T, T, T, bool]
) -> None:
    gate_type, up_type, down_type, transposed = types
    d = max(columns(gate_type, d), columns(up_type, d))
    f = f if transposed else columns(down_type, f)
    table, padded = Table(name), -(-d // 128) * 128
    gate = weights(gate_type, f, d, 1)[0].reshape(f, -1)
    up = weights(up_type, f, d, 2)[0]
    down = weights(down_type, *((f, d) if transposed else (d, f)), 3)[0]
    gate[np.random.default_rng(9).random(f) < silent] = 0  # neurons whose gate is 0
    xq = quantized(name, inputs("normal", (1, d)))
    if silent < 0:  # none is
        some = np.empty(f, np.float32)
        table.gemm(gate_type, kernels.pack_tile16(gate_type, gate.reshape(-1), f, d), f, d, 0, -(-f // 16), xq, some, f)
        gate[:] = gate[some.argmax()]
    tiles, rows, lines = (
        kernels.pack_tile16(gate_type, gate.reshape(-1), f, d),
        kernels.pack_rows(up_type, up, f, d),
        kernels.pack_down(down_type, down, d, f, transposed),
    )
    g, values = np.empty(f, np.float32), np.empty(f, np.float32)
    table.gemm(gate_type, tiles, f, d, 0, -(-f // 16), xq, g, f)
    table.rows(up_type, rows, d, np.arange(f, dtype=np.int32), xq[0], values)
    values = np.where(g > 0, values, 0).astype(np.float32)
    active = fired(g, values) if transposed else activated(name, g, values)
    run_down = table.down_transposed if transposed else table.down
    for g0 in range(0, f // 32, kernels.FFN_PART):
        g1 = min(g0 + kernels.FFN_PART, f // 32)
        y = Guarded(padded)
        y.inner[:] = 0
        table.ffn(types[:3], tiles, rows, lines, d, f, xq[0], g0, g1, y.inner, transposed)
        part = np.zeros(f // 32, active.dtype)
        part[g0:g1] = active[g0:g1]
        alone = np.zeros(padded, np.float32)
        run_down(down_type, lines, d, f, 0, padded // 128, part, 1.0, alone)
        assert np.array_equal(y.check(), alone)


DOWNS = [*((kind, False) for kind in SPARSE), (int(T.Q4_0), True)]


def down_case(name: str, kind: int, d: int, f: int, transposed: bool) -> tuple[Any, np.ndarray, np.ndarray]:
    """The kernel for a layout of down, a down [d][f] in it, and what its neurons give to it."""
    table, g, up = Table(name), inputs("normal", (f,), 1), inputs("normal", (f,), 2)
    lines = kernels.pack_down(kind, weights(kind, *((f, d) if transposed else (d, f)))[0], d, f, transposed)
    if transposed:
        return table.down_transposed, lines, fired(g, up)
    return table.down, lines, activated(name, g, up)


@pytest.mark.parametrize(("kind", "transposed"), DOWNS)
def test_down_gives_the_same_bits_for_any_chunks(name: str, kind: int, transposed: bool) -> None:
    d, f = 1824, columns(kind, 32 * (kernels.FFN_PART + 1))
    run_down, lines, active = down_case(name, kind, d, f, transposed)
    whole = np.zeros(15 * 128, np.float32)
    run_down(kind, lines, d, f, 0, 15, active, 0.3, whole)
    for c0, c1 in [(0, 1), (1, 4), (2, 15), (7, 8), (14, 15)]:
        some = np.zeros((c1 - c0) * 128, np.float32)
        run_down(kind, lines, d, f, c0, c1, active, 0.3, some)
        assert np.array_equal(some, whole[c0 * 128 : c1 * 128])


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("d", [160, 1824])
def test_down_gives_the_same_bits_for_any_batch(name: str, kind: int, d: int) -> None:
    table, f, chunks = Table(name), columns(kind, 224), (d + 127) // 128
    lines = kernels.pack_down(kind, weights(kind, d, f)[0], d, f)
    active = [activated(name, inputs("normal", (f,), i), inputs("normal", (f,), 50 + i)) for i in range(16)]
    active[3] = activated(name, -np.ones(f, np.float32), np.ones(f, np.float32))  # none fires
    alone = np.zeros((16, chunks * 128), np.float32)
    for i in range(16):
        table.down(kind, lines, d, f, 0, chunks, active[i], 0.3, alone[i])
    for n in (2, 3, 4, 5, 16):
        y = Guarded(n * chunks * 128)
        y.inner[:] = 0
        table.down(kind, lines, d, f, 0, chunks, np.concatenate(active[:n]), 0.3, y.inner)
        assert np.array_equal(y.check().reshape(n, -1), alone[:n])


@pytest.mark.parametrize(("kind", "transposed"), DOWNS)
def test_down_weights_each_part_by_itself(name: str, kind: int, transposed: bool) -> None:
    """The sum over a token's experts must not depend on whether it is computed alone (by parts) or in a prompt."""
    d, f = 160, columns(kind, 32 * (kernels.FFN_PART + 1))
    run_down, lines, active = down_case(name, kind, d, f, transposed)
    whole = inputs("normal", (256,), 3)
    y = whole.copy()
    run_down(kind, lines, d, f, 0, 2, active, 0.3, whole)
    for part in (slice(0, kernels.FFN_PART), slice(kernels.FFN_PART, None)):
        some, sums = np.zeros(len(active), active.dtype), np.zeros(256, np.float32)
        some[part] = active[part]
        run_down(kind, lines, d, f, 0, 2, some, 1.0, sums)
        Table(name).axpy(0.3, sums, y)
    assert np.array_equal(y, whole)


@pytest.mark.parametrize("n", [1, 7, 8, 31, 64, 1537])
def test_small_operations(name: str, n: int) -> None:
    a, b = inputs("normal", (n,), 1), inputs("normal", (n,), 2)
    table = Table(name)
    exact = a.astype(np.float64) @ b
    assert_close(np.array(table.dot(a, b)), exact, np.abs(a).astype(np.float64) @ np.abs(b))
    out = Guarded(n)
    table.rmsnorm(a, b, 1e-6, out.inner)
    assert np.allclose(out.check(), a / np.sqrt((a.astype(np.float64) ** 2).mean() + 1e-6) * b, rtol=1e-5, atol=1e-7)
    y = Guarded(n)
    y.inner[:] = b
    table.axpy(0.5, a, y.inner)
    assert np.allclose(y.check(), b + 0.5 * a, rtol=1e-6, atol=1e-6)


def test_to_f16_rounds_to_nearest_even(name: str) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 4096, np.uint32)
    x = bits.view(np.float32)
    x = np.concatenate([x[np.isfinite(x)], np.float32([0, -0.0, 65504, 65519.9, 65520, 1e-8, 6e-8, 2.0**-14, np.inf])])
    out = Guarded(len(x), np.uint16)
    Table(name).to_f16(x, out.inner)
    with np.errstate(over="ignore"):
        assert np.array_equal(out.check(), x.astype(np.float16).view(np.uint16))


def test_from_f16_is_exact(name: str) -> None:
    for bits in (np.arange(1 << 16, dtype=np.uint16), np.arange(13, dtype=np.uint16)):
        out = Guarded(len(bits))
        Table(name).from_f16(bits, out.inner)
        assert np.array_equal(out.check(), bits.view(np.float16).astype(np.float32), equal_nan=True)


@pytest.mark.parametrize("half", [1, 4, 13, 32, 64])
def test_rope_turns_pairs(name: str, half: int) -> None:
    x, angle = inputs("normal", (2 * half,)), np.random.default_rng(half).uniform(0, 100, half)
    v = Guarded(2 * half)
    v.inner[:] = x
    Table(name).rope(v.inner, np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32))
    turned = (x[:half] + 1j * x[half:].astype(np.float64)) * np.exp(1j * angle)
    assert np.allclose(v.check(), np.concatenate([turned.real, turned.imag]), rtol=0, atol=1e-6 * np.abs(x).max())


@pytest.mark.parametrize("n", [1, 7, 32, 64, 100])
def test_top_k_finds_the_largest_and_of_equal_ones_the_first(name: str, n: int) -> None:
    rng = np.random.default_rng(n)
    special = np.float32([0, -0.0, np.inf, -np.inf, 1e-42, -1e-42, -1])
    for x in (inputs("normal", (n,)), rng.choice(special, n), np.zeros(n, np.float32)):
        for k in {1, min(6, n), n}:
            ids = np.full(k, -1, np.int32)
            Table(name).top_k(x, ids)
            assert np.array_equal(ids, np.argsort(-x, kind="stable")[:k])


def test_top_k_takes_nan_first_and_none_twice(name: str) -> None:
    x = np.uint32([0x3F800000, 0xFFFFFFFF, 0x7F800001, 0xFF800000]).view(np.float32)
    ids = np.full(4, -1, np.int32)
    Table(name).top_k(x, ids)
    assert ids.tolist() == [1, 2, 0, 3]


@pytest.mark.parametrize(("rows", "cols"), [(16, 32), (40, 96), (200, 768)])
def test_layouts_are_permutations(name: str, rows: int, cols: int) -> None:
    for kind in TYPES:
        width = columns(kind, cols)
        raw = weights(kind, rows, width)[0]
        packed = kernels.pack_tile16(kind, raw, rows, width)
        assert np.array_equal(kernels.unpack_tile16(kind, packed, rows, width), raw)
    for kind in SPARSE:
        width = columns(kind, cols)
        raw = weights(kind, rows, width)[0]
        raw[:] = np.random.default_rng(kind).integers(0, 256, raw.shape)
        there = kernels.pack_rows(kind, raw, rows, width)
        assert np.array_equal(kernels.pack_rows(kind, there, rows, width, True), raw)
        assert np.array_equal(kernels.unpack_down(kind, kernels.pack_down(kind, raw, rows, width), rows, width), raw)
    raw = weights(2, 64, cols)[0]
    assert np.array_equal(kernels.unpack_down(2, kernels.pack_down(2, raw, cols, 64, True), cols, 64, True), raw)
