"""What `bench` measures and how it puts it, on tiny sizes. Nothing here is timed against a limit."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from smallthinker_edge._native.kernels import ACTIVE, FIRED, tables
from smallthinker_edge._native.timing import KERNELS, READ_STEP, Timer
from smallthinker_edge.cli import main
from smallthinker_edge.measure import bench, limits, sparsity
from smallthinker_edge.measure import kernels as kernel_bench

ROOT = Path(__file__).resolve().parents[2]
TINY = kernel_bench.Shape("tiny", 256, 4, 2, 32, 256, 8, 2)


@pytest.fixture(scope="module")
def memory() -> limits.Bytes:
    return limits.arbitrary_weights(4 << 20)


def test_every_kernel_of_the_table_can_be_timed() -> None:
    """The members of st_kernels that compute; a new one needs an apply_ function in timing.pyx and a case."""
    header = (ROOT / "include" / "smallthinker" / "kernels.h").read_text()
    body = header[header.index("typedef struct st_kernels {") : header.index("} st_kernels;")]
    members = set(re.findall(r"(?m)^    (?:st_\w+ \*|\w+ \(\*)(\w+)", body))
    assert {"gemm", "quantize"} <= members
    assert {family for _, family, _ in KERNELS.values()} == members | {"read"}
    assert {case.kernel for case in kernel_bench.cases(TINY)} == set(Timer.kernels()) - {"read"}


def test_bench_kernels_times_every_case_of_every_table(memory: limits.Bytes) -> None:
    results = list(kernel_bench.bench_kernels(memory, shapes=[TINY], threads=(1, 2), seconds=0))
    streamed = [case for case in kernel_bench.cases(TINY) if case.streamed]
    small = [case for case in kernel_bench.cases(TINY) if not case.streamed]
    matrices = [case for case in small if case.rows]
    assert len(results) == len(tables()) * (4 * len(streamed) + len(small) + len(matrices))
    assert all(np.isfinite(result.nanoseconds) and result.nanoseconds > 0 for result in results)
    text = kernel_bench.kernel_table(results, {})
    assert all(case.what in text for case in kernel_bench.cases(TINY))


def test_bytes_of_a_case_are_what_its_kernel_reads() -> None:
    sizes = {(case.kernel, case.what): kernel_bench.bytes_of(case) for case in kernel_bench.cases(TINY)}
    assert sizes["gemm_q4_0", "gate"] == 256 * 256 * 18 // 32
    assert sizes["gemm_q8_0", "head, 512 rows"] == 512 * 256 * 34 // 32
    assert sizes["rows_q4_0", "up, 38% active"] == 97 * 256 * 18 // 32  # 97 of 256 neurons
    assert sizes["rows_q5_k", "up, 38% active"] == 97 * 176
    assert sizes["down_q4_0", "down, all"] == 256 * 256 * 18 // 32
    assert sizes["down_q4_0", "down, 38% active"] == 256 * 2 * 8 + 97 * 128
    assert sizes["down_q4_k", "down, 38% active"] == 256 * (4 + 8 * 1.5) + 97 * 128
    assert sizes["down_q6_k", "down, 38% active"] == 256 * (2 + 16) + 97 * 192
    assert sizes["down_transposed_q4_0", "down, 38% active"] == 97 * (8 * 2 + 128)
    assert sizes["ffn_q4_0", "transposed down, 38% active"] == (256 + 97) * 256 * 18 // 32 + 97 * 144
    assert sizes["ffn_q4_k", "expert, 38% active"] == (256 + 97) * 144 + 256 * (4 + 8 * 1.5) + 97 * 128
    assert sizes["attention", "2 heads, 256 positions"] == 2 * 2 * 256 * 32
    assert sizes["quantize", "d"] == 0


def test_kernel_figures_are_in_units_of_the_read_limit() -> None:
    read = {2: limits.ReadLimit(20e9, 19e9, 21e9, 2, 1, 0, {})}
    gate, prompt, norm = (
        next(c for c in kernel_bench.cases(TINY) if c.what == w) for w in ("gate", "gate, 64 tokens", "d")
    )
    results = [
        kernel_bench.KernelResult("t", "tiny", gate, 2, True, 1000.0, 15_000, 16_384),
        kernel_bench.KernelResult("t", "tiny", prompt, 1, False, 1000.0, 9_216, 50_000),
        kernel_bench.KernelResult("t", "tiny", norm, 1, False, 42.0, 0, 0),
    ]
    text = kernel_bench.kernel_table(results, read)
    assert "| gemm_q4_0 | gate | tiny | memory | 2 | 15.0 GB/s (75%) |" in text
    assert "| 50.0 GMAC/s |" in text
    assert "| 42 ns |" in text


def test_active_groups_hold_the_chosen_neurons() -> None:
    chosen = kernel_bench.choose_rows(96, 0.25)
    groups = kernel_bench.active_groups("ref", 96, chosen)
    assert len(chosen) == 24
    assert groups.dtype == ACTIVE
    assert groups["count"].sum() == 24
    fired = [32 * g + index for g, group in enumerate(groups) for index in group["index"][: group["count"]]]
    assert fired == chosen.tolist()
    groups = kernel_bench.active_groups("ref", 96, chosen, transposed=True)
    assert groups.dtype == FIRED
    fired = [32 * g + index for g, group in enumerate(groups) for index in group["index"][group["h"] != 0]]
    assert fired == chosen.tolist()


def test_timer_refuses_what_would_read_outside(memory: limits.Bytes) -> None:
    timer, data = Timer("ref", 1), memory
    with pytest.raises(ValueError):
        timer.run("gemm_q4_0", data, 64, 0, 1, rows=64, cols=256)
    with pytest.raises(ValueError):
        timer.run("rows_q4_0", data, 1 << 16, 0, 1, rows=64, cols=256, index=np.array([64], np.int32))
    with pytest.raises(ValueError):
        timer.run("read", data, READ_STEP, 0, 1, streams=2)
    with pytest.raises(ValueError):
        timer.run("nothing", data, 1 << 16, 0, 1)
    with pytest.raises(ValueError):
        Timer("none", 1)


def test_read_limit_names_its_best_pattern(memory: limits.Bytes) -> None:
    limit = limits.read_limit(2, memory, seconds=0)
    assert limit.patterns[f"{limit.streams}/{limit.ahead}"] == max(limit.patterns.values())
    assert 0 < limit.slowest <= limit.bytes_per_second <= limit.fastest
    assert re.fullmatch(r"[\d.]+ GB/s \([\d.]+-[\d.]+\)", str(limit))


def test_what_is_streamed_fits_into_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    free = limits.psutil.virtual_memory()._replace(available=64 << 30)
    monkeypatch.setattr(limits.psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(limits, "memory_limit", lambda: None)
    for cache, expected in ((2 << 20, 1 << 30), (260 << 20, 1040 << 20)):
        monkeypatch.setattr(limits, "last_level_cache", lambda cache=cache: cache)
        assert limits.streaming_bytes() == expected
    monkeypatch.setattr(limits, "memory_limit", lambda: 600 << 20)
    assert limits.streaming_bytes() == 200 << 20


def test_arbitrary_weights_are_sound_scales(memory: limits.Bytes) -> None:
    scales = memory.view(np.float16).astype(np.float32)
    assert np.isfinite(scales).all()
    assert scales.min() > 1e-3
    assert scales.max() < 1


# Sparsity


@pytest.mark.parametrize("share", [0.02, 0.38, 1.0])
def test_gate_outputs_have_the_wanted_share(share: float) -> None:
    gate = sparsity.gate_outputs(768, share)
    assert gate.shape == (768,)
    assert (gate > 0).sum() == round(768 * share)


def test_bench_sparsity_measures_every_share_and_dense(memory: limits.Bytes) -> None:
    results = list(sparsity.bench_sparsity(memory, shapes=[TINY], tables=tables(), threads=(1, 2), shares=(0.1, 1.0)))
    assert len(results) == len(tables()) * 2 * 2 * 3
    assert all(result.low <= result.microseconds <= result.high for result in results)
    assert sparsity.sparsity_table(results).count("| tiny |") == len(tables()) * 2 * 2


@pytest.mark.parametrize(
    ("times", "dense", "equal"),
    [([10, 20, 30], 25, 0.75), ([10, 20, 30], 31, None), ([10, 20, 30], 5, 0.0), ([10, 20, 30], 20, 0.5)],
)
def test_crossover_lies_between_the_points_around_it(times: list[float], dense: float, equal: float | None) -> None:
    shares: list[float | None] = [0.2, 0.5, 1.0, None]
    results = [
        sparsity.FfnResult("t", "s", 1, share, micro, micro, micro)
        for share, micro in zip(shares, [*times, dense], strict=True)
    ]
    assert sparsity.crossover(results) == equal


def test_plot_is_written(memory: limits.Bytes, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = list(sparsity.bench_sparsity(memory, shapes=[TINY], tables=["ref"], shares=(0.1, 1.0)))
    sparsity.plot_sparsity(results, str(tmp_path / "curve.svg"))
    assert "<svg" in (tmp_path / "curve.svg").read_text()


def test_bench_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "SHAPES", (dataclasses.replace(TINY, name="4b"),))
    monkeypatch.setattr(bench, "streaming_bytes", lambda: 4 << 20)
    figures = tmp_path / "kernels.json"
    options = ["--tables", "ref", "--threads", "1", "--shapes", "4b", "--json", str(figures)]
    assert main(["bench", "kernels", *options]) == 0
    assert "Memory reads, 1 thread:" in capsys.readouterr().out
    written = json.loads(figures.read_text())
    assert written["read_limits"][0]["bytes_per_second"] > 0
    assert {result["table"] for result in written["kernels"]} == {"ref"}
    assert main(["bench", "kernels", "--tables", "none", "--threads", "1"]) == 2
