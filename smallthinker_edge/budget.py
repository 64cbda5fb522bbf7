"""What a model needs of memory, before anything is allocated.

Called by model.py with the user's `memory=`. The whole model must fit: experts are not yet paged from storage.
"""

from __future__ import annotations

import re

import psutil

from smallthinker_edge._native.gguf import GGUFFile
from smallthinker_edge.config import ModelConfig, tensor_name
from smallthinker_edge.errors import MemoryBudgetError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# The tokenizer, threads' stacks and what the allocator keeps, measured with a 152k-token vocabulary.
MARGIN = 96 << 20


def parse_memory(memory: int | str) -> int:
    """Bytes of an int, or of a string such as "1GiB", "900 MB", "4096".

    Raises ValueError for anything else.
    """
    if isinstance(memory, bool) or not isinstance(memory, int | str):
        raise ValueError("memory must be bytes as an int, or a string such as '1GiB'")
    if isinstance(memory, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?i?B?)", memory.strip(), re.IGNORECASE)
        unit = match.group(2).upper() if match else ""
        if match is None or unit not in UNITS:
            raise ValueError(f"cannot read {memory!r} as a memory size; write for example '1GiB' or '900MB'")
        memory = int(float(match.group(1)) * UNITS[unit])
    if memory <= 0:
        raise ValueError("memory must be positive")
    return memory


def parts(gguf: GGUFFile, config: ModelConfig, context: int, batch: int) -> dict[str, int]:
    """Bytes by purpose of a process that runs the model wholly in memory."""
    skip = {tensor_name("token_embd")} if not config.tied else set()
    weights = sum(info.nbytes for name, info in gguf.tensors.items() if name not in skip)
    cache = 0
    for windowed in config.window_layout:
        positions = min(context, config.window + batch) if windowed and config.window else context
        cache += 2 * 2 * (positions + 255) // 256 * 256 * config.n_kv_heads * config.head_dim
    width = 4 * config.d_model + 3 * config.n_heads * config.head_dim
    buffers = batch * (4 * width + config.n_experts_used * config.d_ffn * 7) + 4 * config.vocab_size
    process = psutil.Process().memory_info().rss
    return {"process": process, "weights": weights, "KV cache": cache, "buffers": buffers, "margin": MARGIN}


def check(memory: int | str, gguf: GGUFFile, config: ModelConfig, context: int, batch: int) -> None:
    """Raises MemoryBudgetError, with the smallest budget that works and its parts, where `memory` is too little."""
    limit = parse_memory(memory)
    needed = parts(gguf, config, context, batch)
    total = sum(needed.values())
    if total > limit:
        table = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in needed.items())
        raise MemoryBudgetError(
            f"a budget of {limit} bytes is too small: this model with a context of {context} needs "
            f"{total} bytes ({table})"
        )
