"""Feeds changed files to the targets until time is up: `make fuzz`.

    python tests/fuzz/run.py [TARGET ...] [--time 300] [--seed 0] [--plain] [--out FOLDER]

Each target is a process of its own: with atheris, guided by coverage, where that is installed and unless --plain, else
a loop that changes and tries. Prints a line a target, and each finding when it comes; ends with 1 where there were any.
Their inputs, the shortest of each kind, are in FOLDER (default: build/fuzz).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import logging
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tests" / "fuzz"), str(ROOT / "tests" / "support"), str(ROOT)]
LONGEST = 20  # seconds of computing that an input may take
HANGS = 600  # seconds of anything
LARGEST = 1 << 20  # bytes of an input
MEMORY = 3 << 30  # bytes of address space: more than any file of a megabyte needs


class TooSlowError(Exception):
    """A target did not end."""


def stop(_: int, __: FrameType | None) -> None:
    raise TooSlowError(f"not done in {LONGEST} s")


def place(problem: BaseException) -> str:
    """What findings are told apart by: the type, and where it was raised in our code."""
    frames = traceback.extract_tb(problem.__traceback__)
    last = next((f for f in reversed(frames) if "smallthinker_edge" in f.filename), frames[-1])
    return f"{type(problem).__name__} at {Path(last.filename).name}:{last.lineno}"


class Trying:
    """Runs a target, and keeps the shortest input of each kind of finding."""

    def __init__(self, name: str, out: Path) -> None:
        from targets import TARGETS, Workplace, run

        self.name, self.out, self.run = name, out, run
        method, seed_method, self.change = TARGETS[name]
        self.workplace = workplace = Workplace()
        self.target = getattr(workplace, method)
        self.seeds: list[bytes] = list(getattr(workplace, seed_method)())
        self.findings: dict[str, bytes] = {}
        self.tried = self.taken = 0

    def __call__(self, data: bytes) -> None:
        self.tried += 1
        (self.out / f"{self.name}-current").write_bytes(data)  # what a crash was on
        signal.setitimer(signal.ITIMER_PROF, LONGEST)
        try:
            self.taken += self.run(self.target, data)
        except Exception as problem:
            self.keep(place(problem), data)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    def keep(self, kind: str, data: bytes) -> None:
        if kind not in self.findings:
            print(f"{self.name}: {kind}", file=sys.stderr)
            traceback.print_exc(limit=-4)
        if len(data) < len(self.findings.get(kind, data + b" ")):
            self.findings[kind] = data
            (self.out / f"{self.name}-{hashlib.sha256(kind.encode()).hexdigest()[:12]}").write_bytes(data)

    def inputs(self, seed: int) -> Iterator[bytes]:
        """The seeds, then changes of them, now and then of what was changed before."""
        draw, last = random.Random(f"{self.name} {seed}"), self.seeds[0]
        yield from self.seeds
        while True:
            last = self.change(draw, last if draw.random() < 0.2 else draw.choice(self.seeds))[:LARGEST]
            yield last


def prepare() -> None:
    """A process for nothing else: quiet, and with an end to every input."""
    warnings.simplefilter("ignore")
    logging.disable()
    signal.signal(signal.SIGPROF, stop)


def try_plain(name: str, seconds: float, seed: int, out: Path) -> None:
    """A loop without a guide, for machines without atheris and for the sanitizers."""
    prepare()
    trying = Trying(name, out)
    if "LD_PRELOAD" not in os.environ:  # the address sanitizer has terabytes of addresses
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    end = time.monotonic() + seconds
    for data in trying.inputs(seed):
        if time.monotonic() > end:
            break
        trying(data)
    print(f"{name}: {trying.tried} inputs, {trying.taken} taken")


def try_guided(name: str, seconds: float, seed: int, out: Path) -> None:
    import atheris

    prepare()
    with atheris.instrument_imports(include=["smallthinker_edge"]):
        trying = Trying(name, out)
    corpus = Path(tempfile.mkdtemp())
    for i, data in enumerate(trying.seeds):
        (corpus / str(i)).write_bytes(data)

    def mutate(data: bytes, most: int, number: int) -> bytes:
        return trying.change(random.Random(number), data)[:most]

    options = {
        "max_total_time": int(seconds), "max_len": LARGEST, "seed": seed % 2**31 or 1, "rss_limit_mb": MEMORY >> 20,
        "timeout": HANGS, "report_slow_units": HANGS, "artifact_prefix": out / f"{name}-", "print_final_stats": 1,
    }  # fmt: skip
    flags = [f"-{key}={value}" for key, value in options.items()]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], trying, custom_mutator=mutate)
    atheris.Fuzz()


def watch(name: str, guided: bool, seconds: float, seed: int, out: Path) -> int:
    """Runs a target in a process; the number of findings."""
    mode: Callable[..., None] = try_guided if guided else try_plain
    command = [sys.executable, __file__, name, "--time", str(seconds), "--seed", str(seed), "--out", out, "--mode"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*command, mode.__name__], env=os.environ | {"TMPDIR": folder}, capture_output=True, text=True, check=False
        )
    current = out / f"{name}-current"
    if done.returncode != 0 and current.exists():
        current.rename(out / f"{name}-crash")
    current.unlink(missing_ok=True)
    found = [path.name for path in out.glob(f"{name}-*")]
    counts = re.findall(r"number_of_executed_units: (\d+)|: (\d+) inputs", done.stdout + done.stderr)
    tried = max(counts[-1]) if counts else "?"
    print(f"{name}: {tried} inputs; findings: {', '.join(found) or 'none'}", flush=True)
    if found or done.returncode != 0:
        said = re.sub(r"^(#|stat::).*\n", "", done.stderr, flags=re.MULTILINE)  # but for the guide's own progress
        print(done.stdout[-3000:] + said[-6000:], file=sys.stderr, flush=True)
    return len(found) or int(done.returncode != 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="default: all")
    parser.add_argument("--time", type=float, default=300, help="seconds of all targets together (default: 300)")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--plain", action="store_true", help="without atheris")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "fuzz")
    parser.add_argument("--mode", choices=("try_plain", "try_guided"), help=argparse.SUPPRESS)  # of a process of ours
    arguments = parser.parse_args()
    if arguments.mode:
        globals()[arguments.mode](arguments.targets[0], arguments.time, arguments.seed, arguments.out)
        return 0
    from targets import TARGETS

    shutil.rmtree(arguments.out, ignore_errors=True)
    arguments.out.mkdir(parents=True)
    guided = not arguments.plain and importlib.util.find_spec("atheris") is not None
    names, jobs = arguments.targets or list(TARGETS), os.cpu_count() or 1
    each = max(1.0, arguments.time * min(jobs, len(names)) / len(names))
    print(f"{'guided by atheris' if guided else 'plain'}, {each:.0f} s a target, seed {arguments.seed}", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        found = list(pool.map(lambda name: watch(name, guided, each, arguments.seed, arguments.out), names))
    return int(sum(found) > 0)


if __name__ == "__main__":
    sys.exit(main())
