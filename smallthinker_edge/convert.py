"""Hugging Face checkpoint folder to GGUF: `smallthinker-edge convert`.

Runs on the user's computer, never on the device: it needs the [convert] extra (the `gguf` package writes the file
and quantises). Streams: one expert at a time is held as floats, one stacked tensor as quantised bytes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from smallthinker_edge.checkpoint import MAX_CONTEXT, MAX_LAYERS, Checkpoint, CheckpointConfig, optional_json, read_json
from smallthinker_edge.errors import ModelFormatError, SmallThinkerError

Progress = Callable[[int, int, str], None]
Array = npt.NDArray[Any]
TYPES = ("q4_0", "q8_0", "f16")
LLAMA_CPP_WINDOW = 4096
SLICE = 1 << 22  # weights that are floats at a time
PERIOD = 4
PREDICTOR = "model.lm_head_profiler"
BLOCK = 32


@dataclass(frozen=True)
class Tensor:
    """A tensor of the GGUF file: shape in NumPy order; `sources` of shape `part` are its data one after the other."""

    name: str
    type: Any
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    part: tuple[int, ...]


class Converter:
    """One conversion: `Converter(folder, type).write(path)`."""

    def __init__(self, folder: str, type_: str) -> None:
        try:
            import gguf
        except ImportError:
            raise SmallThinkerError("converting needs: pip install 'smallthinker_edge[convert]'") from None
        self.gguf = gguf
        self.folder = folder
        self.config = CheckpointConfig(folder)
        self.checkpoint = Checkpoint(folder)
        self.type = gguf.GGMLQuantizationType[type_.upper()]
        self.float = gguf.GGMLQuantizationType.F32
        self.layers = self.config.integer("num_hidden_layers", MAX_LAYERS)
        self.d = self.config.integer("hidden_size")
        self.vocab = self.config.integer("vocab_size")
        self.experts = self.config.integer("moe_num_primary_experts")
        self.ffn = self.config.integer("moe_ffn_hidden_size")
        self.tied = self.config.flag("tie_word_embeddings", True)
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Refuses by name what our reader would refuse in the finished file."""
        config = self.config
        if config.integer("num_attention_heads") % config.integer("num_key_value_heads"):
            config.refuse("num_key_value_heads", "does not divide num_attention_heads")
        if config.integer("moe_num_active_primary_experts") > self.experts:
            config.refuse("moe_num_active_primary_experts", f"is more than the {self.experts} experts")
        rows = {"hidden_size": self.d, "moe_ffn_hidden_size": self.ffn}
        rows["head_dim"] = config.integer("num_attention_heads") * config.integer("head_dim")
        for key, row in rows.items():
            if row % BLOCK:
                config.refuse(key, f"makes matrix rows of {row}, which are not whole blocks of {BLOCK}")

    def write(self, path: str, progress: Progress) -> None:
        """Writes to a temporary file and renames it when it is whole."""
        tensors = list(self._tensors())
        temporary = path + ".part"
        writer = self.gguf.GGUFWriter(temporary, "smallthinker")
        try:
            self._metadata(writer)
            self._tokenizer(writer)
            self._check(tensors)
            for tensor in tensors:
                bytes_shape = self.gguf.quant_shape_to_byte_shape(tensor.shape, tensor.type)
                dtype, raw = (np.float32, None) if tensor.type == self.float else (np.uint8, tensor.type)
                stored = tensor.shape if raw is None else bytes_shape
                writer.add_tensor_info(tensor.name, stored, np.dtype(dtype), int(np.prod(bytes_shape)), raw)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for i, tensor in enumerate(tensors):
                progress(i, len(tensors), tensor.name)
                writer.write_tensor_data(self._data(tensor))
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
        writer.add_context_length(config.integer("max_position_embeddings", MAX_CONTEXT))
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
        writer.add_rope_freq_base(config.rope_theta)
        softmax = config.flag("moe_primary_router_apply_softmax", False)
        writer.add_uint32("smallthinker.expert_gating_func", 1 if softmax else 2)
        self._attention_layout(writer)

    def _attention_layout(self, writer: Any) -> None:
        """Window and RoPE per layer, in llama.cpp's keys as far as they reach, in ours beyond."""
        window = self.config.layout("sliding_window_layout", self.layers, 0)
        rope = self.config.layout("rope_layout", self.layers, 1)
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
        tokenizer = read_json(path)
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
        settings = optional_json(self.folder, "tokenizer_config.json")
        generation = optional_json(self.folder, "generation_config.json")
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

    def _tensors(self) -> Iterator[Tensor]:
        """The tensors of the file, in its order."""
        d, heads = self.d, self.config.integer("num_attention_heads") * self.config.integer("head_dim")
        kv_heads = self.config.integer("num_key_value_heads") * self.config.integer("head_dim")
        yield self._matrix("token_embd", "model.embed_tokens", (self.vocab, d))
        yield self._plain("output_norm", "model.norm", (d,))
        if not self.tied:
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
                sources = tuple(f"{moe}experts.{e}.{name}.weight" for e in range(self.experts))
                yield Tensor(f"{ours}ffn_{name}_exps.weight", self.type, (self.experts, *shape), sources, shape)
        if PREDICTOR in self.checkpoint:
            flat = (self.checkpoint.size(PREDICTOR),)
            yield Tensor("lm_head_profiler.weight", self.gguf.GGMLQuantizationType.Q4_0, flat, (PREDICTOR,), flat)

    def _plain(self, name: str, source: str, shape: tuple[int, ...]) -> Tensor:
        return Tensor(name + ".weight", self.float, shape, (source + ".weight",), shape)

    def _matrix(self, name: str, source: str, shape: tuple[int, int]) -> Tensor:
        return Tensor(name + ".weight", self.type, shape, (source + ".weight",), shape)

    def _check(self, tensors: list[Tensor]) -> None:
        """Every source is there in its shape, and the checkpoint holds nothing else, before a byte is written."""
        for tensor in tensors:
            for source in tensor.sources:
                self.checkpoint.check(source, tensor.part)
        self.checkpoint.refuse_unread((source for tensor in tensors for source in tensor.sources), self.tied)

    def _data(self, tensor: Tensor) -> Array:
        parts = [self._quantised(source, tensor.part, tensor.type) for source in tensor.sources]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _quantised(self, name: str, shape: tuple[int, ...], type_: Any) -> Array:
        """A tensor as the file's bytes; read in slices of rows, so that floats stay few."""
        rows, columns = shape if len(shape) == 2 else (1, shape[0])
        _, row_bytes = self.gguf.quant_shape_to_byte_shape((rows, columns), type_)
        out = np.empty((rows, row_bytes), np.uint8)
        step = max(1, SLICE // columns)
        for first in range(0, rows, step):
            data = self.checkpoint.read(name, shape, first, step if len(shape) == 2 else None)
            if not np.isfinite(data).all():
                raise ModelFormatError("holds values that are not finite", path=self.folder, field=name)
            data = data.reshape(-1, columns)
            out[first : first + step] = self.gguf.quants.quantize(data, type_).view(np.uint8)
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
