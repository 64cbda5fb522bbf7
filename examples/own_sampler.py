"""Choose the tokens yourself: a Session gives logits, and keeps the KV cache between calls.

    python examples/own_sampler.py [MODEL.gguf]

Prints a greedy answer of the demo model, token by token, with the probability the model gave each one and the
runner-up it preferred to it. The same two calls are all that a constrained or a speculative sampler needs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import smallthinker_edge
from smallthinker_edge import SmallThinker

PROMPT = "<|im_start|>user\nturn on the kitchen light<|im_end|>\n<|im_start|>assistant\n"


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax of one row of logits [V]."""
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum()


def main() -> None:
    demo = Path(smallthinker_edge.__file__).with_name("data") / "demo.gguf"
    path = sys.argv[1] if len(sys.argv) > 1 else demo
    with SmallThinker(path) as model, model.session() as session:
        logits = session.decode(model.tokenize(PROMPT))
        for _ in range(64):
            chances = probabilities(logits)
            second, best = np.argsort(chances)[-2:]
            if int(best) in model.tokenizer.eos_ids:
                break
            shown = model.detokenize([int(best)])
            print(f"{shown!r:<16} {chances[best]:.3f}   next: {model.detokenize([int(second)])!r}")
            if session.position == session.context:
                break
            logits = session.decode([int(best)])


if __name__ == "__main__":
    main()
