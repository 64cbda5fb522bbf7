"""What a text's importance matrix holds: the inputs of every matrix, as the float64 reference has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_files import write_model
from reference import Array, Reference

from smallthinker_edge import SmallThinker
from smallthinker_edge._native.capture import MatrixInputs
from smallthinker_edge.cli import main
from smallthinker_edge.measure import imatrix
from smallthinker_edge.measure.imatrix import measure_importance

SHAPE: dict[str, Any] = {"n_layers": 3, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32, "d_ffn": 96,
                         "n_experts": 6, "n_experts_used": 2, "context_length": 256}  # fmt: skip
WINDOW = 70


class Watched(Reference):
    """Keeps what each matrix is multiplied with: inputs[name] = rows, or of experts a list of rows."""

    inputs: dict[str, list[Any]]

    def attention(self, h: Array, layer: int, *, kv: str | None = None) -> Array:
        self.inputs.setdefault(f"blk.{layer}.attn_q", []).append(h)
        return super().attention(h, layer, kv=kv)

    def input_of(self, x: Array, name: str, types: tuple[str, ...] = ()) -> Array:
        if "attn_output" in name:
            self.inputs.setdefault(name.removesuffix(".weight"), []).append(x)
        return x

    def experts(self, h: Array, layer: int, chosen: Any, weights: Array) -> Array:
        gate, up = (self.weights[f"blk.{layer}.ffn_{name}_exps.weight"] for name in ("gate", "up"))
        for expert in range(len(gate)):
            rows = h[(chosen == expert).any(1)]
            hidden = np.maximum(rows @ gate[expert].T, 0) * (rows @ up[expert].T)
            for name, x in ((f"blk.{layer}.ffn_gate_exps", rows), (f"blk.{layer}.ffn_down_exps", hidden)):
                self.inputs.setdefault(f"{name} {expert}", []).append(x)
        return super().experts(h, layer, chosen, weights)


def expected(path: str, tokens: list[int]) -> dict[str, np.ndarray]:
    watched = Watched.from_gguf(path)
    watched.inputs = {}
    for first in range(0, len(tokens) // WINDOW * WINDOW, WINDOW):
        states = watched.run(tokens[first : first + WINDOW]).states
        watched.inputs.setdefault("output", []).append(states)
    return {name: np.concatenate(rows) for name, rows in watched.inputs.items()}


def read(path: Path) -> dict[str, np.ndarray]:
    """With the package that llama.cpp's own scripts use."""
    return {
        tensor.name: np.array(tensor.data).reshape([int(n) for n in reversed(tensor.shape)])
        for tensor in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("types", ["F32", "Q8_0", "Q4_0", "transposed"])
def test_sums_are_those_of_the_reference(tmp_path: Path, types: str) -> None:
    options = SHAPE | ({"types": "Q4_0", "down_transposed": True} if types == "transposed" else {"types": types})
    if types != "F32":
        options["n_experts_used"] = SHAPE["n_experts"]  # activations in 8 bits would choose others here and there
    path = write_model(tmp_path / "m.gguf", **options)
    tokens = np.random.default_rng(0).integers(0, 250, 2 * WINDOW + 9).tolist()
    with SmallThinker(path) as model:
        measure_importance(model, tokens, tmp_path / "i.gguf", WINDOW, products=True, dataset="words.txt")
    found, inputs = read(tmp_path / "i.gguf"), expected(path, tokens)
    tolerance = 2e-3 if types == "F32" else 0.1  # keys and values in fp16; activations in 8 bits
    for name, x in inputs.items():
        name, _, expert = name.partition(" ")
        number = int(expert or 0)
        squares = found[name + ".weight.in_sum2"][number]
        assert found[name + ".weight.counts"][number, 0] == len(x), name
        assert np.linalg.norm(squares - (x * x).sum(0)) <= tolerance * np.linalg.norm((x * x).sum(0)) + 1e-12, name
        if "gate" in name:
            continue
        products = found[name + ".weight.in_products"]
        products = products[number] if products.ndim == 3 else products
        assert np.linalg.norm(products - x.T @ x) <= tolerance * np.linalg.norm(x.T @ x) + 1e-12, name
    for layer in range(3):
        gate = found[f"blk.{layer}.ffn_gate_exps.weight.in_products"]
        every = found[f"blk.{layer}.ffn_gate_exps.weight.in_sum2"].sum(0) / options["n_experts_used"]
        assert np.allclose(np.diagonal(gate), every, rtol=1e-3), "of all tokens, whatever their experts"
        for same, first in (("attn_k", "attn_q"), ("attn_v", "attn_q"), ("ffn_up_exps", "ffn_gate_exps")):
            for ending in (".weight.in_sum2", ".weight.counts"):
                assert np.array_equal(found[f"blk.{layer}.{same}{ending}"], found[f"blk.{layer}.{first}{ending}"])
    keys = gguf.GGUFReader(tmp_path / "i.gguf").fields
    assert keys["general.type"].contents() == "imatrix"
    assert keys["imatrix.datasets"].contents() == ["words.txt"]
    assert (keys["imatrix.chunk_count"].contents(), keys["imatrix.chunk_size"].contents()) == (2, WINDOW)


@pytest.mark.parametrize("types", ["F16", "Q8_0", "Q4_0"])
def test_logits_do_not_depend_on_capturing(tmp_path: Path, types: str) -> None:
    path = write_model(tmp_path / "m.gguf", **SHAPE | {"types": types})
    with SmallThinker(path, threads=2) as model:
        for tokens in ([1, 2], [5, 6, 7], list(range(40))):  # few tokens have a way of their own
            with model.session() as session:
                alone = session.decode(tokens, all_logits=True)
            inputs = MatrixInputs(model.config, 40, 1, 2)
            with model.capturing(inputs), model.session() as session:
                assert np.array_equal(session.decode(tokens, all_logits=True), alone)
            assert inputs.neurons[:, : len(tokens)].any()
            assert not inputs.neurons[:, len(tokens) :].any()
        with model.capturing(inputs), model.session() as session, pytest.raises(ValueError, match="2 to 40"):
            session.decode([1])
        with model.session() as session:
            session.decode([1])  # nothing is captured any more


def test_a_text_that_is_run_for_each_group_of_layers_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, text = write_model(tmp_path / "m.gguf", **SHAPE), tmp_path / "t.txt"
    text.write_text("hello world, " * 60)
    command = ["imatrix", "-m", path, "--text", str(text), "--window", "64", "--products"]
    assert main([*command, "-o", str(tmp_path / "a.gguf")]) == 0
    monkeypatch.setattr(imatrix, "PRODUCT_BYTES", 1)
    assert main([*command, "-o", str(tmp_path / "b.gguf")]) == 0
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_text_that_is_too_short_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, text = write_model(tmp_path / "m.gguf", **SHAPE), tmp_path / "t.txt"
    text.write_text("hello")
    assert main(["imatrix", "-m", path, "--text", str(text), "-o", str(tmp_path / "i.gguf")]) != 0
    assert "window" in capsys.readouterr().err
    assert not list(tmp_path.glob("i.gguf*"))
