"""Files by torch.save, read without torch: what they hold, and that nothing they name is ever called."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoint_files import FIXTURES, VOCAB, D, to_bf16_bits, write_checkpoint

from smallthinker_edge import ModelFormatError, SmallThinker
from smallthinker_edge.files.convert import convert
from smallthinker_edge.files.torch_file import read_tensors

STORAGES = {"<f4": "FloatStorage", "<f2": "HalfStorage", "<u2": "BFloat16Storage", "<f8": "DoubleStorage"}
INNER = 32


class Stored:
    """What torch pickles by reference: numbers of the archive."""

    def __init__(self, values: np.ndarray, kind: str, key: str) -> None:
        self.values, self.kind, self.key = values, kind, key


class Tensor:
    """An array that pickles as a torch tensor does; uint16 stands for bfloat16."""

    def __init__(self, values: np.ndarray, **changes: Any) -> None:
        self.values, self.changes = values, changes

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        strides = tuple(stride // self.values.itemsize for stride in self.values.strides)
        parts = {"offset": 0, "shape": self.values.shape, "stride": strides} | self.changes
        stored = Stored(self.values, STORAGES[self.values.dtype.str], "0")
        arguments = (stored, parts["offset"], parts["shape"], parts["stride"], False, OrderedDict())
        return sys.modules["torch._utils"]._rebuild_tensor_v2, arguments


class Pickler(pickle.Pickler):
    """Numbers the storages and leaves them out of the pickle."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, 2)
        self.storages: list[np.ndarray] = []

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Stored):
            return None
        self.storages.append(value.values)
        kind = getattr(sys.modules["torch"], value.kind)
        return ("storage", kind, str(len(self.storages) - 1), "cpu", value.values.size)


@pytest.fixture
def torch_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules with torch's names for the pickler to refer to; the code under test must not import them."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2() -> None:
        raise AssertionError("called")

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2  # type: ignore[attr-defined]
    torch._utils = utils  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)


def save(path: Path, value: object, *, compression: int = zipfile.ZIP_STORED, byteorder: str = "little") -> None:
    buffer = io.BytesIO()
    pickler = Pickler(buffer)
    pickler.dump(value)
    write_archive(path, buffer.getvalue(), pickler.storages, compression=compression, byteorder=byteorder)


def write_archive(path: Path, pickled: bytes, storages: list[np.ndarray], *, compression: int = zipfile.ZIP_STORED,
                  byteorder: str = "little", folder: str = "archive") -> None:  # fmt: skip
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{folder}/data.pkl", pickled)
        archive.writestr(f"{folder}/byteorder", byteorder)
        for i, values in enumerate(storages):
            archive.writestr(f"{folder}/data/{i}", np.ascontiguousarray(values).tobytes())
        archive.writestr(f"{folder}/version", "3\n")


def matrices(dtype: str = "f4") -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    pair = [rng.standard_normal(shape).astype(np.float32) for shape in ((INNER, D), (VOCAB, INNER))]
    first, second = (to_bf16_bits(m) if dtype == "bf16" else m.astype(dtype) for m in pair)
    return first, second


def floats(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


@pytest.mark.usefixtures("torch_names")
@pytest.mark.parametrize("dtype", ["f4", "f2", "bf16"])
def test_the_predictor_beside_the_weights_becomes_the_tensor(tmp_path: Path, dtype: str) -> None:
    first, second = matrices(dtype)
    write_checkpoint(tmp_path / "hf")
    save(tmp_path / "hf" / "model_lm_head.pt", OrderedDict(zweite=Tensor(second), erste=Tensor(first)))
    convert(tmp_path / "hf", tmp_path / "m.gguf", "q8_0")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    flat = np.concatenate([floats(first).ravel(), floats(second).ravel()])
    expected = gguf.quants.quantize(flat, gguf.GGMLQuantizationType.Q4_0)
    assert found["lm_head_profiler.weight"].data.tobytes() == expected.tobytes()
    with SmallThinker(tmp_path / "m.gguf") as model:
        assert model.config.lm_head_predictor_size == INNER


def test_a_file_by_torch_itself_is_read(tmp_path: Path) -> None:
    """Written by torch 2.14.1: the state_dict() of two layers in bfloat16, whose element i is (i % 255 - 127) / 128."""
    write_checkpoint(tmp_path / "hf")
    shutil.copy(FIXTURES / "model_lm_head.pt", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "m.gguf")
    flat = np.concatenate([(np.arange(n) % 255 - 127) / 128 for n in (INNER * D, VOCAB * INNER)]).astype(np.float32)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    expected = gguf.quants.quantize(flat, gguf.GGMLQuantizationType.Q4_0)
    assert found["lm_head_profiler.weight"].data.tobytes() == expected.tobytes()


@pytest.mark.usefixtures("torch_names")
def test_nested_tensors_have_dotted_names(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    first, second = matrices()
    part = Tensor(first, offset=D, shape=(INNER - 1, D))
    save(path, {"model": {"fc1.weight": part}, "rest": [Tensor(second), (Tensor(first[:1]),)]})
    found = read_tensors(str(path))
    assert {name: place.shape for name, place in found.items()} == {
        "model.fc1.weight": (INNER - 1, D), "rest.0": (VOCAB, INNER), "rest.1.0": (1, D),
    }  # fmt: skip
    place = found["model.fc1.weight"]
    values = np.fromfile(path, "<f4", (INNER - 1) * D, offset=place.offset).reshape(place.shape)
    assert np.array_equal(values, first[1:])


class Command:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.fspath(self.path),)


def named(module: str, name: str) -> bytes:
    """A pickle that calls module.name()."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b")R."


@pytest.mark.usefixtures("torch_names")
def test_code_in_a_pickle_is_refused_by_name_and_not_run(tmp_path: Path) -> None:
    save(tmp_path / "a.pt", {"fc1": Command(tmp_path / "made")})
    with pytest.raises(ModelFormatError, match=r"posix\.mkdir is not allowed") as caught:
        read_tensors(str(tmp_path / "a.pt"))
    assert caught.value.field == "posix.mkdir"
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [("os", "getcwd"), ("builtins", "list"), ("builtins", "eval"), ("torch", "DoubleStorage"), ("torch", "load"),
     ("torch._utils", "_rebuild_tensor"), ("torch.nn", "Linear"), ("__main__", "Predictor"), ("collections", "Counter"),
     ("numpy.core.multiarray", "_reconstruct"), ("torch", "FloatStorage.__init__"), ("_codecs", "encode")],
)  # fmt: skip
def test_every_other_global_is_refused(tmp_path: Path, module: str, name: str) -> None:
    write_archive(tmp_path / "a.pt", named(module, name), [])
    with pytest.raises(ModelFormatError) as caught:
        read_tensors(str(tmp_path / "a.pt"))
    assert caught.value.field == f"{module}.{name}"


def storage(key: str, size: int) -> bytes:
    """A pickle of one reference to a storage of float32."""
    return b"\x80\x02(\x8c\x07storagectorch\nFloatStorage\n\x8c\x01" + key.encode() + b"\x8c\x03cpuK%ctQ." % size


REBUILD = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
HOSTILE_PICKLES = {
    "empty": b"", "cut": b"\x80\x02}q", "no tensors": pickle.dumps({"a": 1}, 2), "a text": pickle.dumps("hello", 2),
    "a key of bytes": b"\x80\x02}C\x01aK\x01s.", "itself": b"\x80\x02]q\x00h\x00a.",
    "a deep list": b"\x80\x02" + b"]" * 50000 + b"a" * 49999 + b".", "an unknown reference": b"\x80\x02K\x01Q.",
    "a reference to nothing": storage("7", 16),
    "a storage alone": storage("0", 16),
    "a wrong size": storage("0", 17),
    "state for a function": REBUILD + b"}X\x01\x00\x00\x00aK\x01sb.",
    "attributes for a function": REBUILD + b"N}X\x09\x00\x00\x00_functionK\x01s\x86b.",
    "attributes for a class": b"\x80\x02ccollections\nOrderedDict\nN}X\x01\x00\x00\x00aK\x01s\x86b.",
    "a place of the memo beyond all memory": b"\x80\x02}r\xff\xff\xff\x7fK\x01Q.",
    "a key of tuples of tuples": b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"K\x01s.",
    "a name of tuples of tuples": b"\x80\x04)" + b"q\x00h\x00\x86" * 60 + b"h\x00\x93.",
    "a reference of tuples of tuples": b"\x80\x02)" + b"q\x00h\x00\x86" * 60 + b"Q.",
    "a shape of tuples of tuples": REBUILD + b"(NK\x00)" + b"q\x00h\x00\x86" * 60 + b"h\x00tR.",
    "lists of the same lists": b"\x80\x02]q\x00" + b"".join(
        b"](" + bytes([ord("h"), i]) * 200 + bytes([ord("e"), ord("q"), i + 1]) for i in range(6)) + b".",
    "no storage": REBUILD + b"(NK\x00(t(tNNtR.", "too few": REBUILD + b")R.",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_PICKLES)
def test_a_hostile_pickle_is_a_format_error(tmp_path: Path, name: str) -> None:
    write_archive(tmp_path / "a.pt", HOSTILE_PICKLES[name], [np.zeros(16, np.float32)])
    with pytest.raises(ModelFormatError, match=r"a\.pt"):
        read_tensors(str(tmp_path / "a.pt"))
    assert not hasattr(OrderedDict, "a")


@pytest.mark.usefixtures("torch_names")
@pytest.mark.parametrize(
    "changes",
    [{"shape": (INNER + 1, D)}, {"offset": 1}, {"offset": -1}, {"shape": (-INNER, -D)}, {"stride": (0, 1)},
     {"stride": (1, INNER)}, {"shape": (2**62, 2**62, 4), "stride": (0, 0, 0)}, {"shape": (True, D)}, {"stride": (1,)},
     {"shape": [INNER, D]}, {"offset": 2**70}, {"shape": (1,) * 9, "stride": (1,) * 9}],
    ids=str,
)  # fmt: skip
def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    save(tmp_path / "a.pt", [Tensor(matrices()[0], **changes)])
    with pytest.raises(ModelFormatError, match="tensor"):
        read_tensors(str(tmp_path / "a.pt"))


@pytest.mark.usefixtures("torch_names")
def test_archives_that_torch_would_not_write_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    first, _ = matrices()
    save(path, [Tensor(first)], compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ModelFormatError, match="compressed"):
        read_tensors(str(path))
    save(path, [Tensor(first)], byteorder="big")
    with pytest.raises(ModelFormatError, match="little"):
        read_tensors(str(path))
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2))
    with pytest.raises(ModelFormatError, match=r"torch\.save"):
        read_tensors(str(path))
    save(path, [Tensor(first)])
    whole = bytearray(path.read_bytes())
    at = whole.index(first.tobytes())
    whole[at + 100] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ModelFormatError, match="checksum"):
        read_tensors(str(path))
    for cut in (0, 10, at + 50, len(whole) - 5):
        path.write_bytes(whole[:cut])
        with pytest.raises(ModelFormatError):
            read_tensors(str(path))


@pytest.mark.usefixtures("torch_names")
@pytest.mark.parametrize(
    "shapes",
    [[(INNER, D)], [(INNER, D), (VOCAB, INNER), (INNER,)], [(INNER, D + 1), (VOCAB, INNER)],
     [(D, INNER), (INNER, VOCAB)],
     [(INNER, D), (VOCAB, INNER + 1)], [(INNER + 1, D), (VOCAB, INNER + 1)], [(2 * D, D), (VOCAB, 2 * D)]],
    ids=str,
)  # fmt: skip
def test_other_shapes_are_no_predictor(tmp_path: Path, shapes: list[tuple[int, ...]]) -> None:
    write_checkpoint(tmp_path / "hf")
    save(tmp_path / "hf" / "model_lm_head.pt", [Tensor(np.ones(shape, np.float32)) for shape in shapes])
    with pytest.raises(ModelFormatError, match=r"model_lm_head\.pt"):
        convert(tmp_path / "hf", tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
