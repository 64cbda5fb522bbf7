"""Trains a predictor of the LM head for a model from its own hidden states, and writes the model with it.

    python tools/models/train_lm_head_predictor.py MODEL.gguf -o OUT.gguf [--text FILE] [--inner 64] [--steps 4000]

score = W2 (W1 x) with x the head's input and K inner dimensions; a vocabulary row is computed where its score is above
a threshold (technical report, section 6.2; docs/context.md). With p the full head's probabilities, training minimises

    sum over rows of  p * softplus(-score) + cost * softplus(score),

whose optimum is score = log(p / cost): the probability lost against the rows computed, at `cost` a row. It starts from
the best approximation of rank K to those targets (reduced-rank regression on the states' covariance) and goes on with
Adagrad over the likely rows of each batch and a random share of the others. The threshold is then set on states that
training has not seen, by --agreement (how often the most likely token is kept) and --lost, and stored in the file.

Prints, on further states and with the engine itself: the share of rows computed, how often the most likely token is the
same, and the probability that is lost. Needs the [convert] extra (gguf) and memory for the head in float32.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from smallthinker_edge import SmallThinker
from smallthinker_edge.files.config import tensor_name
from smallthinker_edge.files.gguf import GGUFFile
from smallthinker_edge.files.packed import is_packed

Array = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int32]
SEQUENCE = 512
KEPT = 256  # likely rows of a state that are told apart; the others count as improbable
NEGATIVES = 16384  # rows of a step beside the likely ones
BATCH = 64
PREDICTOR, THRESHOLD = tensor_name("lm_head_profiler"), "smallthinker.lm_head_profiler.threshold"


@dataclass
class States:
    """What the head gets and gives: x [n, d], the KEPT most likely rows and their probabilities [n, KEPT], best first,
    and the log of the sum of exp(logit) [n]."""

    x: Array
    rows: npt.NDArray[np.int32]
    p: Array
    log_sum: Array

    def part(self, a: int, b: int) -> States:
        return States(self.x[a:b], self.rows[a:b], self.p[a:b], self.log_sum[a:b])


def read_tokens(model: SmallThinker, text: str | None, count: int, seed: int) -> Tokens:
    """[sequences, SEQUENCE] of a text, or random ones."""
    rng = np.random.default_rng(seed)
    if text is None:
        return rng.integers(0, model.config.vocab_size, (count // SEQUENCE, SEQUENCE), dtype=np.int32)
    ids = np.array(model.tokenize(Path(text).read_text(encoding="utf-8")), np.int32)
    sequences = ids[: len(ids) // SEQUENCE * SEQUENCE].reshape(-1, SEQUENCE)
    return rng.permutation(sequences)[: count // SEQUENCE]


def collect(model: SmallThinker, sequences: Tokens) -> States:
    """The states of all positions, by the engine."""
    parts: list[States] = []
    with model.session(SEQUENCE) as session:
        for ids in sequences:
            session.reset()
            x = np.empty((len(ids), model.config.d_model), np.float32)
            logits = session.decode(ids, all_logits=True, states=x)
            kept = min(KEPT, logits.shape[1])
            rows = np.argpartition(logits, -kept, axis=1)[:, -kept:].astype(np.int32)
            order = np.argsort(-np.take_along_axis(logits, rows, 1), axis=1)
            rows = np.take_along_axis(rows, order, 1)
            best = np.take_along_axis(logits, rows, 1)
            log_sum = best[:, 0] + np.log(np.exp(logits - best[:, :1]).sum(1))
            parts.append(States(x, rows, np.exp(best - log_sum[:, None]), log_sum))
    return States(*(np.concatenate([getattr(part, name) for part in parts]) for name in States.__dataclass_fields__))


def head_rows(path: str) -> Array:
    """The head [V, d] in float32."""
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    head = tensors.get(tensor_name("output"), tensors[tensor_name("token_embd")])
    return gguf.quants.dequantize(head.data, head.tensor_type).astype(np.float32, copy=False)


def low_rank(head: Array, states: States, inner: int, cost: float) -> tuple[Array, Array]:
    """W1 [K, d] and W2 [V, K] of the rank-K map nearest, over the states, to log(p / cost) of every row."""
    x = states.x.astype(np.float64)
    covariance = x.T @ x / len(x)
    # log(p / cost) = logit - log_sum - log(cost): the second part, the same for every row, as a linear map of x.
    ridge = covariance + 1e-6 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    offset = np.linalg.solve(ridge, x.T @ (states.log_sum + np.log(cost)) / len(x))
    wanted = head - offset.astype(np.float32)
    values, vectors = np.linalg.eigh(ridge)
    root = (vectors * np.sqrt(values)) @ vectors.T
    inverse = (vectors / np.sqrt(values)) @ vectors.T
    # The eigenvectors of root W' W root are the right singular vectors of W root.
    directions = np.linalg.eigh(root @ (wanted.T @ wanted).astype(np.float64) @ root)[1][:, -inner:]
    return (directions.T @ inverse).astype(np.float32), wanted @ (root @ directions).astype(np.float32)


def softplus_slope(score: Array) -> Array:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * score)), np.float32)


def refine(first: Array, second: Array, states: States, cost: float, steps: int, rate: float, seed: int) -> None:
    """Adagrad on the loss above, in place."""
    rng = np.random.default_rng(seed)
    seen_first, seen_second = np.zeros_like(first), np.zeros_like(second)
    vocabulary = len(second)
    slot = np.full(vocabulary, -1)
    for step in range(steps):
        batch = rng.integers(0, len(states.x), BATCH)
        likely = np.unique(states.rows[batch])
        others = rng.choice(vocabulary, min(NEGATIVES, vocabulary), replace=False)
        rows = np.concatenate([likely, np.setdiff1d(others, likely)])
        share = (len(rows) - len(likely)) / max(1, vocabulary - len(likely))  # of the rows that are not likely
        slot[rows] = np.arange(len(rows))
        x, w = states.x[batch], second[rows]
        z = x @ first.T
        slope = softplus_slope(z @ w.T)
        weight = np.full(len(rows), cost / share if share else cost, np.float32)
        weight[: len(likely)] = cost
        gradient = slope * weight
        at = np.arange(BATCH)[:, None], slot[states.rows[batch]]
        gradient[at] -= (1 - slope[at]) * states.p[batch]
        gradient /= BATCH
        now = rate * (1 - step / steps)
        for weights, seen, which, g in (
            (second, seen_second, rows, gradient.T @ z),
            (first, seen_first, slice(None), (gradient @ w).T @ x),
        ):
            seen[which] += g * g
            weights[which] -= now * np.sqrt(np.mean(weights[which] ** 2)) * g / (np.sqrt(seen[which]) + 1e-20)


def quantized(matrix: Array, kind: str) -> tuple[npt.NDArray[np.uint8], Array]:
    """(bytes of the type, what they stand for)."""
    number = gguf.GGMLQuantizationType[kind.upper()]
    data = gguf.quants.quantize(matrix, number)
    return data.reshape(-1).view(np.uint8), gguf.quants.dequantize(data, number).reshape(matrix.shape)


def choose_threshold(first: Array, second: Array, states: States, agreement: float, lost: float) -> float:
    """The highest threshold that keeps the most likely row of this share of states and loses, on average over them, no
    more probability than `lost` (of the likely rows; what the others have is not counted)."""
    z = states.x @ first.T
    scores = np.stack([np.einsum("nk,nk->n", z, second[rows]) for rows in states.rows.T], axis=1)
    best = np.sort(scores[:, 0])
    order = np.argsort(scores, axis=None)
    sums = np.cumsum(states.p.ravel()[order]) / len(scores)
    by_loss = scores.ravel()[order][min(np.searchsorted(sums, lost), scores.size - 1)]
    by_agreement = best[min(len(best) - 1, int((1 - agreement) * len(best)))]
    return float(min(by_agreement, by_loss) - 1e-6 * np.std(best))


def write(source: str, target: str, predictor: npt.NDArray[np.uint8], kind: str, threshold: float) -> None:
    """The source, which must be one file, with the predictor in place of an older one."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "smallthinker")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", THRESHOLD):
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    writer.add_float32(THRESHOLD, threshold)
    tensors = [t for t in reader.tensors if t.name != PREDICTOR]
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type
        )
    number = gguf.GGMLQuantizationType[kind.upper()]
    writer.add_tensor_info(PREDICTOR, predictor.shape, predictor.dtype, predictor.nbytes, number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data)
    writer.write_tensor_data(predictor)
    writer.close()


def evaluate(path: str, sequences: Tokens, threads: int | None) -> str:
    """What the file's predictor does on these sequences, by the engine."""
    lost: list[Array] = []
    same: list[npt.NDArray[np.bool_]] = []
    with SmallThinker(path, threads=threads, context=SEQUENCE) as model, model.session(SEQUENCE) as session:
        for ids in sequences:
            session.reset()
            full = session.decode(ids, all_logits=True)
            session.reset()
            sparse = session.decode(ids, all_logits=True, head_threshold=model.head_threshold)
            same.append(full.argmax(1) == sparse.argmax(1))
            weights = np.exp(full - full.max(1, keepdims=True))
            kept = np.where(np.isfinite(sparse), weights, 0).sum(1) / weights.sum(1)
            lost.append(1 - kept)
        share = model.stats()["head_share"]
    gone, agreement = np.concatenate(lost), np.concatenate(same).mean()
    divergence = -np.log(np.maximum(1 - gone, 1e-30))  # KL(sparse || full)
    return (
        f"rows computed: {share:.2%}\nmost likely token the same: {agreement:.3%} of {len(gone)}\n"
        f"probability lost: mean {gone.mean():.2e}, median {np.median(gone):.2e}, 99th percentile "
        f"{np.quantile(gone, 0.99):.2e}\nKL of sparse against full: {divergence.mean():.2e} nats"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="MODEL.gguf")
    parser.add_argument("-o", "--output", required=True, metavar="FILE")
    parser.add_argument("--text", metavar="FILE", help="what to read (default: random tokens)")
    parser.add_argument("--inner", type=int, default=64, metavar="K", help="inner width, a multiple of 32 (64)")
    parser.add_argument("--states", type=int, default=16384, help="for training; a quarter more to judge (16384)")
    parser.add_argument("--steps", type=int, default=4000, help=f"gradient steps of {BATCH} states (4000)")
    parser.add_argument("--rate", type=float, default=0.05, help="step size against the weights' size (0.05)")
    parser.add_argument("--cost", type=float, default=1e-5, help="of computing a row, in probability lost (1e-5)")
    parser.add_argument("--agreement", type=float, default=0.998, help="share of most likely tokens kept (0.998)")
    parser.add_argument("--lost", type=float, default=0.01, help="probability left out at most, on average (0.01)")
    parser.add_argument("--type", default="q4_0", choices=("q4_0", "q8_0"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.inner % 32 or options.inner < 32:
        sys.exit("error: --inner must be a multiple of 32")
    with GGUFFile(options.model) as file:
        if len(file.paths) > 1 or is_packed(file):
            sys.exit("error: the model must be a GGUF in one file; pack what this writes")

    with SmallThinker(options.model, threads=options.threads, context=SEQUENCE, head_threshold=None) as model:
        eighth = max(1, options.states // (8 * SEQUENCE))
        sequences = read_tokens(model, options.text, options.states + 2 * eighth * SEQUENCE, options.seed)
        if len(sequences) <= 2 * eighth:
            sys.exit("error: too little text")
        states = collect(model, sequences[: len(sequences) - eighth])
    n = len(states.x) - eighth * SEQUENCE
    print(
        f"{n} states to train on; most likely token {states.p[:, 0].mean():.3f} on average, the {states.p.shape[1]} "
        f"likeliest {states.p.sum(1).mean():.3f}"
    )
    first, second = low_rank(head_rows(options.model), states.part(0, n), options.inner, options.cost)
    refine(first, second, states.part(0, n), options.cost, options.steps, options.rate, options.seed)
    data = [quantized(matrix, options.type) for matrix in (first, second)]
    judges = states.part(n, len(states.x))
    threshold = choose_threshold(data[0][1], data[1][1], judges, options.agreement, options.lost)
    print(f"threshold {threshold:.4f}")
    write(options.model, options.output, np.concatenate([data[0][0], data[1][0]]), options.type, threshold)
    print(evaluate(options.output, sequences[len(sequences) - eighth :], options.threads))


if __name__ == "__main__":
    main()
