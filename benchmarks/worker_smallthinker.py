"""This library as a worker of compare.py and budgets.py.

python benchmarks/worker_smallthinker.py MODEL --threads 2 --context 512
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from worker import serve

from smallthinker_edge import Session, SmallThinker, __version__
from smallthinker_edge.measure.limits import arbitrary_weights, read_limit, streaming_bytes


class SmallThinkerEngine:
    """One model; a stream is a Session."""

    def __init__(self, path: str, threads: int, context: int, memory: str | None = None) -> None:
        started = time.perf_counter()
        self.threads, self.context = threads, context
        self.model = SmallThinker(path, threads=threads, context=context, memory=memory)
        self.load_seconds = time.perf_counter() - started
        self.streams: dict[str, Session] = {}
        self.read_memory: Any = None

    def describe(self) -> dict[str, Any]:
        stats = self.model.stats()
        return {
            "engine": f"smallthinker_edge {__version__}",
            "kernels": stats["kernels"],
            "load_seconds": self.load_seconds,
            "model_bytes": stats["model_bytes"],
        }

    def reset(self, stream: str) -> None:
        if stream in self.streams:
            self.streams[stream].reset()

    def run(self, stream: str, tokens: Sequence[int]) -> None:
        if stream not in self.streams:
            self.streams[stream] = self.model.session(self.context)
        self.streams[stream].decode(tokens)

    def stats(self) -> dict[str, Any]:
        return dict(self.model.stats())

    def read_limit(self, pattern: list[int] | None) -> dict[str, Any]:
        """How fast memory can be read: the best of all patterns, or by one (streams, ahead)."""
        if self.read_memory is None:
            self.read_memory = arbitrary_weights(streaming_bytes())
        patterns = {} if pattern is None else {"patterns": [(pattern[0], pattern[1])]}
        limit = read_limit(self.threads, self.read_memory, **patterns)
        return {"bytes_per_second": limit.bytes_per_second, "pattern": [limit.streams, limit.ahead]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True, help="positions of every stream")
    parser.add_argument("--memory", metavar="SIZE", help="budget of a packed model (default: none)")
    arguments = parser.parse_args()
    serve(SmallThinkerEngine(arguments.model, arguments.threads, arguments.context, arguments.memory))


if __name__ == "__main__":
    main()
