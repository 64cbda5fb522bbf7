"""Routing traces: which experts every token chose. Recorded here and drawn as a heatmap.

Called by `smallthinker-edge trace`; tools/paging/replay.py replays them. A trace is an .npz file: `routing` uint16
[tokens, L, K], and `experts` (E).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from smallthinker_edge.errors import ContextFull, ModelFormatError
from smallthinker_edge.model import SmallThinker
from smallthinker_edge.opening import BATCH

Progress = Callable[[int, int, str], object]


@dataclass(frozen=True)
class Trace:
    """routing: uint16 [tokens, L, K], the experts each token chose in each layer; experts: how many a layer has."""

    routing: npt.NDArray[np.uint16]
    experts: int

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an .npz file. Raises OSError."""
        with open(path, "wb") as file:
            np.savez_compressed(file, routing=self.routing, experts=np.array(self.experts))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Reads what save() wrote. Raises ModelFormatError for anything else, OSError."""
        try:
            with np.load(path, allow_pickle=False) as content:
                routing, experts = content["routing"], int(content["experts"])
        except (KeyError, ValueError, TypeError) as problem:
            raise ModelFormatError(f"is not a routing trace: {problem}", path=os.fspath(path)) from None
        if routing.ndim != 3 or routing.dtype != np.uint16 or not routing.size or routing.max() >= experts:
            raise ModelFormatError("is not a routing trace", path=os.fspath(path), field="routing")
        return cls(routing, experts)

    def counts(self) -> npt.NDArray[np.int64]:
        """How many tokens use each expert, int64 [L, E]."""
        layers = self.routing.shape[1]
        ids = self.routing + (np.arange(layers) * self.experts)[None, :, None]
        counts = np.bincount(ids.ravel().astype(np.int64), minlength=layers * self.experts)
        return counts.reshape(layers, self.experts)

    def use(self) -> npt.NDArray[np.float64]:
        """Share of tokens that use each expert, float64 [L, E]."""
        return np.asarray(self.counts() / len(self.routing), np.float64)

    def rarely_used(self, share: float) -> npt.NDArray[np.bool_]:
        """Experts that fewer than this share of the tokens use: bool [L, E].

        As many as a token uses stay in each layer, the most used ones, whatever the share.
        """
        use, (_, _, used) = self.use(), self.routing.shape
        rare = use < share
        most_used = np.argsort(-use, axis=1, kind="stable")[:, :used]
        np.put_along_axis(rare, most_used, False, axis=1)
        return rare


def record(model: SmallThinker, tokens: Sequence[int], max_tokens: int = 0, progress: Progress | None = None) -> Trace:
    """Decodes tokens in a session of their own, goes on for max_tokens greedy ones, and returns how they were routed.

    Args:
        progress: called with (tokens done, all of them, what is done).

    Raises ContextFull where the tokens do not fit the model's context, ValueError for bad ones.
    """
    total = len(tokens) + max_tokens
    report = progress or (lambda done, total, name: None)
    with model.recording() as chunks:
        if max_tokens:
            stream = model.stream(
                tokens, max_tokens=max_tokens, on_prompt=lambda done, _: report(done, total, "tokens")
            )
            for _ in stream:
                report(len(tokens) + len(stream.tokens), total, "tokens")
        else:
            with model.session() as session:
                if len(tokens) > session.context:
                    raise ContextFull(f"the text has {len(tokens)} tokens, the context {session.context}")
                for start in range(0, max(1, len(tokens)), BATCH):
                    session.prefill(tokens[start : start + BATCH])
                    report(session.position, total, "tokens")
    return traced(model, chunks)


def traced(model: SmallThinker, chunks: Sequence[bytes]) -> Trace:
    """The trace of what recording() has collected."""
    config, content = model.config, np.frombuffer(b"".join(chunks), np.int32)
    each = config.n_layers * config.n_experts_used
    routing = content.reshape(content.size // each, config.n_layers, config.n_experts_used)
    return Trace(routing.astype(np.uint16), config.n_experts)


def hot_share(use: npt.NDArray[Any]) -> float:
    """Share of all uses [L, E] that falls on the most used fifth of all experts."""
    ranked = np.sort(use, axis=None)[::-1]
    return float(ranked[: max(1, ranked.size // 5)].sum() / ranked.sum())


def draw_heatmap(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Draws how often each layer's experts are used, by number and the most used first, as a picture of layers and
    experts (as Figures 4 and 5 of the report). The file's suffix says which kind, such as .png or .svg.

    Needs matplotlib: raises ImportError without the [plots] extra, ValueError for a kind it cannot write, OSError.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MultipleLocator, PercentFormatter

    tokens, layers, used = trace.routing.shape
    use = trace.use()
    width = 5.5  # inches a panel, whose cells are square
    figure = Figure(figsize=(2 * width + 1.5, width * layers / trace.experts + 1.3), layout="compressed")
    by_id, by_rank = figure.subplots(1, 2, sharey=True)
    for axes, values, label in (
        (by_id, use, "expert"),
        (by_rank, -np.sort(-use, axis=1), "experts of the layer, most used first"),
    ):
        image = axes.imshow(values, cmap="viridis", vmin=0, vmax=use.max(), interpolation="nearest")
        axes.set(xlabel=label)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MultipleLocator(8))
            axis.set_minor_locator(MultipleLocator(1))
    by_id.set(ylabel="layer")
    bar = figure.colorbar(
        image, ax=[by_id, by_rank], format=PercentFormatter(1), aspect=30, label="tokens that use the expert"
    )
    bar.ax.axhline(used / trace.experts, color="white")
    bar.ax.annotate("even ", (0, used / trace.experts), ha="right", va="center", fontsize="small")
    figure.suptitle(f"Experts that {tokens} tokens use, {used} of {trace.experts} in each of {layers} layers")
    figure.savefig(path, dpi=120, bbox_inches="tight")
