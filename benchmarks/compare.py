"""Compares this library with llama.cpp on one GGUF file: `make bench` runs it.

    python benchmarks/compare.py MODEL.gguf --llama-python PYTHON [--threads 2] [--output build/bench/NAME]

Each engine lives in a process of its own and sleeps while the other one works; they take turns job by job on the same
random tokens. Writes NAME.json and its page, NAME.md; docs/measurements/ keeps such pairs. Random tokens route
differently from text: compare engines and builds with these figures, not experts' use.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, TextIO

import psutil
from report import save
from traffic import traffic_of

from smallthinker_edge.files.config import ModelConfig
from smallthinker_edge.files.gguf import GGUFFile
from smallthinker_edge.files.pack import pack
from smallthinker_edge.machine.cpus import auto_threads

HERE = Path(__file__).resolve().parent
OURS, LLAMA = "smallthinker_edge", "llama.cpp"
SETTLE_SECONDS = 0.1  # between turns: threads that wait by spinning give up in far less
CALM_SHARE, ATTEMPTS = 0.1, 3
FIRST_TOKEN_PROMPT, WARM_UP_TOKENS = 16, 32


@dataclass(frozen=True)
class Job:
    """A kind of work.

    Attributes:
        tokens: how many are timed. context: how many stand in the KV cache before them.
        steps: one by one (decode), or as one prompt.
    """

    tokens: int
    context: int
    steps: bool

    @property
    def name(self) -> str:
        return f"decode {self.tokens} tokens at {self.context}" if self.steps else f"prompt of {self.tokens}"


@dataclass(frozen=True)
class Contender:
    """An engine with its settings. stream: what its streams' names end in."""

    name: str
    engine: str
    stream: str


class Worker:
    """An engine's process, sleeping until asked. started: when it was, by time.perf_counter(); held: tokens in
    every stream."""

    def __init__(self, command: Sequence[str], errors: TextIO | None = None) -> None:
        """errors: takes what the process writes to its standard error."""
        self.started = time.perf_counter()
        self.held: dict[str, int] = {}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True)
        self.description = self._answer()

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        if "stream" in job:
            before = 0 if job["reset"] else self.held.get(job["stream"], 0)
            self.held[job["stream"]] = before + len(job["tokens"])
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"compare: {self.process.args} ended with exit code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@dataclass(frozen=True)
class Plan:
    """What is run: on which file, by whom, how often."""

    model: str
    llama_python: str | None
    threads: int
    vocab_size: int
    jobs: tuple[Job, ...]
    contenders: tuple[Contender, ...]
    repetitions: int
    seed: int

    @property
    def engines(self) -> list[str]:
        return list(dict.fromkeys(contender.engine for contender in self.contenders))

    @property
    def stages(self) -> list[tuple[Job, ...]]:
        """The jobs, those with the same context together, the shortest context first."""
        contexts = sorted({job.context for job in self.jobs})
        return [tuple(job for job in self.jobs if job.context == context) for context in contexts]

    @property
    def context(self) -> int:
        """Positions that the longest stream grows to, in whole attention chunks."""
        most = max(job.context + job.tokens * (self.repetitions if job.context else 1) for job in self.jobs)
        return -(-max(most, FIRST_TOKEN_PROMPT, WARM_UP_TOKENS) // 256) * 256

    def worker(self, engine: str, model: str | None = None) -> Worker:
        python, script = (
            (sys.executable, "worker_smallthinker.py")
            if engine == OURS
            else (self.llama_python or "", "worker_llama.py")
        )
        options = ["--threads", str(self.threads), "--context", str(self.context)]
        return Worker([python, str(HERE / script), model or self.model, *options])

    def ids(self, job: Job, repetition: int) -> list[int]:
        """The tokens of a job, the same for every engine."""
        rng = random.Random(f"{self.seed} {job} {repetition}")
        return [rng.randrange(self.vocab_size) for _ in range(job.tokens)]


def warm_up(worker: Worker, plan: Plan, contenders: Sequence[Contender]) -> None:
    """Memory is slow when it is first used: the longest prompt and some tokens before anything counts."""
    longest = max((job.tokens for job in plan.jobs if not job.steps), default=1)
    for contender in contenders:
        for job in (Job(longest, 0, False), Job(WARM_UP_TOKENS, 0, True)):
            ask(worker, contender, job, plan.ids(job, -1))


def fill(worker: Worker, plan: Plan, contender: Contender, job: Job) -> None:
    """Puts a job's context before it, for nothing: what stands in the stream already stays, unless that is too much."""
    if job.context:
        held = worker.held.get(stream_of(contender, job), 0)
        held = held if held <= job.context else 0
        missing = Job(job.context - held, job.context, False)
        if missing.tokens:
            ask(worker, contender, missing, plan.ids(missing, -1), reset=held == 0)


def stream_of(contender: Contender, job: Job) -> str:
    """Jobs with a context share a stream, which grows from one to the next: filling it takes most of the time."""
    return f"{'grown' if job.context else 'empty'}{contender.stream}"


def ask(worker: Worker, contender: Contender, job: Job, ids: list[int], reset: bool | None = None) -> dict[str, Any]:
    """Runs a job. reset: in an empty stream; None: where it has no context."""
    reset = job.context == 0 if reset is None else reset
    return worker.ask({"stream": stream_of(contender, job), "tokens": ids, "steps": job.steps, "reset": reset})


def measure(workers: dict[str, Worker], plan: Plan, jobs: Sequence[Job], repetition: int) -> Iterator[dict[str, Any]]:
    """One repetition: each of the jobs by every contender whose worker is there, in turns; the order alternates."""
    contenders = [contender for contender in plan.contenders if contender.engine in workers]
    for job in jobs:
        for contender in contenders if repetition % 2 == 0 else reversed(contenders):
            answer = calm_turn(workers[contender.engine], contender, job, plan.ids(job, repetition))
            yield {"job": asdict(job), "contender": contender.name, "repetition": repetition, **answer}


def calm_turn(worker: Worker, contender: Contender, job: Job, ids: list[int]) -> dict[str, Any]:
    """One turn; taken again, ATTEMPTS times in all, while other processes disturb it.

    Streams with a context are not run twice: they would grow.
    """
    attempts = 0
    while True:
        answer = turn(worker, contender, job, ids)
        attempts += 1
        # Ticks of 10 ms say little of a short turn.
        calm = (answer["foreign_cpu_share"] - CALM_SHARE) * answer["seconds"] < 0.05
        if calm or job.context or attempts == ATTEMPTS:
            return answer | {"attempts": attempts}


def turn(worker: Worker, contender: Contender, job: Job, ids: list[int]) -> dict[str, Any]:
    """The worker's answer, with "foreign_cpu_share": CPUs that other processes used meanwhile."""
    time.sleep(SETTLE_SECONDS)
    busy = busy_seconds()
    answer = ask(worker, contender, job, ids)
    foreign = max(0.0, busy_seconds() - busy - answer["cpu_seconds"])
    return answer | {"foreign_cpu_share": foreign / answer["seconds"]}


def busy_seconds() -> float:
    """CPU seconds that all processes of the machine have used, in ticks of 10 ms."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def read_limits(workers: dict[str, Worker], pattern: list[int] | None) -> list[dict[str, Any]]:
    """The memory-read limit, where the worker that can measure it is there."""
    if OURS not in workers:
        return []
    return [workers[OURS].ask({"call": "read_limit", "arguments": {"pattern": pattern}})]


@contextmanager
def running(plan: Plan, engines: Sequence[str]) -> Iterator[dict[str, Worker]]:
    """Workers of the engines, warmed up."""
    with ExitStack() as stack:
        workers = {}
        for engine in engines:
            workers[engine] = plan.worker(engine)
            stack.callback(workers[engine].close)
            warm_up(workers[engine], plan, [c for c in plan.contenders if c.engine == engine])
            progress(f"{engine} is loaded")
        yield workers


def run(plan: Plan, together: bool) -> dict[str, Any]:
    """Everything but the time to the first token.

    together: both engines stay loaded and alternate job by job; else, for models that do not fit twice, each is loaded
    anew in every repetition, and only one is in memory.
    """
    runs: list[dict[str, Any]] = []
    limits: list[dict[str, Any]] = []
    descriptions: dict[str, Any] = {}

    def repeat(workers: dict[str, Worker], jobs: Sequence[Job], numbers: Sequence[int]) -> None:
        descriptions.update({engine: worker.description for engine, worker in workers.items()})
        for job in jobs:
            for contender in plan.contenders:
                if contender.engine in workers:
                    fill(workers[contender.engine], plan, contender, job)
        for number in numbers:
            limits.extend(read_limits(workers, limits[0]["pattern"] if limits else None))
            runs.extend(measure(workers, plan, jobs, number))
            at = f"repetition {number + 1} of {plan.repetitions} at {jobs[0].context}"
            progress(f"{at}: {', '.join(workers)}")

    if together:
        with running(plan, plan.engines) as workers:
            for jobs in plan.stages:
                repeat(workers, jobs, range(plan.repetitions))
            limits.extend(read_limits(workers, limits[0]["pattern"]))
    else:
        for number in range(plan.repetitions):
            for engine in plan.engines:
                with running(plan, [engine]) as workers:
                    for jobs in plan.stages:
                        repeat(workers, jobs, [number])
    return {"engines": descriptions, "read_limits": limits, "runs": runs}


def read_whole(path: str) -> None:
    """Has the system keep a file in its page cache."""
    with open(path, "rb", buffering=0) as file:
        while file.read(8 << 20):
            pass


def first_token(plan: Plan, packed: str | None, repetitions: int) -> list[dict[str, Any]]:
    """Seconds from starting a process to the logits after a prompt, in turns; files are in the page cache."""
    starts = [(engine, plan.model) for engine in plan.engines] + ([(OURS, packed)] if packed else [])
    prompt = Job(FIRST_TOKEN_PROMPT, 0, False)
    times: dict[tuple[str, str], list[float]] = {start: [] for start in starts}
    for repetition in range(repetitions):
        for (engine, file), seconds in times.items():
            read_whole(file)
            worker = plan.worker(engine, file)
            contender = next(c for c in plan.contenders if c.engine == engine)
            ask(worker, contender, prompt, plan.ids(prompt, repetition))
            seconds.append(time.perf_counter() - worker.started)
            worker.close()
    return [
        {"engine": engine, "file": "packed" if file == packed else "GGUF", "seconds": seconds}
        for (engine, file), seconds in times.items()
    ]


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def cpu_name(cpuinfo: str) -> str | None:
    """The first CPU's name in /proc/cpuinfo, None where it has none. Guests may be told a name without a number, which
    several generations share: then with family and model."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or fields.get("Model")
    if name is None or "cpu family" not in fields or re.search(r"\d", name.partition("@")[0]):
        return name
    return f"{name} (family {fields['cpu family']}, model {fields.get('model', '?')})"


def machine() -> dict[str, Any]:
    """What a reader needs to know of this machine."""
    info = Path("/proc/cpuinfo")
    name = cpu_name(info.read_text(encoding="utf-8")) if info.exists() else None
    return {
        "cpu": name or platform.processor() or platform.machine(),
        "cpus": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def active_share(model: str, given: float | None) -> tuple[float | None, str]:
    """(share of a used expert's neurons whose gate is positive, where that is known from); None if it is not."""
    if given is not None:
        return given, "given"
    statistics = Path(model).with_suffix(".json")
    if statistics.is_file():
        measured = json.loads(statistics.read_text(encoding="utf-8"))
        return 1 - measured["silent"], f"measured by make_synthetic.py ({statistics.name})"
    return None, "not known: every neuron is counted"


def fits_twice(model: str) -> bool:
    """Whether both engines' weights and the file's page cache fit into memory, with a quarter to spare."""
    return psutil.virtual_memory().available > 3.25 * os.path.getsize(model)


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="MODEL.gguf")
    parser.add_argument(
        "--llama-python", metavar="PYTHON", help="has llama-cpp-python; without, only this library runs"
    )
    parser.add_argument(
        "--packed", metavar="FILE", help="the same model packed (made if it is not there), to time its first token"
    )
    parser.add_argument("--threads", type=int, default=auto_threads(), help="of both engines (default: usable CPUs)")
    parser.add_argument("--decode", type=int, default=64, metavar="N", help="tokens decoded one by one (64)")
    parser.add_argument("--contexts", type=int, nargs="*", default=[0, 4096], metavar="N", help="before them (0 4096)")
    parser.add_argument("--prompts", type=int, nargs="*", default=[128, 512], metavar="N", help="lengths (128 512)")
    parser.add_argument(
        "--flash-attention", nargs="+", choices=("on", "off"), default=["on", "off"], help="of llama.cpp"
    )
    parser.add_argument("--repetitions", type=int, default=5, metavar="N", help="of everything; medians count (5)")
    parser.add_argument("--turns", choices=("auto", "jobs", "processes"), default="auto", help="auto: job by job where"
                        " both engines fit into memory, else one process after the other")  # fmt: skip
    parser.add_argument("--starts", type=int, default=3, metavar="N", help="process starts timed per file (3)")
    parser.add_argument("--active-share", type=float, metavar="X", help="active neurons, to count bytes (default: from"
                        " MODEL.json as make_synthetic.py --stats writes it)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="build/bench/result", metavar="NAME", help="writes NAME.json and NAME.md")
    return parser


def make_plan(arguments: argparse.Namespace, vocab_size: int, context_length: int) -> Plan:
    """The work asked for, less the contexts that the model does not reach."""
    growth = arguments.decode * arguments.repetitions
    contexts = [n for n in sorted(set(arguments.contexts)) if n + growth <= context_length]
    jobs = [Job(n, 0, False) for n in arguments.prompts if n <= context_length]
    jobs += [Job(arguments.decode, n, True) for n in contexts]
    contenders = [Contender(OURS, OURS, "")]
    if arguments.llama_python:
        variants = arguments.flash_attention
        contenders += [Contender(f"{LLAMA}, flash attention {v}", LLAMA, f"/{v}") for v in variants]
    return Plan(
        *(arguments.model, arguments.llama_python, arguments.threads, vocab_size, tuple(jobs), tuple(contenders)),
        *(arguments.repetitions, arguments.seed),
    )


def main() -> None:
    arguments = arguments_parser().parse_args()
    with GGUFFile(arguments.model) as file:
        config = ModelConfig.from_gguf(file)
        share, source = active_share(arguments.model, arguments.active_share)
        traffic = traffic_of(file.tensors, config, 1.0 if share is None else share)
        name = str(file.metadata.get("general.name", Path(arguments.model).name))
    if arguments.packed and not os.path.exists(arguments.packed):
        pack(arguments.model, arguments.packed)
    plan = make_plan(arguments, config.vocab_size, config.context_length)
    together = arguments.turns == "jobs" or (arguments.turns == "auto" and fits_twice(arguments.model))
    result = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "model": {"name": name, "file_bytes": os.path.getsize(arguments.model)},
        "threads": plan.threads,
        "turns": "job by job" if together else "process by process",
        "active_share": share,
        "active_share_source": source,
        "traffic": traffic.as_dict(),
        **run(plan, together),
        "first_token": first_token(plan, arguments.packed, arguments.starts) if arguments.starts else [],
    }
    output = Path(arguments.output)
    print(save(result, output))
    progress(f"written to {output.with_suffix('.json')} and {output.with_suffix('.md')}")


if __name__ == "__main__":
    main()
