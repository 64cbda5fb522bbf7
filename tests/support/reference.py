"""The forward pass of a SmallThinker model in plain NumPy, float64, written from the model's description.

Tests compare the engine with it. It shares no code with the engine: files are read and dequantised with the
`gguf` package, every sequence is computed whole with explicit masks, and nothing is cached or blocked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize

Array = npt.NDArray[np.float64]

# The sum of sigmoid weights is not divided by less than this (the smallest normal float16).
SMALLEST_WEIGHT_SUM = 6.103515625e-5

# Types whose products are taken of whole numbers, so that what they multiply is rounded.
TILED = ("Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K")


@dataclass(frozen=True)
class Params:
    """Sizes and options of one model. `window_layout` and `rope_layout` have one entry per layer."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_experts_used: int
    rms_eps: float
    rope_theta: float
    rope_theta_swa: float
    rope_dim: int
    gating: str
    window: int
    window_layout: tuple[bool, ...]
    rope_layout: tuple[bool, ...]


@dataclass
class Trace:
    """What one pass computed: logits [n, V]; per layer the chosen experts [n, K] and their weights [n, K]; the
    head's input [n, d]."""

    logits: Array
    chosen: list[npt.NDArray[np.int64]] = field(default_factory=list)
    weights: list[Array] = field(default_factory=list)
    states: Array = field(default_factory=lambda: np.empty((0, 0)))


class Reference:
    """A model whose weights are dequantised matrices in NumPy order (`token_embd.weight` is [V, d]).

    Parameters:
        params: sizes and options.
        weights: by GGUF name. Experts are [E, f, d] (gate, up) and [E, d, f] or, transposed, [E, f, d] (down).
            Without `output.weight` the head is the embedding. `attn_qkv` may stand in for q, k and v.
    """

    def __init__(
        self, params: Params, weights: Mapping[str, npt.NDArray[Any]], types: Mapping[str, str] | None = None
    ) -> None:
        self.params = params
        self.weights: dict[str, Array] = {name: np.asarray(w, np.float64) for name, w in weights.items()}
        self.types = dict(types or {})
        self.rounding = False

    @classmethod
    def from_gguf(cls, path: str | os.PathLike[str]) -> Reference:
        """Reads a whole GGUF file. Every tensor is held as float64: for small models only."""
        reader = GGUFReader(path)
        weights = {
            t.name: dequantize(t.data, t.tensor_type).reshape([int(n) for n in reversed(t.shape)])
            for t in reader.tensors
        }
        return cls(_read_params(reader), weights, {t.name: t.tensor_type.name for t in reader.tensors})

    def logits(self, tokens: Sequence[int], *, kv: str | None = None, rounding: bool = False) -> Array:
        """Logits [n, V] of every position of one sequence that starts at position 0.

        kv, "f16", "q8_0" or "q8_0-all", rounds keys (after RoPE) and values as a KV cache of that kind does. rounding:
        the inputs of matrices that an engine multiplies in integers are rounded to Q8_0 first; everything else stays
        float64.
        """
        return self.run(tokens, kv=kv, rounding=rounding).logits

    def run(self, tokens: Sequence[int], *, kv: str | None = None, rounding: bool = False) -> Trace:
        """Like logits, and keeps which experts every layer chose and with what weights."""
        self.rounding = rounding
        p, w = self.params, self.weights
        embedding = w["token_embd.weight"]
        trace = Trace(np.empty((0, 0)))
        x = embedding[np.asarray(tokens, np.int64)]
        for layer in range(p.n_layers):
            chosen, weights = self.route(x, layer)
            trace.chosen.append(chosen)
            trace.weights.append(weights)
            h = rms_norm(x, w[f"blk.{layer}.attn_norm.weight"], p.rms_eps)
            x = x + self.attention(h, layer, kv=kv)
            h = rms_norm(x, w[f"blk.{layer}.ffn_norm.weight"], p.rms_eps)
            x = x + self.experts(h, layer, chosen, weights)
        x = rms_norm(x, w["output_norm.weight"], p.rms_eps)
        head = "output.weight" if "output.weight" in w else "token_embd.weight"
        trace.states = x
        trace.logits = self.input_of(x, head) @ w[head].T
        return trace

    def head_scores(self, states: Array) -> Array:
        """What the LM head's predictor gives every row [n, V], from the head's input [n, d]."""
        flat = self.weights["lm_head_profiler.weight"].ravel()
        d, vocab = states.shape[1], len(self.weights["token_embd.weight"])
        inner = flat.size // (d + vocab)
        first, second = flat[: inner * d].reshape(inner, d), flat[inner * d :].reshape(vocab, inner)
        return states @ first.T @ second.T

    def input_of(self, x: Array, name: str, types: tuple[str, ...] = TILED) -> Array:
        """x as the named matrix gets to see it."""
        return stored(x, "q8_0") if self.rounding and self.types[name] in types else x

    def route(self, x: Array, layer: int) -> tuple[npt.NDArray[np.int64], Array]:
        """Chosen experts and weights, both [n, K], from the residual x [n, d] as it enters the layer."""
        logits = x @ self.weights[f"blk.{layer}.ffn_gate_inp.weight"].T
        chosen = np.argsort(-logits, axis=-1, kind="stable")[:, : self.params.n_experts_used]
        top = np.take_along_axis(logits, chosen, axis=-1)
        if self.params.gating == "softmax":
            return chosen, softmax(top)
        scores = 1.0 / (1.0 + np.exp(-top))
        return chosen, scores / np.maximum(scores.sum(axis=-1, keepdims=True), SMALLEST_WEIGHT_SUM)

    def attention(self, h: Array, layer: int, *, kv: str | None = None) -> Array:
        """Output [n, d] of the attention block for its normalised input h [n, d]."""
        p, n = self.params, len(h)
        q, k, v = self._project(h, layer)
        if p.rope_layout[layer]:
            theta = p.rope_theta_swa if p.window_layout[layer] else p.rope_theta
            q, k = (rope(t, np.arange(n), theta, p.rope_dim) for t in (q, k))
        k, v = (stored(t, layer_type(kv, p.window_layout[layer])) for t in (k, v))
        distance = np.arange(n)[:, None] - np.arange(n)[None, :]
        visible = distance >= 0
        if p.window_layout[layer]:
            visible &= distance < p.window
        out = np.empty_like(q)
        for head in range(p.n_heads):
            kv_head = head // (p.n_heads // p.n_kv_heads)
            scores = q[:, head] @ k[:, kv_head].T / np.sqrt(p.head_dim)
            out[:, head] = softmax(np.where(visible, scores, -np.inf)) @ v[:, kv_head]
        name = f"blk.{layer}.attn_output.weight"
        return self.input_of(out.reshape(n, -1), name) @ self.weights[name].T

    def experts(self, h: Array, layer: int, chosen: npt.NDArray[np.int64], weights: Array) -> Array:
        """Weighted sum [n, d] of the chosen experts' outputs for their normalised input h [n, d]."""
        gate, up, down = (self.weights[f"blk.{layer}.ffn_{m}_exps.weight"] for m in ("gate", "up", "down"))
        # [E, d, f] is the ordinary layout, also where d == f and the shape cannot tell.
        transposed = down.shape[1] != h.shape[1]
        y = np.zeros_like(h)
        # Integer kernels want all three in types that have them, or in Q4_0 where down is transposed: there an engine
        # rounds what a neuron gives to each block of 32 outputs; here it is rounded once, to bytes of 32 neurons.
        names = [f"blk.{layer}.ffn_{m}_exps.weight" for m in ("gate", "up", "down")]
        rounded = self.rounding and {self.types[name] for name in names} <= ({"Q4_0"} if transposed else set(TILED))
        h = stored(h, "q8_0") if rounded else h
        for expert in np.unique(chosen):
            rows, slot = np.nonzero(chosen == expert)
            hidden = np.maximum(h[rows] @ gate[expert].T, 0.0) * (h[rows] @ up[expert].T)
            hidden = stored(hidden, "q8_0") if rounded else hidden
            out = hidden @ (down[expert] if transposed else down[expert].T)
            y[rows] += weights[rows, slot][:, None] * out
        return y

    def _project(self, h: Array, layer: int) -> tuple[Array, Array, Array]:
        """q [n, H, head_dim], k and v [n, KV, head_dim], from separate matrices or a fused one."""
        p, w = self.params, self.weights
        fused = w.get(f"blk.{layer}.attn_qkv.weight")
        if fused is None:
            names = [f"blk.{layer}.attn_{m}.weight" for m in "qkv"]
            parts = [self.input_of(h, name) @ w[name].T for name in names]
        else:
            query, kv = p.n_heads * p.head_dim, p.n_kv_heads * p.head_dim
            h = self.input_of(h, f"blk.{layer}.attn_qkv.weight")
            parts = np.split(h @ fused.T, [query, query + kv], axis=-1)
        q, k, v = (part.reshape(len(h), -1, p.head_dim) for part in parts)
        return q, k, v


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x [n, d] divided by its root mean square, times weight [d]."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def softmax(x: Array) -> Array:
    """Softmax over the last axis; entries of -inf get weight 0."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def rope(x: Array, positions: npt.NDArray[np.int64], theta: float, rope_dim: int) -> Array:
    """Rotates x [n, heads, head_dim]: dimension i pairs with i + rope_dim/2; the rest stay as they are."""
    half = rope_dim // 2
    angle = positions[:, None] * theta ** (-np.arange(half) * 2.0 / rope_dim)
    cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
    a, b = x[..., :half], x[..., half:rope_dim]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., rope_dim:]], axis=-1)


def layer_type(kv: str | None, window: bool) -> str | None:
    """In which type a layer's keys and values are kept by a KV cache of a kind."""
    return {"q8_0": "f16" if window else "q8_0", "q8_0-all": "q8_0"}.get(kv or "", kv)


def stored(x: Array, kv: str | None) -> Array:
    """x, for instance keys or values [n, heads, head_dim], as storage in type kv gives it back."""
    if kv == "f16":
        return x.astype(np.float16).astype(np.float64)
    if kv == "q8_0":
        kind = GGMLQuantizationType.Q8_0
        return np.asarray(dequantize(quantize(x.astype(np.float32), kind), kind), np.float64)
    return x


def kl_divergence(p_logits: npt.ArrayLike, q_logits: npt.ArrayLike) -> float:
    """KL(P || Q) in nats, mean over positions. Both [n, V] (or [V]) logits; P is the reference."""
    p, q = _log_softmax(p_logits), _log_softmax(q_logits)
    return float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)))


def top1_agreement(p_logits: npt.ArrayLike, q_logits: npt.ArrayLike) -> float:
    """Share of positions, 0 to 1, where both have the same most likely token."""
    p, q = (np.atleast_2d(np.asarray(a)) for a in (p_logits, q_logits))
    return float(np.mean(p.argmax(axis=-1) == q.argmax(axis=-1)))


def relative_error(reference: npt.ArrayLike, value: npt.ArrayLike) -> float:
    """Norm of the difference over the norm of the reference; NaN in either gives NaN."""
    a, b = np.asarray(reference, np.float64), np.asarray(value, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"shapes {a.shape} and {b.shape} differ")
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(a)), 1e-30))


def _log_softmax(logits: npt.ArrayLike) -> Array:
    x = np.atleast_2d(np.asarray(logits, np.float64))
    x = x - x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


def _metadata(reader: GGUFReader) -> Callable[..., Any]:
    def get(key: str, default: Any = None) -> Any:
        entry = reader.get_field(f"smallthinker.{key}")
        if entry is not None:
            return entry.contents()
        return default

    return get


def _read_params(reader: GGUFReader) -> Params:
    get = _metadata(reader)
    n_layers, window = int(get("block_count")), int(get("attention.sliding_window", 0))
    period_of_four = tuple(layer % 4 != 0 for layer in range(n_layers))
    pattern = get("attention.sliding_window_pattern")
    if not window:
        window_layout = (False,) * n_layers
    elif isinstance(pattern, list):
        window_layout = tuple(bool(flag) for flag in pattern)
    elif pattern is not None:
        window_layout = tuple(layer % int(pattern) != 0 for layer in range(n_layers))
    else:
        window_layout = period_of_four
    n_heads = int(get("attention.head_count"))
    head_dim = int(get("attention.key_length", int(get("embedding_length")) // n_heads))
    theta = float(get("rope.freq_base"))
    rope_default = period_of_four if window else (True,) * n_layers
    return Params(
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=int(get("attention.head_count_kv")),
        head_dim=head_dim,
        n_experts_used=int(get("expert_used_count")),
        rms_eps=float(get("attention.layer_norm_rms_epsilon")),
        rope_theta=theta,
        rope_theta_swa=float(get("rope.freq_base_swa", theta)),
        rope_dim=int(get("rope.dimension_count", head_dim)),
        gating="softmax" if get("expert_gating_func", 2) == 1 else "sigmoid",
        window=window,
        window_layout=window_layout,
        rope_layout=tuple(bool(flag) for flag in get("rope_layout", rope_default)),
    )
