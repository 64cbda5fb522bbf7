"""Asks whether proven bounds could spare most of the LM head: how many rows stay candidates for the largest logits.

    python tools/models/head_bounds.py MODEL.gguf [--tokens 64] [--top 1 40]

Greedy and top-k sampling need the k largest of V logits. A cheap pass gives every row an upper bound; rows whose
bound is below the k-th best lower bound need not be read. Three bounds are tried on the model's own head:

- block norms: rows in blocks of 16; logit <= centre . x + radius * |x| (Cauchy-Schwarz; 1/16 of the rows are read)
- coarse rows: the two high bits of every Q4_0 weight, and the norm of what they leave out (half of the rows' bytes)
- leading directions: rows and x in the basis of the head's principal components; the first quarter of the products
  exactly, the rest by Cauchy-Schwarz on the stored norms (a quarter of the bytes)

States: the head's input in the model's own forward pass over random tokens. What came out is in
docs/notes/2026-11-25-head-bounds.md. Needs the [convert] extra and, for a 4B, 5 GB.
"""

from __future__ import annotations

import argparse

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader
from gguf.quants import dequantize

from smallthinker_edge import SmallThinker

Array = npt.NDArray[np.float32]
BLOCK = 16


def head_of(reader: GGUFReader) -> tuple[Array, Array | None]:
    """(rows [V, d], what the two high bits of Q4_0 leave of each row [V, d] or None)."""
    tensors = {t.name: t for t in reader.tensors}
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    rows = dequantize(head.data, head.tensor_type).astype(np.float32, copy=False)
    if head.tensor_type.name != "Q4_0":
        return rows, None
    blocks = np.asarray(head.data).reshape(len(rows), -1, 18)
    scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(np.float32)
    nibbles = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=2)
    # q = 4 * (q >> 2) + 1.5 + rest, rest in -1.5 .. 1.5
    rest = ((nibbles & 3).astype(np.float32) - 1.5) * scale[..., None]
    return rows, rest.reshape(rows.shape)


def states_of(path: str, count: int) -> Array:
    """The head's inputs [count, d] for random tokens."""
    with SmallThinker(path, context=count, head_threshold=None) as model, model.session() as session:
        states = np.empty((count, model.config.d_model), np.float32)
        session.decode(np.random.default_rng(0).integers(0, model.config.vocab_size, count), states=states)
    return states


def candidates(estimate: Array, slack: Array, k: int) -> float:
    """Share of rows whose upper bound reaches the k-th largest lower bound; both [n, rows]."""
    floor = np.partition(estimate - slack, -k, axis=1)[:, -k]
    return float((estimate + slack >= floor[:, None]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="MODEL.gguf")
    parser.add_argument("--tokens", type=int, default=64, help="states to average over (64)")
    parser.add_argument("--top", type=int, nargs="*", default=[1, 40], help="k (1 40)")
    arguments = parser.parse_args()
    x = states_of(arguments.model, arguments.tokens)
    rows, rest = head_of(GGUFReader(arguments.model))
    logits, length = x @ rows.T, np.linalg.norm(x, axis=1)[:, None]
    print(
        f"best logit / |row| |x|: {np.mean(logits.max(1) / (length[:, 0] * np.linalg.norm(rows, axis=1).mean())):.3f}"
    )
    for k in arguments.top:
        whole = len(rows) // BLOCK * BLOCK
        blocks = rows[:whole].reshape(-1, BLOCK, rows.shape[1])
        centre = blocks.mean(1)
        radius = np.linalg.norm(blocks - centre[:, None], axis=2).max(1)
        floor = np.partition(logits, -k, axis=1)[:, -k]  # the best any order of search could know
        share = float((x @ centre.T + radius * length >= floor[:, None]).mean())
        print(f"top {k}: block norms: {100 * share:.2f} % of rows, bytes {1 / BLOCK + share:.3f} of the head")
        if rest is not None:
            share = candidates(logits - x @ rest.T, np.linalg.norm(rest, axis=1) * length, k)
            print(f"top {k}: coarse rows: {100 * share:.2f} % of rows, bytes {0.5 + 0.5 * share:.3f}")
        basis = np.linalg.eigh((rows.T @ rows).astype(np.float64))[1][:, ::-1].astype(np.float32)
        cut = rows.shape[1] // 4
        turned, turned_x = rows @ basis, x @ basis
        slack = np.linalg.norm(turned[:, cut:], axis=1) * np.linalg.norm(turned_x[:, cut:], axis=1)[:, None]
        share = candidates(turned_x[:, :cut] @ turned[:, :cut].T, slack, k)
        print(f"top {k}: leading directions: {100 * share:.2f} % of rows, bytes {0.25 + 0.75 * share:.3f}")


if __name__ == "__main__":
    main()
