"""What logits say of a text: losses, perplexity, and how far two models' predictions are apart. Numbers only.

Called by evaluate.py. A text is cut into windows as llama.cpp's llama-perplexity does it, so that figures compare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)

Floats = npt.NDArray[np.floating]
Ids = npt.NDArray[np.int32]
# One record a position: nats, and whether both models put the same token first.
LOSS = np.dtype([("loss", "<f8")])
COMPARED = np.dtype([("kl", "<f8"), ("loss_a", "<f8"), ("loss_b", "<f8"), ("same_top1", "?")])
Records = npt.NDArray[np.void]


def cut(tokens: Sequence[int], size: int, bos: int | None = None) -> list[Ids]:
    """The whole windows of `size` tokens that a text has, one after the other; a shorter rest is left out.

    bos: of a model that wants one before a text: it stands in place of every window's first token.
    Raises ValueError for a size under 4, or a text that is shorter than one window.
    """
    if size < 4:
        raise ValueError(f"a window must have at least 4 tokens, not {size}")
    if len(tokens) < size:
        raise ValueError(f"the text has {len(tokens)} tokens, a window {size}: give a longer text or smaller windows")
    windows = np.array(tokens[: len(tokens) // size * size], np.int32).reshape(-1, size)
    if bos is not None:
        windows[:, 0] = bos
    return list(windows)


def first_counted(size: int) -> int:
    """The first position of a window whose prediction counts: what is in front of its second half is context only.

    The last position predicts a token that is no longer in the window, so size - 1 - first_counted(size) count.
    """
    return size // 2


def log_probabilities(logits: Floats) -> npt.NDArray[np.float64]:
    """log softmax of one row [V], in float64."""
    shifted = logits.astype(np.float64) - logits.max()
    return np.asarray(shifted - math.log(np.exp(shifted).sum()))


def losses(logits: Floats, targets: Ids) -> Records:
    """LOSS records [n]: minus the log probability of each target, from logits [n, V]."""
    found = np.empty(len(targets), LOSS)
    for i, (row, target) in enumerate(zip(logits, targets, strict=True)):
        found["loss"][i] = -log_probabilities(row)[target]
    return found


def compared(a: Floats, b: Floats, targets: Ids) -> Records:
    """COMPARED records [n] of two models' logits [n, V]: KL(A || B), both losses, whether the top tokens agree."""
    found = np.empty(len(targets), COMPARED)
    for i, (row_a, row_b, target) in enumerate(zip(a, b, targets, strict=True)):
        p, q = log_probabilities(row_a), log_probabilities(row_b)
        found[i] = float(np.exp(p) @ (p - q)), -p[target], -q[target], row_a.argmax() == row_b.argmax()
    return found


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean loss.

    Attributes:
        perplexity, error: and its standard error, of losses taken as independent.
        loss: mean in nats a token. count: tokens that count.
    """

    perplexity: float
    error: float
    loss: float
    count: int

    @classmethod
    def of(cls, losses: Floats) -> Perplexity:
        mean, error = float(losses.mean()), standard_error(losses)
        value = math.exp(mean) if mean < 700 else math.inf
        return cls(value, value * error, mean, losses.size)


@dataclass(frozen=True)
class Divergence:
    """KL(A || B) in nats, over positions.

    Attributes:
        mean, error: the mean and its standard error. median, quantiles (by share), largest: of single positions.
        top1: share of positions where both models' likeliest token is the same.
    """

    mean: float
    error: float
    median: float
    quantiles: dict[float, float]
    largest: float
    top1: float

    @classmethod
    def of(cls, records: Records) -> Divergence:
        kl = records["kl"]
        values = dict(zip(QUANTILES, np.quantile(kl, QUANTILES).tolist(), strict=True))
        return cls(
            float(kl.mean()),
            standard_error(kl),
            values[0.5],
            values,
            float(kl.max()),
            float(records["same_top1"].mean()),
        )


def standard_error(values: Floats) -> float:
    """Of the mean; 0 where there is one value."""
    return float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else 0.0
