"""Measures the embedded home model as it ships: what it takes for what, and how its experts are used.

    python tools/home_model/report.py devel.jsonl [--model FILE.gguf]

Prints the tables of docs/home-model.md. devel.jsonl: SLURP's; only wordings that training left out are used. Needs the
[dev] extra (the NumPy reference reads the file with `gguf`).
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import slurp

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/support"))

import reference  # noqa: E402
from home_chats import home_chats  # noqa: E402

from smallthinker_edge import SmallThinker  # noqa: E402
from smallthinker_edge.home.schema import UNKNOWN  # noqa: E402
from smallthinker_edge.home.text_form import model_form  # noqa: E402
from smallthinker_edge.home.understand import EMBEDDED, HomeModel  # noqa: E402


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


def confusion(home_model: HomeModel, spoken: list[slurp.Spoken]) -> str:
    """A table of SLURP's intents: how many are right, and what the others are taken for."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for one in spoken:
        intent = one.intent if one.accepted != (UNKNOWN,) else "all others"
        commands = home_model.said(model_form(one.text))
        actions = ["no valid answer"] if commands is None else [command["action"] for command in commands]
        right = commands is not None and one.accepts(commands)
        seen[intent]["right" if right else ", ".join(actions)] += 1
    lines = ["| intent | right | of | taken for |", "|---|---|---|---|"]
    for intent, answers in sorted(seen.items()):
        wrong = ", ".join(f"{name} {n}" for name, n in answers.most_common() if name != "right")
        lines.append(f"| {intent} | {answers['right']} | {answers.total()} | {wrong} |")
    return "\n".join(lines)


def expert_use(path: str, model: SmallThinker, texts: list[str]) -> str:
    """A table of the share of tokens that use each expert, and of silent neurons in the chosen ones."""
    config = model.config
    ref = Watched.from_gguf(path)
    ref.active, ref.neurons = np.zeros(config.n_layers), np.zeros(config.n_layers)
    counts, tokens = np.zeros((config.n_layers, config.n_experts)), 0
    for text in texts:
        ids = model.tokenize(text)
        tokens += len(ids)
        for layer, chosen in enumerate(ref.run(ids).chosen):
            counts[layer] += np.bincount(chosen.ravel(), minlength=config.n_experts)
    silent = 1 - ref.active / ref.neurons
    head = " | ".join(("layer", "expert 0", *map(str, range(1, config.n_experts)), "silent neurons"))
    rows = [
        f"| {layer} | " + " | ".join(f"{share:.2f}" for share in row) + f" | {silent[layer]:.2f} |"
        for layer, row in enumerate(counts / tokens)
    ]
    return "\n".join((f"| {head} |", "|" + "---|" * (config.n_experts + 2), *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="JSON lines of SLURP's form")
    parser.add_argument("--model", default=str(EMBEDDED))
    args = parser.parse_args()
    spoken = [one for one in slurp.read_slurp(args.file) if slurp.is_held_out(one.sentence.kind)]
    with SmallThinker(args.model) as model:
        print(confusion(HomeModel(model, constrained=False), spoken), end="\n\n")
        print(expert_use(args.model, model, home_chats(60)))


if __name__ == "__main__":
    main()
