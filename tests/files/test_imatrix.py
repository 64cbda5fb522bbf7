"""Importance matrices: both of llama.cpp's forms, what is refused, and what conversion makes of them."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoint_files import EXPERTS, LAYERS, write_checkpoint
from gguf_files import write_model
from small_model import divergence

from smallthinker_edge import ModelFormatError, SmallThinker
from smallthinker_edge._native.quantize import quantize_rows
from smallthinker_edge.cli import main
from smallthinker_edge.files.convert import convert
from smallthinker_edge.files.imatrix import FLOOR, ImportanceMatrix
from smallthinker_edge.measure.imatrix import measure_importance

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("LLAMA_PYTHON", ROOT / ".venv-llama/bin/python"))
SHAPE: dict[str, Any] = {"n_layers": 2, "d_model": 64, "n_heads": 2, "n_kv_heads": 1, "head_dim": 32, "d_ffn": 96,
                         "n_experts": 4, "n_experts_used": 2, "context_length": 256, "types": "F16"}  # fmt: skip
Statistics = dict[str, tuple[np.ndarray, np.ndarray]]  # sums of squares [matrices, columns], counts [matrices]


def statistics(layers: int, d: int, width: int, f: int, experts: int) -> Statistics:
    """Of a model's matrices; the last expert has seen nothing."""
    rng = np.random.default_rng(7)
    roles = [*((f"attn_{m}", d, 1) for m in "qkv"), ("attn_output", width, 1)]
    roles += [("ffn_gate_exps", d, experts), ("ffn_up_exps", d, experts), ("ffn_down_exps", f, experts)]
    found: Statistics = {}
    for layer in range(layers):
        for role, columns, matrices in roles:
            counts = rng.integers(10, 99, matrices)
            sums = rng.exponential(size=(matrices, columns)).astype(np.float32) ** 3 * counts[:, None]
            if matrices > 1:
                counts[-1], sums[-1] = 0, 0
            found[f"blk.{layer}.{role}.weight"] = sums.astype(np.float32), counts
    return found


def of_small_model() -> Statistics:
    return statistics(SHAPE["n_layers"], 64, 64, 96, 4)


def of_checkpoint(values: dict[str, np.ndarray]) -> Statistics:
    d, f = values["model.layers.0.block_sparse_moe.experts.0.gate.weight"].shape[::-1]
    width = values["model.layers.0.self_attn.o_proj.weight"].shape[1]
    return statistics(LAYERS, d, width, f, EXPERTS)


def write_gguf(path: Path, found: Statistics, more: dict[str, np.ndarray] | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    for name, (sums, counts) in found.items():
        writer.add_tensor(name + ".in_sum2", sums)
        writer.add_tensor(name + ".counts", counts.astype(np.float32)[:, None])
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_binary(path: Path, found: Statistics, calls: int = 3) -> Path:
    """As llama-imatrix wrote it before GGUF: mean squares times calls, then the calls and the name of the text."""
    data = struct.pack("<i", len(found))
    for name, (sums, counts) in found.items():
        means = (sums / np.maximum(counts, 1)[:, None] * calls).astype("<f4")
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, means.size) + means.tobytes()
    path.write_bytes(data + struct.pack("<ii", calls, 5) + b"a.txt")
    return path


@pytest.mark.parametrize("write", [write_gguf, write_binary])
def test_both_forms_of_llama_cpp_are_read(tmp_path: Path, write: Callable[..., Path]) -> None:
    found = of_small_model()
    with ImportanceMatrix(write(tmp_path / "i", found)) as opened:
        assert opened.entries.keys() == found.keys()
        for name, (sums, counts) in found.items():
            assert np.allclose(opened.entries[name].squares.ravel(), (sums / np.maximum(counts, 1)[:, None]).ravel())


@pytest.mark.parametrize("write", [write_gguf, write_binary])
def test_blocks_are_those_of_least_error_by_the_matrix(tmp_path: Path, write: Callable[..., Path]) -> None:
    found, source = of_small_model(), write_model(tmp_path / "m.gguf", **SHAPE)
    path = write(tmp_path / "i", found)
    assert main(["convert", source, "-o", str(tmp_path / "q.gguf"), "--imatrix", str(path)]) == 0
    convert(source, tmp_path / "again.gguf", imatrix=path)
    assert (tmp_path / "q.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()
    values = {tensor.name: tensor.data for tensor in gguf.GGUFReader(source).tensors}
    for tensor in gguf.GGUFReader(tmp_path / "q.gguf").tensors:
        if tensor.tensor_type != gguf.GGMLQuantizationType.Q4_0:
            continue
        rows = np.array(values[tensor.name], np.float32)
        rows = rows.reshape(-1, *rows.shape[-2:])
        sums, counts = found.get(tensor.name, (np.zeros((1, 0)), np.zeros(1)))
        for number, data in enumerate(np.array(tensor.data).reshape(len(rows), -1)):
            weight = np.ones(rows.shape[-1], np.float32)
            if counts[number]:
                weight = (sums[number] / sums[number].mean() + FLOOR).astype(np.float32)
            best = error(quantize_rows(rows[number], weight), rows[number], weight)
            assert error(data, rows[number], weight) <= best * 1.001, tensor.name


def error(data: np.ndarray, values: np.ndarray, weight: np.ndarray) -> float:
    found = gguf.quants.dequantize(np.array(data).reshape(-1, 18), gguf.GGMLQuantizationType.Q4_0)
    return float((weight * (found.reshape(values.shape) - values) ** 2).sum())


def test_a_checkpoint_is_rounded_as_its_gguf(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "i", of_checkpoint(write_checkpoint(tmp_path / "hf")))
    convert(tmp_path / "hf", tmp_path / "f32.gguf", "f16")
    for source, target in ((tmp_path / "hf", "a.gguf"), (tmp_path / "f32.gguf", "b.gguf")):
        convert(source, tmp_path / target, imatrix=path)
    a, b = (
        {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(tmp_path / name).tensors}
        for name in ("a.gguf", "b.gguf")
    )
    assert a == b


def test_products_of_columns_lessen_the_error_of_outputs(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m.gguf", **SHAPE | {"n_experts_used": 4})  # no chance which are chosen
    tokens = np.random.default_rng(1).integers(0, 250, 1200).tolist()
    with SmallThinker(source) as model, model.session() as session:
        measure_importance(model, tokens[:1024], tmp_path / "full.gguf", 128, products=True)
        measure_importance(model, tokens[:1024], tmp_path / "diagonal.gguf", 128)
        exact = session.decode(tokens[1024:], all_logits=True)
    convert(source, tmp_path / "plain.gguf")
    for name in ("full", "diagonal"):
        convert(source, tmp_path / f"q-{name}.gguf", imatrix=tmp_path / f"{name}.gguf")
    losses = []
    for name in ("q-full.gguf", "q-diagonal.gguf", "plain.gguf"):
        with SmallThinker(tmp_path / name) as model, model.session() as session:
            losses.append(divergence(exact, session.decode(tokens[1024:], all_logits=True)).mean())
    assert losses[0] < losses[1] < losses[2]
    with SmallThinker(tmp_path / "q-full.gguf") as model:
        assert os.path.getsize(tmp_path / "q-full.gguf") == os.path.getsize(tmp_path / "plain.gguf")


def test_what_is_missing_or_of_another_shape_is_named(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m.gguf", **SHAPE)
    found = of_small_model()
    for name, change in (
        ("blk.1.attn_output.weight", None),
        ("blk.0.ffn_down_exps.weight", (np.ones((4, 64), np.float32), np.ones(4))),
        ("blk.1.ffn_up_exps.weight", (np.ones((3, 64), np.float32), np.ones(3))),
    ):
        wrong = dict(found)
        if change is None:
            del wrong[name]
        else:
            wrong[name] = change
        with pytest.raises(ModelFormatError, match=name):
            convert(source, tmp_path / "q.gguf", imatrix=write_gguf(tmp_path / "i", wrong))
        assert not list(tmp_path.glob("q.gguf*"))
    with pytest.raises(ValueError, match="q4_0"):
        convert(source, tmp_path / "q.gguf", "q8_0", imatrix=write_gguf(tmp_path / "i", found))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    source, path = write_model(tmp_path / "m.gguf", **SHAPE), tmp_path / "i"
    found = {name: value for name, value in of_small_model().items() if "blk.0.attn_q" in name}
    whole = write_binary(path, found).read_bytes()
    for size in range(len(whole) - 4 * 2 - 5):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelFormatError):
            ImportanceMatrix(path)
    for at, value in ((0, -1), (0, 1 << 30), (4, -5), (4, 1 << 30), (27, -1), (31, 1 << 30), (31, -64)):
        path.write_bytes(whole[:at] + struct.pack("<i", value) + whole[at + 4 :])
        with pytest.raises(ModelFormatError):
            ImportanceMatrix(path)
    name, (sums, counts) = next(iter(found.items()))
    for bad in (-1.0, np.nan, np.inf):
        damaged = np.where(np.arange(sums.size) == 5, bad, sums).astype(np.float32).reshape(sums.shape)
        for write in (write_gguf, write_binary):
            with pytest.raises(ModelFormatError, match=name):
                ImportanceMatrix(write(path, {name: (damaged, counts)}))
    with pytest.raises(ModelFormatError, match=f"{name}.counts"):
        ImportanceMatrix(write_gguf(path, {}, {name + ".in_sum2": sums}))
    with pytest.raises(ModelFormatError, match=f"{name}.counts"):
        ImportanceMatrix(write_gguf(path, {}, {name + ".in_sum2": sums, name + ".counts": np.ones(7, np.float32)}))
    with pytest.raises(ModelFormatError):
        ImportanceMatrix(write_gguf(path, {}, {"other": sums}))
    for products in (
        np.ones((64, 32), np.float32), np.full((64, 64), np.nan, np.float32), -np.eye(64, dtype=np.float32),
        np.triu(np.full((64, 64), 1e38, np.float32)), np.ones((64, 64), np.float16),
    ):  # fmt: skip
        more = {"blk.0.attn_q.weight.in_products": products}
        with pytest.raises(ModelFormatError, match="products"):
            convert(source, tmp_path / "q.gguf", imatrix=write_gguf(path, of_small_model(), more))


def test_products_of_the_head_are_checked_where_it_is_the_embedding(tmp_path: Path) -> None:
    products = {"output.weight.in_products": np.eye(96, dtype=np.float32)}
    imatrix = write_gguf(tmp_path / "i", of_small_model(), products)
    with pytest.raises(ModelFormatError, match=r"output\.weight\.in_products"):
        convert(write_model(tmp_path / "m.gguf", **SHAPE), tmp_path / "q.gguf", imatrix=imatrix)
    values = write_checkpoint(tmp_path / "hf", tied=True)
    write_gguf(tmp_path / "i", of_checkpoint(values), {"output.weight.in_products": np.eye(7, dtype=np.float32)})
    with pytest.raises(ModelFormatError, match=r"output\.weight\.in_products"):
        convert(tmp_path / "hf", tmp_path / "q.gguf", imatrix=tmp_path / "i")
    assert not list(tmp_path.glob("q.gguf*"))


def test_products_of_one_matrix_may_have_a_dimension_more(tmp_path: Path) -> None:
    """Experts share those of what goes in: [1, columns, columns] is the same as [columns, columns]."""
    source, written = write_model(tmp_path / "m.gguf", **SHAPE), []
    products = np.cov(np.random.default_rng(3).normal(size=(64, 200))).astype(np.float32)
    for shape in ((64, 64), (1, 64, 64)):
        more = {"blk.0.ffn_gate_exps.weight.in_products": products.reshape(shape)}
        convert(source, tmp_path / "q.gguf", imatrix=write_gguf(tmp_path / "i", of_small_model(), more))
        written.append((tmp_path / "q.gguf").read_bytes())
    assert written[0] == written[1]


def test_tiny_counts_and_importance_weigh_no_column_with_infinity(tmp_path: Path) -> None:
    source, found = write_model(tmp_path / "m.gguf", **SHAPE), of_small_model()
    name = "blk.0.attn_q.weight"
    sums, counts = found[name]
    with pytest.raises(ModelFormatError, match=name):
        ImportanceMatrix(write_gguf(tmp_path / "i", {name: (sums, np.full(counts.shape, 1e-44, np.float32))}))
    written = []
    for value in (1.0, 1e-45):  # of one column; all others have none
        found[name] = (np.eye(1, 64, dtype=np.float32) * np.float32(value), np.ones(1))
        convert(source, tmp_path / "q.gguf", imatrix=write_gguf(tmp_path / "i", found))
        written.append((tmp_path / "q.gguf").read_bytes())
    assert written[0] == written[1]


THEIRS = """
import ctypes, sys, numpy, llama_cpp, gguf
source, target, imatrix = sys.argv[1:]
tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(imatrix).tensors}
means = {}
for name, tensor in tensors.items():
    if name.endswith(".in_sum2"):
        of = name.removesuffix(".in_sum2")
        sums = numpy.array(tensor.data).reshape(-1, int(tensor.shape[0]))
        counts = numpy.array(tensors[of + ".counts"].data).reshape(-1, 1)
        means[of.encode()] = numpy.where(counts > 0, sums / numpy.maximum(counts, 1), 1).astype(numpy.float32)
data = (llama_cpp.llama_cpp.llama_model_imatrix_data * (len(means) + 1))()
for entry, (name, values) in zip(data, means.items()):
    entry.name, entry.size = name, values.size
    entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
options = llama_cpp.llama_model_quantize_default_params()
options.ftype, options.nthread, options.pure = 2, 2, True
options.imatrix = ctypes.cast(data, type(options.imatrix))
assert llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(options)) == 0
"""


def test_llama_cpp_quantises_by_what_we_measure(tmp_path: Path) -> None:
    if not PYTHON.is_file() or subprocess.run([PYTHON, "-c", "import llama_cpp, gguf"], capture_output=True).returncode:
        pytest.skip("llama-cpp-python and gguf are not there: LLAMA_PYTHON names a Python that has them")
    source = write_model(tmp_path / "m.gguf", **SHAPE | {"n_layers": 6})
    tokens = np.random.default_rng(1).integers(0, 250, 512).tolist()
    with SmallThinker(source) as model:
        measure_importance(model, tokens, tmp_path / "i.gguf", 128, products=True)
    command = [PYTHON, "-c", THEIRS, source, str(tmp_path / "theirs.gguf"), str(tmp_path / "i.gguf")]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    convert(source, tmp_path / "plain.gguf")
    theirs, plain = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / name).tensors}
        for name in ("theirs.gguf", "plain.gguf")
    )
    for name in ("blk.0.attn_q.weight", "blk.3.ffn_down_exps.weight", "blk.5.ffn_up_exps.weight"):
        assert theirs[name].tensor_type == gguf.GGMLQuantizationType.Q4_0
        assert theirs[name].data.tobytes() != plain[name].data.tobytes()
