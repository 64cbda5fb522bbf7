"""Measures prompt and decode speed of one model file, on random tokens, as docs/performance.md reports them.

    python benchmarks/decode.py MODEL.gguf [--prompt 512] [--decode 128] [--repeat 3] [--threads N]

Random tokens route differently from text: compare engines and builds with these figures, not experts' use.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import psutil

from smallthinker_edge import Session, SmallThinker


def seconds_of(session: Session, tokens: np.ndarray, one_by_one: bool) -> float:
    """Wall time of decoding the tokens, as one prompt or as single steps."""
    started = time.perf_counter()
    for chunk in tokens[:, None] if one_by_one else [tokens]:
        session.decode(chunk)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="MODEL.gguf")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (512)")
    parser.add_argument("--decode", type=int, default=128, help="tokens decoded one by one after it (128)")
    parser.add_argument("--repeat", type=int, default=3, help="measurements; the median counts (3)")
    parser.add_argument("--threads", type=int, help="compute threads (default: usable CPUs)")
    arguments = parser.parse_args()

    started = time.perf_counter()
    with SmallThinker(arguments.model, threads=arguments.threads) as model:
        print(f"load {time.perf_counter() - started:.2f} s, {model.stats()}")
        rng = np.random.default_rng(0)
        prompts, decodes = [], []
        for _ in range(arguments.repeat):
            tokens = rng.integers(0, model.config.vocab_size, arguments.prompt + arguments.decode)
            with model.session(len(tokens)) as session:
                prompts.append(arguments.prompt / seconds_of(session, tokens[: arguments.prompt], one_by_one=False))
                decodes.append(arguments.decode / seconds_of(session, tokens[arguments.prompt :], one_by_one=True))
        print(f"prompt {statistics.median(prompts):.1f} tokens/s (of {[round(x, 1) for x in prompts]})")
        print(f"decode {statistics.median(decodes):.1f} tokens/s (of {[round(x, 1) for x in decodes]})")
        print(f"resident {psutil.Process().memory_info().rss / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
