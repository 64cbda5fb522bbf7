"""Measures what keeping to a grammar costs or saves: milliseconds a token, free and constrained, in turns.

    python benchmarks/structured.py MODEL.gguf [--tokens 200] [--repeat 5] [--output FILE]

Free text; a list of objects by a JSON schema (names, numbers, a choice of five words); the same with logprobs, for
which the whole head is computed, as it is without the shortcut for allowed rows. Tokens that the grammar leaves no
choice about are decoded together with the next one, and count. Random weights choose among what is allowed, as good
ones do.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

from report import publish

from smallthinker_edge import SmallThinker
from smallthinker_edge.generation.stream import Timings
from smallthinker_edge.measure.limits import OtherProcesses

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


def cases(model: SmallThinker, tokens: int) -> dict[str, Callable[[], Timings]]:
    """What is measured, by name."""
    ends = dict.fromkeys(model.tokenizer.eos_ids, -1000000000.0)

    def free() -> Timings:
        return model.generate(PROMPT, max_tokens=tokens, logit_bias=ends).timings

    def constrained(logprobs: int | None) -> Timings:
        grammar = model.grammars().json_schema(SCHEMA)
        return model.generate(PROMPT, max_tokens=tokens, constraint=grammar, logprobs=logprobs).timings

    return {
        "free": free,
        "JSON by a schema": lambda: constrained(None),
        "JSON by a schema, whole head": lambda: constrained(0),
    }


def milliseconds(timings: Timings) -> float:
    return 1e3 * timings.decode_seconds / timings.decode_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--tokens", type=int, default=200, help="of each text (200)")
    parser.add_argument("--repeat", type=int, default=5, help="turns (5)")
    parser.add_argument("--threads", type=int, help="compute threads (default: usable CPUs)")
    parser.add_argument("--output", metavar="FILE", help="write the table there too")
    arguments = parser.parse_args()
    others = OtherProcesses()
    with SmallThinker(arguments.model, threads=arguments.threads, context=2048) as model:
        measured = cases(model, arguments.tokens)
        for run in measured.values():
            run()  # a virtual machine's memory is slow until every page of the weights has been used once
        runs = [{name: milliseconds(run()) for name, run in measured.items()} for _ in range(arguments.repeat)]
        stats = model.stats()
    lines = ["| | ms a token | times as fast as free text |", "|---|---:|---:|"]
    for name in measured:
        ratios = [run["free"] / run[name] for run in runs]
        lines.append(
            f"| {name} | {statistics.median(run[name] for run in runs):.2f} | **{statistics.median(ratios):.2f}** "
            f"({min(ratios):.2f}-{max(ratios):.2f}) |"
        )
    about = (
        f"{Path(arguments.model).name}, {stats['kernels']}, {stats['threads']} threads, medians of {arguments.repeat} "
        f"texts of {arguments.tokens} tokens"
    )
    publish("\n".join(lines), about, others, arguments.output)


if __name__ == "__main__":
    main()
