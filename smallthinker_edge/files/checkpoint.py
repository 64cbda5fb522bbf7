"""A Hugging Face checkpoint folder of a SmallThinker model: its config.json and the tensors of its safetensors files.

Called by convert.py. Whatever would change what the model computes and is not known here is refused by name; nothing
here writes, or knows GGUF.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import warnings
from collections.abc import Iterable
from contextlib import closing
from typing import Any, NamedTuple, NoReturn, TypeGuard

import numpy as np
import numpy.typing as npt

from smallthinker_edge._native.source import SourceFile
from smallthinker_edge.errors import ModelFormatError
from smallthinker_edge.printable import printable

ARCHITECTURE, MODEL_TYPE = "SmallThinkerForCausalLM", "smallthinker"
DTYPES: dict[str, np.dtype[Any]] = {"BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
SINGLE, INDEX, PREDICTOR_FILE = "model.safetensors", "model.safetensors.index.json", "model_lm_head.pt"
SHARD = re.compile(r"model-(\d{1,9})-of-(\d{1,9})\.safetensors")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx")
MAX_HEADER = 1 << 25  # bytes; the 21B in a single file needs 1.5 MB
MAX_JSON = 1 << 28  # bytes; the largest tokenizers in use have 35 MB
MAX_DIMS, MAX_SHARDS = 8, 10000
SLICE = 1 << 22  # numbers held at a time
MAX_LAYERS, MAX_SIZE, MAX_CONTEXT = 4096, 1 << 24, (1 << 31) - 1

# What convert reads.
READ_KEYS = frozenset(
    "architectures model_type num_hidden_layers hidden_size num_attention_heads num_key_value_heads head_dim "
    "moe_num_primary_experts moe_num_active_primary_experts moe_ffn_hidden_size moe_primary_router_apply_softmax "
    "rope_layout sliding_window_layout sliding_window_size rope_theta rope_scaling rope_parameters rms_norm_eps "
    "max_position_embeddings vocab_size tie_word_embeddings bos_token_id eos_token_id".split()
)
# Keys of the released files, and of any saved checkpoint, that say nothing about one forward pass.
HARMLESS_KEYS = frozenset(
    "_name_or_path attention_dropout auto_map dense_ffn_hidden_size dtype hidden_dropout initializer_range max_length "
    "model_name output_attentions output_hidden_states output_router_logits pad_token_id repetition_penalty "
    "return_dict router_aux_loss_coef temperature tokenizer_class top_k top_p torch_dtype transformers_version "
    "unsloth_version use_cache".split()
)
# Keys that change what is computed, with the values that leave it as it is here. The first group are keys of the
# authors' older code, the others are what Hugging Face configurations call the same things.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "use_qk_norm": (False,),
    "moe_enable_early_router": (True,),
    "moe_shared_primary_experts": (0, False),
    "moe_enable_secondary_experts": (False,),
    "norm_topk_prob": (True,),
    **dict.fromkeys(("attention_bias", "qkv_bias", "mlp_bias", "use_bias", "lm_head_bias"), (False,)),
    **dict.fromkeys(("hidden_act", "hidden_activation", "moe_hidden_act"), ("relu",)),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "routed_scaling_factor"), (1,)),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), (1,)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "attention_multiplier"), ()),
    **dict.fromkeys(("query_pre_attn_scalar", "quantization_config", "layer_types", "sliding_window"), ()),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "num_nextn_predict_layers"), (0,)),
    "use_sliding_window": (False,),
}
SECONDARY_EXPERTS = ("moe_num_secondary_experts", "moe_secondary_expert_size")
UNSCALED_ROPE = frozenset({"rope_type", "type", "rope_theta"})


class Place(NamedTuple):
    """Where a tensor lies: its numbers are at `offset` of a file, one after the other."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Checkpoint:
    """The tensors of a folder's safetensors files; checked when opened, read when asked for, from any thread.

    Raises ModelFormatError naming file and field for a damaged or missing file.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._places: dict[str, Place] = {}
        index = os.path.join(folder, INDEX)
        promised = _weight_map(index) if os.path.exists(index) else {}
        files = _weight_files(folder, promised)
        for file in files:
            for name, place in read_header(os.path.join(folder, file)).items():
                if name in self._places:
                    other = os.path.basename(self._places[name].path)
                    raise ModelFormatError(f"is in {other} as well", path=place.path, field=name)
                self._places[name] = place
        for name, file in promised.items():
            if name not in self._places or os.path.basename(self._places[name].path) != file:
                raise ModelFormatError(f"is not in {file}, where the index has it", path=index, field=name)
        stray = sorted(
            f for f in os.listdir(folder) if f.endswith(WEIGHT_SUFFIXES) and f not in {*files, PREDICTOR_FILE}
        )
        if stray:
            warnings.warn(printable(f"{folder}: not read: {', '.join(stray):.400}"), stacklevel=2)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def add(self, name: str, place: Place) -> None:
        """A tensor from elsewhere, under a name that no safetensors file has."""
        self._places[name] = place

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises ModelFormatError where a tensor is missing or has another shape."""
        if name not in self._places:
            raise ModelFormatError("is missing", path=self.folder, field=name)
        path, _, found, _ = self._places[name]
        if found != shape:
            raise ModelFormatError(f"has shape {list(found)}, not {list(shape)}", path=path, field=name)

    def size(self, name: str) -> int:
        """Elements of a tensor that is there."""
        return math.prod(self._places[name].shape)

    def path_of(self, name: str) -> str:
        """The file that a tensor is in."""
        return self._places[name].path

    def elements(self, name: str, first: int = 0, count: int | None = None) -> npt.NDArray[Any]:
        """`count` numbers (all) of a tensor from number `first` on, flat: uint16 for bfloat16, else float32.

        Raises ModelFormatError where the file was cut short meanwhile.
        """
        path, dtype, _, offset = self._places[name]
        count = self.size(name) - first if count is None else count
        size = DTYPES[dtype].itemsize
        with closing(SourceFile(path)) as file:
            raw = file.read(offset + first * size, count * size, name).view(DTYPES[dtype])
        return raw.astype(np.float32) if dtype == "F16" else raw

    def floats(self, name: str, first: int = 0, count: int | None = None) -> npt.NDArray[np.float32]:
        """The same as float32."""
        raw = self.elements(name, first, count)
        return (raw.astype(np.uint32) << 16).view(np.float32) if raw.dtype == np.uint16 else raw

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors that are there hold the same bytes; held in memory a slice at a time."""
        if self._places[first][1:3] != self._places[second][1:3]:
            return False
        for at in range(0, self.size(first), SLICE):
            count = min(SLICE, self.size(first) - at)
            if not np.array_equal(self.elements(first, at, count), self.elements(second, at, count)):
                return False
        return True

    def refuse_unread(self, read: Iterable[str], tied: bool) -> None:
        """Raises ModelFormatError for a tensor that is not in `read` and not known to be harmless.

        Harmless are tables of RoPE that older code saved, and in a tied checkpoint a copy of the embedding as head.
        A head that differs there is refused: transformers 4 would use the embedding, transformers 5 the head.
        """
        for name in sorted(set(self._places) - set(read)):
            path = self._places[name].path
            if name.endswith(".rotary_emb.inv_freq"):
                warnings.warn(printable(f"{name}: not needed and left out"), stacklevel=2)
            elif name == "lm_head.weight" and tied:
                if not self.same(name, "model.embed_tokens.weight"):
                    raise ModelFormatError(
                        "differs from the embedding, but tie_word_embeddings is true (the default) in config.json: "
                        "set it to false to use this head, or remove the tensor",
                        path=path,
                        field=name,
                    )
                warnings.warn(f"{name}: a copy of the embedding, which is used instead (tied)", stacklevel=2)
            else:
                raise ModelFormatError("nothing of a SmallThinker model reads this tensor", path=path, field=name)


class CheckpointConfig:
    """config.json, each value checked when asked for; keys left out have the defaults of the authors' class.

    Raises ModelFormatError naming the key for another model, and for a value of any known key that would change the
    computation in a way that is not supported; unknown keys are told in a warning.
    """

    def __init__(self, folder: str) -> None:
        self.path = os.path.join(folder, "config.json")
        self.values = read_json(self.path)
        self._check_architecture()
        self._check_neutral()
        self.rope_theta = self._rope_theta()
        known = READ_KEYS | HARMLESS_KEYS | NEUTRAL_VALUES.keys() | {"moe_layer_layout", *SECONDARY_EXPERTS}
        unknown = sorted(key for key in self.values.keys() - known if self.values[key] is not None)
        if unknown:
            message = f"{self.path}: unknown keys were ignored: {', '.join(unknown):.400}"
            warnings.warn(printable(message), stacklevel=2)

    def _check_architecture(self) -> None:
        """The 21B's file has no model_type, older ones have no architectures; one is enough, and neither may differ."""
        kind, architectures = self.values.get("model_type"), self.values.get("architectures")
        if architectures is not None and architectures != [ARCHITECTURE]:
            self.refuse("architectures", f"is {architectures!r:.80}, not [{ARCHITECTURE!r}]")
        if kind != MODEL_TYPE and (kind is not None or architectures is None):
            self.refuse("model_type", f"is {kind!r:.80}, not {MODEL_TYPE!r}")

    def _check_neutral(self) -> None:
        for key, neutral in NEUTRAL_VALUES.items():
            value = self.values.get(key)
            if value is not None and not _one_of(value, neutral):
                allowed = "".join(f" or {v!r}" for v in neutral)
                self.refuse(key, f"{value!r:.80} is not supported, only null{allowed}")
        layout = self.values.get("moe_layer_layout")
        if layout is not None and not (isinstance(layout, list) and all(_one_of(kind, (1,)) for kind in layout)):
            self.refuse("moe_layer_layout", "has layers without experts, which are not supported")
        if self.values.get("moe_enable_secondary_experts") is None:
            for key in SECONDARY_EXPERTS:
                if self.values.get(key) not in (None, 0):
                    self.refuse(key, "secondary experts are not supported")

    def _rope_theta(self) -> float:
        """Base of RoPE: its own key, or within rope_parameters or rope_scaling, which may say nothing else."""
        thetas = {"rope_theta": self.number("rope_theta")} if self.values.get("rope_theta") is not None else {}
        for key in ("rope_parameters", "rope_scaling"):
            rope = self.values.get(key)
            if rope is None:
                continue
            if not isinstance(rope, dict):
                self.refuse(key, f"must be an object or null, not {rope!r:.80}")
            for name in ("rope_type", "type"):
                if rope.get(name, "default") != "default":
                    self.refuse(key, f"scaled RoPE is not supported: {name} is {rope[name]!r:.80}")
            for name in sorted(rope.keys() - UNSCALED_ROPE):
                if rope[name] is not None and not _one_of(rope[name], (1,)):
                    self.refuse(key, f"{name!r:.80} is not supported")
            if rope.get("rope_theta") is not None:
                thetas[key] = self._positive(key, rope["rope_theta"])
        if not thetas:
            self.refuse("rope_theta", "is missing, here and in rope_parameters")
        if len(set(thetas.values())) > 1:
            self.refuse(next(reversed(thetas)), f"rope_theta is said more than once, and differs: {thetas}")
        return next(iter(thetas.values()))

    def refuse(self, field: str, message: str) -> NoReturn:
        raise ModelFormatError(message, path=self.path, field=field)

    def integer(self, key: str, most: int = MAX_SIZE) -> int:
        value = self.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            self.refuse(key, f"must be a whole number from 1 to {most}, not {value!r:.80}")
        return value

    def number(self, key: str) -> float:
        return self._positive(key, self.values.get(key))

    def _positive(self, key: str, value: object) -> float:
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30:
            return float(value)
        self.refuse(key, f"must be a positive number, not {value!r:.80}")

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            self.refuse(key, f"must be true or false, not {value!r:.80}")
        return value

    def layout(self, key: str, layers: int, default: int) -> list[bool]:
        """A list of 0 and 1 per layer; missing or null is all `default`."""
        value = self.values.get(key)
        if value is None:
            value = [default] * layers
        if not isinstance(value, list) or len(value) != layers or not all(_one_of(v, (0, 1)) for v in value):
            self.refuse(key, f"must be {layers} times 0 or 1")
        return [bool(v) for v in value]


def _weight_map(index: str) -> dict[str, str]:
    """Which file the index has each tensor in; every one a plain name of the same folder."""
    entries = read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise ModelFormatError("is not an object of tensors and files", path=index, field="weight_map")
    for name, file in entries.items():
        if not isinstance(file, str) or os.path.basename(file) != file or not file.endswith(".safetensors"):
            raise ModelFormatError(f"{file!r:.80} is not the name of a safetensors file", path=index, field=name)
        if not os.path.isfile(os.path.join(os.path.dirname(index), file)):
            raise ModelFormatError(f"{file} is named, but is not there", path=index, field=name)
    return entries


def _weight_files(folder: str, promised: dict[str, str]) -> list[str]:
    """The files to read: those of the index; without one model.safetensors, or else all shards of one set."""
    here = sorted(os.listdir(folder))
    if promised:
        files = sorted(set(promised.values()))
        if SINGLE in here and SINGLE not in files:
            raise ModelFormatError(f"lies beside {INDEX} and its shards: remove one of them", path=folder, field=SINGLE)
        return files
    if SINGLE in here:
        return [SINGLE]
    shards = [match for match in map(SHARD.fullmatch, here) if match]
    counts = {int(match[2]) for match in shards}
    if not shards:
        raise ModelFormatError("has no model.safetensors and no shards of one", path=folder)
    if len(counts) > 1 or max(counts) > MAX_SHARDS:
        raise ModelFormatError("has shards of more than one set", path=folder, field=shards[0][0])
    missing = set(range(1, max(counts) + 1)) - {int(match[1]) for match in shards}
    if missing or len(shards) != max(counts):
        one = f"number {min(missing)} of {max(counts)}" if missing else "one to each number"
        raise ModelFormatError(f"there is no shard {one}", path=folder, field=shards[0][0])
    return [match[0] for match in shards]


def read_header(path: str) -> dict[str, Place]:
    """The tensors of a safetensors file. Raises ModelFormatError, naming the tensor, where the header lies."""
    with closing(SourceFile(path)) as file:
        size = file.size
        if size < 8:
            raise ModelFormatError("is too short for a safetensors file", path=path, field="header")
        (length,) = struct.unpack("<Q", file.read(0, 8, "header").data)
        if length > min(size - 8, MAX_HEADER):
            message = f"a header of {length} bytes does not fit the file, or is over {MAX_HEADER}"
            raise ModelFormatError(message, path=path, field="header")
        encoded = file.read(8, length, "header").tobytes()
    try:
        header = json.loads(encoded.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as problem:
        raise ModelFormatError(f"is not JSON: {problem}", path=path, field="header") from None
    if not isinstance(header, dict):
        raise ModelFormatError("is not a JSON object", path=path, field="header")
    header.pop("__metadata__", None)
    places = {name: _place(path, name, entry, 8 + length, size) for name, entry in header.items()}
    end = 0
    for name, place in sorted(places.items(), key=lambda item: item[1].offset):
        if place.bytes and place.offset < end:
            raise ModelFormatError("its data overlaps another tensor's", path=path, field=name)
        end = max(end, place.offset + place.bytes)
    return places


def _place(path: str, name: str, entry: object, data: int, size: int) -> Place:
    """One entry of a header whose data begins at byte `data` of a file of `size` bytes."""

    def fail(message: str) -> NoReturn:
        raise ModelFormatError(message, path=path, field=name)

    if not isinstance(entry, dict):
        fail("is not a JSON object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        fail(f"dtype {dtype!r:.40} is not supported; supported are {', '.join(DTYPES)}")
    if not _whole_numbers(shape) or len(shape) > MAX_DIMS:
        fail(f"has no shape: {shape!r:.80}")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        fail(f"has no data_offsets: {offsets!r:.80}")
    start, end = offsets
    if not start <= end <= size - data or end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        fail("its data_offsets do not fit its shape or the file")
    return Place(path, dtype, tuple(shape), data + start)


def _whole_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError where a key comes twice, which the json module would let pass."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key comes twice")
    return value


def _one_of(value: object, allowed: tuple[Any, ...]) -> bool:
    """Whether a JSON value is one of some scalars; 1, 1.0 and true count as the same."""
    return isinstance(value, str | int | float) and value in allowed


def read_json(path: str) -> dict[str, Any]:
    """A JSON object. Raises ModelFormatError where the file is anything else."""
    with closing(SourceFile(path)) as file:
        if file.size > MAX_JSON:
            raise ModelFormatError(f"has {file.size} bytes, more than {MAX_JSON}", path=path)
        encoded = file.read(0, file.size).tobytes()
    try:
        value = json.loads(encoded.decode())
        json.dumps(value, ensure_ascii=False).encode()  # JSON can hold half characters, which no text can
    except (ValueError, RecursionError) as problem:
        raise ModelFormatError(f"is not JSON: {problem}", path=path) from None
    if not isinstance(value, dict):
        raise ModelFormatError("is not a JSON object", path=path)
    return value


def optional_json(folder: str, name: str) -> dict[str, Any]:
    """A JSON object of a folder, or {} where there is no such file."""
    path = os.path.join(folder, name)
    return read_json(path) if os.path.exists(path) else {}
