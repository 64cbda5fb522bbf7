"""What model a GGUF file holds: its sizes and options, from the metadata, checked against every tensor.

Called by opening.py, the packer, the memory plan and `info` before anything else is done with a file. Never
reads tensor data, and nothing about a particular model is hard-coded here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from smallthinker_edge._native.layouts import TYPES
from smallthinker_edge.errors import ModelFormatError
from smallthinker_edge.files.gguf import StoredBytes, TensorInfo

ARCHITECTURE = "smallthinker"
MATRIX_TYPES = frozenset(TYPES)
# Those whose blocks fit into rows of the predictor's inner width.
PREDICTOR_TYPES = frozenset({"F32", "F16", "BF16", "Q8_0", "Q4_0"})
# Activations are quantised in blocks of 32, so every matrix row must be whole blocks.
BLOCK = 32
# llama.cpp's rule when a window is set: one full-attention layer, then three window layers.
DEFAULT_PERIOD = 4
_MAX_LAYERS = 4096
_MAX_SIZE = 1 << 24
_MAX_CONTEXT = (1 << 31) - 1

LAYER_TENSORS = (
    "attn_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_norm",
    "ffn_gate_inp",
    "ffn_gate_exps",
    "ffn_up_exps",
    "ffn_down_exps",
)


class ModelHeader(Protocol):
    """What a model file says of itself. paths: all its parts."""

    paths: list[str]

    @property
    def metadata(self) -> Mapping[str, object]: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...


class ModelFile(ModelHeader, Protocol):
    """A header and the bytes, wherever they come from: a GGUF file, or a packed one. See GGUFFile for the methods."""

    path: str

    def stored(self, name: str) -> StoredBytes: ...
    def data(self, name: str) -> npt.NDArray[np.uint8]: ...
    def forget(self, name: str | None = None) -> None: ...
    def expect_rows(self, name: str) -> None: ...
    def close(self) -> None: ...


def tensor_name(role: str, layer: int | None = None) -> str:
    """The canonical GGUF name: tensor_name("attn_q", 3) is "blk.3.attn_q.weight"."""
    return f"{role}.weight" if layer is None else f"blk.{layer}.{role}.weight"


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a SmallThinker model. Sizes are in elements; layers count from 0.

    Attributes:
        n_layers: layers of attention and experts.
        d_model: width of the residual stream.
        n_heads: query heads, a multiple of n_kv_heads.
        n_kv_heads: key/value heads.
        head_dim: width of one head, a multiple of 8.
        n_experts: experts of a layer.
        n_experts_used: how many of them a token uses.
        d_ffn: neurons of one expert.
        vocab_size: rows of the embedding and of the head.
        context_length: longest context the model was made for, in tokens.
        rms_eps: epsilon of every RMSNorm.
        rope_theta: base of the rotary embedding (RoPE) on full-attention layers.
        gating: how the logits of the chosen experts become weights.
        window: on window layers a query sees this many newest positions, itself included; 0: no such layers.
        rope_layout: per layer, True when RoPE is used (False: no position embedding, NoPE).
        window_layout: per layer, True for sliding-window attention.
        tied: the head is the embedding matrix.
        name: general.name, or "".
        rope_theta_swa: base of RoPE on window layers.
        rope_dim: how many of a head's dimensions are rotated; even, at most head_dim.
        down_transposed: ffn_down_exps is {d_model, d_ffn, n_experts}: one neuron's weights are one row.
        lm_head_predictor_size: inner width K of lm_head_profiler.weight; 0 when the file has none.
        lm_head_threshold: score of the predictor above which a vocabulary row is worth computing.
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_experts: int
    n_experts_used: int
    d_ffn: int
    vocab_size: int
    context_length: int
    rms_eps: float
    rope_theta: float
    gating: Literal["sigmoid", "softmax"]
    window: int
    rope_layout: tuple[bool, ...]
    window_layout: tuple[bool, ...]
    tied: bool
    name: str
    rope_theta_swa: float
    rope_dim: int
    down_transposed: bool
    lm_head_predictor_size: int = 0
    lm_head_threshold: float = 0.0

    @classmethod
    def from_gguf(cls, gguf: ModelHeader) -> ModelConfig:
        """Reads and checks the configuration of an opened file.

        - Window: the file's own `attention.sliding_window` is what is used. (llama.cpp takes 4096 whatever
          the key says; the released models have 4096.) The window layers are those with `l % 4 != 0`; an
          integer n in `attention.sliding_window_pattern` makes that `l % n != 0`, an array there gives each.
        - RoPE: `smallthinker.rope_layout` where present; else, with a window, the layers with `l % 4 != 0`
          whatever the pattern, and without one every layer.
        - Gating: an absent `expert_gating_func` means sigmoid.
        - `lm_head_threshold` is the extra key `smallthinker.lm_head_profiler.threshold` where present.
        - `down_transposed` is told by the shape of ffn_down_exps. Where d_ffn equals d_model it cannot be
          told, and the ordinary layout is assumed.

        Raises ModelFormatError naming the key or tensor: one that is missing, of the wrong type or shape, out
        of range, or that this library would have to ignore (unknown tensors, RoPE scaling).
        """
        return _read_config(gguf)

    @property
    def query_width(self) -> int:
        """Elements of all query heads: n_heads * head_dim."""
        return self.n_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Elements of all key (or value) heads: n_kv_heads * head_dim."""
        return self.n_kv_heads * self.head_dim

    @staticmethod
    def tensor_name(role: str, layer: int | None = None) -> str:
        """The canonical GGUF name: tensor_name("attn_q", 3) is "blk.3.attn_q.weight"."""
        return tensor_name(role, layer)

    @property
    def head_tensor(self) -> str:
        """Name of the tensor that makes logits: the embedding when tied."""
        return tensor_name("token_embd" if self.tied else "output")

    def tensor_names(self) -> Iterator[str]:
        """Every name of an ordinary file (q, k and v apart) in file order, without the optional predictor."""
        yield tensor_name("token_embd")
        yield tensor_name("output_norm")
        if not self.tied:
            yield tensor_name("output")
        for layer in range(self.n_layers):
            for role in LAYER_TENSORS:
                yield tensor_name(role, layer)


def expert_sizes(gguf: ModelHeader) -> tuple[int, int, int, int]:
    """(layers, experts of a layer, d_model, d_ffn), of a file whose tensors may be missing. Raises as from_gguf()."""
    keys = _Keys(gguf)
    _check_architecture(keys)
    sizes = _read_sizes(keys)
    return sizes["n_layers"], sizes["n_experts"], sizes["d_model"], sizes["d_ffn"]


class _Keys:
    """Typed access to `smallthinker.*` metadata; every failure names the key."""

    def __init__(self, gguf: ModelHeader) -> None:
        self.path = gguf.paths[0]
        self.metadata = gguf.metadata

    def fail(self, key: str, message: str) -> NoReturn:
        raise ModelFormatError(message, path=self.path, field=key)

    def get(self, key: str) -> object:
        return self.metadata.get(f"{ARCHITECTURE}.{key}")

    def integer(self, key: str, *, low: int, high: int, default: int | None = None) -> int:
        """A whole number in [low, high]. An array with one equal entry per layer counts as that entry."""
        full, value = f"{ARCHITECTURE}.{key}", self.get(key)
        if value is None:
            if default is None:
                self.fail(full, "the key is missing")
            return default
        if isinstance(value, list) and value:
            if any(item != value[0] for item in value):
                self.fail(full, "different values for different layers are not supported")
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool):
            self.fail(full, f"must be a whole number, not {_shorten(value)}")
        if not low <= value <= high:
            self.fail(full, f"must be from {low} to {high}, not {value}")
        return value

    def finite_float(self, key: str, default: float | None = None) -> float:
        full, value = f"{ARCHITECTURE}.{key}", self.get(key)
        if value is None:
            if default is None:
                self.fail(full, "the key is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.fail(full, f"must be a number, not {_shorten(value)}")
        if not math.isfinite(value):
            self.fail(full, f"must be finite, not {value}")
        return float(value)

    def positive_float(self, key: str, default: float | None = None) -> float:
        value = self.finite_float(key, default)
        if value <= 0:
            self.fail(f"{ARCHITECTURE}.{key}", f"must be positive, not {value}")
        return value

    def flags(self, key: str, n_layers: int) -> tuple[bool, ...] | None:
        """An array of one bool (or 0/1) per layer; None when the key is absent."""
        full, value = f"{ARCHITECTURE}.{key}", self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or any(item not in (0, 1) for item in value):
            self.fail(full, f"must be an array of booleans, not {_shorten(value)}")
        if len(value) != n_layers:
            self.fail(full, f"has {len(value)} entries for {n_layers} layers")
        return tuple(bool(item) for item in value)


def _shorten(value: object) -> str:
    """A value for an error message, never long."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"{type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_config(gguf: ModelHeader) -> ModelConfig:
    keys = _Keys(gguf)
    _check_architecture(keys)
    sizes = _read_sizes(keys)
    n_layers = sizes["n_layers"]
    window, window_layout, rope_layout = _read_layouts(keys, n_layers)
    rope_theta = keys.positive_float("rope.freq_base")
    _refuse_rope_scaling(keys)

    tensors = _Tensors(gguf)
    vocab_size = _read_vocab_size(keys, tensors, sizes["d_model"])
    name = gguf.metadata.get("general.name", "")
    config = ModelConfig(
        **sizes,
        vocab_size=vocab_size,
        rms_eps=keys.positive_float("attention.layer_norm_rms_epsilon"),
        rope_theta=rope_theta,
        rope_theta_swa=keys.positive_float("rope.freq_base_swa", rope_theta),
        rope_dim=_read_rope_dim(keys, sizes["head_dim"]),
        gating=_read_gating(keys),
        window=window,
        window_layout=window_layout,
        rope_layout=rope_layout,
        tied=tensor_name("output") not in gguf.tensors,
        name=name if isinstance(name, str) else "",
        down_transposed=tensors.is_down_transposed(sizes["d_model"], sizes["d_ffn"]),
        lm_head_predictor_size=tensors.predictor_size(sizes["d_model"], vocab_size),
        lm_head_threshold=keys.finite_float("lm_head_profiler.threshold", 0.0),
    )
    tensors.check_all(config)
    return config


def _check_architecture(keys: _Keys) -> None:
    architecture = keys.metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        keys.fail("general.architecture", f"must be {ARCHITECTURE!r}, not {_shorten(architecture)}")


def _read_sizes(keys: _Keys) -> dict[str, int]:
    size = {"low": 1, "high": _MAX_SIZE}
    n_layers = keys.integer("block_count", low=1, high=_MAX_LAYERS)
    d_model = keys.integer("embedding_length", **size)
    n_heads = keys.integer("attention.head_count", **size)
    n_kv_heads = keys.integer("attention.head_count_kv", **size)
    head_dim = keys.integer("attention.key_length", **size, default=d_model // n_heads)
    value_dim = keys.integer("attention.value_length", **size, default=head_dim)
    n_experts = keys.integer("expert_count", **size)
    n_experts_used = keys.integer("expert_used_count", low=1, high=n_experts)
    if n_heads % n_kv_heads:
        keys.fail(
            "smallthinker.attention.head_count_kv",
            f"{n_kv_heads} KV heads do not divide {n_heads} query heads",
        )
    if head_dim % 8:  # what the kernels take at once
        keys.fail("smallthinker.attention.key_length", f"the head width must be a multiple of 8, not {head_dim}")
    if value_dim != head_dim:
        keys.fail("smallthinker.attention.value_length", f"must equal the key length {head_dim}, not {value_dim}")
    d_ffn = _read_d_ffn(keys)
    for key, width in (
        ("embedding_length", d_model),
        ("expert_feed_forward_length", d_ffn),
        ("attention.head_count", n_heads * head_dim),
    ):
        if width % BLOCK:
            keys.fail(f"{ARCHITECTURE}.{key}", f"a width of {width} is not a multiple of {BLOCK}")
    return {
        "n_layers": n_layers,
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "head_dim": head_dim,
        "n_experts": n_experts,
        "n_experts_used": n_experts_used,
        "d_ffn": d_ffn,
        "context_length": keys.integer("context_length", low=1, high=_MAX_CONTEXT),
    }


def _read_d_ffn(keys: _Keys) -> int:
    """The expert width: expert_feed_forward_length, or feed_forward_length; both must agree."""
    general = keys.integer("feed_forward_length", low=0, high=_MAX_SIZE, default=0)
    expert = keys.integer("expert_feed_forward_length", low=0, high=_MAX_SIZE, default=0)
    if general and expert and general != expert:
        keys.fail(
            "smallthinker.expert_feed_forward_length",
            f"is {expert}, but feed_forward_length is {general}; they must be equal",
        )
    if not (general or expert):
        keys.fail("smallthinker.expert_feed_forward_length", "the key is missing or zero")
    return expert or general


def _read_layouts(keys: _Keys, n_layers: int) -> tuple[int, tuple[bool, ...], tuple[bool, ...]]:
    """(window, window_layout, rope_layout) by the rules in ModelConfig.from_gguf."""
    window = keys.integer("attention.sliding_window", low=0, high=_MAX_CONTEXT, default=0)
    default = tuple(layer % DEFAULT_PERIOD != 0 for layer in range(n_layers))
    pattern = default
    if isinstance(keys.get("attention.sliding_window_pattern"), list):
        pattern = keys.flags("attention.sliding_window_pattern", n_layers) or default
    elif keys.get("attention.sliding_window_pattern") is not None:
        period = keys.integer("attention.sliding_window_pattern", low=1, high=_MAX_SIZE)
        pattern = tuple(layer % period != 0 for layer in range(n_layers))
    rope_layout = keys.flags("rope_layout", n_layers)
    if rope_layout is None:
        rope_layout = default if window else (True,) * n_layers
    if not window:
        pattern = (False,) * n_layers
    return (window if any(pattern) else 0), pattern, rope_layout


def _read_rope_dim(keys: _Keys, head_dim: int) -> int:
    rope_dim = keys.integer("rope.dimension_count", low=2, high=head_dim, default=head_dim)
    if rope_dim % 2:
        keys.fail("smallthinker.rope.dimension_count", f"must be even, not {rope_dim}")
    return rope_dim


def _read_gating(keys: _Keys) -> Literal["sigmoid", "softmax"]:
    value = keys.get("expert_gating_func")
    if value is None:
        return "sigmoid"
    if type(value) is int and value in (1, 2):
        return "softmax" if value == 1 else "sigmoid"
    keys.fail("smallthinker.expert_gating_func", f"must be 1 (softmax) or 2 (sigmoid), not {_shorten(value)}")


def _refuse_rope_scaling(keys: _Keys) -> None:
    kind = keys.get("rope.scaling.type")
    if kind not in (None, "none"):
        keys.fail("smallthinker.rope.scaling.type", f"RoPE scaling {_shorten(kind)} is not supported")


def _read_vocab_size(keys: _Keys, tensors: _Tensors, d_model: int) -> int:
    """Rows of token_embd, which smallthinker.vocab_size and the list of tokens must match where present."""
    shape = tensors.shape("token_embd")
    if len(shape) != 2 or shape[0] != d_model:
        tensors.fail(tensor_name("token_embd"), f"shape {shape}; ({d_model}, vocabulary) expected")
    vocab_size = shape[1]
    if vocab_size > _MAX_SIZE:
        tensors.fail(tensor_name("token_embd"), f"a vocabulary of {vocab_size}; at most {_MAX_SIZE} is read")
    keys.integer("vocab_size", low=vocab_size, high=vocab_size, default=vocab_size)
    tokens = keys.metadata.get("tokenizer.ggml.tokens")
    if tokens is not None:
        if not isinstance(tokens, Sequence) or isinstance(tokens, str):
            keys.fail("tokenizer.ggml.tokens", f"must be an array of strings, not {_shorten(tokens)}")
        if len(tokens) != vocab_size:
            keys.fail("tokenizer.ggml.tokens", f"has {len(tokens)} tokens, token_embd {vocab_size} rows")
    return vocab_size


class _Tensors:
    """Checks the tensor table; every failure names the tensor and its file."""

    def __init__(self, gguf: ModelHeader) -> None:
        self.paths = gguf.paths
        self.table: Mapping[str, TensorInfo] = gguf.tensors

    def fail(self, name: str, message: str) -> NoReturn:
        info = self.table.get(name)
        part = 0 if info is None else info.part
        offset = None if info is None else info.offset
        raise ModelFormatError(message, path=self.paths[part], field=name, offset=offset)

    def shape(self, role: str, layer: int | None = None) -> tuple[int, ...]:
        """Shape in GGUF order with trailing ones taken off; the first dimension always stays."""
        name = tensor_name(role, layer)
        info = self.table.get(name)
        if info is None:
            apart = ": a file without experts becomes a model with convert --bundle" if role.endswith("_exps") else ""
            self.fail(name, "the tensor is missing" + apart)
        return _strip(info.shape)

    def check(self, role: str, layer: int | None, shape: tuple[int, ...], types: frozenset[str]) -> str:
        """Presence, shape and type of one tensor; returns its name."""
        name = tensor_name(role, layer)
        if self.shape(role, layer) != _strip(shape):
            self.fail(name, f"shape {self.table[name].shape}, expected {shape} (first dimension contiguous)")
        if self.table[name].type not in types:
            self.fail(name, f"type {self.table[name].type}, expected {' or '.join(sorted(types))}")
        return name

    def is_down_transposed(self, d_model: int, d_ffn: int) -> bool:
        """Told by layer 0; check_all holds the other layers to it."""
        return d_model != d_ffn and self.shape("ffn_down_exps", 0)[:2] == (d_model, d_ffn)

    def predictor_size(self, d_model: int, vocab_size: int) -> int:
        """K of lm_head_profiler.weight: K rows of d_model and vocab_size rows of K, flat. 0 when absent."""
        name = tensor_name("lm_head_profiler")
        info = self.table.get(name)
        if info is None:
            return 0
        elements = math.prod(info.shape)
        if len(_strip(info.shape)) != 1 or elements % (d_model + vocab_size):
            self.fail(
                name,
                f"shape {info.shape}, expected one row of a multiple of {d_model} + {vocab_size} elements",
            )
        size = elements // (d_model + vocab_size)
        if size % BLOCK or size > d_model:
            self.fail(name, f"an inner width of {size} is not a multiple of {BLOCK} up to {d_model}")
        if info.type not in PREDICTOR_TYPES:
            self.fail(name, f"type {info.type}, expected {' or '.join(sorted(PREDICTOR_TYPES))}")
        return size

    def check_all(self, config: ModelConfig) -> None:
        """Every tensor that the model needs is there as it must be, and no other."""
        d = config.d_model
        f32 = frozenset({"F32"})
        known = {tensor_name("lm_head_profiler")}
        known.add(self.check("token_embd", None, (d, config.vocab_size), MATRIX_TYPES))
        known.add(self.check("output_norm", None, (d,), f32))
        if not config.tied:
            known.add(self.check("output", None, (d, config.vocab_size), MATRIX_TYPES))
        for layer in range(config.n_layers):
            known.update(self.check_layer(config, layer))
        for name in self.table:
            if name not in known:
                self.fail(name, "not a tensor of a SmallThinker model; ignoring it could change results")

    def check_layer(self, config: ModelConfig, layer: int) -> list[str]:
        d, f, experts = config.d_model, config.d_ffn, config.n_experts
        query, kv = config.query_width, config.kv_width
        f32 = frozenset({"F32"})
        down = (d, f, experts) if config.down_transposed else (f, d, experts)
        expected = [
            ("attn_norm", (d,), f32),
            ("ffn_norm", (d,), f32),
            ("ffn_gate_inp", (d, experts), f32),
            ("attn_output", (query, d), MATRIX_TYPES),
            ("ffn_gate_exps", (d, f, experts), MATRIX_TYPES),
            ("ffn_up_exps", (d, f, experts), MATRIX_TYPES),
            ("ffn_down_exps", down, MATRIX_TYPES),
        ]
        fused = tensor_name("attn_qkv", layer) in self.table
        if fused:
            expected.append(("attn_qkv", (d, query + 2 * kv), MATRIX_TYPES))
        else:
            expected += [("attn_q", (d, query), MATRIX_TYPES)]
            expected += [(role, (d, kv), MATRIX_TYPES) for role in ("attn_k", "attn_v")]
        return [self.check(role, layer, shape, types) for role, shape, types in expected]


def _strip(shape: tuple[int, ...]) -> tuple[int, ...]:
    end = len(shape)
    while end > 1 and shape[end - 1] == 1:
        end -= 1
    return shape[:end]
