"""Files of the model authors' engine: read as what they are, to the last bit, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from authors_files import BLOCK, repack, write_authors_model, write_bundle, write_without_experts
from checkpoint_files import write_checkpoint
from gguf_files import write_model

from smallthinker_edge import ModelFormatError, SmallThinker
from smallthinker_edge.cli import main
from smallthinker_edge.files.convert import convert
from smallthinker_edge.files.gguf import GGUFFile
from smallthinker_edge.files.pack import pack

# Matrices of 36,864 bytes: nine pages.
SHAPE: dict[str, Any] = {"n_layers": 2, "d_model": 512, "d_ffn": 128, "n_experts": 4, "n_heads": 8, "head_dim": 64}
FOUR_B: dict[str, Any] = {
    "n_layers": 1, "d_model": 1536, "d_ffn": 768, "n_experts": 32, "n_experts_used": 4, "n_heads": 12, "n_kv_heads": 2,
    "head_dim": 128, "lm_head_profiler": 128,
}  # fmt: skip
MATRIX = 512 // 32 * BLOCK * 128
PROMPT = [5, 80, 200, 33, 250, 4, 120, 99]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_authors_model(tmp_path_factory.mktemp("authors") / "m.powerinfer.gguf", **SHAPE)


@pytest.fixture(scope="module")
def bare(whole: str) -> str:
    return write_without_experts(whole, Path(whole).with_name("bare.gguf"))


def tensors(path: str | Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}


def logits(path: str | Path) -> np.ndarray:
    with SmallThinker(path, threads=2, context=64) as model, model.session() as session:
        return session.decode(PROMPT, all_logits=True)


def assert_same_model(path: Path, other: str) -> None:
    """Bytes, configuration and logits, with and without rows of the head left out."""
    assert tensors(path) == tensors(other)
    assert np.array_equal(logits(path), logits(other))
    with SmallThinker(path, context=64) as model, SmallThinker(other, context=64) as same:
        assert model.config == same.config
        assert model.config.down_transposed
        assert (model.config.gating, model.config.lm_head_threshold) == ("sigmoid", 0.0)
        assert model.generate("hello", max_tokens=5).tokens == same.generate("hello", max_tokens=5).tokens


@pytest.mark.parametrize("arm", [False, True])
def test_bundle_and_file_without_experts_are_the_whole_model(arm: bool, whole: str, bare: str, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", whole, arm=arm)
    convert(bare, tmp_path / "m.gguf", bundle=bundle)
    assert_same_model(tmp_path / "m.gguf", whole)
    pack(tmp_path / "m.gguf", tmp_path / "m.stpk")
    assert np.array_equal(logits(tmp_path / "m.stpk"), logits(whole))


@pytest.mark.parametrize("arm", [False, True])
def test_layers_of_the_4b(arm: bool, tmp_path: Path) -> None:
    whole = write_authors_model(tmp_path / "whole.gguf", **FOUR_B)
    bare = write_without_experts(whole, tmp_path / "bare.gguf")
    bundle = write_bundle(tmp_path / "bundle", whole, arm=arm)
    assert bundle.stat().st_size == 32 * 3 * 663_552
    convert(bare, tmp_path / "m.gguf", bundle=bundle)
    assert_same_model(tmp_path / "m.gguf", whole)


def test_another_type_is_made_of_the_same_weights(whole: str, bare: str, tmp_path: Path) -> None:
    convert(bare, tmp_path / "bundled.gguf", "q8_0", bundle=write_bundle(tmp_path / "bundle", whole, arm=True))
    convert(whole, tmp_path / "whole.gguf", "q8_0")
    assert tensors(tmp_path / "bundled.gguf") == tensors(tmp_path / "whole.gguf")


def test_transposed_down_holds_the_weights_of_the_plain_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    d, f = SHAPE["d_model"], SHAPE["d_ffn"]
    steps = rng.integers(-7, 8, (SHAPE["n_experts"], d, f))
    steps[:, (np.arange(d)[:, None] - np.arange(f)) % 32 == 0] = -8  # one in each block of either direction
    down = (steps / 64).astype(np.float32)
    name = "blk.1.ffn_down_exps.weight"
    turned = np.ascontiguousarray(down.transpose(0, 2, 1))
    authors = write_authors_model(tmp_path / "a.gguf", **SHAPE, replace_tensors={name: (turned, "Q4_0")})
    plain = write_model(tmp_path / "p.gguf", **SHAPE, replace_tensors={name: (down, "Q4_0")})
    found = {}
    for source in (authors, plain):
        convert(source, tmp_path / "f16.gguf", "f16")
        with GGUFFile(tmp_path / "f16.gguf") as file:
            info = file.tensors[name]
            found[source] = file.data(name).view(np.float16).reshape(info.shape[::-1])
    assert np.array_equal(found[authors].transpose(0, 2, 1), found[plain])
    assert np.array_equal(found[plain], down.astype(np.float16))


def test_the_command_takes_a_bundle(whole: str, bare: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, target = str(write_bundle(tmp_path / "bundle", whole, arm=True)), str(tmp_path / "m.gguf")
    assert main(["generate", "-m", bare, "-p", "hello"]) == 1
    assert "convert --bundle" in capsys.readouterr().err
    assert main(["convert", bare, "--bundle", bundle, "-o", target]) == 0
    assert tensors(target) == tensors(whole)
    assert main(["convert", bare, "--bundle", bundle, "-o", bundle]) == 2
    assert "target is the file" in capsys.readouterr().err
    assert main(["convert", bare, "--bundle", bundle, "-o", target, "--kl", bundle]) == 2
    assert "--kl" in capsys.readouterr().err


def test_an_expert_of_zeros_tells_nothing_and_spoils_nothing(whole: str, bare: str, tmp_path: Path) -> None:
    zeros = np.tile(np.frombuffer(b"\0\0" + b"\x88" * 16, np.uint8), (128, 16))
    for arm, gate in ((False, zeros.tobytes()), (True, repack(zeros))):
        bundle = write_bundle(tmp_path / "bundle", whole, arm=arm)
        with bundle.open("r+b") as file:
            file.seek(MATRIX)
            file.write(gate)
        convert(bare, tmp_path / "m.gguf", bundle=bundle)
        found = tensors(tmp_path / "m.gguf")["blk.0.ffn_gate_exps.weight"]
        assert found == zeros.tobytes() + tensors(whole)["blk.0.ffn_gate_exps.weight"][MATRIX:]


def gates_replaced(whole: str, bundle: Path, make: Any) -> None:
    """Writes what make(gate [rows, bytes], layer, expert) gives over each gate."""
    stacks = {t.name: t.data for t in gguf.GGUFReader(whole).tensors}
    with bundle.open("r+b") as file:
        for layer in range(SHAPE["n_layers"]):
            for expert, gate in enumerate(stacks[f"blk.{layer}.ffn_gate_exps.weight"]):
                file.seek(MATRIX * (1 + 3 * (expert + SHAPE["n_experts"] * layer)))
                file.write(make(gate, layer, expert))


def without_lowest(gate: np.ndarray) -> bytes:
    """As a quantiser leaves it that looks for another scale: nothing is -8 scales."""
    blocks = gate.reshape(-1, BLOCK).copy()
    weights = blocks[:, 2:]
    weights[weights & 15 == 0] += 1
    weights[weights < 16] += 16
    return blocks.tobytes()


DAMAGES: dict[str, tuple[Any, str]] = {
    "weights in turns of eight bytes": (lambda gate, *_: repack(gate, 8), "no layout fits"),
    "noise": (lambda gate, *_: np.random.default_rng(1).bytes(gate.nbytes), "no layout fits"),
    "another quantiser": (lambda gate, *_: without_lowest(gate), "no layout fits"),
    "one gate repacked": (lambda gate, *at: repack(gate) if at == (1, 3) else gate.tobytes(), "no layout fits"),
    "zeros": (lambda gate, *_: b"\0" * gate.nbytes, "cannot be told"),
    "weights of zero": (lambda gate, *_: (b"\0\0" + b"\x88" * 16) * (gate.nbytes // 18), "cannot be told"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_gates_that_fit_no_layout_or_two_are_refused(name: str, whole: str, bare: str, tmp_path: Path) -> None:
    make, message = DAMAGES[name]
    bundle = write_bundle(tmp_path / "bundle", whole)
    gates_replaced(whole, bundle, make)
    with pytest.raises(ModelFormatError, match=message) as problem:
        convert(bare, tmp_path / "m.gguf", bundle=bundle)
    assert problem.value.path == str(bundle)
    assert problem.value.offset is not None
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(("matrix", "role"), [(0, "up"), (2, "down")])
def test_other_matrices_must_be_q4_0_in_rows(matrix: int, role: str, whole: str, bare: str, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", whole)
    at = MATRIX * (matrix + 3 * (2 + 4))
    content = bytearray(bundle.read_bytes())
    content[at : at + 2] = b"\0\x7c"  # an infinite scale
    bundle.write_bytes(content)
    with pytest.raises(ModelFormatError, match=f"{role} matrix of layer 1, expert 2") as problem:
        convert(bare, tmp_path / "m.gguf", bundle=bundle)
    assert problem.value.offset == at


@pytest.mark.parametrize("change", [-1, 1, -MATRIX, MATRIX * 12])
def test_another_size_is_refused(change: int, whole: str, bare: str, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", whole)
    with bundle.open("r+b") as file:
        file.truncate(bundle.stat().st_size + change)
    with pytest.raises(ModelFormatError, match="2 layers of 4 experts of 3 matrices of 36864 bytes has 884736"):
        convert(bare, tmp_path / "m.gguf", bundle=bundle)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"d_model": 64, "d_ffn": 96}, "whole pages"),
        ({"d_model": 256, "d_ffn": 256}, "transposed down could not be told"),
    ],
)
def test_sizes_that_no_bundle_has_are_refused(shape: dict[str, int], message: str, tmp_path: Path) -> None:
    bare = write_without_experts(write_model(tmp_path / "m.gguf", **SHAPE | shape), tmp_path / "bare.gguf")
    (tmp_path / "bundle").write_bytes(b"\0" * 4096)
    with pytest.raises(ModelFormatError, match=message):
        convert(bare, tmp_path / "out.gguf", bundle=tmp_path / "bundle")


def test_what_a_bundle_does_not_go_with_is_refused(whole: str, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", whole)
    with pytest.raises(ModelFormatError, match="has experts"):
        convert(whole, tmp_path / "m.gguf", bundle=bundle)
    write_checkpoint(tmp_path / "hf")
    with pytest.raises(ValueError, match="checkpoint folder"):
        convert(tmp_path / "hf", tmp_path / "m.gguf", bundle=bundle)
    with pytest.raises(FileNotFoundError):
        convert(write_without_experts(whole, tmp_path / "b.gguf"), tmp_path / "m.gguf", bundle=tmp_path / "none")
