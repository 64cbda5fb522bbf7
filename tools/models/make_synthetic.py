"""Writes SmallThinker GGUF files with real shapes, random weights and the activation statistics of real models.

Run by people who measure speed and paging without the real weights, and by the tests; needs NumPy only. The
result is an ordinary GGUF (docs/synthetic-models.md says how it is calibrated). It never writes meaningful text.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from synthetic_gguf import (
    ALIGNMENT,
    BLOCK,
    SUPER,
    GGUFStream,
    Tensor,
    WeightSource,
    byte_level_entries,
    dequantize_q4_0,
    dequantize_q6_k,
    gguf_entry,
    set_constant_q4_0,
    set_constant_q6_k,
    vocabulary_entries,
)

FILE_TYPE_MOSTLY_Q4_0 = 2
DEFAULT_VOCAB = Path(__file__).resolve().parents[3] / "shared" / "data" / "qwen2-vocab.gguf"

EMBEDDING_SD = 0.05
CONSTANT = 0.1  # value of the first BLOCK channels, through the whole network
HOT_SHARE = 0.22
EASY_OFFSET = 2.6  # router sd between hot and cold experts in --style easy
HOT_JITTER = 0.1
SCORE_SD = 2.0  # of attention scores: a token attends to a handful of others
RESIDUAL_GROWTH = 1.5  # variance added by all layers together, in units of the embedding's


@dataclass(frozen=True)
class Shape:
    """What the model looks like; names as in FORMATS section 1."""

    name: str
    layers: int
    d_model: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    experts_used: int
    d_ffn: int
    vocab_size: int
    context: int
    tied: bool
    hybrid: bool
    hot_use: float
    window: int = 4096
    rope_theta: float = 1.5e6
    rms_eps: float = 1e-6
    gating: str = "sigmoid"

    def uses_rope(self, layer: int) -> bool:
        return not self.hybrid or layer % 4 != 0

    def has_window(self, layer: int) -> bool:
        return self.hybrid and layer % 4 != 0


PRESETS = {
    "4b": Shape("synthetic 4B-A0.6B", 32, 1536, 12, 2, 128, 32, 4, 768, 151936, 32768, True, False, 0.45),
    "21b": Shape(
        "synthetic 21B-A3B", 52, 2560, 28, 4, 128, 64, 6, 768, 151936, 16384, False, True, 0.36, gating="softmax"
    ),
    "custom": Shape("synthetic", 4, 256, 4, 2, 64, 16, 4, 128, 320, 2048, True, False, 0.45),
}


@dataclass(frozen=True)
class Options:
    """How the numbers are drawn."""

    seed: int = 0
    head_type: str = "Q4_0"
    down_transposed: bool = False
    easy: bool = False
    silent: float = 0.62
    silent_first: float = 0.93
    sample: int = 256

    def silent_target(self, layer: int, layers: int) -> float:
        return self.silent_first if layer < int(layers / 10 + 0.5) else self.silent


def model_entries(shape: Shape, vocab: Path | None) -> list[bytes]:
    """All metadata; the tokenizer is copied from `vocab` where its size fits, otherwise byte-level."""
    keys: dict[str, Any] = {
        "general.architecture": "smallthinker",
        "general.name": shape.name,
        "general.file_type": FILE_TYPE_MOSTLY_Q4_0,
        "general.alignment": ALIGNMENT,
        "smallthinker.block_count": shape.layers,
        "smallthinker.context_length": shape.context,
        "smallthinker.embedding_length": shape.d_model,
        "smallthinker.feed_forward_length": shape.d_ffn,
        "smallthinker.expert_feed_forward_length": shape.d_ffn,
        "smallthinker.expert_count": shape.experts,
        "smallthinker.expert_used_count": shape.experts_used,
        "smallthinker.expert_gating_func": {"softmax": 1, "sigmoid": 2}[shape.gating],
        "smallthinker.attention.head_count": shape.heads,
        "smallthinker.attention.head_count_kv": shape.kv_heads,
        "smallthinker.attention.key_length": shape.head_dim,
        "smallthinker.attention.value_length": shape.head_dim,
        "smallthinker.attention.layer_norm_rms_epsilon": float(shape.rms_eps),
        "smallthinker.rope.freq_base": float(shape.rope_theta),
    }
    if shape.hybrid:
        keys["smallthinker.attention.sliding_window"] = shape.window
    entries = [gguf_entry(key, value) for key, value in keys.items()]
    if vocab is not None and vocab.exists():
        tokens, tokenizer = vocabulary_entries(vocab)
        if tokens == shape.vocab_size:
            return entries + tokenizer
    return entries + byte_level_entries(shape.vocab_size)


# --- calibration: the forward pass of FORMATS section 2 on a sample ----------------------------------------


def bisect(function: Callable[[float], float], target: float, low: float, high: float) -> float:
    """x in [low, high] with function(x) = target, for a rising function."""
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < target else (low, middle)
    return (low + high) / 2


def top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """Boolean [tokens, experts]: which `k` have the largest logits."""
    chosen = np.zeros(logits.shape, bool)
    np.put_along_axis(chosen, np.argpartition(-logits, k - 1, axis=1)[:, :k], True, axis=1)
    return chosen


def rope(x: np.ndarray, theta: float) -> np.ndarray:
    """NEOX rotation of [tokens, heads, head_dim] at positions 0, 1, ..."""
    half = x.shape[2] // 2
    angle = np.arange(x.shape[0])[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = (f(angle).astype(np.float32)[:, None, :] for f in (np.cos, np.sin))
    a, b = x[..., :half], x[..., half:]
    return np.concatenate((a * cos - b * sin, a * sin + b * cos), axis=2)


class Sample:
    """Two sequences of random tokens that walk through the layers while those are being made.

    The first half of the rows of `x` [2 * tokens, d] calibrates, the second half only measures.
    """

    def __init__(self, shape: Shape, x: np.ndarray) -> None:
        self.shape, self.x, self.half = shape, x, x.shape[0] // 2

    def normed(self, weight: np.ndarray) -> np.ndarray:
        mean_square = np.mean(self.x.astype(np.float64) ** 2, axis=1, keepdims=True)
        return (self.x / np.sqrt(mean_square + self.shape.rms_eps)).astype(np.float32) * weight

    def attend(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Attention output [2 * tokens, heads * head_dim] before the output projection."""
        s, n = self.shape, self.half
        i, j = np.arange(n)[:, None], np.arange(n)[None, :]
        hidden = j > i
        if s.has_window(layer):
            hidden |= i - j >= s.window
        parts = []
        for rows in (slice(0, n), slice(n, 2 * n)):
            qs, ks, vs = (m[rows].reshape(n, -1, s.head_dim) for m in (q, k, v))
            if s.uses_rope(layer):
                qs, ks = rope(qs, s.rope_theta), rope(ks, s.rope_theta)
            group = s.heads // s.kv_heads
            ks, vs = np.repeat(ks, group, axis=1), np.repeat(vs, group, axis=1)
            scores = qs.transpose(1, 0, 2) @ ks.transpose(1, 2, 0) / math.sqrt(s.head_dim)
            scores[:, hidden] = -np.inf
            scores = np.exp(scores - scores.max(axis=2, keepdims=True))
            scores /= scores.sum(axis=2, keepdims=True)
            parts.append((scores @ vs.transpose(1, 0, 2)).transpose(1, 0, 2).reshape(n, -1))
        return np.concatenate(parts)

    def expert_weights(self, logits: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """[2 * tokens, experts] mixing weights, zero where not chosen."""
        if self.shape.gating == "softmax":
            raw = np.exp(logits - logits.max(axis=1, keepdims=True)) * chosen
        else:
            raw = chosen / (1 + np.exp(-logits))
        return raw / raw.sum(axis=1, keepdims=True)


@dataclass
class LayerStats:
    """What the second sequence showed in one layer; shares are of tokens (use) or of neurons (silent)."""

    layer: int
    silent: float
    hot_use: float
    cold_use: float
    rms: float


class Builder:
    """Makes, calibrates and writes one model, tensor by tensor."""

    def __init__(self, shape: Shape, options: Options, stream: GGUFStream) -> None:
        self.shape, self.options, self.stream = shape, options, stream
        self.source = WeightSource(options.seed)
        self.sd = 1 / math.sqrt(shape.d_model)
        self.layer_variance = min(0.3, RESIDUAL_GROWTH / 1.25 / shape.layers) * EMBEDDING_SD**2
        self.hot_count = max(1, round(HOT_SHARE * shape.experts))
        self.constant = CONSTANT

    def norm_weight(self) -> np.ndarray:
        weight = (1 + 0.1 * self.source.rng.standard_normal(self.shape.d_model)).astype(np.float32)
        weight[:BLOCK] = 1
        return weight

    def embedding(self, name: str, *, constant: bool) -> None:
        """Writes token_embd or output in chunks; the first channels constant where asked."""
        s = self.shape
        kind = next(tensor.type for tensor in self.stream.tensors if tensor.name == name)

        def chunks() -> Iterator[np.ndarray]:
            for start in range(0, s.vocab_size, 8192):
                rows = min(8192, s.vocab_size - start)
                if kind == "Q6_K":
                    blocks = self.source.q6_k(rows, s.d_model, EMBEDDING_SD)
                    if constant:
                        self.constant = set_constant_q6_k(blocks[:, 0], CONSTANT)
                else:
                    blocks = self.source.q4_0(rows, s.d_model, EMBEDDING_SD)
                    if constant:
                        self.constant = set_constant_q4_0(blocks[:, 0], CONSTANT)
                yield blocks

        self.stream.write(name, chunks())

    def sample(self, path: Path) -> Sample:
        """Embeddings of random tokens, read back from the file that is being written."""
        s = self.shape
        tensor = self.stream.tensors[0]
        self.stream.file.flush()
        row = tensor.nbytes // s.vocab_size
        start = self.stream.data_start + self.stream.offsets[tensor.name]
        table = np.memmap(path, np.uint8, "r", start, (s.vocab_size, row))
        ids = self.source.rng.integers(0, s.vocab_size, 2 * self.options.sample)
        if tensor.type == "Q6_K":
            x = dequantize_q6_k(table[ids].reshape(len(ids), -1, 210))
        else:
            x = dequantize_q4_0(table[ids].reshape(len(ids), -1, 18))
        return Sample(s, x)

    def router(self, x: np.ndarray, half: int, hot: np.ndarray) -> np.ndarray:
        """Router matrix [experts, d] whose constant channels hold biases that give the wanted use."""
        s = self.shape
        weight = self.source.rng.standard_normal((s.experts, s.d_model)).astype(np.float32)
        weight[:, :BLOCK] = 0
        logits = x[:half] @ weight.T
        weight /= np.float32(logits.std(axis=0).mean())
        logits = x[:half] @ weight.T
        mean = logits.mean(axis=0)
        jitter = HOT_JITTER * self.source.rng.standard_normal(s.experts)
        centred = logits - mean + jitter

        def use(offset: float) -> float:
            return float(top_k(centred + offset * hot, s.experts_used)[:, hot].mean())

        ceiling = min(1.0, s.experts_used / self.hot_count)
        offset = EASY_OFFSET if self.options.easy else bisect(use, min(s.hot_use, 0.98 * ceiling), -4.0, 12.0)
        weight[:, :BLOCK] = ((jitter - mean + offset * hot) / (BLOCK * self.constant))[:, None]
        return weight

    def gate_bias(self, layer: int, h: np.ndarray) -> float:
        """Weight on the constant channels of every gate row that silences the wanted share of neurons.

        For a random row the gate of a token is normal with sd |h| * sd around bias * sum of h's constants.
        """
        reach = (BLOCK * h[:, 0] / np.linalg.norm(h[:, BLOCK:], axis=1) / self.sd).astype(np.float64)
        cdf = NormalDist().cdf
        target = self.options.silent_target(layer, self.shape.layers)
        return -bisect(lambda b: float(np.mean([cdf(b * r) for r in reach])), target, -8.0, 8.0)

    def layer(self, layer: int, sample: Sample) -> LayerStats:
        """Writes the tensors of one layer and moves the sample through it."""
        s, half, write = self.shape, sample.half, self.stream.write
        blk = f"blk.{layer}."
        attn_norm, ffn_norm = self.norm_weight(), self.norm_weight()
        write(blk + "attn_norm.weight", attn_norm)
        write(blk + "ffn_norm.weight", ffn_norm)
        hot = np.zeros(s.experts, bool)
        hot[self.source.rng.choice(s.experts, self.hot_count, replace=False)] = True
        router = self.router(sample.x, half, hot)
        write(blk + "ffn_gate_inp.weight", router)
        logits = sample.x @ router.T
        chosen = top_k(logits, s.experts_used)
        mix = sample.expert_weights(logits, chosen)

        self.attention(layer, sample, attn_norm)
        h = sample.normed(ffn_norm)
        output, silent = self.experts(layer, h, half, mix)
        sample.x = sample.x + output
        measured = chosen[half:]
        cold_use = float(measured[:, ~hot].mean()) if not hot.all() else 0.0
        rms = float(np.sqrt(np.mean(sample.x**2)))
        return LayerStats(layer, silent, float(measured[:, hot].mean()), cold_use, rms)

    def attention(self, layer: int, sample: Sample, norm: np.ndarray) -> None:
        s, half, blk = self.shape, sample.half, f"blk.{layer}."
        h = sample.normed(norm)
        projected = []
        widths = {"attn_q": s.heads, "attn_k": s.kv_heads, "attn_v": s.kv_heads}
        for name, heads in widths.items():
            sd = self.sd * (1 if name == "attn_v" else math.sqrt(SCORE_SD))
            blocks = self.source.q4_0(heads * s.head_dim, s.d_model, sd)
            self.stream.write(f"{blk}{name}.weight", blocks)
            projected.append(h @ dequantize_q4_0(blocks).T)
        mixed = sample.attend(layer, *projected)
        # Late positions set the scale: the first ones attend to few tokens and come out larger.
        late = mixed[half * 3 // 4 : half]
        sd = math.sqrt(0.25 * self.layer_variance / float(np.mean(np.sum(late**2, axis=1))))
        blocks = self.source.q4_0(s.d_model, s.heads * s.head_dim, sd)
        set_constant_q4_0(blocks[:BLOCK], 0.0)
        self.stream.write(blk + "attn_output.weight", blocks)
        sample.x = sample.x + mixed @ dequantize_q4_0(blocks).T

    def experts(self, layer: int, h: np.ndarray, half: int, mix: np.ndarray) -> tuple[np.ndarray, float]:
        """Writes gate, up and down; (their output [2 * tokens, d], share of silent neurons measured)."""
        s, blk = self.shape, f"blk.{layer}."
        gate = self.source.q4_0(s.experts * s.d_ffn, s.d_model, self.sd)
        set_constant_q4_0(gate[:, 0], self.gate_bias(layer, h[:half]))
        up = self.source.q4_0(s.experts * s.d_ffn, s.d_model, self.sd)
        self.stream.write(blk + "ffn_gate_exps.weight", gate)
        self.stream.write(blk + "ffn_up_exps.weight", up)

        active, silent, seen = [], 0, 0
        power = np.zeros(h.shape[0])
        for expert in range(s.experts):
            rows = np.flatnonzero(mix[:, expert])
            neurons = slice(expert * s.d_ffn, (expert + 1) * s.d_ffn)
            g = h[rows] @ dequantize_q4_0(gate[neurons]).T
            u = h[rows] @ dequantize_q4_0(up[neurons]).T
            silent += int((g[rows >= half] <= 0).sum())
            seen += g[rows >= half].size
            a = np.maximum(g, 0) * u * mix[rows, expert, None]
            power[rows] += np.sum(a.astype(np.float64) ** 2, axis=1)
            active.append((rows, a.astype(np.float32)))
        del gate, up

        sd = math.sqrt(self.layer_variance / power[:half].mean())
        output = np.zeros(h.shape, np.float32)

        def chunks() -> Iterator[np.ndarray]:
            for rows, a in active:
                if self.options.down_transposed:
                    blocks = self.source.q4_0(s.d_ffn, s.d_model, sd)
                    set_constant_q4_0(blocks[:, 0], 0.0)
                    output[rows] += a @ dequantize_q4_0(blocks)
                else:
                    blocks = self.source.q4_0(s.d_model, s.d_ffn, sd)
                    set_constant_q4_0(blocks[:BLOCK], 0.0)
                    output[rows] += a @ dequantize_q4_0(blocks).T
                yield blocks

        self.stream.write(blk + "ffn_down_exps.weight", chunks())
        return output, silent / max(1, seen)

    def output_norm(self) -> np.ndarray:
        """Random signs, so that a tied head does not simply repeat the last token; logits of a useful width."""
        width = 0.8 * math.sqrt(2 * math.log(self.shape.vocab_size))
        scale = width / (EMBEDDING_SD * math.sqrt(self.shape.d_model))
        signs = self.source.rng.choice([-1.0, 1.0], self.shape.d_model)
        signs[:BLOCK] = 1
        return (scale * signs * self.norm_weight()).astype(np.float32)


def tensor_table(shape: Shape, options: Options) -> list[Tensor]:
    """Every tensor in the order in which it is written."""
    s, d, f, e = shape, shape.d_model, shape.d_ffn, shape.experts
    query, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    embedding = Tensor("token_embd.weight", options.head_type if s.tied else "Q4_0", (d, s.vocab_size))
    tensors = [embedding]
    for layer in range(s.layers):
        blk = f"blk.{layer}."
        tensors += [
            Tensor(blk + "attn_norm.weight", "F32", (d,)),
            Tensor(blk + "ffn_norm.weight", "F32", (d,)),
            Tensor(blk + "ffn_gate_inp.weight", "F32", (d, e)),
            Tensor(blk + "attn_q.weight", "Q4_0", (d, query)),
            Tensor(blk + "attn_k.weight", "Q4_0", (d, kv)),
            Tensor(blk + "attn_v.weight", "Q4_0", (d, kv)),
            Tensor(blk + "attn_output.weight", "Q4_0", (query, d)),
            Tensor(blk + "ffn_gate_exps.weight", "Q4_0", (d, f, e)),
            Tensor(blk + "ffn_up_exps.weight", "Q4_0", (d, f, e)),
            Tensor(blk + "ffn_down_exps.weight", "Q4_0", (d, f, e) if options.down_transposed else (f, d, e)),
        ]
    tensors.append(Tensor("output_norm.weight", "F32", (d,)))
    if not s.tied:
        tensors.append(Tensor("output.weight", options.head_type, (d, s.vocab_size)))
    return tensors


def check(shape: Shape, options: Options) -> None:
    """Raises ValueError for a shape that cannot be written or calibrated."""
    s = shape
    for label, width in (
        ("d-model", s.d_model),
        ("d-ffn", s.d_ffn),
        ("heads x head-dim", s.heads * s.head_dim),
    ):
        if width % BLOCK or width < BLOCK:
            raise ValueError(f"{label} must be a multiple of {BLOCK}, not {width}")
    if s.d_model < 2 * BLOCK:
        raise ValueError(f"d-model must be at least {2 * BLOCK}: {BLOCK} channels are held constant")
    if options.head_type == "Q6_K" and s.d_model % SUPER:
        raise ValueError(f"a Q6_K head needs a d-model that is a multiple of {SUPER}")
    if s.layers < 1 or s.kv_heads < 1 or s.heads % s.kv_heads:
        raise ValueError("layers must be positive and kv-heads must divide heads")
    if s.head_dim % 2 or not 1 <= s.experts_used <= s.experts:
        raise ValueError("head-dim must be even and experts-used from 1 to experts")
    if options.down_transposed and s.d_model == s.d_ffn:
        raise ValueError("a transposed down is recognised by its shape: d-ffn must differ from d-model")
    if options.sample < 8 or not (0 < options.silent < 1 and 0 < options.silent_first < 1):
        raise ValueError("sample must be at least 8, silent shares between 0 and 1")


def make(
    path: Path, shape: Shape, options: Options, vocab: Path | None, report: Callable[[str], None]
) -> dict[str, Any]:
    """Writes the model (to a temporary name, then renamed) and returns the measured statistics."""
    check(shape, options)
    started = time.monotonic()
    temporary = path.with_name(path.name + ".part")
    statistics: list[LayerStats] = []
    try:
        with open(temporary, "wb", buffering=1 << 20) as file:
            stream = GGUFStream(file, model_entries(shape, vocab), tensor_table(shape, options))
            report(f"{shape.name}: {shape.layers} layers, {stream.total / 1e9:.2f} GB")
            builder = Builder(shape, options, stream)
            builder.embedding("token_embd.weight", constant=True)
            sample = builder.sample(temporary)
            report("layer  silent  hot use  cold use  residual rms")
            for layer in range(shape.layers):
                stats = builder.layer(layer, sample)
                statistics.append(stats)
                report(
                    f"{layer:5d}  {stats.silent:6.3f}  {stats.hot_use:7.3f}  {stats.cold_use:8.3f}  {stats.rms:12.4f}"
                )
            stream.write("output_norm.weight", builder.output_norm())
            if not shape.tied:
                builder.embedding("output.weight", constant=False)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    silent, hot, cold = (
        float(np.mean([getattr(s, key) for s in statistics])) for key in ("silent", "hot_use", "cold_use")
    )
    report(
        f"mean of the layers: silent {silent:.3f}, {builder.hot_count} hot experts used by {hot:.3f} of tokens, "
        f"the others by {cold:.3f}; {time.monotonic() - started:.0f} s"
    )
    return {
        "shape": asdict(shape),
        "options": asdict(options),
        "hot_experts": builder.hot_count,
        "silent": silent,
        "hot_use": hot,
        "cold_use": cold,
        "layers": [asdict(s) for s in statistics],
    }


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("preset", choices=sorted(PRESETS))
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="GGUF file to write")
    add("--seed", type=int, default=0)
    add("--head", choices=("q4_0", "q6_k"), default="q4_0", help="type of the LM head (tied: the embedding)")
    add("--down", choices=("normal", "transposed"), default="normal", help="layout of ffn_down_exps")
    add(
        "--style",
        choices=("default", "easy"),
        default="default",
        help="easy: hot experts 2.6 sd above others",
    )
    add("--silent", type=float, default=0.62, help="share of neurons that ReLU silences (default 0.62)")
    add("--silent-first", type=float, default=0.93, help="the same in the first tenth of the layers (0.93)")
    add("--sample", type=int, default=256, help="random tokens to calibrate on, and as many to measure on")
    add("--vocab", type=Path, default=DEFAULT_VOCAB, help="GGUF whose tokenizer is copied; else byte-level")
    add("--stats", type=Path, metavar="FILE", help="also write the measured statistics as JSON")
    add("--hot-use", type=float, help="share of tokens that use a hot expert")
    add("--tied", action=argparse.BooleanOptionalAction, default=None, help="the embedding is the LM head")
    add("--hybrid", action=argparse.BooleanOptionalAction, default=None, help="NoPE and window layers")
    add("--gating", choices=("sigmoid", "softmax"))
    names = ("layers", "d-model", "heads", "kv-heads", "head-dim", "experts", "experts-used", "d-ffn")
    for name in (*names, "vocab-size", "context", "window"):
        add("--" + name, type=int)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    fields = Shape.__dataclass_fields__
    given = {key: value for key, value in vars(args).items() if key in fields and value is not None}
    shape = replace(PRESETS[args.preset], **given)
    options = Options(
        seed=args.seed,
        head_type=args.head.upper(),
        down_transposed=args.down == "transposed",
        easy=args.style == "easy",
        silent=args.silent,
        silent_first=args.silent_first,
        sample=args.sample,
    )
    try:
        statistics = make(args.output, shape, options, args.vocab, lambda line: print(line, flush=True))
    except (ValueError, OSError) as error:
        print(f"make_synthetic: {error}", file=sys.stderr)
        return 1
    if args.stats:
        args.stats.write_text(json.dumps(statistics, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
