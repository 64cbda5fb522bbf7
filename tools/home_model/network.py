"""The home model in PyTorch: the forward pass of SmallThinker, pretended Q4_0, and the checkpoint folder.

Called by train.py. Knows nothing of the task or of how it is trained; the engine never imports it.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

WINDOW, CONTEXT, THETA, EPS = 4096, 2048, 10000.0, 1e-6
PERIOD = 4  # layers 0, 4, ... see everything and have no positions, the others have RoPE and a window
SMALLEST_SUM = 6.103515625e-5  # of expert weights, as the released models clamp it
ROWS = 128  # products of a size that was there before need no code made anew (oneDNN makes it for every size)
# Beyond about 16 a float32 sigmoid is 1, and a program that ranks experts by it (llama.cpp) finds only ties.
CALM_LOGIT = 8.0


@dataclass(frozen=True)
class Shape:
    """Sizes of the network."""

    layers: int = 6
    d_model: int = 256
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 8
    used: int = 2
    d_ffn: int = 128
    vocab: int = 4096
    dropout: float = 0.1  # of embeddings and of what every block adds, in training


def fake_q4_0(w: torch.Tensor) -> torch.Tensor:
    """The weights as Q4_0 would store them (d = v / -8, v of largest magnitude); gradients pass straight through."""
    blocks = w.detach().reshape(-1, 32)
    v = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    d = v / -8
    safe = torch.where(d == 0, torch.ones_like(d), d)
    q = (blocks / safe + 8.5).floor_().clamp_(0, 15).sub_(8).mul_(d.half().float())
    return w + (q.view_as(w) - w).detach()


class Matrix(nn.Module):
    """Weights [..., out, in] that can pretend to be Q4_0, and compute in another type."""

    quantised = False
    compute = torch.float32  # bfloat16 is five times as fast where the CPU has AMX, and slower than float32 elsewhere

    def __init__(self, *shape: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape) * std)

    def forward(self) -> torch.Tensor:
        return (fake_q4_0(self.weight) if Matrix.quantised else self.weight).to(Matrix.compute)


class Mask:
    """Dropout from one long random mask, read from a random place: a new one each time takes longer than a layer."""

    SIZE = 1 << 23
    masks: ClassVar[dict[tuple[float, torch.dtype], torch.Tensor]] = {}

    @staticmethod
    def dropped(x: torch.Tensor, p: float) -> torch.Tensor:
        if p == 0:
            return x
        if (p, x.dtype) not in Mask.masks:
            Mask.masks[p, x.dtype] = (torch.rand(Mask.SIZE) >= p).to(x.dtype) / (1 - p)
        start = int(torch.randint(Mask.SIZE - x.numel(), ()))
        return x * Mask.masks[p, x.dtype][start : start + x.numel()].view(x.shape)


class Permute(torch.autograd.Function):
    """x[index] where index is a permutation of the rows: its gradient is a gather too, not a slow scatter."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class Rotate(torch.autograd.Function):
    """RoPE, halves rotated. x: [..., T, head_dim]; cos, sin: [T, head_dim / 2]. The gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return Rotate.turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return Rotate.turned(grad, cos, -sin), None, None

    @staticmethod
    def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        y = torch.empty(x.shape, dtype=x.dtype)
        (a, b), (u, v) = x.chunk(2, -1), y.chunk(2, -1)
        torch.mul(a, cos, out=u).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=v).addcmul_(a, sin)
        return y


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in as few passes as its gradient allows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = (length.square_() / x.shape[-1] + EPS).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(Matrix.compute)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        grad = grad.float()
        unit = x * scale
        product = grad * unit
        projection = (product @ weight)[..., None] / -x.shape[-1]
        to_x = (grad * weight).addcmul_(unit, projection).mul_(scale)
        return to_x, product.reshape(-1, x.shape[-1]).sum(0)


def rope_tables(tokens: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    half = head_dim // 2
    angle = torch.arange(tokens)[:, None] * THETA ** (-torch.arange(half) / half)
    return angle.cos(), angle.sin()


class Layer(nn.Module):
    def __init__(self, index: int, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        d, hd = shape.d_model, shape.head_dim
        inner, small = 1 / math.sqrt(d), 1 / math.sqrt(2 * shape.layers)
        self.rope = index % PERIOD != 0
        self.attn_norm, self.ffn_norm = nn.Parameter(torch.ones(d)), nn.Parameter(torch.ones(d))
        self.router = nn.Parameter(torch.randn(shape.experts, d) * inner)
        self.q = Matrix(shape.heads * hd, d, std=inner)
        self.k, self.v = (Matrix(shape.kv_heads * hd, d, std=inner) for _ in range(2))
        self.o = Matrix(d, shape.heads * hd, std=inner * small)
        self.gate, self.up = (Matrix(shape.experts, shape.d_ffn, d, std=inner) for _ in range(2))
        self.down = Matrix(shape.experts, d, shape.d_ffn, std=small / math.sqrt(shape.d_ffn))

    def forward(self, x: torch.Tensor, tables: Any, silence: list[float] | None) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [B, T, D] -> (x, loss of the router: load balance, and logits that are too large)."""
        b, t, d = x.shape
        logits = F.linear(x, self.router).view(-1, self.shape.experts)  # before attention, on the raw residual
        top, chosen = logits.topk(self.shape.used)
        weight = top.sigmoid()
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=SMALLEST_SUM)
        x = x + self.dropped(self.attention(RMSNorm.apply(x, self.attn_norm), tables))
        h = RMSNorm.apply(x, self.ffn_norm).view(-1, d)
        x = x + self.dropped(self.mixture(h, chosen, weight.to(h.dtype), silence).view(b, t, d))
        return x, self.balance(logits, chosen, b) + 0.1 * F.relu(logits.abs() - CALM_LOGIT).square().mean()

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        return Mask.dropped(x, self.shape.dropout) if self.training else x

    def attention(self, h: torch.Tensor, tables: Any) -> torch.Tensor:
        """h: [B, T, D]. Written out: for short sequences this is faster on a CPU than the fused kernel."""
        b, t, _ = h.shape
        heads, kv_heads, hd = self.shape.heads, self.shape.kv_heads, self.shape.head_dim
        cos, sin, mask = tables
        qkv = F.linear(h, torch.cat([self.q() / math.sqrt(hd), self.k(), self.v()]))
        qk, v = qkv.view(b, t, -1, hd).transpose(1, 2).split([heads + kv_heads, kv_heads], 1)
        if self.rope:
            qk = Rotate.apply(qk, cos, sin)
        q, k = qk.split([heads, kv_heads], 1)
        q = q.reshape(b, kv_heads, -1, hd)  # [B, KV, heads per KV head * T, head_dim]
        scores = q @ k.transpose(-1, -2)
        scores = scores.view(b, heads, t, t).add_(mask).softmax(-1)
        y = (scores.view(b, kv_heads, -1, t) @ v).view(b, heads, t, hd)
        return F.linear(y.transpose(1, 2).reshape(b, t, -1), self.o())

    def mixture(
        self, h: torch.Tensor, chosen: torch.Tensor, weight: torch.Tensor, silence: list[float] | None
    ) -> torch.Tensor:
        """h: [N, D]; chosen, weight: [N, K]. Tokens are sorted by expert, so every expert is three dense products.

        An expert's rows are padded to a multiple of ROWS with rows that weigh nothing.
        """
        n, used = chosen.shape
        order = chosen.reshape(-1).argsort(stable=True)
        counts = torch.bincount(chosen.reshape(-1), minlength=self.shape.experts)
        padded = (counts + ROWS - 1) // ROWS * ROWS
        shift = (padded - counts).cumsum(0) - (padded - counts)  # of an expert's rows, by the padding before them
        place = torch.arange(n * used) + shift.repeat_interleave(counts)
        total = int(padded.sum())
        source = torch.zeros(total, dtype=torch.long).scatter_(0, place, order)
        real = torch.zeros(total, 1, dtype=h.dtype).index_fill_(0, place, 1.0)
        inverse = torch.empty_like(order).scatter_(0, order, place)
        inputs = Permute.apply(h[:, None].expand(n, used, -1).reshape(n * used, -1), source, inverse)
        share = (Permute.apply(weight.view(-1, 1), source, inverse) * real).split(padded.tolist())
        gate_up, down = torch.cat([self.gate(), self.up()], 1).unbind(), self.down().unbind()
        outputs, silent = [], 0.0
        for e, rows in enumerate(inputs.split(padded.tolist())):
            gate, up = F.linear(rows, gate_up[e]).chunk(2, -1)
            gate = F.relu(gate)
            if silence is not None:
                silent += float((gate[: int(counts[e])] == 0).float().mean(-1).sum()) / (n * used)
            outputs.append(F.linear(gate * up * share[e], down[e]))
        if silence is not None:
            silence.append(silent)
        return Permute.apply(torch.cat(outputs), inverse, source).view(n, used, -1).sum(1)

    def balance(self, logits: torch.Tensor, chosen: torch.Tensor, sequences: int) -> torch.Tensor:
        """Load balance in groups of eight sequences: a topic may have its own experts, the mixture may not."""
        groups = max(1, sequences // 8)
        rows = len(chosen) // sequences * (sequences // groups)  # of a group; a last incomplete group is left out
        picked = torch.zeros_like(logits).scatter_(1, chosen, 1.0)[: groups * rows]
        share = logits.sigmoid()[: groups * rows]
        share = share / share.sum(-1, keepdim=True)
        picked, share = (a.view(groups, rows, -1).mean(1) for a in (picked, share))
        return (picked / self.shape.used * share).sum(-1).mean() * self.shape.experts


class Model(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        # A wide embedding gives the router of layer 0 something to see; the narrow norm keeps the tied head calm.
        self.embed = Matrix(shape.vocab, shape.d_model, std=0.4)
        self.layers = nn.ModuleList(Layer(i, shape) for i in range(shape.layers))
        self.norm = nn.Parameter(torch.full((shape.d_model,), 0.25))
        self.tables: dict[int, Any] = {}

    def forward(
        self, ids: torch.Tensor, rows: torch.Tensor, silence: list[float] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """ids: [B, T], rows: bool [B, T] -> (logits of those rows [n, V], loss of the routers).

        silence: each layer adds the share of silent neurons in its chosen experts.
        """
        t = ids.shape[1]
        if t not in self.tables:
            mask = torch.full((t, t), -math.inf).triu(1)
            tables = (*rope_tables(t, self.shape.head_dim), mask)
            self.tables[t] = tuple(table.to(Matrix.compute) for table in tables)
        matrix = self.embed()
        x = F.embedding(ids, matrix).float()
        if self.training:
            x = Mask.dropped(x, self.shape.dropout)
        balance = torch.zeros(())
        for layer in self.layers:
            x, loss = layer(x, self.tables[t], silence)
            balance = balance + loss / len(self.layers)
        wanted = int(rows.sum())
        x = F.pad(x[rows], (0, 0, 0, -wanted % ROWS))
        return F.linear(RMSNorm.apply(x, self.norm), matrix)[:wanted].float(), balance


def named_tensors(model: Model) -> dict[str, torch.Tensor]:
    """The parameters by the released models' names."""
    tensors: dict[str, Any] = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm}
    for i, layer in enumerate(model.layers):
        prefix = f"model.layers.{i}."
        tensors[prefix + "input_layernorm.weight"] = layer.attn_norm
        tensors[prefix + "post_attention_layernorm.weight"] = layer.ffn_norm
        tensors[prefix + "block_sparse_moe.primary_router.weight"] = layer.router
        for name in "qkvo":
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = getattr(layer, name).weight
        for e in range(model.shape.experts):
            for name in ("gate", "up", "down"):
                tensors[f"{prefix}block_sparse_moe.experts.{e}.{name}.weight"] = getattr(layer, name).weight[e]
    return tensors


def write_checkpoint(model: Model, out: str, eos: int, bos: int, template: str) -> None:
    """config.json, model.safetensors (bf16) and the tokenizer's settings, as the released models have them."""
    os.makedirs(out, exist_ok=True)
    tensors = {name: t.detach().to(torch.bfloat16).contiguous() for name, t in named_tensors(model).items()}
    target = os.path.join(out, "model.safetensors")
    save_file(tensors, target + ".tmp")
    os.replace(target + ".tmp", target)
    shape = model.shape
    layout = [int(i % PERIOD != 0) for i in range(shape.layers)]
    generation = {"bos_token_id": bos, "eos_token_id": [bos, eos]}
    config = {
        "architectures": ["SmallThinkerForCausalLM"], "model_type": "smallthinker",
        "num_hidden_layers": shape.layers, "hidden_size": shape.d_model, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim, "moe_num_primary_experts": shape.experts,
        "moe_num_active_primary_experts": shape.used, "moe_ffn_hidden_size": shape.d_ffn,
        "moe_primary_router_apply_softmax": False, "rope_layout": layout, "rope_theta": THETA, "rope_scaling": None,
        "sliding_window_layout": layout, "sliding_window_size": WINDOW, "rms_norm_eps": EPS,
        "vocab_size": shape.vocab, "tie_word_embeddings": True, "max_position_embeddings": CONTEXT,
        "torch_dtype": "bfloat16", **generation,
    }  # fmt: skip
    settings = {"add_bos_token": False, "chat_template": template, "tokenizer_class": "Qwen2Tokenizer"}
    for stem, content in (("config", config), ("generation_config", generation), ("tokenizer_config", settings)):
        with open(os.path.join(out, stem + ".json"), "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
