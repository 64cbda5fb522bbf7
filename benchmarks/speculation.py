"""Measures prompt-lookup speculation: how often guesses are right and what they give, by the kind of text.

    python benchmarks/speculation.py MODEL [--memory 1GiB] [--most 8] [--output FILE]

A model is made to say a given text, whatever its logits are, so that acceptance is that of the text and time that of
the model: for synthetic models, whose own text is noise. Texts are JSON, code and prose of this repository, in tokens
of a BPE of 8192 trained on them, and random tokens; the model gets their ids scattered over its vocabulary. The first
half of a text is the prompt; "code, edited" says the prompt again, every 16th token another one. With --own the model
says what it wants: the demo model, on held-out home commands.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from report import publish
from tokenizers import ByteLevelBPETokenizer

from smallthinker_edge import SmallThinker, Timings
from smallthinker_edge.cli.demo import SENTENCES, load_sentences
from smallthinker_edge.measure.limits import OtherProcesses

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {"JSON": SENTENCES, "code": ROOT / "smallthinker_edge/session.py", "prose": ROOT / "docs/synthetic-models.md"}


class Dictation:
    """Stands in for a sampler: the next token is the text's, whatever the logits."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tokens

    def sample(self, logits: object, history: Sequence[int]) -> int:
        return self.tokens[len(history)]


def texts(vocabulary: int, tokens: int) -> dict[str, list[int]]:
    """Tokens of each kind of text, `tokens` of them."""
    bpe = ByteLevelBPETokenizer()
    files = [str(path) for path in (*(ROOT / "smallthinker_edge").rglob("*.py"), *ROOT.glob("docs/*.md"), SENTENCES)]
    bpe.train(files, vocab_size=8192, show_progress=False)
    scattered = np.random.default_rng(0).permutation(vocabulary)
    found = {name: bpe.encode(path.read_text(encoding="utf-8")).ids[:tokens] for name, path in TEXTS.items()}
    half = found["code"][: tokens // 2]
    edited = [token if i % 16 else 8191 - i for i, token in enumerate(half, 1)]
    found |= {"code, edited": half + edited, "random": list(range(tokens))}
    return {name: scattered[ids].tolist() for name, ids in found.items()}


def dictated(model: SmallThinker, text: Sequence[int]) -> Callable[[int], list[Timings]]:
    def run(speculate: int) -> list[Timings]:
        prompt = list(text[: len(text) // 2])
        rest = len(text) - len(prompt)
        return [model.generate(prompt, max_tokens=rest, sampler=Dictation(text), speculate=speculate).timings]

    return run


def warm_up(model: SmallThinker) -> None:
    """A virtual machine's memory is slow until every page of the weights has been used once."""
    with model.session() as session:
        for token in np.random.default_rng(0).integers(0, model.config.vocab_size, 400):
            session.decode([token])


def commands(model: SmallThinker) -> Callable[[int], list[Timings]]:
    chats = [[{"role": "user", "content": entry.sentence}] for entry in load_sentences(SENTENCES)]
    return lambda speculate: [model.chat(chat, speculate=speculate).timings for chat in chats]


def row(name: str, plain: list[list[Timings]], guessed: list[list[Timings]]) -> str:
    """One line of the table; runs of both took turns."""

    def speed(run: list[Timings]) -> float:
        return sum(t.decode_tokens for t in run) / sum(t.decode_seconds for t in run)

    ratios = [speed(b) / speed(a) for a, b in zip(plain, guessed, strict=True)]
    total = [t for run in guessed for t in run]
    drafted, accepted = sum(t.drafted_tokens for t in total), sum(t.accepted_tokens for t in total)
    tokens = sum(t.decode_tokens for t in total)
    return (
        f"| {name} | {statistics.median(map(speed, plain)):.1f} | {statistics.median(map(speed, guessed)):.1f} | "
        f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f}-{max(ratios):.2f}) | {accepted}/{drafted} | "
        f"{accepted / tokens:.0%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--memory", help="budget of the process (default: none)")
    parser.add_argument("--most", type=int, default=8, metavar="N", help="speculate=N (8)")
    parser.add_argument("--tokens", type=int, default=500, help="of a text; half of them are its prompt (500)")
    parser.add_argument("--repeat", type=int, default=3, help="turns (3)")
    parser.add_argument("--own", action="store_true", help="the demo's commands instead of dictated texts")
    parser.add_argument("--only", nargs="*", help="kinds of text (all)")
    parser.add_argument("--threads", type=int, help="compute threads (default: usable CPUs)")
    parser.add_argument("--output", metavar="FILE", help="write the table there too")
    arguments = parser.parse_args()

    lines = [
        f"| text | plain, tokens/s | speculate={arguments.most} | times as fast | accepted/guessed | of all tokens |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    with SmallThinker(
        arguments.model, memory=arguments.memory, threads=arguments.threads, context=2048, keep_sessions=0
    ) as model:
        if arguments.own:
            cases = {"home commands": commands(model)}
        else:
            kinds = texts(model.config.vocab_size, arguments.tokens)
            cases = {name: dictated(model, text) for name, text in kinds.items()}
        warm_up(model)
        others = OtherProcesses()
        for name, run in cases.items():
            if arguments.only and name not in arguments.only:
                continue
            plain: list[list[Timings]] = []
            guessed: list[list[Timings]] = []
            for i in range(arguments.repeat):
                for speculate in (0, arguments.most) if i % 2 else (arguments.most, 0):
                    (guessed if speculate else plain).append(run(speculate))
            lines.append(row(name, plain, guessed))
        stats = model.stats()
    budget = f", memory={arguments.memory}" if arguments.memory else ""
    name = f"{Path(arguments.model).name}{budget}"
    about = f"{name}, {stats['kernels']}, {stats['threads']} threads; {arguments.repeat} turns"
    publish("\n".join(lines), about, others, arguments.output)


if __name__ == "__main__":
    main()
