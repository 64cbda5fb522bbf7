"""Draws what grows with what, the last step of everything.py. It measures nothing.

    python benchmarks/growth.py FOLDER

From what everything.py left in FOLDER: growth.json (contexts and prompts), growth-long.json (a longer context, without
llama.cpp), threads-N.json, budgets.json; what is not there is left out. Writes FOLDER/growth.svg. Needs the [plots]
extra.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import report

from smallthinker_edge.machine.memory import parse_memory

Points = dict[str, list[tuple[float, float]]]  # of each engine: (x, tokens per second)


def of_jobs(results: Sequence[dict[str, Any]], wanted: Callable[[dict[str, Any]], bool], x: str) -> Points:
    """Medians of the jobs that are wanted, by one of their fields."""
    points: Points = {}
    for result in results:
        for job in filter(wanted, report.jobs_of(result)):
            values = report.summary(result, job)
            points.setdefault(report.OURS, []).append((job[x], values["ours"]))
            if "rival" in values:
                points.setdefault("llama.cpp", []).append((job[x], values["rival"]))
    return {engine: sorted(found) for engine, found in points.items()}


def of_threads(folder: Path, decode: bool) -> Points:
    """Decoding from an empty context, or the longest prompt, by the number of threads."""
    points: Points = {}
    for path in sorted(folder.glob("threads-*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        jobs = [job for job in report.jobs_of(result) if job["steps"] == decode and not job["context"]]
        values = report.summary(result, jobs[-1])
        points.setdefault(report.OURS, []).append((result["threads"], values["ours"]))
        if "rival" in values:
            points.setdefault("llama.cpp", []).append((result["threads"], values["rival"]))
    return {engine: sorted(found) for engine, found in points.items()}


def of_budgets(folder: Path) -> Points:
    path = folder / "budgets.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["budgets"] if path.exists() else []
    fit = [(parse_memory(row["memory"]) / 2**30, statistics.median(row["decode"])) for row in rows if row["fits"]]
    return {report.OURS: fit} if fit else {}


def panels(folder: Path) -> list[tuple[str, str, Points]]:
    """(title, label of x, points) of every panel there is something for."""
    paths = (folder / "growth.json", folder / "growth-long.json")
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    found = [
        ("Decoding after a context", "positions", of_jobs(results, lambda job: bool(job["steps"]), "context")),
        ("Prompts", "tokens", of_jobs(results, lambda job: not job["steps"], "tokens")),
        ("Decoding by threads", "threads", of_threads(folder, True)),
        ("A prompt by threads", "threads", of_threads(folder, False)),
        ("Decoding within a budget", "GiB", of_budgets(folder)),
    ]
    return [panel for panel in found if any(len(points) > 1 for points in panel[2].values())]


def draw(folder: Path) -> Path:
    """Writes the picture. Raises ValueError where the folder has nothing to draw."""
    shown = panels(folder)
    if not shown:
        raise ValueError(f"nothing to draw in {folder}")
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "growth"  # the same picture from the same figures
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(shown), figsize=(3.4 * len(shown), 3), squeeze=False, layout="constrained")
    for ax, (title, label, points) in zip(axes[0], shown, strict=True):
        for engine, series in points.items():
            ax.plot(*zip(*series, strict=True), marker="o", markersize=3, label=engine)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel(label)
        ax.set_ylim(bottom=0)
        if label == "tokens":
            ax.set_xscale("log", base=2)
        elif label == "threads":
            ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0][0].set_ylabel("tokens/s")
    axes[0][0].legend(fontsize=8)
    output = folder / "growth.svg"
    figure.savefig(output, metadata={"Date": None})
    plt.close(figure)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    print(draw(parser.parse_args().folder))


if __name__ == "__main__":
    main()
