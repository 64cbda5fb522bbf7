"""Trains the embedded home model (docs/home-model.md) and writes it as a Hugging Face checkpoint folder.

    python tools/home_model/train.py --out DIR --slurp devel.jsonl [--minutes 60] [--workers 2] [--resume]

Needs the [train] extra. Data comes from mixture.py; `smallthinker-edge convert` makes the GGUF that ships.
Workers are processes of one thread each that average their gradients: on small matrices that is twice as fast as one
process of two threads, which would wait for each other at every operation.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import slurp
import torch
import torch.distributed as dist
import torch.nn.functional as F
from augment import Example
from chat_form import END, SPECIAL, TEMPLATE, prompt
from mixture import Mixture
from network import Matrix, Model, Shape, write_checkpoint
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS_ALONE = r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+|\s+"


def train_tokenizer(vocab_size: int, mixture: Mixture) -> Tokenizer:
    """Byte-level BPE over sentences and answers.

    It is trained on words without the space or quote before them, so that no merge joins the two, and used with
    Qwen2's pre-tokeniser: a name then has the same tokens in the sentence, after a space, and in the JSON, after a
    quote, and the model can copy it token by token.
    """
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS_ALONE), "isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    text = (content for example in islice(mixture, 60000) for _, content in (*example.turns, ("", example.answer)))
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    ))  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"), byte_level]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer


Row = tuple[list[int], int]  # token ids of prompt and answer, and how many belong to the prompt


def encode(tokenizer: Tokenizer, examples: list[Example]) -> list[Row]:
    prompts = tokenizer.encode_batch([prompt(example.turns) for example in examples])
    answers = tokenizer.encode_batch([example.answer + END for example in examples])
    return [(p.ids + a.ids, len(p.ids)) for p, a in zip(prompts, answers, strict=True)]


def batches_of(rows: list[Row], tokens: int) -> list[list[Row]]:
    """Rows of like length together, at most `tokens` a batch with padding, so that little of it is padding."""
    batches: list[list[Row]] = [[]]
    for row in sorted(rows, key=lambda row: -len(row[0])):
        if batches[-1] and padded_length(batches[-1][0]) * (len(batches[-1]) + 1) > tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def padded_length(row: Row) -> int:
    """In steps, so that batches have few different sizes (see network.ROWS)."""
    return -(-len(row[0]) // 4) * 4


def tensors(batch: list[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids [B, T], rows that predict a token of an answer bool [B, T], those tokens [n])."""
    longest = padded_length(max(batch, key=lambda row: len(row[0])))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in batch])
    position = torch.arange(longest)
    starts, ends = (torch.tensor(x)[:, None] for x in zip(*((n - 1, len(row) - 1) for row, n in batch), strict=True))
    mask = (position >= starts) & (position < ends)
    return ids, mask, ids.roll(-1, 1)[mask]


def training_batches(tokenizer: Tokenizer, mixture: Mixture, tokens: int) -> Iterator[list[Row]]:
    """Endless batches."""
    examples = iter(mixture)
    while True:
        batches = batches_of(encode(tokenizer, list(islice(examples, 4096))), tokens)
        mixture.rng.shuffle(batches)
        yield from batches


@torch.no_grad()
def exact_match(model: Model, tokenizer: Tokenizer, examples: list[Example]) -> float:
    """Share of examples that greedy decoding answers to the letter. Teacher forcing decides the same: an answer is
    exact if and only if every next token of the right answer is the most likely one."""
    right = 0
    model.eval()
    for batch in batches_of(encode(tokenizer, examples), 8192):
        ids, mask, targets = tensors(batch)
        logits, _ = model(ids, mask)
        wrong = torch.zeros(ids.shape, dtype=torch.bool)
        wrong[mask] = logits.argmax(-1) != targets
        right += int((~wrong.any(1)).sum())
    model.train()
    return right / len(examples)


def orthogonalised(m: torch.Tensor) -> torch.Tensor:
    """Nearly the closest matrices with singular values of one. m: [n, r, c].

    Newton-Schulz iteration with the coefficients of Muon (K. Jordan, 2024), which reach 0.7 to 1.2 in five rounds.
    """
    tall = m.shape[1] > m.shape[2]
    x = m.transpose(1, 2) if tall else m
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(Matrix.compute)
    for _ in range(5):
        a = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.transpose(1, 2) if tall else x).to(m.dtype)


class Muon:
    """Momentum whose update is orthogonalised, for matrices (experts one by one). Workers share the matrices out."""

    def __init__(self, parameters: list[nn.Parameter], rank: int, workers: int) -> None:
        self.groups: dict[tuple[int, int], list[nn.Parameter]] = {}
        for p in parameters:
            self.groups.setdefault((p.shape[-2], p.shape[-1]), []).append(p)
        self.momentum = {shape: torch.zeros(self.count(ps), *shape) for shape, ps in self.groups.items()}
        self.rank, self.workers = rank, workers

    @staticmethod
    def count(parameters: list[nn.Parameter]) -> int:
        return sum(p.numel() // (p.shape[-2] * p.shape[-1]) for p in parameters)

    @torch.no_grad()
    def step(self, rate: float, decay: float) -> None:
        """Parameters must have the same gradient in every worker."""
        for shape, parameters in self.groups.items():
            grad = torch.cat([p.grad.view(-1, *shape) for p in parameters if p.grad is not None])
            momentum = self.momentum[shape].lerp_(grad, 0.05)
            update = torch.zeros_like(grad)
            share = slice(self.rank * len(grad) // self.workers, (self.rank + 1) * len(grad) // self.workers)
            update[share] = orthogonalised(grad[share].lerp(momentum[share], 0.95))
            if self.workers > 1:
                dist.all_reduce(update)
            scale = rate * math.sqrt(max(1.0, shape[0] / shape[1]))
            pieces = update.split([self.count([p]) for p in parameters])
            for p, piece in zip(parameters, pieces, strict=True):
                p.mul_(1 - rate * decay).sub_(piece.view_as(p), alpha=scale)


def average_gradients(parameters: list[nn.Parameter], done: float, workers: int) -> float:
    """Averages the workers' gradients in place; returns the mean of `done`, so that all follow the same schedule."""
    if workers == 1:
        return done
    flat = torch.cat([p.grad.view(-1) for p in parameters if p.grad is not None] + [torch.tensor([done])])
    dist.all_reduce(flat)
    flat /= workers
    offset = 0
    for p in parameters:
        if p.grad is not None:
            p.grad.copy_(flat[offset : offset + p.numel()].view_as(p))
            offset += p.numel()
    return float(flat[-1])


class Training:
    """One worker: the model, its optimisers and the schedule (warm up, stay, decay to zero)."""

    def __init__(self, args: argparse.Namespace, rank: int) -> None:
        torch.manual_seed(args.seed)
        torch.set_num_threads(1)
        Matrix.compute = torch.bfloat16 if args.bf16 else torch.float32
        self.args, self.rank = args, rank
        self.tokenizer = Tokenizer.from_file(os.path.join(args.out, "tokenizer.json"))
        shape = Shape(layers=args.layers, d_model=args.width, heads=args.width // Shape.head_dim, d_ffn=args.ffn,
                      vocab=args.vocab, dropout=args.dropout)  # fmt: skip
        self.model = Model(shape)
        matrices = [p for name, p in self.model.named_parameters() if p.ndim > 1 and name.startswith("layers.")]
        matrices = [p for p in matrices if p.shape[-2] != shape.experts]
        others = [p for p in self.model.parameters() if not any(p is m for m in matrices)]
        self.muon = Muon(matrices, rank, args.workers)
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
        self.step, self.tokens, self.before = 0, 0, 0.0
        if args.resume:
            self.load()
        self.start = time.monotonic()
        self.mixture = Mixture(f"{args.seed} {rank} {self.step}", args.slurp, args.held_out)

    def elapsed(self) -> float:
        """Seconds of training, those before --resume included."""
        return self.before + time.monotonic() - self.start

    def save(self) -> None:
        ids = [self.tokenizer.token_to_id(token) for token in SPECIAL]
        write_checkpoint(self.model, self.args.out, eos=ids[2], bos=ids[0], template=TEMPLATE)
        state = {
            "model": self.model.state_dict(), "adam": self.adam.state_dict(), "muon": self.muon.momentum,
            "counts": (self.step, self.tokens, self.elapsed()),
        }  # fmt: skip
        path = os.path.join(self.args.out, "state.pt")
        torch.save(state, path + ".tmp")
        os.replace(path + ".tmp", path)

    def load(self) -> None:
        state = torch.load(os.path.join(self.args.out, "state.pt"))
        self.model.load_state_dict(state["model"])
        self.adam.load_state_dict(state["adam"])
        self.muon.momentum = state["muon"]
        self.step, self.tokens, self.before = state["counts"]

    def update(self, batch: list[Row], done: float) -> tuple[float, float]:
        """One step of the optimisers; (loss, share of the time that all workers agree has passed)."""
        ids, mask, targets = tensors(batch)
        logits, balance = self.model(ids, mask)
        loss = F.cross_entropy(logits, targets)
        self.model.zero_grad()
        (loss + self.args.balance * balance).backward()
        parameters = list(self.model.parameters())
        done = average_gradients(parameters, done, self.args.workers)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        rate = min(1.0, (self.step + 1) / 50) * min(1.0, (1 - done) / self.args.decay)
        self.muon.step(self.args.rate * rate, 0.1)
        for group in self.adam.param_groups:
            group["lr"] = self.args.adam_rate * rate
        self.adam.step()
        self.step += 1
        self.tokens += ids.numel() * self.args.workers
        return float(loss.detach()), done

    def held_out(self) -> list[Example]:
        """People's sentences that training does not see, as they are."""
        spoken = slurp.read_slurp(self.args.slurp) if self.args.slurp else []
        kept = [s.sentence for s in spoken if slurp.is_held_out(s.sentence.kind, self.args.held_out)]
        return [Example((("user", sentence.text),), sentence.answer) for sentence in kept]

    def run(self) -> None:
        seen = list(islice(Mixture("seen", self.args.slurp, self.args.held_out), 400))
        held_out = self.held_out()
        done, saved, losses = 0.0, self.elapsed(), []
        for batch in training_batches(self.tokenizer, self.mixture, self.args.tokens):
            done = self.elapsed() / (60 * self.args.minutes)
            Matrix.quantised = self.step > 0 and done > 1 - self.args.quantised
            loss, done = self.update(batch, min(done, 1.0))
            losses.append(loss)
            if self.rank == 0 and self.step % 50 == 0:
                print(f"{done:.3f} step {self.step} loss {np.mean(losses[-50:]):.4f} "
                      f"{self.tokens / self.elapsed():.0f} tok/s", flush=True)  # fmt: skip
            if self.rank == 0 and self.elapsed() - saved > self.args.save_every:
                saved = self.elapsed()
                self.save()
                now = [exact_match(self.model, self.tokenizer, some) for some in (seen, held_out)]
                print(f"  {saved:.0f} s: seen {now[0]:.3f} held out {now[1]:.3f}", flush=True)
            if done >= 1:
                break
        if self.rank == 0:
            self.save()
            self.report(seen, held_out)

    def report(self, seen: list[Example], held_out: list[Example]) -> None:
        for Matrix.quantised in (False, True):
            name = "Q4_0" if Matrix.quantised else "float"
            print(f"{name}: seen {exact_match(self.model, self.tokenizer, seen):.4f} "
                  f"held out {exact_match(self.model, self.tokenizer, held_out):.4f}")  # fmt: skip
        silence: list[float] = []
        ids, mask, _ = tensors(batches_of(encode(self.tokenizer, seen), 8192)[1])
        with torch.no_grad():
            self.model(ids, mask, silence)
        print("silent neurons per layer:", [round(share, 3) for share in silence])
        print(f"steps {self.step} tokens {self.tokens} seconds {self.elapsed():.0f}")


def worker(rank: int, args: argparse.Namespace, rendezvous: str) -> None:
    if args.workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=args.workers)
    Training(args, rank).run()
    if args.workers > 1:
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", required=True, help="folder of the checkpoint")
    parser.add_argument(
        "--slurp", type=Path, help="SLURP's devel.jsonl; without it, only our and Home Assistant's sentences"
    )
    parser.add_argument(
        "--held-out", type=int, default=slurp.HELD_OUT, help="percent of SLURP's wordings that training does not see"
    )
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16: for CPUs with AMX")
    parser.add_argument("--dropout", type=float, default=Shape.dropout)
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out; time counts on")
    parser.add_argument("--minutes", type=float, default=60, help="wall time of training (default 60)")
    parser.add_argument("--decay", type=float, default=0.4, help="last share of the time, with a falling rate")
    parser.add_argument("--quantised", type=float, default=0.2, help="last share of the time that pretends Q4_0")
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--width", type=int, default=Shape.d_model)
    parser.add_argument("--ffn", type=int, default=Shape.d_ffn)
    parser.add_argument("--vocab", type=int, default=Shape.vocab, help="tokens, special ones included")
    parser.add_argument("--tokens", type=int, default=5000, help="tokens a step and worker")
    parser.add_argument("--rate", type=float, default=0.02, help="peak learning rate of the matrices (Muon)")
    parser.add_argument("--adam-rate", type=float, default=3e-3, help="of embedding, routers and norms (AdamW)")
    parser.add_argument("--balance", type=float, default=0.02, help="weight of the routers' loss")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save-every", type=float, default=120, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    if not args.resume:
        train_tokenizer(args.vocab, Mixture(f"tokenizer {args.seed}", args.slurp, args.held_out)).save(
            os.path.join(args.out, "tokenizer.json")
        )
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = os.path.join(folder, "rendezvous")
        if args.workers == 1:
            worker(0, args, rendezvous)
        else:
            torch.multiprocessing.spawn(worker, (args, rendezvous), args.workers)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
