"""Puts the figures of compare.py and budgets.py into words: medians, ratios, bytes per second. It measures nothing.

python benchmarks/report.py                  # writes the pages and the picture of docs/measurements/
python benchmarks/report.py RESULT.json      # prints one page
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from picture import Bars, draw
from traffic import Traffic

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "measurements"
OURS = "smallthinker_edge"

Result = dict[str, Any]


def job_name(job: dict[str, Any]) -> str:
    if not job["steps"]:
        return f"prompt of {job['tokens']}"
    return "decode, " + (f"context {job['context']}" if job["context"] else "empty context")


def rates(result: Result, job: dict[str, Any], contender: str) -> list[float]:
    """Tokens per second in each repetition, in their order."""
    runs = [run for run in result["runs"] if run["job"] == job and run["contender"] == contender]
    return [job["tokens"] / run["seconds"] for run in sorted(runs, key=lambda run: run["repetition"])]


def jobs_of(result: Result) -> list[dict[str, Any]]:
    jobs: list[dict[str, Any]] = []
    for run in result["runs"]:
        if run["job"] not in jobs:
            jobs.append(run["job"])
    return jobs


def best_rival(result: Result, job: dict[str, Any]) -> str | None:
    """The other engine's setting with the larger median for this job; None where it did not run."""
    rivals = {run["contender"] for run in result["runs"] if run["contender"] != OURS}
    return max(sorted(rivals), key=lambda name: statistics.median(rates(result, job, name)), default=None)


def summary(result: Result, job: dict[str, Any]) -> dict[str, Any]:
    """Medians of a job: "ours"; with a rival "rival", "rival_name", "ratio", and "ratios" of pairs that took turns."""
    ours = rates(result, job, OURS)
    rival = best_rival(result, job)
    values: dict[str, Any] = {"ours": statistics.median(ours), "ours_all": ours}
    if rival is not None:
        theirs = rates(result, job, rival)
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        values |= {"rival_name": rival, "rival": statistics.median(theirs), "rival_all": theirs}
        values |= {"ratio": statistics.median(ratios), "ratios": ratios}
    return values


def read_limit(result: Result) -> float:
    """Bytes per second that memory gives: the median of the run's measurements."""
    return statistics.median(limit["bytes_per_second"] for limit in result["read_limits"])


def bytes_per_second(result: Result, job: dict[str, Any], contender: str, whole: bool) -> float:
    """Median over the repetitions; a stream with a context grows by the job's tokens each time, if it stays loaded."""
    traffic = Traffic(**result["traffic"])
    grows = job["context"] and result["turns"] == "job by job"
    figures = []
    for repetition, rate in enumerate(rates(result, job, contender)):
        position = job["context"] + (job["tokens"] * repetition if grows else 0) + (job["tokens"] + 1) / 2
        figures.append(rate * (traffic.whole_at(position) if whole else traffic.at(position)))
    return statistics.median(figures)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median and, in brackets, the range."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def setting(name: str) -> str:
    """What is added to a figure of llama.cpp: which of its settings it was."""
    return f", flash {name.rpartition(' ')[2]}" if "flash" in name else ""


def speed_table(result: Result) -> str:
    rows = []
    for job in jobs_of(result):
        values = summary(result, job)
        row = [job_name(job), spread(values["ours_all"])]
        if "rival" in values:
            row += [spread(values["rival_all"]) + setting(values["rival_name"]), f"**{spread(values['ratios'], 2)}**"]
        rows.append(row)
    head = ["tokens per second: median (range)", OURS, "llama.cpp, its better setting", "ratio of pairs"]
    return table(head[: len(rows[0])], rows)


def traffic_table(result: Result) -> str:
    limit, traffic = read_limit(result), Traffic(**result["traffic"])
    rows = []
    for job in jobs_of(result):
        if not job["steps"]:
            continue
        values = summary(result, job)
        position = job["context"] + (job["tokens"] + 1) / 2
        entries = [(OURS, False, OURS)]
        if "rival" in values:
            entries.append((values["rival_name"], True, "llama.cpp"))
        for contender, whole, label in entries:
            size = traffic.whole_at(position) if whole else traffic.at(position)
            speed = bytes_per_second(result, job, contender, whole)
            row = [
                f"{label}, {job_name(job)}",
                f"{size / 1e6:.0f} MB",
                f"{speed / 1e9:.1f} GB/s",
                f"{speed / limit:.0%}",
            ]
            rows.append(row)
    limits = spread([measured["bytes_per_second"] / 1e9 for measured in result["read_limits"]])
    return table(["", "bytes per token", "per second", f"of the read limit, {limits} GB/s"], rows)


def first_token_table(result: Result) -> str:
    rows = [[f"{start['engine']}, {start['file']}", spread(start["seconds"], 2)] for start in result["first_token"]]
    return table(["seconds from process start to the logits after 16 tokens", ""], rows)


def machine_of(result: Result) -> str:
    """When and where it was measured."""
    machine = result["machine"]
    return (
        f"{result['date']}; {machine['cpu']}, {machine['cpus']} CPUs, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"{machine['system']}, Python {machine['python']}."
    )


def notes(result: Result) -> str:
    """How it was measured, in a paragraph."""
    share = result["active_share"]
    engines = [f"{d['engine']}" + (f" ({d['kernels']})" if "kernels" in d else "") for d in result["engines"].values()]
    repetitions = 1 + max(run["repetition"] for run in result["runs"])
    idle = max(run["idle_cpu_seconds"] for run in result["runs"])
    foreign = [run["foreign_cpu_share"] for run in result["runs"]]
    disturbed = (
        f"other processes took {statistics.median(foreign):.0%} of a CPU in the median turn, {max(foreign):.0%} at most"
    )
    how = f"{share:.3f}, {result['active_share_source']}" if share is not None else result["active_share_source"]
    return (
        f"{machine_of(result)} {' against '.join(engines)}; "
        f"{result['threads']} threads each; "
        f"{result['model']['name']}, {result['model']['file_bytes'] / 1e9:.2f} GB. {repetitions} repetitions, turns "
        f"{result['turns']}; no engine used more than {idle * 1e3:.0f} ms of CPU between two of its turns, "
        f"{disturbed}. "
        f"Share of active neurons: {how}."
    )


def made_from(folder: Path) -> str:
    """What a page says of itself. folder: where it will be."""
    inside = folder.resolve().is_relative_to(RESULTS)
    readme = os.path.relpath(RESULTS / "README.md", folder) if inside else "README.md"
    return (
        f"`make bench-docs` writes this page from the .json beside it; [README.md]({readme}) says how it was measured."
    )


def markdown(result: Result, folder: Path = RESULTS) -> str:
    """The page of one comparison: all its tables, and how it was measured. folder: where it will be."""
    parts = [
        f"# {result['model']['name']}, {result['engines'][OURS]['kernels']}, {result['machine']['cpu']}",
        made_from(folder),
        speed_table(result),
    ]
    if result["read_limits"] and any(job["steps"] for job in jobs_of(result)):
        parts.append(traffic_table(result))
    if result["first_token"]:
        parts.append(first_token_table(result))
    return "\n\n".join([*parts, notes(result)]) + "\n"


def budget_bound(row: dict[str, Any]) -> float:
    """Tokens per second that computing alone or reading alone would allow, the smaller: what the same model does with
    all experts in memory, and the experts that had to be read at the speed of the reads that took place."""
    computing, wanted = statistics.median(row["alone"]), row["read_bytes_per_token"] - row["wasted_bytes_per_token"]
    if wanted <= 0 or not row["disk_seconds_per_token"]:
        return computing
    return min(computing, row["read_bytes_per_token"] / row["disk_seconds_per_token"] / wanted)


def budget_row(row: dict[str, Any]) -> list[str]:
    """A budget's figures; of what was not measured, none."""
    if not row["fits"]:
        return [row["memory"], "killed for memory" if "killed" in row["why"] else "does not fit", *[""] * 7]
    figures = [row["memory"], f"{row['slots']:.0f}", f"{row['hit_rate']:.3f}"]
    figures += [f"{row['read_bytes_per_token'] / 1e6:.1f}", f"**{spread(row['decode'])}**"]
    waiting = f"{row['wait_share']:.0%}" if "wait_share" in row else ""
    if not row.get("alone"):
        return [*figures, "", "", "", waiting]
    bound, ratios = budget_bound(row), [a / b for a, b in zip(row["decode"], row["alone"], strict=True)]
    figures += [spread(row["alone"]), spread(ratios, 2), f"{bound:.1f}, {statistics.median(row['decode']) / bound:.0%}"]
    return [*figures, waiting]


def budgets_page(result: Result, folder: Path = RESULTS) -> str:
    """The page of budgets.py. folder: where it will be."""
    head = ["limit and budget", "slots", "found in memory", "MB read a token", "tokens per second", "all in memory"]
    head += ["ratio of pairs", "bound, of which", "of the time waiting"]
    rows = result["budgets"]
    stolen = [row["stolen_share"] for row in rows if row.get("stolen_share") is not None]
    gone = f" The host took {min(stolen):.0%} to {max(stolen):.0%} of a CPU away, by budget." if stolen else ""
    parts = [
        f"# {result['model']['name']} within budgets, {result['machine']['cpu']}",
        made_from(folder),
        table(head, [budget_row(row) for row in rows]),
        f"{machine_of(result)} {result['threads']} threads, context {result['context']}; packed, "
        f"{result['model']['file_bytes'] / 1e9:.2f} GB.{gone}",
    ]
    return "\n\n".join(parts) + "\n"


def results_of(folder: Path) -> dict[Path, Result]:
    """Every .json of a folder and of those in it, by its file."""
    return {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.json"))}


def page_of(result: Result, folder: Path = RESULTS) -> str | None:
    """The page of a comparison or of budgets; None where it is neither. folder: where it will be."""
    return (
        markdown(result, folder) if "runs" in result else budgets_page(result, folder) if "budgets" in result else None
    )


def save(result: Result, output: Path) -> str:
    """Writes a result and its page, OUTPUT.json and OUTPUT.md; returns the page."""
    text = page_of(result, output.parent)
    assert text is not None
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def pages(results: Path = RESULTS) -> dict[Path, str]:
    """The page of every comparison and of all budgets in a folder: its file, and its text made anew from the .json of
    the same name."""
    made = {path.with_suffix(".md"): page_of(it, path.parent) for path, it in results_of(results).items()}
    return {path: text for path, text in made.items() if text is not None}


def pictures(results: Path = RESULTS) -> dict[Path, str]:
    """The picture of each list of figures ("rows") in a folder: its file, and its text made anew."""
    found = results_of(results)
    return {
        path.with_suffix(".svg"): draw(listed["title"], [_bars(found, path.with_name, row) for row in listed["rows"]])
        for path, listed in found.items()
        if "rows" in listed
    }


def _bars(found: dict[Path, Result], beside: Callable[[str], Path], row: dict[str, Any]) -> Bars:
    if "result" not in row:
        return Bars(row["name"], row["ours"], row["theirs"], row["ratio"])
    result = found[beside(row["result"])]
    (job,) = [job for job in jobs_of(result) if job_name(job) == row["job"]]
    values = summary(result, job)
    return Bars(row["name"], round(values["ours"], 1), round(values["rival"], 1), values["ratio"])


def publish(table: str, about: str, others: object, output: str | None) -> None:
    """Prints a table with what was measured and how busy the machine was, and writes it to a file too."""
    text = f"{table}\n\n{date.today().isoformat()}, {about}. {others}\n"
    print(text)
    if output:
        Path(output).write_text(text, encoding="utf-8")


def main() -> None:
    if len(sys.argv) > 1:
        print(page_of(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
        return
    for path, text in (pages() | pictures()).items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
