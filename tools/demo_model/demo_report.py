"""Measures the embedded demo model as it ships: exact matches through the engine, and how its experts are used.

    python tools/demo_model/demo_report.py [MODEL.gguf] [--sentences 1000]

Prints what docs/demo-model.md states. Needs the [dev] extra (the NumPy reference reads the file with `gguf`).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import demo_grammar
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/support"))

import reference  # noqa: E402

from smallthinker_edge import SmallThinker  # noqa: E402


def answers(model: SmallThinker, examples: list[demo_grammar.Example]) -> list[str]:
    """The model's answers, greedy."""
    return [
        model.chat([{"role": "user", "content": made.sentence}], max_tokens=256).text for made in examples
    ]  # fmt: skip


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def kinds(made: demo_grammar.Example) -> list[str]:
    """The rows of the table that an example belongs to."""
    several = made.answer.startswith("[")
    actions = {c["action"] for c in (json.loads(made.answer) if several else [json.loads(made.answer)])}
    return [f"unseen {kind}" for kind in made.unseen] + (["several commands"] if several else [*actions])


class Watched(reference.Reference):
    """The reference model, counting silent neurons of the chosen experts."""

    def experts(self, h: Any, layer: int, chosen: Any, weights: Any) -> Any:
        gate = self.weights[f"blk.{layer}.ffn_gate_exps.weight"]
        for expert in np.unique(chosen):
            rows = np.nonzero((chosen == expert).any(axis=1))[0]
            active = h[rows] @ gate[expert].T > 0
            self.active[layer] += active.sum()
            self.neurons[layer] += active.size
        return super().experts(h, layer, chosen, weights)


def expert_use(path: str, model: SmallThinker, examples: list[demo_grammar.Example]) -> tuple[np.ndarray, np.ndarray]:
    """(share of tokens that use each expert [layers, experts], share of silent neurons [layers])."""
    config = model.config
    ref = Watched.from_gguf(path)
    ref.active, ref.neurons = np.zeros(config.n_layers), np.zeros(config.n_layers)
    counts, tokens = np.zeros((config.n_layers, config.n_experts)), 0
    for made in examples:
        ids = model.tokenize(demo_grammar.chat(made.sentence, made.answer))
        tokens += len(ids)
        for layer, chosen in enumerate(ref.run(ids).chosen):
            counts[layer] += np.bincount(chosen.ravel(), minlength=config.n_experts)
    return counts / tokens, 1 - ref.active / ref.neurons


def show_matches(name: str, examples: list[demo_grammar.Example], texts: list[str], wrong: int) -> None:
    right = [text == made.answer for text, made in zip(texts, examples, strict=True)]
    valid = np.mean([is_json(text) for text in texts])
    print(f"{name}: {np.mean(right):.3f} exact, {valid:.3f} valid JSON of {len(examples)}")
    for kind in sorted({kind for made in examples for kind in kinds(made)}):
        of_kind = [ok for ok, made in zip(right, examples, strict=True) if kind in kinds(made)]
        print(f"  {kind}: {np.mean(of_kind):.3f} of {len(of_kind)}")
    misses = [(made, text) for ok, made, text in zip(right, examples, texts, strict=True) if not ok]
    for made, text in misses[:wrong]:
        print(f"  > {made.sentence}\n    right {made.answer}\n    model {text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(ROOT / "smallthinker_edge" / "data" / "demo.gguf"))
    parser.add_argument("--sentences", type=int, default=1000)
    parser.add_argument("--wrong", type=int, default=0, metavar="N", help="show N wrong answers of each set")
    arguments = parser.parse_args()
    rng = random.Random("report")
    sets = {
        "like training": [demo_grammar.compose(rng) for _ in range(arguments.sentences)],
        "held out": demo_grammar.held_out_examples(arguments.sentences),
    }
    with SmallThinker(arguments.model) as model:
        for name, examples in sets.items():
            show_matches(name, examples, answers(model, examples), arguments.wrong)
        shares, silent = expert_use(arguments.model, model, sets["held out"][:40])
        for layer, row in enumerate(shares):
            uses = " ".join(f"{share:.2f}" for share in row)
            print(f"layer {layer}: tokens that use each expert {uses}; silent neurons {silent[layer]:.2f}")


if __name__ == "__main__":
    main()
