"""benchmarks/: what they count and how they put it, on made-up figures and tiny models."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import capped
import compare
import everything
import gguf_files
import growth
import pytest
import report
import worker
from traffic import Traffic, traffic_of

from smallthinker_edge.files.config import ModelConfig
from smallthinker_edge.files.gguf import GGUFFile, TensorInfo
from smallthinker_edge.files.pack import pack

ROOT = Path(__file__).resolve().parents[2]


# What a token reads


def test_traffic_of_the_4b_is_that_of_the_plan() -> None:
    """Tensor sizes by hand: 4 values of 18/32 bytes; a layer has q, k, v, o, router, norms, and 32 experts."""
    layers, d, f, experts, used, vocab = 32, 1536, 768, 32, 4, 151936
    q4 = 18 / 32
    tensors = {"token_embd.weight": (vocab * d * q4, "Q4_0"), "output_norm.weight": (4 * d, "F32")}
    for layer in range(layers):
        matrices = {"attn_q": d * 1536, "attn_k": d * 256, "attn_v": d * 256, "attn_output": 1536 * d}
        matrices |= {f"ffn_{part}_exps": experts * d * f for part in ("gate", "up", "down")}
        tensors |= {f"blk.{layer}.{name}.weight": (n * q4, "Q4_0") for name, n in matrices.items()}
        vectors = {"attn_norm": d, "ffn_norm": d, "ffn_gate_inp": experts * d}
        tensors |= {f"blk.{layer}.{name}.weight": (4 * n, "F32") for name, n in vectors.items()}
    info = {name: TensorInfo(name, kind, (), 0, int(size), 0) for name, (size, kind) in tensors.items()}

    class Config:
        tied, down_transposed, window, window_layout = True, False, 0, (False,) * layers
        n_layers, n_experts, n_experts_used, vocab_size = layers, experts, used, vocab
        n_kv_heads, head_dim = 2, 128

    traffic = traffic_of(info, Config(), 0.38)  # type: ignore[arg-type]
    attention, head, router, norms = layers * 3584 * d * q4, vocab * d * q4, layers * 4 * experts * d, 4 * d * 65
    assert traffic.dense == round(attention + head + router + norms + d * q4)
    assert traffic.experts_whole == layers * used * 3 * d * f * 18 // 32
    # gate whole, 0.38 of up, of down 2 of 18 bytes and 0.38 of the other 16
    share = (1 + 0.38 + (2 + 0.38 * 16) / 18) / 3
    assert traffic.experts == pytest.approx(traffic.experts_whole * share, abs=1)
    assert share == pytest.approx(0.61, abs=0.005)
    assert traffic.kv_position == 32 * 1024  # 32 KiB per token
    assert traffic.at(100) == traffic.dense + traffic.experts + 100 * 32 * 1024
    assert traffic.whole_at(0) == pytest.approx(485e6, rel=0.02)


def test_traffic_counts_whole_experts_where_nothing_is_skipped(tmp_path: Path) -> None:
    """A file of F32 and F16 tensors has no layout that skips; its dense bytes are those of the file's tensors."""
    path = gguf_files.write_model(tmp_path / "model.gguf", types="F16")
    with GGUFFile(path) as file:
        config = ModelConfig.from_gguf(file)
        traffic = traffic_of(file.tensors, config, 0.1)
        experts = sum(t.nbytes for name, t in file.tensors.items() if "_exps" in name)
    assert traffic.experts_whole == experts * config.n_experts_used // config.n_experts
    assert traffic.experts == traffic.experts_whole


@pytest.mark.parametrize(
    ("types", "transposed", "of_down"),
    [
        (("Q4_K", "Q5_K", "Q6_K"), False, (18 + 0.5 * 192) / 210),
        (("Q8_0", "Q4_K", "Q4_K"), False, (16 + 0.5 * 128) / 144),
        (("Q4_0", "Q4_0", "Q5_K"), False, (16 + 0.5 * 160) / 176), (("Q4_K", "Q8_0", "Q4_K"), False, None),
        (("Q4_K", "Q4_K", "Q4_K"), True, None), (("Q3_K", "Q4_K", "Q4_K"), False, None),
    ],
)  # fmt: skip
def test_traffic_of_mixed_types_skips_where_the_engine_does(
    types: tuple[str, str, str], transposed: bool, of_down: float | None
) -> None:
    names = [f"blk.0.ffn_{part}_exps.weight" for part in ("gate", "up", "down")]
    sizes = (1000, 2000, 3000)
    info = {"token_embd.weight": TensorInfo("token_embd.weight", "F16", (), 0, 100, 0)}
    info |= {name: TensorInfo(name, t, (), 0, size, 0) for name, t, size in zip(names, types, sizes, strict=True)}

    class Config:
        tied, down_transposed, window, window_layout = True, transposed, 0, (False,)
        n_layers, n_experts, n_experts_used, vocab_size, n_kv_heads, head_dim = 1, 4, 4, 10, 1, 32

    expected = 6000 if of_down is None else round(1000 + 0.5 * 2000 + of_down * 3000)
    assert traffic_of(info, Config(), 0.5).experts == expected  # type: ignore[arg-type]


def test_traffic_of_a_transposed_down_has_the_scales_of_active_neurons_only(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"types": "Q4_0", "d_model": 256, "d_ffn": 64, "n_experts": 4, "n_experts_used": 2}
    experts = []
    for transposed in (False, True):
        with GGUFFile(gguf_files.write_model(tmp_path / "m.gguf", **shape, down_transposed=transposed)) as file:
            experts.append(traffic_of(file.tensors, ModelConfig.from_gguf(file), 0.5).experts)
    matrix = 256 * 64 * 18 // 32
    layers = 4
    assert experts == [layers * 2 * (2 * matrix + matrix // 18), layers * 4 * matrix]


def test_traffic_of_a_window_stops_growing() -> None:
    traffic = Traffic(dense=1000, experts=200, experts_whole=500, kv_position=10, kv_position_window=30, window=64)
    assert traffic.at(64) == 1200 + 64 * 40
    assert traffic.at(164) == 1200 + 164 * 10 + 64 * 30
    assert traffic.whole_at(0) == 1500


# All of it


def test_steps_of_everything_leave_files_of_different_names(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.touch()
    for quick, size in ((False, 1 << 30), (True, 1 << 30), (False, 1 << 20)):
        os.truncate(model, size)  # without blocks
        steps = list(everything.steps(model, model.with_suffix(".stpk"), tmp_path, "python", quick))
        assert any(step.output.name == "budgets.json" for step in steps) == (size == 1 << 30)
        names = [step.output.name for step in steps]
        assert len(names) == len(set(names))
        assert "threads-1.json" in names
        for step in steps:
            assert step.output.parent == tmp_path
            named = {str(step.output), str(step.output.with_suffix(""))} & set(step.command)
            assert named or step.prints, "a step writes the file it is known by"
    assert everything.folder_name("AMD EPYC(R) 9R14 96-Core", Path("x/4b-q4km.gguf")) == "amd-epyc-9r14-96-core-4b-q4km"


def test_a_step_that_fails_leaves_no_file(tmp_path: Path) -> None:
    step = everything.Step(tmp_path / "a.md", [sys.executable, "-c", "print('half'); raise SystemExit(3)"], prints=True)
    with pytest.raises(SystemExit, match="exit status 3"):
        everything.run(step)
    assert not list(tmp_path.iterdir())
    everything.run(everything.Step(tmp_path / "a.md", [sys.executable, "-c", "print('whole')"], prints=True))
    assert (tmp_path / "a.md").read_text() == "whole\n"


def test_growth_is_drawn_from_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        growth.draw(tmp_path)
    rows = [{"memory": f"{n}MiB", "fits": n > 300, "decode": [n / 10, n / 20, n / 5]} for n in (256, 512, 1024)]
    (tmp_path / "budgets.json").write_text(json.dumps({"budgets": rows}))
    ((title, _, points),) = growth.panels(tmp_path)
    assert (title, points) == ("Decoding within a budget", {report.OURS: [(0.5, 51.2), (1.0, 102.4)]})
    for name, context, rivals in (("growth", 4096, {"llama.cpp": [20.0]}), ("growth-long", 32000, {})):
        (tmp_path / f"{name}.json").write_text(json.dumps(result_of([40.0], rivals, context)))
    (title, _, points), _ = growth.panels(tmp_path)
    assert (title, points["llama.cpp"]) == ("Decoding after a context", [(4096, pytest.approx(20))])
    assert points[report.OURS] == [(4096, pytest.approx(40)), (32000, pytest.approx(40))]
    pytest.importorskip("matplotlib")
    assert growth.draw(tmp_path).read_text().startswith("<?xml")


# The worker


class FakeEngine:
    """Remembers what it was asked to run."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def describe(self) -> dict[str, Any]:
        return {"engine": "fake"}

    def reset(self, stream: str) -> None:
        self.calls.append(("reset", stream))

    def run(self, stream: str, tokens: Sequence[int]) -> None:
        self.calls.append((stream, list(tokens)))

    def twice(self, number: int) -> dict[str, Any]:
        return {"twice": 2 * number}


def test_worker_runs_prompts_whole_and_decodes_token_by_token() -> None:
    engine, answers = FakeEngine(), io.StringIO()
    jobs = [
        {"stream": "a", "tokens": [1, 2, 3], "steps": False, "reset": True},
        {"stream": "b", "tokens": [4, 5], "steps": True, "reset": False},
        {"call": "twice", "arguments": {"number": 21}},
    ]
    worker.serve(engine, io.StringIO("".join(json.dumps(job) + "\n" for job in jobs)), answers)
    head, prompt, decode, called = (json.loads(line) for line in answers.getvalue().splitlines())
    assert engine.calls == [("reset", "a"), ("a", [1, 2, 3]), ("b", [4]), ("b", [5])]
    assert head == {"engine": "fake"}
    assert prompt["seconds"] > 0
    assert called["twice"] == 42
    assert all("idle_cpu_seconds" in answer for answer in (prompt, decode, called))


# The report


def result_of(ours: Sequence[float], rivals: dict[str, Sequence[float]], context: int = 0) -> dict[str, Any]:
    """A result whose decode job of 10 tokens ran at the given tokens per second."""
    job = {"tokens": 10, "context": context, "steps": True}
    runs = [
        {"job": job, "contender": name, "repetition": i, "seconds": 10 / rate, "idle_cpu_seconds": 0.002,
         "foreign_cpu_share": 0.01}
        for name, values in {"smallthinker_edge": ours, **rivals}.items()
        for i, rate in enumerate(values)
    ]  # fmt: skip
    traffic = Traffic(
        dense=10**6, experts=10**6, experts_whole=2 * 10**6, kv_position=1000, kv_position_window=0, window=0
    )
    machine = {"cpu": "A CPU", "cpus": 2, "memory_bytes": 4 << 30, "system": "Linux 6", "python": "3.11"}
    return {
        "date": "2026-01-02", "machine": machine, "model": {"name": "m", "file_bytes": 10**9}, "threads": 2,
        "turns": "job by job", "active_share": 0.38, "active_share_source": "given", "traffic": traffic.as_dict(),
        "engines": {"smallthinker_edge": {"engine": "smallthinker_edge 1", "kernels": "avx2"}},
        "read_limits": [{"bytes_per_second": 1e9}, {"bytes_per_second": 4e8}, {"bytes_per_second": 5e8}],
        "runs": runs, "first_token": [],
    }  # fmt: skip


def test_ratio_is_the_median_of_pairs_not_of_medians() -> None:
    result = result_of([10, 40, 90], {"llama.cpp": [10, 10, 30]})
    values = report.summary(result, report.jobs_of(result)[0])
    assert values["ours"] == pytest.approx(40)
    assert values["rival"] == pytest.approx(10)
    assert values["ratios"] == pytest.approx([1, 4, 3])
    assert values["ratio"] == pytest.approx(3)


def test_rival_is_the_faster_of_its_settings() -> None:
    settings = {"llama.cpp, flash attention on": [5, 5, 5], "llama.cpp, flash attention off": [4, 8, 9]}
    result = result_of([16, 16, 16], settings)
    values = report.summary(result, report.jobs_of(result)[0])
    assert values["rival_name"] == "llama.cpp, flash attention off"
    assert values["ratio"] == pytest.approx(2)


def test_bytes_per_second_count_the_growing_context() -> None:
    """Token i of a repetition attends to context + 10 * repetition + i positions: 5.5 on average, and 1 kB each."""
    result = result_of([100, 100, 100], {}, context=50)
    job = report.jobs_of(result)[0]
    assert report.bytes_per_second(result, job, "smallthinker_edge", False) == pytest.approx(100 * (2e6 + 65_500))
    result = result_of([100, 100, 100], {})
    job = report.jobs_of(result)[0]
    assert report.bytes_per_second(result, job, "smallthinker_edge", False) == pytest.approx(100 * (2e6 + 5_500))
    assert report.bytes_per_second(result, job, "smallthinker_edge", True) == pytest.approx(100 * (3e6 + 5_500))


def test_markdown_shows_ratio_and_share_of_the_median_read_limit() -> None:
    text = report.markdown(result_of([100, 100, 100], {"llama.cpp": [40, 50, 60]}))
    assert "**2.00 (1.67-2.50)**" in text
    assert "of the read limit, 0.5 (0.4-1.0) GB/s" in text
    assert "| smallthinker_edge, decode, empty context | 2 MB | 0.2 GB/s | 40% |" in text
    assert "2026-01-02; A CPU, 2 CPUs, 4 GiB" in text
    assert text.startswith("# m, avx2, A CPU\n")


def test_every_comparison_of_a_folder_has_its_page(tmp_path: Path) -> None:
    result = result_of([1], {})
    (tmp_path / "b.json").write_text(json.dumps(result))
    (tmp_path / "other.json").write_text("{}")
    assert report.pages(tmp_path) == {tmp_path / "b.md": report.markdown(result)}


def budget(memory: str, **figures: Any) -> dict[str, Any]:
    """A budget's row: 2 MB read a token in 4 ms, half of it in vain."""
    row = {"memory": memory, "fits": True, "slots": 9.0, "hit_rate": 0.75, "ahead_hit_rate": 0.1,
           "decode": [80, 90, 100], "alone": [100, 120, 110], "wait_share": 0.09, "stolen_share": 0.04,
           "read_bytes_per_token": 2e6, "wasted_bytes_per_token": 1e6, "disk_seconds_per_token": 4e-3}  # fmt: skip
    return row | figures


def test_a_budget_is_bound_by_computing_or_by_what_had_to_be_read() -> None:
    assert report.budget_bound(budget("a")) == pytest.approx(110)
    assert report.budget_bound(budget("a", disk_seconds_per_token=40e-3)) == pytest.approx(1 / 20e-3)
    nothing_read = {f"{name}_per_token": 0.0 for name in ("read_bytes", "wasted_bytes", "disk_seconds")}
    assert report.budget_bound(budget("a", **nothing_read)) == pytest.approx(110)


def test_page_of_budgets(tmp_path: Path) -> None:
    rows = [{"memory": "1MiB", "fits": False, "why": "too small"},
            {"memory": "2MiB", "fits": False, "why": "killed for memory: 1"},
            budget("1GiB"), budget("9GiB", alone=[], stolen_share=0.2)]  # fmt: skip
    result = {name: result_of([1], {})[name] for name in ("date", "machine", "model", "threads")}
    (tmp_path / "budgets.json").write_text(json.dumps(result | {"context": 64, "budgets": rows}))
    ((path, text),) = report.pages(tmp_path).items()
    assert path == tmp_path / "budgets.md"
    too_small, killed, beside, without = (line for line in text.splitlines() if re.match(r"\| \d", line))
    assert "| does not fit |" in too_small
    assert "| killed for memory |" in killed
    assert "| **90.0 (80.0-100.0)** | 110.0 (100.0-120.0) | 0.80 (0.75-0.91) | 110.0, 82% | 9% |" in beside
    assert without.endswith("| **90.0 (80.0-100.0)** |  |  |  | 9% |")
    assert len({line.count("|") for line in (too_small, killed, beside, without)}) == 1
    assert "took 4% to 20% of a CPU" in text
    untold = result | {"context": 64, "budgets": [budget("1GiB", stolen_share=None)]}
    (tmp_path / "budgets.json").write_text(json.dumps(untold))
    assert "The host" not in report.pages(tmp_path)[path]


def test_budgets_of_the_demo_model(demo_model: Path, tmp_path: Path) -> None:
    try:
        capped.Cgroup(1 << 30).remove()
    except OSError as problem:
        pytest.skip(f"no memory cgroup can be made here: {problem}")
    packed = tmp_path / "demo.stpk"
    pack(demo_model, packed)
    command = [sys.executable, str(ROOT / "benchmarks" / "budgets.py"), str(packed), "--budgets", "1MiB", "300MiB"]
    command += ["--context", "256", "--threads", "1", "--tokens", "2", "--series", "2", "--output", str(tmp_path / "b")]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    too_small, fits = json.loads((tmp_path / "b.json").read_text())["budgets"]
    assert not too_small["fits"]
    assert "killed for memory" in too_small["why"]
    assert fits["hit_rate"] > 0
    assert 0 <= fits["wait_share"] < 1
    assert len(fits["decode"]) == len(fits["alone"]) == 2
    assert any("exit status 0" in line for line in fits["limit"])
    assert report.pages(tmp_path) == {tmp_path / "b.md": (tmp_path / "b.md").read_text()}


def test_bars_are_as_long_as_the_ratios_say(tmp_path: Path) -> None:
    rows = [{"name": "a < b", "result": "b.json", "job": "decode, empty context"},
            {"name": "c", "ours": 9, "theirs": 6, "ratio": 1.5}]  # fmt: skip
    (tmp_path / "b.json").write_text(json.dumps(result_of([100], {"llama.cpp": [40]})))
    (tmp_path / "c.json").write_text(json.dumps({"title": "t", "rows": rows}))
    ((path, text),) = report.pictures(tmp_path).items()
    assert path == tmp_path / "c.svg"
    assert "a &lt; b" in text
    ours_a, theirs_a, ours_c, theirs_c = (
        float(width) for width in re.findall(r'width="([\d.]+)" height="11"', text)[:4]
    )
    assert (ours_a / theirs_a, ours_c / theirs_c) == pytest.approx((2.5, 1.5), rel=1e-3)


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\nmodel\t: 1\n",
         "AMD EPYC (family 25, model 17)"),
        ("model name\t: Intel(R) Xeon(R) Gold 6448Y\ncpu family\t: 6\nmodel\t\t: 143\n", "Intel(R) Xeon(R) Gold 6448Y"),
        ("model name\t: Intel(R) Xeon(R) CPU @ 2.20GHz\ncpu family\t: 6\nmodel\t\t: 79\n",
         "Intel(R) Xeon(R) CPU @ 2.20GHz (family 6, model 79)"),
        ("processor\t: 0\nCPU part\t: 0xd08\n\nModel\t\t: Raspberry Pi 4 Model B\n", "Raspberry Pi 4 Model B"),
        ("processor\t: 0\n", None),
    ],
)  # fmt: skip
def test_cpus_of_one_name_are_told_apart(cpuinfo: str, name: str | None) -> None:
    assert compare.cpu_name(cpuinfo) == name


def test_comparison_measures_this_library_alone(demo_model: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "compare.py"),
        str(demo_model),
        "--threads",
        "1",
        "--decode",
        "2",
    ]
    command += ["--contexts", "0", "16", "--prompts", "8", "--repetitions", "2", "--starts", "1"]
    subprocess.run([*command, "--output", str(tmp_path / "r")], check=True, capture_output=True, timeout=300)
    result = json.loads((tmp_path / "r.json").read_text())
    assert [report.job_name(job) for job in report.jobs_of(result)] == [
        "prompt of 8",
        "decode, empty context",
        "decode, context 16",
    ]
    assert len(result["runs"]) == 6
    assert all(run["seconds"] > 0 for run in result["runs"])
    assert (tmp_path / "r.md").read_text() == report.markdown(result)


class Listener:
    """A worker's stand-in that keeps what it is asked for."""

    ask = compare.Worker.ask

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        self.jobs: list[tuple[str, int, bool]] = []
        self.process = SimpleNamespace(stdin=io.StringIO())

    def _answer(self) -> dict[str, Any]:
        job = json.loads(self.process.stdin.getvalue().splitlines()[-1])
        self.jobs.append((job["stream"], len(job["tokens"]), job["reset"]))
        return {"seconds": 1.0, "cpu_seconds": 1.0, "idle_cpu_seconds": 0.0}


def test_contexts_are_filled_once_and_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filling a context takes most of a run's time; a stream that has outgrown the next one begins anew."""
    monkeypatch.setattr(compare, "SETTLE_SECONDS", 0)
    arguments = compare.arguments_parser().parse_args(
        ["m", "--contexts", "40", "0", "100", "45", "--decode", "4", "--prompts", "8", "--repetitions", "2"]
    )
    plan = compare.make_plan(arguments, 1000, 256)
    listener, ours = Listener(), plan.contenders[0]
    for jobs in plan.stages:
        for job in jobs:
            compare.fill(listener, plan, ours, job)  # type: ignore[arg-type]
        for number in range(plan.repetitions):
            list(compare.measure({ours.engine: listener}, plan, jobs, number))  # type: ignore[dict-item]
    empty = [("empty", 8, True), ("empty", 4, True)]
    turns = [("grown", 4, False)] * 2
    fills = [("grown", 40, True)], [("grown", 45, True)], [("grown", 100 - 53, False)]
    assert listener.jobs == [*empty, *empty, *fills[0], *turns, *fills[1], *turns, *fills[2], *turns]


class Neighbour:
    """A worker's stand-in: while it works, another process uses the machine as long as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, foreign: Sequence[float]) -> None:
        self.foreign, self.jobs, self.busy = list(foreign), 0, 0.0
        monkeypatch.setattr(compare, "SETTLE_SECONDS", 0)
        monkeypatch.setattr(compare, "busy_seconds", lambda: self.busy)

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        self.busy += 2.0 + self.foreign[self.jobs]
        self.jobs += 1
        return {"seconds": 1.0, "cpu_seconds": 2.0, "idle_cpu_seconds": 0.0}


@pytest.mark.parametrize(
    ("foreign", "context", "attempts"),
    [([0.05], 0, 1), ([0.9, 0.05], 0, 2), ([0.9, 0.8, 0.7], 0, 3), ([0.9], 4096, 1)],
)
def test_a_disturbed_turn_is_taken_again(
    foreign: list[float], context: int, attempts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Neighbour(monkeypatch, foreign)
    contender, job = compare.Contender("a", "a", ""), compare.Job(4, context, True)
    answer = compare.calm_turn(worker, contender, job, [1, 2, 3, 4])  # type: ignore[arg-type]
    assert answer["attempts"] == worker.jobs == attempts
    assert answer["foreign_cpu_share"] == pytest.approx(foreign[-1])
