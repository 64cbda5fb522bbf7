"""Makes routing traces that change with the text, as published traces of mixture-of-experts models do.

    python tools/paging/topics.py --shape 4b --kind topics --tokens 1500 -o topics.npz
    python tools/paging/replay.py topics.npz --slots 200 335 420

Run by people who choose an eviction policy: random tokens, which synthetic models are run on, have no topics. How the
kinds were fitted to published figures: docs/notes/2026-11-30-forecast-eviction.md.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smallthinker_edge.measure.trace import Trace

SHAPES = {"4b": (32, 32, 4), "21b": (52, 64, 6), "128": (8, 128, 8)}  # layers, experts, used by a token
TOPIC_TOKENS = 300  # on average


@dataclass(frozen=True)
class Kind:
    """Standard deviations of what adds up to an expert's logit.

    Attributes:
        base: the same for all texts. topic: drawn anew with each topic. burst: wanders within a topic and keeps `kept`
            of itself from token to token. noise: of each token alone.
        hot: added to the logits of the 22 % hot experts.
    """

    base: float = 0.0
    topic: float = 0.0
    burst: float = 0.0
    kept: float = 0.0
    noise: float = 1.0
    hot: float = 0.0


KINDS = {
    "topics": Kind(base=0.5, topic=1.0, burst=0.3, kept=0.8, noise=0.75),
    "bursts": Kind(base=0.5, topic=0.7, burst=1.0, kept=0.9, noise=0.4),
    "flat": Kind(base=0.8),
    "hot": Kind(hot=1.75),
}


def make_trace(shape: tuple[int, int, int], kind: Kind, tokens: int, seed: int = 0, text: int = 0) -> Trace:
    """A trace of one text. Texts of one seed are of one model: they share `base` and which experts are hot.

    Args:
        shape: layers, experts of a layer, experts that a token uses.
    """
    layers, experts, used = shape
    model = np.random.default_rng(seed)
    base = kind.base * model.standard_normal((layers, experts))
    base += model.permuted(np.tile(kind.hot * (np.arange(experts) < round(0.22 * experts)), (layers, 1)), axis=1)
    draw = np.random.default_rng((seed, text))
    burst, topic, ends = draw.standard_normal((layers, experts)), base, 0.0
    routing = np.empty((tokens, layers, used), np.uint16)
    for token in range(tokens):
        if token >= ends:
            topic = base + kind.topic * draw.standard_normal((layers, experts))
            ends = token + draw.exponential(TOPIC_TOKENS)
        burst = kind.kept * burst + math.sqrt(1 - kind.kept**2) * draw.standard_normal((layers, experts))
        logits = topic + kind.burst * burst + kind.noise * draw.standard_normal((layers, experts))
        routing[token] = np.argpartition(-logits, used, axis=1)[:, :used]
    return Trace(routing, experts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="4b", help="128: that of models with 128 experts")
    parser.add_argument("--kind", choices=KINDS, default="topics")
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="NPZ")
    arguments = parser.parse_args()
    make_trace(SHAPES[arguments.shape], KINDS[arguments.kind], arguments.tokens, arguments.seed).save(arguments.output)


if __name__ == "__main__":
    main()
