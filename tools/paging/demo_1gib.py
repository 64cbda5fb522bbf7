"""Shows a model that is larger than its memory limit decoding inside it: `make demo-1gib`.

    python tools/paging/demo_1gib.py [MODEL.gguf] [--memory 1GiB] [--context 2048] [--tokens 128]
        [--llama-python PYTHON]

Without a model it makes the synthetic 4B of make_synthetic.py in build/ (5 GB of disk, minutes). It packs the GGUF
where that has not been done, then runs the library, and llama.cpp's mmap where a Python has llama-cpp-python, each
under tools/paging/capped.py and from a cold page cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMES = ("decode_seconds", "stall_seconds", "disk_seconds", "tail_seconds")
COUNTS = ("hits", "ahead_hits", "misses", "read_bytes", *TIMES)
LLAMA_SECONDS = 60  # below 0.1 tokens/s there is nothing to wait for


def synthetic_model() -> Path:
    path = ROOT / "build" / "synthetic-4b.gguf"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        print("No model given: making a synthetic one of the 4B's shape (its text means nothing) ...", flush=True)
        subprocess.run([sys.executable, ROOT / "tools" / "models" / "make_synthetic.py", "4b", "-o", path], check=True)
    return path


def packed(model: Path) -> Path:
    if model.suffix == ".stpk":
        return model
    target = model.with_suffix(".stpk")
    if not target.exists():
        print(f"Packing {model.name} ...", flush=True)
        subprocess.run([sys.executable, "-m", "smallthinker_edge", "pack", model, "-o", target], check=True)
    return target


def capped(memory: str, python: str, *worker: str) -> None:
    command = [sys.executable, str(ROOT / "tools" / "paging" / "capped.py"), "--memory", memory, "--drop-caches", "--"]
    if subprocess.run([*command, python, __file__, *worker], check=False).returncode:
        print("It did not get to its end under this limit.")


def run_ours(path: str, memory: str, context: int, tokens: int, prompt: int = 0) -> None:
    """Decodes random tokens in four series, after a prompt of random tokens where asked."""
    started = time.perf_counter()
    from smallthinker_edge import SmallThinker
    from smallthinker_edge.model import stall_share

    draw = random.Random(0)
    with SmallThinker(path, memory=memory, context=context) as model, model.session() as session:
        vocabulary = model.config.vocab_size
        session.decode([draw.randrange(vocabulary)])
        print(f"first token after {time.perf_counter() - started:.2f} s; {model.plan.slots} expert slots")
        if prompt:
            ids = [draw.randrange(vocabulary) for _ in range(prompt)]
            begun = time.perf_counter()
            session.decode(ids)
            print(f"prompt of {prompt}: {prompt / (time.perf_counter() - begun):.1f} tokens/s")
        for _ in range(4):
            before, begun = model.stats(), time.perf_counter()
            for _ in range(tokens // 4):
                session.decode([draw.randrange(vocabulary)])
            seconds, after = time.perf_counter() - begun, model.stats()
            change = {key: after[key] - before[key] for key in COUNTS}  # type: ignore[operator]
            rate = change["hits"] / (change["hits"] + change["ahead_hits"] + change["misses"])
            decode, wait, disk, tail = (change[key] for key in TIMES)
            threads = int(str(after["threads"]))
            stall, within = stall_share(decode, wait, disk, threads), stall_share(decode, wait, disk, threads, tail)
            speed = f"{tokens // 4 / seconds:.1f} tokens/s, hit rate {rate:.3f}, {after['slots']} slots"
            reads = f"read {change['read_bytes'] / seconds / 1e9:.2f} GB/s, disk busy {disk / seconds:.0%}"
            print(f"{speed}, {reads}, stall {stall:.1%}, within tokens {within:.1%}", flush=True)


def run_llama(path: str, context: int, tokens: int) -> None:
    """The same with llama.cpp and the GGUF mapped into memory, for at most a minute."""
    sys.path.pop(0)  # benchmarks/ and tools/ hold files of other packages' names
    import llama_cpp

    started = time.perf_counter()
    model = llama_cpp.Llama(path, n_ctx=context, n_threads=2, use_mmap=True, verbose=False)
    draw = random.Random(0)
    model.eval([draw.randrange(model.n_vocab())])
    print(f"first token after {time.perf_counter() - started:.2f} s", flush=True)
    done, begun = 0, time.perf_counter()
    while done < tokens and time.perf_counter() - begun < LLAMA_SECONDS:
        model.eval([draw.randrange(model.n_vocab())])
        done += 1
    print(f"{done / (time.perf_counter() - begun):.2f} tokens/s ({done} tokens)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, help="GGUF or packed file (default: a synthetic 4B)")
    parser.add_argument("--memory", default="1GiB", help="limit of the whole process (1GiB)")
    parser.add_argument("--context", type=int, default=2048, help="positions that the memory plan holds (2048)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to decode (128)")
    parser.add_argument("--prompt", type=int, default=0, help="random tokens before them, as one prompt (0)")
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python (default: this one, if it has)")
    parser.add_argument("--worker", choices=("ours", "llama"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker == "ours":
        return run_ours(str(arguments.model), arguments.memory, arguments.context, arguments.tokens, arguments.prompt)
    if arguments.worker == "llama":
        return run_llama(str(arguments.model), arguments.context, arguments.tokens)

    model = arguments.model or synthetic_model()
    options = ["--memory", arguments.memory]
    for name in ("context", "tokens", "prompt"):
        options += [f"--{name}", str(getattr(arguments, name))]
    file = packed(model)
    print(f"\nsmallthinker_edge, {arguments.memory}:", flush=True)
    capped(arguments.memory, sys.executable, str(file), *options, "--worker", "ours")
    llama = arguments.llama_python or (sys.executable if importlib.util.find_spec("llama_cpp") else None)
    if llama is None:
        print("\nllama.cpp: not installed here (--llama-python PYTHON names one that has llama-cpp-python)")
    elif model.suffix == ".gguf":
        print(f"\nllama.cpp with mmap, {arguments.memory}, at most {LLAMA_SECONDS} s:", flush=True)
        capped(arguments.memory, llama, str(model), *options, "--worker", "llama")
    return None


if __name__ == "__main__":
    main()
