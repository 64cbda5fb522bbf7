"""Predicts tokens per second on boards that were not at hand, from instruction counts, and says on what assumptions.

`predict.py measure` counts the instructions that kernels execute under qemu (user mode, with insn_count.c) into
docs/measurements/arm-counts.json, from which arm_pages.py makes the predictions; `predict.py loops` asks llvm-mca for
the cycles of inner loops. Needs gcc, ziglang, llvm-mca and a qemu-user that loads plugins (Debian's static one does
not). Not used by the library.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COUNTS = ROOT / "docs" / "measurements" / "arm-counts.json"
TABLES = {"cortex-a72": "neon", "cortex-a76": "dotprod", "max": "i8mm"}
KERNELS = ("gemv_q4_0", "gemm_q4_0", "gemv_q8_0", "rows", "down", "attention_f16", "attention_q8")
SOURCES: dict[str, list[str]] = {
    "tools/arm/arm_count.c": [], "src/system/cpu.c": [], "src/weights/types.c": [], "src/weights/layout.c": [],
    "src/weights/expert.c": [], "src/kernels/kv.c": [], "src/kernels/neurons.c": [], "src/kernels/ref.c": [],
    "src/kernels/arm/common.c": [], "src/kernels/arm/neon.c": [],
    "src/kernels/arm/dotprod.c": ["-march=armv8.2-a+dotprod"],
    "src/kernels/arm/i8mm.c": ["-march=armv8.2-a+dotprod+i8mm"],
}  # fmt: skip
# Cores whose schedules llvm-mca is asked for, and the table each would run.
SCHEDULES = {"cortex-a72": "neon", "cortex-a76": "dotprod", "neoverse-n1": "dotprod"}


# Measuring


def build(folder: Path) -> tuple[Path, Path]:
    """(qemu plugin, tools/arm/arm_count.c for ARM64 with the compiler and flags of the wheels)."""
    plugin, program = folder / "insn_count.so", folder / "arm_count"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", plugin, ROOT / "tools/arm/insn_count.c"], check=True)
    compiler = [sys.executable, ROOT / "tools/build/zig_cc.py", "aarch64-linux-musl"]
    flags = ["-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", f"-I{ROOT / 'include'}"]
    objects = []
    for source, own in SOURCES.items():
        objects.append(folder / (Path(source).stem + ".o"))
        subprocess.run([*compiler, *flags, *own, "-c", ROOT / source, "-o", objects[-1]], check=True)
    subprocess.run([*compiler, "-static", *objects, "-o", program], check=True)
    return plugin, program


def count(command: list[str | Path]) -> tuple[int, int]:
    """(instructions, weights of one repetition) of one run under the plugin."""
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    match = re.search(r"instructions: (\d+)", result.stderr)
    if match is None:
        raise SystemExit(
            f"{command[0]} does not load plugins: a qemu-user built with them is needed, not the static one"
        )
    return int(match[1]), int(result.stdout)


def measure(qemu: str) -> dict[str, Any]:
    """Instructions per weight by table and kernel; the difference of two runs leaves out the program's start."""
    result: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        plugin, program = build(Path(folder))
        for cpu, table in TABLES.items():
            result[table] = {}
            for kernel in KERNELS:
                command = [qemu, "-cpu", cpu, "-plugin", plugin, program, kernel, table]
                (few, weights), (many, _) = count([*command, "1"]), count([*command, "3"])
                result[table][kernel] = round((many - few) / 2 / weights, 4)
    told = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout
    return {
        "date": date.today().isoformat(),
        "compiler": f"clang of zig {version('ziglang')}",
        "qemu": "qemu-user " + re.findall(r"version (\d+\.\d+)", told)[0],
        "instructions_per_weight": result,
    }


def inner_loop(listing: str, function: str) -> list[str]:
    """The innermost loop of a function that multiplies most, as assembly without addresses."""
    lines: list[tuple[int, str]] = []
    inside = False
    for line in listing.splitlines():
        if head := re.match(r"[0-9a-f]+ <(.+)>:", line):
            inside = head[1].startswith(function)
        elif inside and (match := re.match(r"\s*([0-9a-f]+):\s+(.*)", line)):
            lines.append((int(match[1], 16), match[2].split("//")[0].strip()))
    index = {address: i for i, (address, _) in enumerate(lines)}
    spans = []
    for i, (address, text) in enumerate(lines):
        match = re.match(r"(?:b|b\.\w+|cbn?z|tbn?z)\s+(?:.*,\s*)?([0-9a-f]+) <", text)
        if match and index.get(int(match[1], 16), i + 1) <= i and int(match[1], 16) <= address:
            spans.append((index[int(match[1], 16)], i))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    multiplies = re.compile(r"(sdot|s?mmla|smlal2?|smull2?)\b")
    start, end = max(
        inner, key=lambda span: sum(bool(multiplies.match(lines[k][1])) for k in range(span[0], span[1] + 1))
    )
    return [re.sub(r"[0-9a-f]+ <.*>$", "loop", text) for _, text in lines[start : end + 1]]


def cycles(loop: list[str], cpu: str) -> float:
    """Cycles of one iteration by llvm-mca's model of a core, where every load hits the first cache."""
    with tempfile.NamedTemporaryFile("w", suffix=".s") as file:
        file.write("loop:\n" + "\n".join(loop) + "\n")
        file.flush()
        command = ["llvm-mca", "-mtriple=aarch64", f"-mcpu={cpu}", "-mattr=+dotprod", "-iterations=200", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"Total Cycles:\s+(\d+)", report)
    assert match is not None, report
    return int(match[1]) / 200


def loops(objects: list[str]) -> None:
    """Prints instructions and cycles per weight of inner loops: objects are FILE:FUNCTION:WEIGHTS of an iteration."""
    for item in objects:
        file, function, weights = item.rsplit(":", 2)
        command = ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", file]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        loop = inner_loop(listing, function)
        each = {cpu: f"{cycles(loop, cpu) / int(weights):.3f}" for cpu in SCHEDULES}
        print(f"{function}: {len(loop) / int(weights):.3f} instructions per weight; cycles per weight {each}")


# Predicting


@dataclass(frozen=True)
class Model:
    """Sizes of the two released models (their config.json)."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    used: int
    ffn: int
    vocabulary: int = 151936

    def weights(self, silent: float) -> dict[str, float]:
        """Weights that one token multiplies, by the kernel that does it."""
        expert = self.layers * self.used * self.ffn * self.width
        attention = self.layers * 2 * self.width * (self.heads + self.kv_heads) * self.head_dim
        dense = attention + self.vocabulary * self.width + expert
        return {"gemv_q4_0": dense, "rows": expert * (1 - silent), "down": expert * (1 - silent)}

    def router_weights(self) -> int:
        """F32, not Q4_0."""
        return self.layers * self.experts * self.width

    def bytes(self, silent: float) -> float:
        """Bytes of weights that a token reads: 18 a block of 32; down's scales are read whole."""
        weights = self.weights(silent)
        scales = self.layers * self.used * self.ffn * self.width * silent * 2 / 32
        return sum(weights.values()) * 18 / 32 + scales + 4 * self.router_weights()

    @property
    def expert_bytes(self) -> int:
        return 3 * self.ffn * self.width * 18 // 32


MODELS = {
    "4B": Model("4B", 32, 1536, 12, 2, 128, 32, 4, 768),
    "21B": Model("21B", 52, 2560, 28, 4, 128, 64, 6, 768),
}


@dataclass(frozen=True)
class Board:
    """What is assumed of a board. bandwidth: bytes/s that reads by all fast cores reach; storage: bytes/s of reads."""

    name: str
    table: str
    cores: int
    clock: float
    ipc: float  # instructions per cycle in these loops
    bandwidth: float
    storage: float


# Clocks and cores: data sheets. Bandwidth: STREAM 5.5 GB/s on a Pi 4 (sci-pi.org.uk); 60 % of LPDDR4X-4267 x 32 bit on
# a Pi 5; 17-22 GB/s on the RK3588 (turingpi.com). Storage: UHS-I SDR104, PCIe 2.0 x1, and a drive on PCIe 3.0 x4.
# IPC: llvm-mca's, less a quarter for cache misses and the small operations, which its model leaves out.
BOARDS = (
    Board("Pi 4, SD card", "neon", 4, 1.8e9, 1.5, 5.0e9, 40e6),
    Board("Pi 5, SD card", "dotprod", 4, 2.4e9, 1.5, 10e9, 85e6),
    Board("Pi 5, NVMe", "dotprod", 4, 2.4e9, 1.5, 10e9, 420e6),
    Board("RK3588, NVMe", "dotprod", 4, 2.3e9, 1.5, 18e9, 1500e6),
)
# The technical report's figures for its own engine on a Raspberry Pi 5 (model, budget in GiB or 0: none).
REPORT = {("4B", 0): 28.77, ("21B", 0): 6.61, ("4B", 1): 0.75}
SILENT = 0.62  # median share of silent neurons (report, figure 4)
MISS_1GIB = 0.18  # of the 4B's experts with 314 slots (docs/notes/2026-11-24-reads-of-experts.md)
# Norms, attention over a short context, router, quantisation, Python: a whole token of a model of the 4B's shapes
# executes 1.06 (dotprod) and 1.07 (neon) times what its matrices do (docs/measurements/arm-tokens.json).
OVERHEAD = 1.07


def predict(model: Model, board: Board, counts: dict[str, Any], misses: float) -> dict[str, float]:
    """Seconds of a token by what takes them. Computing and reading memory overlap; storage is waited for."""
    per_weight = counts["instructions_per_weight"][board.table]
    instructions = sum(n * per_weight[kernel] for kernel, n in model.weights(SILENT).items()) * OVERHEAD
    compute = instructions / (board.cores * board.clock * board.ipc)
    memory = model.bytes(SILENT) / board.bandwidth
    storage = misses * model.layers * model.used * model.expert_bytes / board.storage
    return {"compute": compute, "memory": memory, "storage": storage, "total": max(compute, memory) + storage}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="count instructions under qemu")
    measuring.add_argument("--qemu", default=shutil.which("qemu-aarch64") or "qemu-aarch64")
    looping = commands.add_parser("loops", help="instructions and cycles of inner loops, by llvm-mca")
    looping.add_argument("objects", nargs="+", metavar="FILE:FUNCTION:WEIGHTS")
    arguments = parser.parse_args()
    if arguments.command == "measure":
        COUNTS.parent.mkdir(parents=True, exist_ok=True)
        COUNTS.write_text(json.dumps(measure(arguments.qemu), indent=1) + "\n")
    else:
        loops(arguments.objects)


if __name__ == "__main__":
    main()
