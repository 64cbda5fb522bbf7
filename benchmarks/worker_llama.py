"""llama.cpp as a worker of compare.py, through the C functions that llama-cpp-python binds.

    python benchmarks/worker_llama.py MODEL --threads 2 --context 512

Run in a Python that has llama-cpp-python; it does not import this library. llama_decode() is called directly: nothing
of llama-cpp-python's own sampling or bookkeeping is timed. Weights are mapped and repacked, as by default.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp
from worker import serve

FLASH_ATTENTION = {"off": 0, "on": 1}


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _only_errors(level: int, text: bytes, _: Any) -> None:
    if level == 4:
        sys.stderr.write(text.decode(errors="replace"))


class LlamaEngine:
    """One llama.cpp model; a stream is a context. A stream's name ends in /on or /off, for flash attention.

    Raises RuntimeError if llama.cpp refuses the file or a context.
    """

    def __init__(self, path: str, threads: int, context: int) -> None:
        llama_cpp.llama_log_set(_only_errors, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        started = time.perf_counter()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.load_seconds = time.perf_counter() - started
        self.threads, self.context = threads, context
        self.streams: dict[str, Any] = {}
        self.batch = 0

    def describe(self) -> dict[str, Any]:
        return {
            "engine": f"llama.cpp (llama-cpp-python {llama_cpp.__version__})",
            "system_info": llama_cpp.llama_print_system_info().decode().strip(),
            "load_seconds": self.load_seconds,
        }

    def _open(self, stream: str) -> Any:
        if stream not in self.streams:
            params = llama_cpp.llama_context_default_params()
            params.n_ctx, params.n_threads, params.n_threads_batch = self.context, self.threads, self.threads
            params.flash_attn_type = FLASH_ATTENTION[stream.rpartition("/")[2]]
            self.batch = int(params.n_batch)
            self.streams[stream] = llama_cpp.llama_init_from_model(self.model, params)
            if not self.streams[stream]:
                raise RuntimeError(f"llama.cpp cannot make a context of {self.context} tokens")
        return self.streams[stream]

    def reset(self, stream: str) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._open(stream)), False)

    def run(self, stream: str, tokens: Sequence[int]) -> None:
        context = self._open(stream)
        for start in range(0, len(tokens), self.batch):
            part = tokens[start : start + self.batch]
            ids = (llama_cpp.llama_token * len(part))(*part)
            # Logits of the last token only, as llama_batch_get_one() asks for.
            if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, len(part))):
                raise RuntimeError("llama_decode failed")
        llama_cpp.llama_synchronize(context)
        llama_cpp.llama_get_logits(context)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True, help="positions of every stream")
    arguments = parser.parse_args()
    serve(LlamaEngine(arguments.model, arguments.threads, arguments.context))


if __name__ == "__main__":
    main()
