"""Every benchmark of one model on this machine, hours of it: `make bench-all MODEL=model.gguf`.

    python benchmarks/everything.py MODEL.gguf [--llama-python PYTHON] [--output FOLDER] [--quick]

Writes one file a step into FOLDER (docs/measurements/MACHINE-MODEL), then growth.svg ([plots] extra). A step whose file
is there is not run again, so that it goes on where it was interrupted; remove a file to have it measured anew. --quick
takes few and short turns: to see that all of it runs, not for figures.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from compare import machine

from smallthinker_edge.machine.cpus import auto_threads

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "docs" / "measurements"
PAGED = 512 << 20  # bytes of a file from which on a budget is worth it: Python itself takes 50 MiB


@dataclass(frozen=True)
class Step:
    """A command, and the file it leaves."""

    output: Path
    command: list[str]
    prints: bool = False  # what it prints is the file


def folder_name(cpu: str, model: Path) -> str:
    """Letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", f"{cpu.lower().replace('(r)', '')} {model.stem.lower()}").strip("-")


def steps(model: Path, packed: Path, folder: Path, llama_python: str | None, quick: bool) -> Iterator[Step]:
    """In their order: what matters most first."""

    def script(name: str, *arguments: str) -> list[str]:
        return [sys.executable, str(HERE / name), *arguments]

    def compare(name: str, *arguments: str, rival: bool = True) -> Step:
        against = ["--llama-python", llama_python] if llama_python and rival else []
        few = ["--decode", "4", "--repetitions", "1", "--starts", "0"] if quick else []
        output = folder / name
        return Step(
            output.with_suffix(".json"),
            script("compare.py", str(model), *against, "--output", str(output), *arguments, *few),
        )

    yield compare("compare", *(() if quick else ("--packed", str(packed), "--starts", "9")))
    contexts = ["0", "64"] if quick else ["0", "1024", "4096", "8192", "16384"]
    longest = "128" if quick else "32000"  # llama.cpp takes most of an hour to fill it
    prompts = ["8", "32"] if quick else ["8", "32", "128", "512", "2048"]
    thrice = ("--repetitions", "3", "--starts", "0")
    yield compare("growth", "--contexts", *contexts, "--prompts", *prompts, "--decode", "32", *thrice)
    yield compare("growth-long", "--contexts", longest, "--prompts", "--decode", "32", *thrice, rival=False)
    most = auto_threads()
    for threads in sorted({n for n in (1, 2, 3, 4, 6, 8, 12, 16) if n < most} | {most}):
        alone = ("--threads", str(threads), "--contexts", "0", "--prompts", "512")
        yield compare(f"threads-{threads}", *alone, *thrice)
    size = model.stat().st_size
    budgets = [f"{round(size * share) >> 20}MiB" for share in (0.25, 0.35, 0.5, 0.7, 0.9, 1.1)]
    short = ["--tokens", "4", "--series", "1"] if quick else []
    if size >= PAGED:
        output = folder / "budgets"
        command = script("budgets.py", str(packed), "--budgets", *budgets, *short, "--output", str(output))
        yield Step(output.with_suffix(".json"), command)
    cli = [sys.executable, "-m", "smallthinker_edge", "bench"]
    if not quick:
        yield Step(folder / "context.md", script("context.py", str(model), "--repeat", "2"), prints=True)
        yield Step(folder / "kernels.md", [*cli, "kernels"], prints=True)
        yield Step(folder / "sparsity.md", [*cli, "sparsity"], prints=True)


def run(step: Step) -> None:
    """Raises SystemExit where it fails; its file then is not there."""
    print(f"== {step.output.name}", flush=True)
    done = subprocess.run(step.command, check=False, stdout=subprocess.PIPE if step.prints else None, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(step.command)}: exit status {done.returncode}")
    if step.prints:
        unfinished = step.output.with_suffix(".part")
        unfinished.write_text(done.stdout, encoding="utf-8")
        os.replace(unfinished, step.output)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument(
        "--llama-python", metavar="PYTHON", help="has llama-cpp-python; without, only this library runs"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="few and short turns: to try it")
    arguments = parser.parse_args()
    model: Path = arguments.model
    folder: Path = arguments.output or RESULTS / folder_name(str(machine()["cpu"]), model)
    folder.mkdir(parents=True, exist_ok=True)
    packed = model.with_suffix(".stpk")
    if not packed.exists():
        subprocess.run([sys.executable, "-m", "smallthinker_edge", "pack", model, "-o", packed], check=True)
    for step in steps(model, packed, folder, arguments.llama_python, arguments.quick):
        if step.output.exists():
            print(f"== {step.output.name} is there", flush=True)
        else:
            run(step)
    subprocess.run([sys.executable, str(HERE / "growth.py"), str(folder)], check=True)


if __name__ == "__main__":
    main()
