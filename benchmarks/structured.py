"""Measures what keeping to a grammar costs or saves: milliseconds a token, free and constrained, in turns.

    python benchmarks/structured.py MODEL.gguf [--llama-python PYTHON] [--tokens 200] [--repeat 5] [--output FILE]

Free text; a list of objects by a JSON schema (names, numbers, a choice of five words); the same with logprobs, for
which the whole head is computed, as it is without the shortcut for allowed rows. Tokens that the grammar leaves no
choice about are decoded together with the next one, and count. Random weights choose among what is allowed, as good
ones do. With a Python that has llama-cpp-python, the same prompts and schema there, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from compare import SETTLE_SECONDS, Worker
from report import publish

from smallthinker_edge import SmallThinker
from smallthinker_edge.generation.stream import Timings
from smallthinker_edge.machine.cpus import auto_threads
from smallthinker_edge.measure.limits import OtherProcesses

FREE = "free"
PROMPT = "A list of things in a kitchen, with how many there are and where they stand: "
SCHEMA = {
    "type": "array",
    "minItems": 50,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
            "place": {"enum": ["shelf", "table", "floor", "drawer", "cupboard"]},
        },
        "required": ["name", "count", "place"],
        "additionalProperties": False,
    },
}


def our_cases(model: SmallThinker, tokens: int) -> dict[str, Callable[[], float]]:
    """What is measured of this library: by name, what makes a text and returns the milliseconds of a token."""
    ends = dict.fromkeys(model.tokenizer.eos_ids, -1000000000.0)

    def free() -> float:
        return milliseconds(model.generate(PROMPT, max_tokens=tokens, logit_bias=ends).timings)

    def constrained(logprobs: int | None) -> float:
        grammar = model.grammars().json_schema(SCHEMA)
        return milliseconds(model.generate(PROMPT, max_tokens=tokens, constraint=grammar, logprobs=logprobs).timings)

    return {
        FREE: free,
        "JSON by a schema": lambda: constrained(None),
        "JSON by a schema, whole head": lambda: constrained(0),
    }


def milliseconds(timings: Timings) -> float:
    return 1e3 * timings.decode_seconds / timings.decode_tokens


def llama_cases(worker: Worker, tokens: int) -> dict[str, Callable[[], float]]:
    """The same of llama-cpp-python."""

    def run(schema: object) -> float:
        time.sleep(SETTLE_SECONDS)
        arguments = {"prompt": PROMPT, "tokens": tokens, "schema": schema}
        answer = worker.ask({"call": "complete", "arguments": arguments})
        return 1e3 * float(answer["seconds"]) / int(answer["tokens"])

    return {f"llama-cpp-python, {FREE}": lambda: run(None), "llama-cpp-python, JSON by a schema": lambda: run(SCHEMA)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument(
        "--llama-python", metavar="PYTHON", help="has llama-cpp-python; without, only this library runs"
    )
    parser.add_argument("--tokens", type=int, default=200, help="of each text (200)")
    parser.add_argument("--repeat", type=int, default=5, help="turns (5)")
    parser.add_argument("--threads", type=int, default=auto_threads(), help="of both (default: usable CPUs)")
    parser.add_argument("--output", metavar="FILE", help="write the table there too")
    arguments = parser.parse_args()
    engines = "this library"
    with ExitStack() as stack:
        model = stack.enter_context(SmallThinker(arguments.model, threads=arguments.threads, context=2048))
        measured = our_cases(model, arguments.tokens)
        if arguments.llama_python:
            script = str(Path(__file__).with_name("worker_llama_text.py"))
            command = [arguments.llama_python, script, arguments.model, "--threads", str(arguments.threads)]
            worker = Worker(command)
            stack.callback(worker.close)
            measured |= llama_cases(worker, arguments.tokens)
            engines += f" and {worker.description['engine']}"
        for run in measured.values():
            run()  # a virtual machine's memory is slow until every page of the weights has been used once
        others = OtherProcesses()
        runs = [{name: run() for name, run in measured.items()} for _ in range(arguments.repeat)]
        kernels, others_said = model.stats()["kernels"], str(others)
    lines = ["| | ms a token | times as fast as its own free text |", "|---|---:|---:|"]
    for name in measured:
        own = name.rpartition(", ")[0] if name.startswith("llama") else ""
        ratios = [run[f"{own}, {FREE}" if own else FREE] / run[name] for run in runs]
        lines.append(
            f"| {name} | {statistics.median(run[name] for run in runs):.2f} | **{statistics.median(ratios):.2f}** "
            f"({min(ratios):.2f}-{max(ratios):.2f}) |"
        )
    about = (
        f"{Path(arguments.model).name}, {engines}, {kernels}, {arguments.threads} threads, "
        f"medians of {arguments.repeat} texts of {arguments.tokens} tokens"
    )
    publish("\n".join(lines), about, others_said, arguments.output)


if __name__ == "__main__":
    main()
