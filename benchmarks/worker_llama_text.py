"""llama-cpp-python as its users call it, as a worker of structured.py: texts, free or kept to a JSON schema.

    python benchmarks/worker_llama_text.py MODEL --threads 2

Run in a Python that has llama-cpp-python; it does not import this library. Its own sampling is timed too.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import llama_cpp
from worker import serve


class LlamaText:
    """One model, opened as llama-cpp-python opens it, but for the context."""

    def __init__(self, path: str, threads: int) -> None:
        self.llama = llama_cpp.Llama(path, n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)

    def describe(self) -> dict[str, Any]:
        return {"engine": f"llama-cpp-python {llama_cpp.__version__}"}

    def complete(self, prompt: str, tokens: int, schema: dict[str, Any] | None) -> dict[str, Any]:
        """A greedy text: "seconds" from its first token to its last, and "tokens", how many came after the first."""
        grammar = None if schema is None else llama_cpp.LlamaGrammar.from_json_schema(json.dumps(schema), verbose=False)
        self.llama.reset()
        before = len(self.llama.tokenize(prompt.encode()))
        first = last = 0.0
        for _ in self.llama(prompt, max_tokens=tokens, temperature=0.0, grammar=grammar, stream=True):
            last = time.perf_counter()
            first = first or last
        return {"seconds": last - first, "tokens": self.llama.n_tokens - before - 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    serve(LlamaText(arguments.model, arguments.threads))


if __name__ == "__main__":
    main()
