"""Writes what the model authors' engine does: its GGUF files, those without experts, and expert bundles.

Written from the description of the formats, apart from the package; repacking goes by a table of single bytes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf_files import write_model

PAGE = 4096
BLOCK, ROWS = 18, 4


def write_authors_model(path: Path, **options: Any) -> str:
    """Everything Q4_0, down transposed, a predictor of the head, and no gating key, which is sigmoid."""
    return write_model(path, down_transposed=True, gating=None, types="Q4_0", **{"lm_head_profiler": 32} | options)


def write_without_experts(source: str, target: Path) -> str:
    """A copy of a file without ffn_{gate,up,down}_exps."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "smallthinker")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=field.types[-1])
    for tensor in reader.tensors:
        if "_exps" not in tensor.name:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return os.fspath(target)


def repack(matrix: np.ndarray, run: int = 4) -> bytes:
    """The bytes of a matrix [rows, blocks * 18] as on ARM. run: bytes of a row's weights that stay together."""
    rows, width = matrix.shape
    source = [row * BLOCK + byte for row in range(ROWS) for byte in range(2)]
    for i in range(ROWS * 16 // run):
        source += [i % ROWS * BLOCK + 2 + i // ROWS * run + byte for byte in range(run)]
    four = matrix.reshape(rows // ROWS, ROWS, width // BLOCK, BLOCK).transpose(0, 2, 1, 3)
    packed = four.reshape(-1, ROWS * BLOCK)[:, source]
    packed[:, 2 * ROWS :] ^= 0x88
    return packed.tobytes()


def write_bundle(path: Path, source: str, *, arm: bool = False) -> Path:
    """The bundle of a file with transposed down: of each expert of each layer, up, gate and down in whole pages."""
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(source).tensors}
    with path.open("wb") as file:
        for layer in range(sum("ffn_gate_exps" in name for name in tensors)):
            up, gate, down = (tensors[f"blk.{layer}.ffn_{role}_exps.weight"] for role in ("up", "gate", "down"))
            for expert in range(len(up)):
                assert up[expert].nbytes % PAGE == 0
                file.write(up[expert].tobytes())
                file.write(repack(gate[expert]) if arm else gate[expert].tobytes())
                file.write(down[expert].tobytes())
    return path
