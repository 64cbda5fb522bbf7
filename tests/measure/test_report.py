"""The report of a run: figures that add up, and a page that shows them and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from browser import browsing
from gguf_files import write_model
from small_model import SHAPE

from smallthinker_edge import ContextFull, SmallThinker, cli
from smallthinker_edge.files.pack import pack
from smallthinker_edge.measure.page import MOST_POINTS, percent, render, ticks
from smallthinker_edge.measure.report import run_report
from smallthinker_edge.measure.trace import record
from smallthinker_edge.plan import Plan, make_plan

LAYERS, EXPERTS, USED = SHAPE["n_layers"], SHAPE["n_experts"], SHAPE["n_experts_used"]
BUDGET = 64 << 30
TEMPLATE = {"tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}:"}
HOSTILE = "<script>alert(1)</script> \"'&amp; </title></svg> \x1b[2J\u202e"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("report")
    plain = write_model(folder / "m.gguf", **SHAPE)
    pack(plain, folder / "m.stpk")
    return {"plain": Path(plain), "paged": folder / "m.stpk"}


@contextmanager
def opened(files: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallThinker]:
    """The plain model, or the packed one in a budget whose slots hold one layer's experts."""

    def planned(*arguments: Any, **more: Any) -> Plan:
        plan = make_plan(*arguments, **more)
        return replace(plan, slots=plan.least_slots) if plan.limit is not None else plan

    monkeypatch.setattr("smallthinker_edge.opening.make_plan", planned)
    with SmallThinker(files[kind], memory=BUDGET if kind == "paged" else None, threads=1, context=512) as model:
        yield model


def page_of(figures: dict[str, Any]) -> ElementTree.Element:
    text = render(figures)
    assert text.startswith("<!DOCTYPE html>")
    return ElementTree.fromstring(text)


def text_of(page: ElementTree.Element, path: str) -> str:
    found = page.find(path)
    assert found is not None, path
    return "".join(found.itertext())


def titles(page: ElementTree.Element, path: str) -> list[str]:
    return [str(element.text) for element in page.iterfind(path)]


@pytest.mark.parametrize("kind", ["plain", "paged"])
def test_the_figures_add_up(kind: str, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(files, kind, monkeypatch) as model:
        told: list[tuple[int, int]] = []
        report = run_report(
            model,
            ["hello world", "on the other hand"],
            lambda done, total, _: told.append((done, total)),
            max_tokens=20,
        )
        stats: dict[str, Any] = model.stats()
    figures = json.loads(json.dumps(report.figures()))
    samples, times = figures["samples"], figures["times"]
    tokens = sum(sample["tokens"] for sample in samples)
    computed = sum(
        answer["prompt_tokens"] - answer["reused_tokens"] + answer["tokens"] - 1 for answer in figures["answers"]
    )
    assert figures["experts"]["tokens"] == tokens == computed == times["prompt"]["tokens"] + times["answer"]["tokens"]
    assert len(figures["experts"]["uses"]) == LAYERS
    for layer in figures["experts"]["uses"]:
        assert len(layer) == EXPERTS
        assert sum(layer) == tokens * USED
    for phase in ("prompt", "answer"):
        parts = {name: value for name, value in times[phase].items() if name not in ("total", "tokens")}
        assert sum(parts.values()) == pytest.approx(times[phase]["total"])
        assert parts["waiting"] == 0 if kind == "plain" else parts["waiting"] > 0
        assert min(parts[name] for name in ("attention", "experts", "head")) > 0
    assert times["prompt"]["total"] + times["answer"]["total"] == pytest.approx(stats["decode_seconds"])
    assert [sample["at"] for sample in samples] == sorted(sample["at"] for sample in samples)
    assert told[-1] == (2, 2)
    assert figures["paged"] == (kind == "paged")
    if kind == "plain":
        assert figures["paging"] is None
        return
    counts = figures["paging"]
    assert {name: counts[name] for name in ("hits", "ahead_hits", "misses", "read_bytes")} == {
        name: stats[name] for name in ("hits", "ahead_hits", "misses", "read_bytes")
    }
    assert counts["hit_rate"] == pytest.approx(stats["hit_rate"])
    assert counts["misses"] > 0
    assert figures["plan"]["limit"] == BUDGET
    assert samples[-1]["slots"] == EXPERTS


def test_waiting_is_what_the_one_thread_stalls(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(files, "paged", monkeypatch) as model:
        model.generate("hello", max_tokens=30)
        stats: dict[str, Any] = model.stats()
    assert 0 < stats["stall_seconds"] <= stats["wait_seconds"] < stats["decode_seconds"]
    parts = ("attention_seconds", "expert_seconds", "head_seconds", "wait_seconds", "other_seconds")
    assert sum(stats[name] for name in parts) == pytest.approx(stats["decode_seconds"])


def test_uses_of_experts_are_those_of_a_trace(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(files, "plain", monkeypatch) as model:
        report = run_report(model, ["hello"], max_tokens=9)
    with opened(files, "plain", monkeypatch) as model:
        assert report.uses == record(model, model.tokenize("hello"), 9).counts().tolist()


@pytest.mark.parametrize("kind", ["plain", "paged"])
def test_the_page_shows_the_figures(kind: str, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(files, kind, monkeypatch) as model:
        figures = run_report(model, ["hello world"], max_tokens=12).figures()
    page = page_of(figures)
    experts = figures["experts"]
    assert titles(page, ".//svg[@id='heat']/rect/title") == [
        f"layer {layer}, expert {expert}: {100 * count / experts['tokens']:.1f} %"
        for layer, counts in enumerate(experts["uses"])
        for expert, count in enumerate(counts)
    ]
    rows = [[*map("".join, (cell.itertext() for cell in row))] for row in page.iterfind(".//table[@id='times']/*/tr")]
    names = ["attention", "experts", "head", "waiting", "other", "total"]
    for name, row in zip(names, rows[1:], strict=True):
        for column, phase in ((1, "answer"), (3, "prompt")):
            times = figures["times"][phase]
            amount, unit = row[column].split()
            scale = {"s": 1, "ms": 1e-3, "µs": 1e-6}[unit]
            assert float(amount) * scale == pytest.approx(times[name] / times["tokens"], rel=0.01, abs=1e-7)
            assert row[column + 1] == percent(times[name] / times["total"])
    assert text_of(page, ".//dd[@id='peak']").startswith(f"{figures['peak_bytes'] / 2**20:,.1f} MiB")
    charts = page.findall(".//svg[@class='chart']")
    assert titles(charts[0], "rect[@class='point']/title") == [
        f"{sample['at']:.3f} s: {sample['rss_bytes'] / 2**20:,.1f} MiB" for sample in figures["samples"]
    ]
    levels = [str(text.text) for text in charts[0].iterfind("text[@class='level']")]
    assert levels == ([] if kind == "plain" else ["budget 65,536.0 MiB"])
    assert len(charts) == (1 if kind == "plain" else 2)
    if kind == "paged":
        hits = ahead = used = 0
        for sample, title in zip(figures["samples"], titles(charts[1], "rect[@class='point']/title"), strict=True):
            uses = sample["hits"] + sample["ahead_hits"] + sample["misses"]
            hits, ahead, used = hits + sample["hits"], ahead + sample["ahead_hits"], used + uses
            assert title == (
                f"{sample['at']:.3f} s: {percent(sample['hits'] / uses)}, {percent(hits / used)} so far, "
                f"{percent((hits + ahead) / used)} with those read ahead"
            )
        assert hits / used == figures["paging"]["hit_rate"]
        assert text_of(page, ".//dd[@id='hit-rate']").startswith(percent(figures["paging"]["hit_rate"]))


def test_many_samples_become_few_points(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(files, "paged", monkeypatch) as model:
        figures = run_report(model, ["hello world"], max_tokens=12).figures()
    figures["samples"] = [
        {**figures["samples"][-1], "at": (i + 1) / 100, "hits": 1, "ahead_hits": i % 2, "misses": 1}
        for i in range(1000)
    ]
    charts = page_of(figures).findall(".//svg[@class='chart']")
    for chart in charts:
        assert len(chart.findall("rect[@class='point']")) == MOST_POINTS
    assert (
        titles(charts[1], "rect[@class='point']/title")[-1]
        == "10.000 s: 38.5 %, 40.0 % so far, 60.0 % with those read ahead"
    )


def test_the_page_needs_nothing_else(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(files, "paged", monkeypatch) as model:
        text = render(run_report(model, ["hello"], max_tokens=3).figures())
    assert not re.search(r"https?:|//|src=|href=|@import|url\(|<script|<link|<iframe", text)


def test_names_prompts_and_answers_are_shown_and_never_obeyed(tmp_path: Path) -> None:
    path = write_model(tmp_path / "<b>&\"'.gguf", metadata=TEMPLATE)
    with SmallThinker(path) as model:
        figures = run_report(model, [HOSTILE], max_tokens=3).figures()
    figures["answers"][0]["text"] = HOSTILE
    page = page_of(figures)
    shown = HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert text_of(page, ".//h1") == "<b>&\"'"
    assert [pre.text for pre in page.iterfind(".//pre")] == [shown, shown]
    assert page.find(".//script") is None
    assert page.find(".//b") is None


def test_a_prompt_that_cannot_run_is_named_before_anything_is_computed(tiny_model: Path) -> None:
    with SmallThinker(tiny_model, context=64) as model:
        with pytest.raises(ContextFull, match="prompt 2 has"):
            run_report(model, ["hello", "x" * 100])
        with pytest.raises(ValueError, match="prompt 2 is empty"):
            run_report(model, ["hello", ""])
        with pytest.raises(ValueError, match="no prompt"):
            run_report(model, [])
        assert model.stats()["decode_seconds"] == 0


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.07, [0, 0.02, 0.04, 0.06]),
        (1234, [0, 500, 1000]),
        (100, [0, 20, 40, 60, 80, 100]),
    ],
)
def test_ticks_are_round_numbers(end: float, expected: list[float]) -> None:
    assert ticks(end) == pytest.approx(expected)


def test_the_command_writes_a_page_and_its_figures(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\n\non the hello\n", encoding="utf-8")
    target = tmp_path / "report.html"
    arguments = ["report", "-m", str(tiny_model), "--prompts", str(prompts), "-o", str(target), "--max-tokens", "4"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "report.json"), str(target)]
    figures = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [answer["prompt"] for answer in figures["answers"]] == ["hello", "on the hello"]
    assert target.read_text(encoding="utf-8") == render(figures)


def test_the_command_takes_prompts_from_the_line_or_asks_its_own(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for given, count in ((["-p", "hello", "-p", "on"], 2), ([], 3)):
        assert (
            cli.main(["report", "-m", str(tiny_model), "-o", str(tmp_path / "r.html"), "--max-tokens", "2", *given])
            == 0
        )
        assert len(json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["answers"]) == count
    assert cli.main(["report", "-m", str(tiny_model), "-o", str(tmp_path / "r.json")]) == 2
    assert "cannot end in .json" in capsys.readouterr().err


def test_a_browser_shows_the_page(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with browsing() as browser:
        with opened(files, "paged", monkeypatch) as model:
            page = render(run_report(model, [HOSTILE, "hello"], max_tokens=40).figures())
        (tmp_path / "report.html").write_text(page, encoding="utf-8")
        browser.open((tmp_path / "report.html").as_uri())
        assert browser.complaints() == []
        assert browser.run("return document.querySelectorAll('#heat rect').length") == LAYERS * EXPERTS
        widths = browser.run("return [...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect().width)")
        assert min(widths) > 200
        assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
