"""Counts the instructions of a whole decoded token, of this library and of llama.cpp, on ARM64 under qemu.

Both programs decode the same fixed tokens of the same GGUF one by one, with one thread. The difference of a run of 2 N
and one of N tokens leaves out start-up and loading; what remains, divided by N, is a token: for this library with all
that Python does for it, for llama.cpp from a C program (tools/arm/count_llama.c). The last token's best id, which both
print, shows that they computed the same. This library runs as `make test-arm` left it (the installed wheel).

llama.cpp: cross-compile libllama statically (CMake, GGML_NATIVE=OFF, GGML_CPU_ARM_ARCH=armv8-a or
armv8.2-a+dotprod), link tools/arm/count_llama.c with it for each, and name the programs with --llama CPU=PROGRAM. Needs
gcc and a qemu-user that loads plugins (Debian's static one does not). Not used by the library.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from datetime import date
from pathlib import Path

from run_on_arm import ARM64, python_command

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "docs" / "measurements" / "arm-tokens.json"
DECODE = """
import sys
from smallthinker_edge import SmallThinker
with SmallThinker(sys.argv[1], threads=1, context=512) as model, model.session() as session:
    for i in range(int(sys.argv[2])):
        logits = session.decode([(i * 7919 + 11) % model.config.vocab_size])
    print(int(logits.argmax()))
"""


def count(command: list[str], environment: dict[str, str] | None = None) -> tuple[int, int]:
    """(instructions, best token after the last one) of one run under the plugin."""
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    match = re.search(r"instructions: (\d+)", result.stderr)
    if result.returncode != 0 or match is None:
        raise SystemExit(f"{' '.join(command[-4:])} was not counted:\n{result.stdout}{result.stderr}")
    return int(match[1]), int(result.stdout)


def token(qemu: str, options: list[str], cpu: str, program: str | None, model: str, n: int) -> tuple[float, int]:
    """(instructions of one token, best token after 2 * n) of llama.cpp's program, or of this library."""
    counts = []
    for tokens in (n, 2 * n):
        if program is None:
            arguments = ["-P", "-c", DECODE, model, str(tokens)]
            command, environment = python_command(ARM64, qemu, cpu, arguments, options)
            counts.append(count(command, environment))
        else:
            counts.append(count([qemu, *options, "-cpu", cpu, program, model, str(tokens)]))
    return (counts[1][0] - counts[0][0]) / n, counts[1][1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="GGUF file")
    parser.add_argument(
        "--llama", action="append", default=[], metavar="CPU=PROGRAM", help="may be repeated; CPU=: without llama.cpp"
    )
    parser.add_argument("--packed", help="the same model packed: this library loads it faster")
    parser.add_argument("--tokens", type=int, default=16, metavar="N", help="N and 2 N are decoded (default 16)")
    parser.add_argument("--qemu", default=shutil.which("qemu-aarch64") or "qemu-aarch64")
    parser.add_argument("--name", help="what the model is called in docs/measurements/arm-tokens.json, where it goes")
    arguments = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        plugin = f"{folder}/insn_count.so"
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", plugin, ROOT / "tools/arm/insn_count.c"], check=True)
        for cpu, program in (item.split("=", 1) for item in arguments.llama):
            shared = (arguments.qemu, ["-plugin", plugin], cpu)
            ours, best = token(*shared, None, arguments.packed or arguments.model, arguments.tokens)
            results[cpu] = {"ours": round(ours)}
            print(f"{cpu}: {ours / 1e6:.2f} M instructions a token, best token {best}", flush=True)
            if program:
                theirs, their_best = token(*shared, program, arguments.model, arguments.tokens)
                results[cpu] |= {"llama.cpp": round(theirs), "ratio": round(ours / theirs, 3)}
                print(
                    f"llama.cpp: {theirs / 1e6:.2f} M, ratio {ours / theirs:.3f}; best token {their_best}", flush=True
                )
    if arguments.name:
        known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        known[arguments.name] = {"date": date.today().isoformat(), "tokens": arguments.tokens, "cpus": results}
        RESULT.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
