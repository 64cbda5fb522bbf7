"""The page of a report: one HTML file that needs nothing else, no script, no font, no network.

Called by `smallthinker-edge report` with the figures that it also writes as JSON: whatever the page shows is one of
them, or computed from them here. What prompts, answers and files say is text (Jinja2 escapes it) and never obeyed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from smallthinker_edge.measure.report import USES
from smallthinker_edge.measure.trace import hot_share
from smallthinker_edge.printable import printable

PHASES = {"answer": "token of an answer", "prompt": "token of a prompt"}
PARTS = {
    "attention": "attention and router",
    "experts": "experts",
    "head": "LM head",
    "waiting": "waiting for reads of experts",
    "other": "embedding and the rest",
}
MOST_POINTS = 200  # of a line; more samples are put together
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 960, 240, 76, 16, 12, 30  # of a chart; of the margins around its area
CELL, HEAT_LEFT, HEAT_TOP = 14, 30, 18  # of the heat map


@dataclass(frozen=True)
class Chart:
    """A drawing over the time of the run, in units of its view box.

    Attributes:
        x_ticks, y_ticks: places and labels. lines: (CSS class, points). level: place and label of a straight line.
        points: (x, width, text) of what is shown where the pointer is. shades: (x, width, text) of the prompts.
    """

    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[tuple[str, str]]
    level: tuple[float, str] | None
    points: list[tuple[float, float, str]]
    shades: list[tuple[float, float, str]]


def render(figures: Mapping[str, Any]) -> str:
    """The page of Report.figures()."""
    environment = Environment(
        loader=PackageLoader("smallthinker_edge", "measure"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value, keep="\n\t") if type(value) is str else value,
    )
    environment.filters |= {"percent": percent, "mib": mib, "seconds": seconds, "number": number}
    samples = together(figures["samples"])
    page: str = environment.get_template("report.html").render(
        figures,
        phases=PHASES,
        parts=PARTS,
        speed=speed(figures["answers"]),
        hot=hot_share(np.array(figures["experts"]["uses"])),
        heat=heat(figures),
        memory_chart=memory_chart(figures, samples),
        hits_chart=hits_chart(figures, samples) if figures["paged"] else None,
        size={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
        cell=CELL,
        heat_at=(HEAT_LEFT, HEAT_TOP),
    )
    return page


def percent(share: float) -> str:
    return f"{share * 100:.1f} %"


def mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def number(value: float) -> str:
    """Of a place in a drawing."""
    return f"{value:.1f}"


def seconds(value: float) -> str:
    """A time in a unit that suits it."""
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.2f} ms" if value >= 1e-3 else f"{value * 1e6:.1f} µs"


def speed(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Tokens per second of all prompts and of all answers; 0 where none were computed."""

    def rate(tokens: float, seconds: float) -> float:
        return tokens / seconds if seconds > 0 else 0.0

    return {
        "prompt": rate(
            sum(answer["prompt_tokens"] - answer["reused_tokens"] for answer in answers),
            sum(answer["prompt_seconds"] for answer in answers),
        ),
        "answer": rate(
            sum(max(0, answer["tokens"] - 1) for answer in answers),  # the first one came with its prompt
            sum(answer["answer_seconds"] for answer in answers),
        ),
    }


def together(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The samples as at most MOST_POINTS: counts added, memory the most of any."""
    each = math.ceil(len(samples) / MOST_POINTS)
    groups = [samples[i : i + each] for i in range(0, len(samples), each)]
    ends = [0.0, *(group[-1]["at"] for group in groups)]
    return [
        {
            "from": start,
            "to": end,
            "rss_bytes": max(sample["rss_bytes"] for sample in group),
            **{name: sum(sample[name] for sample in group) for name in USES},
        }
        for group, start, end in zip(groups, ends, ends[1:], strict=False)
    ]


def heat(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Shares of the tokens that use each expert [L][E], and what the scale of the colours needs."""
    experts, model = figures["experts"], figures["model"]
    shares = [[count / experts["tokens"] for count in layer] for layer in experts["uses"]]
    return {"shares": shares, "most": max(map(max, shares)), "even": model["experts_used"] / model["experts"]}


def memory_chart(figures: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Chart:
    budget = figures["plan"]["limit"]
    top = 1.05 * max(budget or 0, figures["peak_bytes"] or 0, *(sample["rss_bytes"] for sample in samples))
    return chart(
        figures["samples"],
        samples,
        {"memory": lambda sample: sample["rss_bytes"] / 2**20},
        top / 2**20,
        " MiB",
        lambda sample: mib(sample["rss_bytes"]),
        None if budget is None else (budget / 2**20, f"budget {mib(budget)}"),
    )


def hits_chart(figures: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Chart:
    sums = np.cumsum([[sample[name] for name in USES] for sample in samples], axis=0)
    so_far = {sample["to"]: shares(counts) for sample, counts in zip(samples, sums.tolist(), strict=True)}
    now = {sample["to"]: shares([sample[name] for name in USES]) for sample in samples}

    def describe(sample: Mapping[str, Any]) -> str:
        hits, ahead = map(percent, so_far[sample["to"]])
        return f"{percent(now[sample['to']][0])}, {hits} so far, {ahead} with those read ahead"

    return chart(
        figures["samples"],
        samples,
        {
            "hits": lambda sample: 100 * now[sample["to"]][0],
            "so-far": lambda sample: 100 * so_far[sample["to"]][0],
            "ahead": lambda sample: 100 * so_far[sample["to"]][1],
        },
        100,
        " %",
        describe,
    )


def shares(counts: Sequence[int]) -> tuple[float, float]:
    """Of USES, the share of hits, and of these with ahead_hits."""
    hits, ahead, misses = counts
    uses = max(1, hits + ahead + misses)
    return hits / uses, (hits + ahead) / uses


def chart(
    samples: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    lines: Mapping[str, Callable[[Mapping[str, Any]], float]],
    top: float,
    unit: str,
    describe: Callable[[Mapping[str, Any]], str],
    level: tuple[float, str] | None = None,
) -> Chart:
    """Values from 0 to `top` over the time of the run.

    Args:
        samples: all of them, for the prompts' times. groups: of together(). lines: what is drawn, by CSS class.
        unit: of the values. describe: what is said of a group. level: value and name of a straight line.
    """
    end: float = groups[-1]["to"]

    def x(at: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * at / end

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top

    def points(value: Callable[[Mapping[str, Any]], float]) -> str:
        return " ".join(f"{x(group['to']):.1f},{y(value(group)):.1f}" for group in groups)

    prompts, before = list[tuple[float, float, str]](), 0.0
    for sample in samples:
        if sample["phase"] == "prompt":
            prompts.append((x(before), x(sample["at"]) - x(before), f"prompt {sample['prompt'] + 1}"))
        before = sample["at"]
    return Chart(
        [(x(tick), f"{tick:g} s") for tick in ticks(end)],
        [(y(tick), f"{tick:,g}{unit}") for tick in ticks(top)],
        [(name, points(value)) for name, value in lines.items()],
        None if level is None else (y(level[0]), level[1]),
        [
            (x(group["from"]), x(group["to"]) - x(group["from"]), f"{group['to']:.3f} s: {describe(group)}")
            for group in groups
        ],
        prompts,
    )


def ticks(end: float, most: int = 6) -> list[float]:
    """Round numbers from 0 up to an end, at most so many."""
    rough = end / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [round(step * i, 12) for i in range(math.floor(end / step + 1e-9) + 1)]
