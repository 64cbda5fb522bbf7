"""Measures what long contexts, KV types and short batches cost.

    python benchmarks/context.py MODEL.gguf [--positions 4096 16384] [--decode 24] [--output FILE]

A long context is not computed but filled with plausible bytes, so that minutes of prompt are not needed; the tokens
decoded after it cost what they would after a real one. Random tokens route differently from text.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
from report import publish

from smallthinker_edge import Session, SmallThinker
from smallthinker_edge.measure.context import fill_context
from smallthinker_edge.measure.limits import OtherProcesses


def milliseconds(session: Session, batches: list[np.ndarray]) -> float:
    """Of one batch: the median over all."""
    times = []
    for batch in batches:
        started = time.perf_counter()
        session.decode(batch, all_logits=len(batch) > 1)
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="MODEL.gguf")
    parser.add_argument("--positions", type=int, nargs="*", default=[4096, 16384], help="contexts (4096 16384)")
    parser.add_argument("--decode", type=int, default=24, help="tokens decoded after each (24)")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8], help="tokens together (1 2 4 8)")
    parser.add_argument("--repeat", type=int, default=3, help="turns through all cases; the median counts (3)")
    parser.add_argument("--threads", type=int, help="compute threads (default: usable CPUs)")
    parser.add_argument("--output", metavar="FILE", help="write the table there too")
    arguments = parser.parse_args()

    others = OtherProcesses()
    rng = np.random.default_rng(0)
    longest = max([64, *arguments.positions]) + arguments.decode * max([1, *arguments.batches])
    with SmallThinker(arguments.model, threads=arguments.threads) as model:
        vocabulary = model.config.vocab_size
        results: dict[str, list[float]] = {}
        for _ in range(arguments.repeat):
            for position in arguments.positions:
                for kv in ("f16", "q8_0"):
                    session = model.session(longest, kv=kv)
                    fill_context(session, position)
                    tokens = [rng.integers(0, vocabulary, 1) for _ in range(arguments.decode)]
                    name = f"one token after {position}, {kv}: {session.kv_bytes / 1e6:.0f} MB"
                    results.setdefault(name, []).append(milliseconds(session, tokens))
                    session.close()
            for size in arguments.batches:
                for kind in ("random", "repeated"):
                    session = model.session(longest, kv="f16")
                    once = rng.integers(0, vocabulary, size if kind == "random" else 1)
                    batch = once if kind == "random" else np.repeat(once, size)
                    name = f"{size} {kind} token{'s' * (size > 1)} together, all logits"
                    results.setdefault(name, []).append(milliseconds(session, [batch] * 6))
                    session.close()
        stats = model.stats()
    lines = ["| | ms | range of turns |", "|---|---:|---:|"]
    for name, values in results.items():
        lines.append(f"| {name} | {statistics.median(values):.1f} | {min(values):.1f}-{max(values):.1f} |")
    about = f"{Path(arguments.model).name}, {stats['kernels']}, {stats['threads']} threads; {arguments.repeat} turns"
    publish("\n".join(lines), about, others, arguments.output)


if __name__ == "__main__":
    main()
