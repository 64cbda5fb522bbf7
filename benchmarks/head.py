"""Measures what a sparse LM head saves: milliseconds of a decoded token and of its head, by the share of rows computed.

    python benchmarks/head.py MODEL.gguf [--shares 0.01 0.05 0.2] [--output FILE]

MODEL needs a predictor (tools/models/train_lm_head_predictor.py). For every share a threshold is searched that lets so
many rows through, so that the times hold for any predictor of that inner width. The model is opened without its
predictor, with it, and without it again; meanwhile the cases take turns of a few tokens, in random order. The head's
time is the token's less that of the same tokens without any logits, in the same opening. Needs the [convert] extra.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from report import publish

from smallthinker_edge import Session, SmallThinker
from smallthinker_edge.files.config import tensor_name
from smallthinker_edge.measure.limits import OtherProcesses

NO_LOGITS, PLAIN, WITH = "no head", "full head, no predictor", "full head, with predictor"
TURN = 4  # tokens


class Case:
    """One way to decode a token, and the seconds it took."""

    def __init__(self, name: str, session: Session, threshold: float | None = None) -> None:
        self.name, self.session, self.threshold = name, session, threshold
        self.seconds: list[float] = []

    def decode(self, ids: np.ndarray) -> None:
        for i in range(len(ids)):
            started = time.perf_counter()
            if self.name == NO_LOGITS:
                self.session.prefill(ids[i : i + 1])
            else:
                self.session.decode(ids[i : i + 1], head_threshold=self.threshold)
            self.seconds.append(time.perf_counter() - started)

    @property
    def milliseconds(self) -> float:
        return 1e3 * statistics.median(self.seconds)


def scores_of(model: SmallThinker, path: str, ids: np.ndarray) -> np.ndarray:
    """What the predictor gives every row for these tokens, in float32."""
    d, inner = model.config.d_model, model.config.lm_head_predictor_size
    states = np.empty((len(ids), d), np.float32)
    with model.session() as session:
        session.decode(ids, states=states)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == tensor_name("lm_head_profiler"))
    flat = gguf.quants.dequantize(tensor.data, tensor.tensor_type).ravel()
    first, second = flat[: inner * d].reshape(inner, d), flat[inner * d :].reshape(-1, inner)
    return np.asarray(states @ first.T @ second.T)


@dataclass
class Row:
    """A case's milliseconds: of a token, and of its head."""

    name: str
    token: float
    head: float


def measure(model: SmallThinker, path: str, shares: Sequence[float], turns: np.ndarray) -> list[Row]:
    """The cases of one opening; those with a threshold where the model has a predictor."""
    sparse = model.head_threshold is not None
    cases = [Case(NO_LOGITS, model.session()), Case(WITH if sparse else PLAIN, model.session())]
    if sparse:
        scores = scores_of(model, path, turns[:8].ravel())
        thresholds = np.quantile(scores, 1 - np.array(shares))
        cases += [Case(f"{s:.0%} of rows", model.session(), float(t)) for s, t in zip(shares, thresholds, strict=True)]
        cases.append(Case("the file's threshold", model.session(), model.head_threshold))
    for turn in turns:
        for i in np.random.default_rng(int(turn[0])).permutation(len(cases)):
            cases[i].decode(turn)
    return [Row(case.name, case.milliseconds, case.milliseconds - cases[0].milliseconds) for case in cases]


def table(rows: Sequence[Row]) -> str:
    plain = [row for row in rows if row.name == PLAIN]
    token, head = (statistics.mean(getattr(row, name) for row in plain) for name in ("token", "head"))
    lines = ["| | token, ms | head, ms | head, times as fast | token, times as fast |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        # By their own difference, so that the two openings' other parts cancel.
        gains = f"{head / row.head:.2f} | {token / (token - head + row.head):.2f}" if row.head else " | "
        lines.append(f"| {row.name} | {row.token:.3f} | {row.head:.3f} | {gains} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="MODEL.gguf")
    parser.add_argument(
        "--shares", type=float, nargs="*", default=[0.01, 0.02, 0.05, 0.1, 0.2, 0.4], help="of the rows"
    )
    parser.add_argument("--decode", type=int, default=60, help="tokens of every case (60)")
    parser.add_argument("--threads", type=int, help="compute threads (default: usable CPUs)")
    parser.add_argument("--output", metavar="FILE", help="write the table there too")
    arguments = parser.parse_args()

    rows: list[Row] = []
    others = OtherProcesses()
    for threshold in (None, "auto", None):
        with SmallThinker(arguments.model, threads=arguments.threads, head_threshold=threshold) as model:
            inner, stats = model.config.lm_head_predictor_size, model.stats()
            if not inner:
                raise SystemExit("error: the model has no predictor; tools/models/train_lm_head_predictor.py adds one")
            shape = -(-arguments.decode // TURN), TURN
            turns = np.random.default_rng(0).integers(0, model.config.vocab_size, shape).astype(np.int32)
            rows += measure(model, arguments.model, arguments.shares, turns)
    about = (
        f"{Path(arguments.model).name}, inner width {inner}, {stats['kernels']}, {stats['threads']} threads, "
        f"medians of {turns.size} tokens"
    )
    publish(table(rows), about, others, arguments.output)


if __name__ == "__main__":
    main()
