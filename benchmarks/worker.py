"""The timing of one engine in a process of its own: jobs come in on standard input, one JSON line each.

Shared by worker_smallthinker.py and worker_llama.py, so that both are timed by the same lines of code. Standard
library only, because it runs in two different environments. It chooses no tokens: compare.py sends the same to both.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any, Protocol, TextIO


class Engine(Protocol):
    """What a worker must offer. A stream is a named KV cache; it is made when it is first used."""

    def describe(self) -> dict[str, Any]: ...

    def reset(self, stream: str) -> None: ...

    def run(self, stream: str, tokens: Sequence[int]) -> None:
        """Appends tokens to a stream and returns when the logits of the last one are there."""


def run_job(engine: Engine, job: dict[str, Any]) -> dict[str, Any]:
    """Times one job.

    job: "stream"; "tokens", ids; "steps": true to run them one by one, else as one prompt; "reset": whether the stream
    is emptied before (not timed).

    Returns "seconds", and "cpu_seconds" of the whole process.
    """
    stream, tokens = job["stream"], job["tokens"]
    if job["reset"]:
        engine.reset(stream)
    cpu = time.process_time()
    started = time.perf_counter()
    if job["steps"]:
        for token in tokens:
            engine.run(stream, [token])
    else:
        engine.run(stream, tokens)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "cpu_seconds": time.process_time() - cpu}


def serve(engine: Engine, jobs: TextIO = sys.stdin, answers: TextIO = sys.stdout) -> None:
    """Describes the engine on one line, then answers each job on one line until the input ends.

    Each answer says in "idle_cpu_seconds" what the process burnt since the last one: what threads that wait by
    spinning take from the other engine.
    """
    print(json.dumps(engine.describe()), file=answers, flush=True)
    since = time.process_time()
    for line in jobs:
        idle = time.process_time() - since
        job = json.loads(line)
        answer = getattr(engine, job["call"])(**job["arguments"]) if "call" in job else run_job(engine, job)
        print(json.dumps(answer | {"idle_cpu_seconds": idle}), file=answers, flush=True)
        since = time.process_time()
