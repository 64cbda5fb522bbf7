"""GGUF files of types that do not run, to files that do: what the `gguf` package makes of the same bytes."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf_files import SCALES, RawGGUF, random_blocks, write_model, write_split_model

from smallthinker_edge import ModelFormatError, SmallThinker
from smallthinker_edge.cli import main
from smallthinker_edge.files.convert import convert
from smallthinker_edge.files.gguf import GGUFFile
from smallthinker_edge.files.pack import pack

SHAPE = {"n_layers": 2, "d_model": 256, "d_ffn": 256, "n_experts": 4, "head_dim": 64, "context_length": 128}


def write_of_type(folder: Path, type_: str) -> tuple[str, dict[str, np.ndarray]]:
    """A model whose matrices have a type, and all tensors as float32 in NumPy order."""
    plain, path = folder / "plain.gguf", folder / f"{type_}.gguf"
    write_model(plain, types="F32", **SHAPE)
    reader = gguf.GGUFReader(plain)
    writer = gguf.GGUFWriter(path, "smallthinker")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=field.types[-1])
    kind, rng, values = GGMLQuantizationType[type_], np.random.default_rng(1), {}
    for tensor in reader.tensors:
        data, raw = tensor.data, None
        if tensor.n_elements > 2048 and "gate_inp" not in tensor.name:
            data, raw = random_blocks(kind, data.shape, rng), kind
            values[tensor.name] = gguf.quants.dequantize(data, kind)
        else:
            values[tensor.name] = np.array(data)
        writer.add_tensor(tensor.name, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path), values


@pytest.mark.parametrize("type_", SCALES)
def test_every_type_is_converted_as_the_gguf_package_reads_it(tmp_path: Path, type_: str) -> None:
    source, values = write_of_type(tmp_path, type_)
    convert(source, tmp_path / "m.gguf", "q8_0")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert found.keys() == values.keys()
    for name, value in values.items():
        kind = GGMLQuantizationType.F32 if "norm" in name or "gate_inp" in name else GGMLQuantizationType.Q8_0
        assert found[name].tensor_type == kind
        if type_ == "Q8_0":
            with GGUFFile(source) as same:
                assert found[name].data.tobytes() == same.data(name).tobytes(), "what has the type already is copied"
        else:
            assert found[name].data.tobytes() == gguf.quants.quantize(value, kind).tobytes(), name
    with SmallThinker(tmp_path / "m.gguf") as model, model.session() as session:
        assert np.isfinite(session.decode([1, 2, 3])).all()


@pytest.mark.parametrize("target", ["q4_0", "q8_0", "f16"])
def test_metadata_and_layout_stay(tmp_path: Path, target: str) -> None:
    options = {"window": 64, "tied": False, "fused_qkv": True, "lm_head_profiler": 32, "rope_layout": [True, False],
               "types": {"default": "BF16", "profiler": "Q4_1", "head": "Q6_K"}, **SHAPE}  # fmt: skip
    parts = write_split_model(tmp_path / "s.gguf", tensors_per_part=5, **options)
    convert(parts[1], tmp_path / "m.gguf", target)
    with GGUFFile(parts[0]) as before, GGUFFile(tmp_path / "m.gguf") as after:
        kept = {key: value for key, value in before.metadata.items() if not key.startswith("split.")}
        file_type = {"q4_0": 2, "q8_0": 7, "f16": 1}[target]
        assert {k: list(v) if hasattr(v, "__len__") else v for k, v in after.metadata.items()} == {
            k: list(v) if hasattr(v, "__len__") else v for k, v in kept.items()
        } | {"general.file_type": file_type}
        assert list(after.tensors) == list(before.tensors)
        assert after.tensors["lm_head_profiler.weight"].type == "Q4_0"
        assert after.tensors["output.weight"].type == target.upper()
    with SmallThinker(tmp_path / "m.gguf") as model:
        assert model.config.rope_layout == (True, False)
        assert model.generate("hello", max_tokens=2).tokens


def test_the_command_takes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = write_of_type(tmp_path, "TQ2_0")
    assert main(["generate", "-m", source, "-p", "hello"]) == 1
    assert main(["convert", source, "-o", str(tmp_path / "m.gguf")]) == 0
    assert main(["generate", "-m", str(tmp_path / "m.gguf"), "-p", "hello", "--max-tokens", "2"]) == 0
    capsys.readouterr()
    assert main(["convert", source, "-o", source]) != 0
    assert "target is the file" in capsys.readouterr().err


def test_what_is_no_model_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    source, _ = write_of_type(tmp_path, "Q4_K")
    packed = tmp_path / "m.stpk"
    pack(tmp_path / "plain.gguf", packed)
    bad = bytearray(Path(source).read_bytes())
    with GGUFFile(source, {12: ("Q4_K", 256, 144)}) as opened:
        at = opened.tensors["blk.1.attn_k.weight"].offset
    bad[at : at + 2] = b"\0\x7c"  # a scale that is infinite
    (tmp_path / "inf.gguf").write_bytes(bad)
    (tmp_path / "cut.gguf").write_bytes(Path(source).read_bytes()[:-1000])
    RawGGUF().u32("general.x", 1).tensor("a.weight", (256,), 12).write(tmp_path / "other.gguf")
    write_model(tmp_path / "llama.gguf", architecture="llama")
    for name in ("m.stpk", "inf.gguf", "cut.gguf", "other.gguf", "llama.gguf"):
        with pytest.raises(ModelFormatError):
            convert(tmp_path / name, target)
        assert not list(tmp_path.glob("m.gguf*"))
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(ModelFormatError):
        convert(tmp_path / "empty.gguf", target)
