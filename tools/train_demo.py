"""Trains the embedded demo model (docs/demo-model.md) and writes it as a Hugging Face checkpoint folder.

    python tools/train_demo.py --out DIR [--minutes 25] [--seed 0]

Needs the [train] extra. Data comes from demo_grammar.py; `smallthinker-edge convert` makes the GGUF that ships.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import struct
import time
from collections.abc import Iterator

import demo_grammar
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

D, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, USED, FFN, PERIOD = 256, 4, 2, 64, 8, 2, 128, 4
WINDOW, CONTEXT, THETA, EPS = 4096, 2048, 10000.0, 1e-6
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(vocab_size: int, seed: int) -> Tokenizer:
    """Byte-level BPE over sentences and answers of the grammar, with Qwen2's pre-tokeniser."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(seed)
    text = ("\n".join(demo_grammar.example(rng)) for _ in range(30000))
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    ))  # fmt: skip
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer


def fake_q4_0(w: torch.Tensor) -> torch.Tensor:
    """The weights as Q4_0 would store them (d = v / -8, v of largest magnitude); gradients pass straight through."""
    blocks = w.detach().reshape(-1, 32)
    v = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    d = v / -8
    q = torch.where(
        d == 0,
        torch.full_like(blocks, 8.0),
        (blocks / torch.where(d == 0, torch.ones_like(d), d) + 8.5).floor().clamp(0, 15),
    )
    return w + (((q - 8) * d.half().float()).reshape(w.shape) - w).detach()


class Linear(nn.Module):
    """A bias-free matrix that can pretend to be Q4_0. weight: [..., out, in]."""

    quantised = False

    def __init__(self, *shape: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape) * scale / math.sqrt(shape[-1]))

    def matrix(self) -> torch.Tensor:
        return fake_q4_0(self.weight) if Linear.quantised else self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.matrix())


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def rotate(x: torch.Tensor) -> torch.Tensor:
    """RoPE, halves rotated. x: [B, heads, T, head_dim]."""
    half = HEAD_DIM // 2
    angle = torch.arange(x.shape[2])[:, None] * THETA ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class Layer(nn.Module):
    def __init__(self, index: int, layers: int) -> None:
        super().__init__()
        small = 1 / math.sqrt(2 * layers)
        self.rope = index % PERIOD != 0
        self.attn_norm, self.ffn_norm = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))
        self.router = nn.Parameter(torch.randn(EXPERTS, D) / math.sqrt(D))
        self.q, self.k, self.v = (Linear(n * HEAD_DIM, D) for n in (HEADS, KV_HEADS, KV_HEADS))
        self.o = Linear(D, HEADS * HEAD_DIM, scale=small)
        self.gate, self.up = Linear(EXPERTS, FFN, D), Linear(EXPERTS, FFN, D)
        self.down = Linear(EXPERTS, D, FFN, scale=small)

    def forward(self, x: torch.Tensor, usage: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [B, T, D] -> (x, load-balance loss). usage gets this layer's share of silent neurons."""
        b, t, _ = x.shape
        logits = F.linear(x, self.router)  # before attention, on the raw residual
        h = rms_norm(x, self.attn_norm)
        q, k, v = (m(h).view(b, t, -1, HEAD_DIM).transpose(1, 2) for m in (self.q, self.k, self.v))
        if self.rope:
            q, k = rotate(q), rotate(k)
        k, v = (m.repeat_interleave(HEADS // KV_HEADS, 1) for m in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, -1))
        top, chosen = logits.reshape(-1, EXPERTS).topk(USED)
        weight = top.sigmoid()
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=6.103515625e-5)
        y, silent = self.experts(rms_norm(x, self.ffn_norm).reshape(-1, D), chosen, weight)
        usage.append(silent)
        # Load balance in groups of eight sequences: a topic may have its own experts, the mixture may not.
        group = max(1, b // 8)
        picked = (
            torch.zeros(b * t, EXPERTS)
            .scatter_(1, chosen, 1.0)[: group * (b // group) * t]
            .view(b // group, -1, EXPERTS)
        )
        share = logits.sigmoid().reshape(-1, EXPERTS)[: picked.shape[0] * picked.shape[1]].view_as(picked)
        share = share / share.sum(-1, keepdim=True)
        balance = (picked.mean(1) / USED * share.mean(1)).sum(-1).mean() * EXPERTS
        return x + y.view(b, t, D), balance

    def experts(self, h: torch.Tensor, chosen: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, silent = torch.zeros_like(h), []
        gate, up, down = self.gate.matrix(), self.up.matrix(), self.down.matrix()
        for e in range(EXPERTS):
            rows, slot = (chosen == e).nonzero(as_tuple=True)
            if len(rows) == 0:
                continue
            inputs = h[rows]
            g = F.relu(F.linear(inputs, gate[e]))
            silent.append((g == 0).float().mean().detach())
            out = F.linear(g * F.linear(inputs, up[e]), down[e]) * weight[rows, slot, None]
            y = y.index_add(0, rows, out)
        return y, torch.stack(silent).mean()


class Model(nn.Module):
    def __init__(self, vocab_size: int, layers: int) -> None:
        super().__init__()
        self.embed = Linear(vocab_size, D)
        self.layers = nn.ModuleList(Layer(i, layers) for i in range(layers))
        self.norm = nn.Parameter(torch.ones(D))

    def forward(self, ids: torch.Tensor, usage: list[torch.Tensor] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """ids: [B, T] -> (logits [B, T, V], load-balance loss)."""
        usage = [] if usage is None else usage
        matrix = self.embed.matrix()
        x = F.embedding(ids, matrix) * 1.0
        balance = torch.zeros(())
        for layer in self.layers:
            x, loss = layer(x, usage)
            balance = balance + loss / len(self.layers)
        return F.linear(rms_norm(x, self.norm), matrix), balance


def make_batches(tokenizer: Tokenizer, rng: random.Random, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids [B, T], loss weights of the next token [B, T]): 1 on the answer, 0.1 on the sentence.

    Sentences of like length share a batch, so that little of it is padding.
    """
    while True:
        drawn = []
        for _ in range(16 * size):
            sentence, answer = demo_grammar.example(rng)
            prompt = tokenizer.encode(demo_grammar.chat(sentence)).ids
            rest = tokenizer.encode(answer + "<|im_end|>").ids
            drawn.append((prompt + rest, [0.1] * (len(prompt) - 1) + [1.0] * len(rest) + [0.0]))
        drawn.sort(key=lambda pair: len(pair[0]))
        batches = [drawn[i : i + size] for i in range(0, len(drawn), size)]
        rng.shuffle(batches)
        for batch in batches:
            longest = max(len(row) for row, _ in batch)
            ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in batch])
            yield ids, torch.tensor([w + [0.0] * (longest - len(w)) for _, w in batch])


@torch.no_grad()
def exact_match(model: Model, tokenizer: Tokenizer, pairs: list[tuple[str, str]]) -> float:
    """Share of pairs that greedy decoding answers to the letter. Teacher forcing decides the same: an answer is
    exact if and only if every next token of the right answer is the most likely one."""
    right = 0
    for sentence, answer in pairs:
        prompt = tokenizer.encode(demo_grammar.chat(sentence)).ids
        rest = tokenizer.encode(answer + "<|im_end|>").ids
        logits, _ = model(torch.tensor([prompt + rest]))
        right += logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == rest
    return right / len(pairs)


def named_tensors(model: Model) -> dict[str, torch.Tensor]:
    """The parameters by the released models' names."""
    tensors = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm}
    for i, layer in enumerate(model.layers):
        prefix = f"model.layers.{i}."
        tensors[prefix + "input_layernorm.weight"] = layer.attn_norm
        tensors[prefix + "post_attention_layernorm.weight"] = layer.ffn_norm
        tensors[prefix + "block_sparse_moe.primary_router.weight"] = layer.router
        for name in "qkvo":
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = getattr(layer, name).weight
        for e in range(EXPERTS):
            for name in ("gate", "up", "down"):
                tensors[f"{prefix}block_sparse_moe.experts.{e}.{name}.weight"] = getattr(layer, name).weight[e]
    return tensors


def write_checkpoint(model: Model, tokenizer: Tokenizer, out: str) -> None:
    """config.json, model.safetensors (bf16) and the tokenizer, as the released models have them."""
    os.makedirs(out, exist_ok=True)
    tensors = named_tensors(model)
    header, blobs, offset = {}, [], 0
    for name, tensor in tensors.items():
        raw = tensor.detach().to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(raw)],
        }
        blobs.append(raw)
        offset += len(raw)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(os.path.join(out, "model.safetensors.tmp"), "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded + b"".join(blobs))
    os.replace(os.path.join(out, "model.safetensors.tmp"), os.path.join(out, "model.safetensors"))
    layers = len(model.layers)
    layout = [int(i % PERIOD != 0) for i in range(layers)]
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    config = {
        "architectures": ["SmallThinkerForCausalLM"], "model_type": "smallthinker", "num_hidden_layers": layers,
        "hidden_size": D, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "moe_num_primary_experts": EXPERTS, "moe_num_active_primary_experts": USED, "moe_ffn_hidden_size": FFN,
        "moe_primary_router_apply_softmax": False, "rope_layout": layout, "rope_theta": THETA, "rope_scaling": None,
        "sliding_window_layout": layout, "sliding_window_size": WINDOW, "rms_norm_eps": EPS,
        "vocab_size": model.embed.weight.shape[0], "tie_word_embeddings": True, "max_position_embeddings": CONTEXT,
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": [ids["<|endoftext|>"], ids["<|im_end|>"]],
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    settings = {"add_bos_token": False, "chat_template": TEMPLATE, "tokenizer_class": "Qwen2Tokenizer"}
    for name, content in (
        ("config", config),
        ("generation_config", generation),
        ("tokenizer_config", settings),
    ):
        with open(os.path.join(out, name + ".json"), "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
    tokenizer.save(os.path.join(out, "tokenizer.json"))


def read_checkpoint(model: Model, folder: str) -> Tokenizer:
    """Fills the model with what write_checkpoint() wrote, and returns its tokenizer."""
    with open(os.path.join(folder, "model.safetensors"), "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        data = file.read()
    parameters = named_tensors(model)
    with torch.no_grad():
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            bits = np.frombuffer(data[start:end], np.int16).copy()
            parameters[name].copy_(torch.from_numpy(bits).view(torch.bfloat16).view(entry["shape"]))
    return Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rng = random.Random(args.seed)
    model = Model(args.vocab, args.layers)
    tokenizer = read_checkpoint(model, args.init) if args.init else train_tokenizer(args.vocab, args.seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    pairs = demo_grammar.held_out_set(1000)
    known = random.Random("known")
    seen = [demo_grammar.example(known) for _ in range(200)]
    batches = make_batches(tokenizer, rng, args.batch)
    start = saved = time.monotonic()
    step = tokens = 0
    while (done := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        Linear.quantised = done > 0.7  # the last part trains what will ship
        rate = args.rate * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        ids, weights = next(batches)
        logits, balance = model(ids)
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, args.vocab), ids[:, 1:].reshape(-1), reduction="none")
        loss = (loss * weights[:, :-1].reshape(-1)).sum() / weights.sum()
        optimiser.zero_grad()
        (loss + args.balance * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step, tokens = step + 1, tokens + ids.numel()
        if step % 50 == 0:
            speed = tokens / (time.monotonic() - start)
            print(
                f"{done:.3f} step {step} loss {loss.item():.4f} balance {balance.item():.3f} {speed:.0f} tok/s",
                flush=True,
            )
        if time.monotonic() - saved > 120:
            saved = time.monotonic()
            write_checkpoint(model, tokenizer, args.out)
            known_now, new_now = (exact_match(model, tokenizer, some) for some in (seen, pairs[:200]))
            print(f"  seen {known_now:.3f} held out {new_now:.3f}", flush=True)
    write_checkpoint(model, tokenizer, args.out)
    for quantised in (False, True):
        Linear.quantised = quantised
        print(f"{'Q4_0' if quantised else 'float'}: seen {exact_match(model, tokenizer, seen):.4f} "
              f"held out {exact_match(model, tokenizer, pairs):.4f}")  # fmt: skip
    usage: list[torch.Tensor] = []
    model(next(batches)[0], usage)
    print(
        "silent neurons per layer:",
        np.round([float(u) for u in usage], 3).tolist(),
        f"steps {step} tokens {tokens}",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder of the checkpoint")
    parser.add_argument("--init", help="folder of an earlier checkpoint to go on from")
    parser.add_argument("--minutes", type=float, default=25, help="wall time of training (default 25)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=1024, help="tokens, special ones included")
    parser.add_argument("--batch", type=int, default=64, help="sentences a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--balance", type=float, default=0.02, help="weight of the load-balance loss")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())
