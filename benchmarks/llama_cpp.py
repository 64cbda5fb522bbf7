"""Times llama.cpp (through llama-cpp-python's C bindings) on a GGUF file and prints JSON.

Run by the comparison benchmark in a Python that has `llama-cpp-python`, usually another environment than the
library's own. It never imports this library, so that neither side can disturb the other.

    python benchmarks/llama_cpp.py MODEL.gguf --threads 2 --decode 64 --contexts 0 4096 --prompts 128 512

With --serve it reads one job per line, {"kind": "decode", "tokens": 64, "context": 0} or {"kind": "prompt",
"tokens": 512}, and answers each with one line, so that two engines can take turns.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import statistics
import sys
import time
from typing import Any

# This file has the name of the package that it imports, and its folder comes first on the path.
sys.path.pop(0)

import llama_cpp

FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _only_errors(level: int, text: bytes, _: Any) -> None:
    if level == 4:
        sys.stderr.write(text.decode(errors="replace"))


class Engine:
    """One llama.cpp model and context. All weights are read into memory; nothing is paged in while timing."""

    def __init__(self, path: str, threads: int, context: int, flash_attention: str = "auto") -> None:
        """Raises RuntimeError if llama.cpp refuses the file or the context.

        threads: for decode and prompt alike. context: tokens the KV cache (F16) must hold.
        """
        llama_cpp.llama_log_set(_only_errors, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        if hasattr(model_params, "load_mode"):
            model_params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        else:
            model_params.use_mmap = False
        started = time.perf_counter()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = context, threads, threads
        if hasattr(params, "flash_attn_type"):
            params.flash_attn_type = FLASH_ATTENTION[flash_attention]
        self.batch = int(params.n_batch)
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot make a context of {context} tokens")
        self.load_seconds = time.perf_counter() - started
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def reset(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)

    def decode(self, tokens: list[int]) -> None:
        """Runs tokens, in batches of llama.cpp's default size, and waits until the last logits are there."""
        for start in range(0, len(tokens), self.batch):
            part = tokens[start : start + self.batch]
            array = (llama_cpp.llama_token * len(part))(*part)
            if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(part))):
                raise RuntimeError("llama_decode failed")
        llama_cpp.llama_synchronize(self.context)
        llama_cpp.llama_get_logits(self.context)

    def close(self) -> None:
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)


def run_job(engine: Engine, rng: random.Random, kind: str, tokens: int, context: int = 0) -> dict[str, Any]:
    """Times one job on random tokens after `context` random tokens, which are not timed."""
    if kind not in ("decode", "prompt"):
        raise ValueError(f"unknown kind of job {kind!r}")
    ids = [rng.randrange(engine.vocab_size) for _ in range(context + tokens)]
    engine.reset()
    if context:
        engine.decode(ids[:context])
    steps = []
    started = time.perf_counter()
    if kind == "prompt":
        engine.decode(ids[context:])
    else:
        for token in ids[context:]:
            begin = time.perf_counter()
            engine.decode([token])
            steps.append(time.perf_counter() - begin)
    seconds = time.perf_counter() - started
    result = {"kind": kind, "tokens": tokens, "context": context, "seconds": seconds}
    result["tokens_per_second"] = tokens / seconds
    if steps:
        result["median_step_ms"] = statistics.median(steps) * 1e3
    return result


def describe(engine: Engine, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "engine": "llama.cpp",
        "llama_cpp_python": llama_cpp.__version__,
        "system_info": llama_cpp.llama_print_system_info().decode(),
        "model": args.model,
        "threads": args.threads,
        "load_seconds": engine.load_seconds,
    }


def serve(engine: Engine, rng: random.Random) -> None:
    for line in sys.stdin:
        if line.strip():
            print(json.dumps(run_job(engine, rng, **json.loads(line))), flush=True)


def run_all(engine: Engine, rng: random.Random, args: argparse.Namespace) -> dict[str, Any]:
    """Every job once per repetition, in turns; returns all runs and the median of each job."""
    jobs = [{"kind": "prompt", "tokens": tokens, "context": 0} for tokens in args.prompts]
    jobs += [{"kind": "decode", "tokens": args.decode, "context": context} for context in args.contexts]
    run_job(engine, rng, "decode", 4)
    runs = [run_job(engine, rng, **job) for _ in range(args.repetitions) for job in jobs]
    medians = {}
    for job in jobs:
        rates = [run["tokens_per_second"] for run in runs if job.items() <= run.items()]
        medians[f"{job['kind']}_{job['tokens']}_at_{job['context']}"] = statistics.median(rates)
    return {"tokens_per_second": medians, "runs": runs}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--decode", type=int, default=64, metavar="N", help="tokens decoded one by one (64)")
    parser.add_argument("--contexts", type=int, nargs="*", default=[0], help="decode after so many tokens (0)")
    parser.add_argument("--prompts", type=int, nargs="*", default=[128, 512], help="prompt lengths (128 512)")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--flash-attention", choices=sorted(FLASH_ATTENTION), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--context-size", type=int, help="KV cache, tokens; default: what the jobs need")
    parser.add_argument("--serve", action="store_true", help="read jobs from standard input")
    args = parser.parse_args()
    needed = max([0, *args.prompts, *(context + args.decode for context in args.contexts)])
    context = args.context_size or -(-needed // 256) * 256
    try:
        engine = Engine(args.model, args.threads, context, args.flash_attention)
    except RuntimeError as error:
        print(f"llama_cpp: {error}", file=sys.stderr)
        return 1
    rng = random.Random(args.seed)
    head = describe(engine, args)
    if args.serve:
        print(json.dumps(head), flush=True)
        serve(engine, rng)
    else:
        print(json.dumps(head | run_all(engine, rng, args), indent=1))
    engine.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
