"""Hugging Face checkpoint folder to GGUF: `smallthinker-edge convert`.

Runs on the user's computer, never on the device: it needs the [convert] extra (the `gguf` package writes the file
and quantises). Streams: one expert at a time is held as floats, one stacked tensor as quantised bytes.
"""

from __future__ import annotations

import json
import os
import struct
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from smallthinker_edge.errors import ModelFormatError, SmallThinkerError

Progress = Callable[[int, int, str], None]
Array = npt.NDArray[Any]
TYPES = ("q4_0", "q8_0", "f16")
DTYPES: dict[str, np.dtype[Any]] = {"BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
LLAMA_CPP_WINDOW = 4096
SLICE = 1 << 22  # weights that are floats at a time
PERIOD = 4


class Checkpoint:
    """The tensors of a folder's safetensors files; checked when opened, read when asked for.

    Raises ModelFormatError naming file and field for a damaged or missing file.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._places: dict[str, tuple[str, str, tuple[int, ...], int]] = {}
        index = os.path.join(folder, "model.safetensors.index.json")
        if os.path.exists(index):
            files = sorted(set(_json(index).get("weight_map", {}).values()))
        else:
            files = ["model.safetensors"]
        for file in files:
            self._open(os.path.join(folder, str(file)))

    def _open(self, path: str) -> None:
        def error(message: str, field: str) -> ModelFormatError:
            return ModelFormatError(message, path=path, field=field)

        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise error("is too short for a safetensors file", "header")
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise error(f"a header of {length} bytes does not fit the file", "header")
            encoded = file.read(length)
        try:
            header = json.loads(encoded)
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, AttributeError) as problem:
            raise error(f"is not JSON: {problem}", "header") from None
        for name, entry in entries.items():
            try:
                dtype, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
                start, end = (int(n) for n in entry["data_offsets"])
            except (KeyError, TypeError, ValueError):
                raise error("has no dtype, shape and data_offsets", name) from None
            if dtype not in DTYPES:
                raise error(f"dtype {dtype} is not supported; supported are {', '.join(DTYPES)}", name)
            count = int(np.prod(shape, dtype=object))
            inside = 0 <= start <= end <= size - 8 - length
            if not inside or min(shape, default=1) < 0 or end - start != count * DTYPES[dtype].itemsize:
                raise error("its data_offsets do not fit its shape or the file", name)
            self._places[name] = (path, dtype, shape, 8 + length + start)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(
        self, name: str, shape: tuple[int, ...], first: int = 0, count: int | None = None
    ) -> npt.NDArray[np.float32]:
        """A tensor as float32, or `count` of its rows from `first` on.

        Raises ModelFormatError where it is missing, has another shape, or the file was cut short meanwhile.
        """
        if name not in self._places:
            raise ModelFormatError("is missing", path=self.folder, field=name)
        path, dtype, found, offset = self._places[name]
        if found != shape:
            raise ModelFormatError(f"has shape {list(found)}, not {list(shape)}", path=self.folder, field=name)
        rows = min(shape[0] - first, shape[0] if count is None else count)
        row = int(np.prod(shape[1:]))
        raw = np.fromfile(path, DTYPES[dtype], rows * row, offset=offset + first * row * DTYPES[dtype].itemsize)
        if raw.size != rows * row:
            raise ModelFormatError("cannot be read whole", path=path, field=name)
        if dtype == "BF16":
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        return np.asarray(raw, np.float32).reshape(rows, *shape[1:])

    def size(self, name: str) -> int:
        """Elements of a tensor that is there."""
        return int(np.prod(self._places[name][2]))


class Config:
    """config.json, each value checked when asked for."""

    def __init__(self, folder: str) -> None:
        self.path = os.path.join(folder, "config.json")
        self.values = _json(self.path)
        kind = self.values.get("model_type")
        if kind != "smallthinker":
            raise self.error("model_type", f"is {kind!r}, not 'smallthinker'")
        if self.values.get("rope_scaling") is not None:
            raise self.error("rope_scaling", "is not supported")

    def error(self, field: str, message: str) -> ModelFormatError:
        return ModelFormatError(message, path=self.path, field=field)

    def integer(self, key: str) -> int:
        value = self.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.error(key, f"must be a whole number, not {value!r}")
        return value

    def number(self, key: str) -> float:
        value = self.values.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(key, f"must be a number, not {value!r}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {value!r}")
        return value

    def layout(self, key: str, layers: int) -> list[bool]:
        """A list of 0 and 1 per layer; missing or null is all 0."""
        value = self.values.get(key) or [0] * layers
        if not isinstance(value, list) or len(value) != layers or any(v not in (0, 1) for v in value):
            raise self.error(key, f"must be {layers} times 0 or 1")
        return [bool(v) for v in value]


def _json(path: str) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:
        try:
            value = json.load(file)
        except ValueError as problem:
            raise ModelFormatError(f"is not JSON: {problem}", path=path) from None
    if not isinstance(value, dict):
        raise ModelFormatError("is not a JSON object", path=path)
    return value


def _optional_json(folder: str, name: str) -> dict[str, Any]:
    path = os.path.join(folder, name)
    return _json(path) if os.path.exists(path) else {}


class Converter:
    """One conversion: `Converter(folder, type).write(path)`."""

    def __init__(self, folder: str, type_: str) -> None:
        try:
            import gguf
        except ImportError:
            raise SmallThinkerError("converting needs: pip install 'smallthinker_edge[convert]'") from None
        self.gguf = gguf
        self.folder = folder
        self.config = Config(folder)
        self.checkpoint = Checkpoint(folder)
        self.type = gguf.GGMLQuantizationType[type_.upper()]
        self.float = gguf.GGMLQuantizationType.F32
        self.layers = self.config.integer("num_hidden_layers")
        self.d = self.config.integer("hidden_size")
        self.vocab = self.config.integer("vocab_size")
        self.experts = self.config.integer("moe_num_primary_experts")
        self.ffn = self.config.integer("moe_ffn_hidden_size")

    def write(self, path: str, progress: Progress) -> None:
        """Writes to a temporary file and renames it when it is whole."""
        temporary = path + ".part"
        writer = self.gguf.GGUFWriter(temporary, "smallthinker")
        try:
            self._metadata(writer)
            self._tokenizer(writer)
            tensors = list(self._tensors())
            for name, type_, shape, _ in tensors:
                bytes_shape = self.gguf.quant_shape_to_byte_shape(shape, type_)
                dtype, raw = (np.float32, None) if type_ == self.float else (np.uint8, type_)
                stored = shape if raw is None else bytes_shape
                writer.add_tensor_info(name, stored, np.dtype(dtype), int(np.prod(bytes_shape)), raw)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for i, (name, _, _, make) in enumerate(tensors):
                progress(i, len(tensors), name)
                writer.write_tensor_data(make())
            progress(len(tensors), len(tensors), "done")
            writer.flush()
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            writer.close()
            os.replace(temporary, path)
        except BaseException:
            writer.close()
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise

    def _metadata(self, writer: Any) -> None:
        config, heads = self.config, self.config.integer("num_attention_heads")
        writer.add_name(os.path.basename(os.path.abspath(self.folder)))
        writer.add_file_type({"Q4_0": 2, "Q8_0": 7, "F16": 1}[self.type.name])
        writer.add_block_count(self.layers)
        writer.add_context_length(config.integer("max_position_embeddings"))
        writer.add_embedding_length(self.d)
        writer.add_feed_forward_length(self.ffn)
        writer.add_expert_feed_forward_length(self.ffn)
        writer.add_expert_count(self.experts)
        writer.add_expert_used_count(config.integer("moe_num_active_primary_experts"))
        writer.add_head_count(heads)
        writer.add_head_count_kv(config.integer("num_key_value_heads"))
        writer.add_key_length(config.integer("head_dim"))
        writer.add_value_length(config.integer("head_dim"))
        writer.add_layer_norm_rms_eps(config.number("rms_norm_eps"))
        writer.add_rope_freq_base(config.number("rope_theta"))
        softmax = config.flag("moe_primary_router_apply_softmax")
        writer.add_uint32("smallthinker.expert_gating_func", 1 if softmax else 2)
        self._attention_layout(writer)

    def _attention_layout(self, writer: Any) -> None:
        """Window and RoPE per layer, in llama.cpp's keys as far as they reach, in ours beyond."""
        window = self.config.layout("sliding_window_layout", self.layers)
        rope = self.config.layout("rope_layout", self.layers)
        expressible = all(rope)
        if any(window):
            size = self.config.integer("sliding_window_size")
            writer.add_sliding_window(size)
            regular = [layer % PERIOD != 0 for layer in range(self.layers)]
            if window != regular:
                writer.add_array("smallthinker.attention.sliding_window_pattern", window)
            expressible = rope == regular and size == LLAMA_CPP_WINDOW
            if expressible and self.layers == PERIOD:
                warnings.warn(
                    f"llama.cpp rotates every layer of a model with a window and exactly {PERIOD} layers, layer 0 too: "
                    "smallthinker_edge runs the file as the checkpoint says, llama.cpp will compute something else",
                    stacklevel=2,
                )
        if not expressible:
            writer.add_array("smallthinker.rope_layout", rope)
            warnings.warn(
                "this model's RoPE layers or window cannot be expressed in llama.cpp's keys: smallthinker_edge runs "
                "the file as the checkpoint says, llama.cpp will compute something else",
                stacklevel=2,
            )

    def _tokenizer(self, writer: Any) -> None:
        path = os.path.join(self.folder, "tokenizer.json")
        tokenizer = _json(path)
        model = tokenizer.get("model")
        if not isinstance(model, dict) or model.get("type") != "BPE":
            raise ModelFormatError("is not a BPE model", path=path, field="model.type")
        tokens: dict[int, tuple[str, int]] = {id_: (token, 1) for token, id_ in model["vocab"].items()}
        for added in tokenizer.get("added_tokens", []):
            tokens[added["id"]] = (added["content"], 3 if added["special"] else 4)
        if tokens and max(tokens) >= self.vocab:
            raise ModelFormatError(f"has ids beyond the vocabulary of {self.vocab}", path=path, field="model.vocab")
        table = [tokens.get(id_, (f"[PAD{id_}]", 5)) for id_ in range(self.vocab)]
        pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list([token for token, _ in table])
        writer.add_token_types([kind for _, kind in table])
        writer.add_token_merges(pairs)
        self._special_tokens(writer)

    def _special_tokens(self, writer: Any) -> None:
        settings = _optional_json(self.folder, "tokenizer_config.json")
        generation = _optional_json(self.folder, "generation_config.json")
        values = self.config.values
        bos = values.get("bos_token_id", generation.get("bos_token_id"))
        eos = generation.get("eos_token_id", values.get("eos_token_id"))
        ends = eos if isinstance(eos, list) else [eos] if eos is not None else []
        if isinstance(bos, int):
            writer.add_bos_token_id(bos)
        if ends:
            writer.add_eos_token_id(ends[0])
        if len(ends) > 1:
            writer.add_eot_token_id(ends[1])
        writer.add_add_bos_token(bool(settings.get("add_bos_token", False)))
        template = settings.get("chat_template")
        separate = os.path.join(self.folder, "chat_template.jinja")
        if os.path.exists(separate):
            with open(separate, encoding="utf-8") as file:
                template = file.read()
        if isinstance(template, str):
            writer.add_chat_template(template)

    def _tensors(self) -> Iterator[tuple[str, Any, tuple[int, ...], Callable[[], Array]]]:
        """(GGUF name, type, shape in NumPy order, what makes its data), in the file's order."""
        d, heads = self.d, self.config.integer("num_attention_heads") * self.config.integer("head_dim")
        kv_heads = self.config.integer("num_key_value_heads") * self.config.integer("head_dim")
        yield self._matrix("token_embd", "model.embed_tokens", (self.vocab, d))
        yield self._plain("output_norm", "model.norm", (d,))
        if not self.config.flag("tie_word_embeddings"):
            yield self._matrix("output", "lm_head", (self.vocab, d))
        for layer in range(self.layers):
            ours, theirs = f"blk.{layer}.", f"model.layers.{layer}."
            yield self._plain(ours + "attn_norm", theirs + "input_layernorm", (d,))
            yield self._matrix(ours + "attn_q", theirs + "self_attn.q_proj", (heads, d))
            yield self._matrix(ours + "attn_k", theirs + "self_attn.k_proj", (kv_heads, d))
            yield self._matrix(ours + "attn_v", theirs + "self_attn.v_proj", (kv_heads, d))
            yield self._matrix(ours + "attn_output", theirs + "self_attn.o_proj", (d, heads))
            yield self._plain(ours + "ffn_norm", theirs + "post_attention_layernorm", (d,))
            moe = theirs + "block_sparse_moe."
            yield self._plain(ours + "ffn_gate_inp", moe + "primary_router", (self.experts, d))
            for name, shape in (("gate", (self.ffn, d)), ("up", (self.ffn, d)), ("down", (d, self.ffn))):
                yield self._stack(f"{ours}ffn_{name}_exps", moe + "experts.{}." + name, shape)
        if "model.lm_head_profiler" in self.checkpoint:
            size = self.checkpoint.size("model.lm_head_profiler")
            q4_0 = self.gguf.GGMLQuantizationType.Q4_0
            yield (
                "lm_head_profiler.weight", q4_0, (size,),
                lambda: self.gguf.quants.quantize(self.checkpoint.read("model.lm_head_profiler", (size,)), q4_0),
            )  # fmt: skip

    def _plain(self, name: str, source: str, shape: tuple[int, ...]) -> tuple[str, Any, Any, Callable[[], Array]]:
        return name + ".weight", self.float, shape, lambda: self.checkpoint.read(source + ".weight", shape)

    def _matrix(self, name: str, source: str, shape: tuple[int, int]) -> tuple[str, Any, Any, Callable[[], Array]]:
        return name + ".weight", self.type, shape, lambda: self._quantised(source + ".weight", shape)

    def _stack(self, name: str, source: str, shape: tuple[int, int]) -> tuple[str, Any, Any, Callable[[], Array]]:
        def make() -> Array:
            names = (source.format(e) + ".weight" for e in range(self.experts))
            return np.stack([self._quantised(n, shape) for n in names])

        return name + ".weight", self.type, (self.experts, *shape), make

    def _quantised(self, name: str, shape: tuple[int, int]) -> Array:
        """A matrix as the file's bytes [rows, bytes a row]; read in slices of rows, so that floats stay few."""
        _, row_bytes = self.gguf.quant_shape_to_byte_shape(shape, self.type)
        out = np.empty((shape[0], row_bytes), np.uint8)
        step = max(1, SLICE // shape[1])
        for first in range(0, shape[0], step):
            data = self.checkpoint.read(name, shape, first, step)
            if not np.isfinite(data).all():
                raise ModelFormatError("holds values that are not finite", path=self.folder, field=name)
            out[first : first + step] = self.gguf.quants.quantize(data, self.type).view(np.uint8)
        return out


def convert(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str],
    type_: str = "q4_0",
    progress: Progress | None = None,
) -> None:
    """Writes the GGUF file of a Hugging Face checkpoint folder of a SmallThinker model.

    Args:
        folder: holds config.json, tokenizer.json and model.safetensors (or shards with their index).
        target: the file to write; it appears under this name only when it is whole.
        type_: "q4_0", "q8_0" or "f16" for all matrices, the embedding included; norms and routers stay float32.
        progress: called with (tensors done, all tensors, the name in work).

    Raises:
        ModelFormatError: a damaged or unsupported checkpoint, naming file and field.
        SmallThinkerError: the [convert] extra is missing. ValueError: an unknown type. OSError: such as a full disk.
    """
    if type_ not in TYPES:
        raise ValueError(f"type must be one of {', '.join(TYPES)}, not {type_!r}")
    Converter(os.fspath(folder), type_).write(os.fspath(target), progress or (lambda done, total, name: None))
