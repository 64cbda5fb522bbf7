"""Measures the embedded demo model as it ships: exact matches through the engine, and how its experts are used.

    python tools/demo_report.py [MODEL.gguf] [--sentences 500]

Prints what docs/demo-model.md states. Needs the [dev] extra (the NumPy reference reads the file with `gguf`).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import demo_grammar
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import reference  # noqa: E402

from smallthinker_edge import SmallThinker  # noqa: E402


def exact_matches(model: SmallThinker, pairs: list[tuple[str, str]]) -> tuple[float, float]:
    """(share of answers that are right to the letter, share that are valid JSON), greedy."""
    right = valid = 0
    for sentence, answer in pairs:
        text = model.chat([{"role": "user", "content": sentence}], max_tokens=200).text
        right += text == answer
        try:
            json.loads(text)
            valid += 1
        except ValueError:
            pass
    return right / len(pairs), valid / len(pairs)


def expert_use(path: str, model: SmallThinker, pairs: list[tuple[str, str]]) -> np.ndarray:
    """Share of tokens that use each expert, [layers, experts]."""
    ref = reference.Reference.from_gguf(path)
    config = model.config
    counts, tokens = np.zeros((config.n_layers, config.n_experts)), 0
    for sentence, answer in pairs:
        ids = model.tokenize(demo_grammar.chat(sentence, answer))
        tokens += len(ids)
        for layer, chosen in enumerate(ref.run(ids).chosen):
            counts[layer] += np.bincount(chosen.ravel(), minlength=config.n_experts)
    return counts / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(ROOT / "smallthinker_edge" / "data" / "demo.gguf"))
    parser.add_argument("--sentences", type=int, default=500)
    arguments = parser.parse_args()
    rng = random.Random("report")
    sets = {
        "like training": [demo_grammar.example(rng) for _ in range(arguments.sentences)],
        "held out": demo_grammar.held_out_set(arguments.sentences),
    }
    with SmallThinker(arguments.model) as model:
        for name, pairs in sets.items():
            right, valid = exact_matches(model, pairs)
            print(f"{name}: {right:.3f} exact, {valid:.3f} valid JSON of {len(pairs)}")
        for layer, shares in enumerate(expert_use(arguments.model, model, sets["held out"][:40])):
            print(f"layer {layer}: experts' share of tokens {np.round(shares, 2).tolist()}")


if __name__ == "__main__":
    main()
