"""Routing traces: which experts every token chose. Recorded here and drawn as a heatmap.

Called by `smallthinker-edge trace`; tools/paging/replay.py replays them. A trace is an .npz file: `routing` uint16
[tokens, L, K], and `experts` (E).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from smallthinker_edge.errors import ModelFormatError
from smallthinker_edge.model import SmallThinker


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

    def use(self) -> npt.NDArray[np.float64]:
        """Share of tokens that use each expert, float64 [L, E]."""
        tokens, layers, _ = self.routing.shape
        ids = self.routing + (np.arange(layers) * self.experts)[None, :, None]
        counts = np.bincount(ids.ravel().astype(np.int64), minlength=layers * self.experts)
        return np.asarray(counts.reshape(layers, self.experts) / tokens, np.float64)

    def rarely_used(self, share: float) -> npt.NDArray[np.bool_]:
        """Experts that fewer than this share of the tokens use: bool [L, E].

        As many as a token uses stay in each layer, the most used ones, whatever the share.
        """
        use, (_, _, used) = self.use(), self.routing.shape
        rare = use < share
        most_used = np.argsort(-use, axis=1, kind="stable")[:, :used]
        np.put_along_axis(rare, most_used, False, axis=1)
        return rare


def record(model: SmallThinker, tokens: Sequence[int], max_tokens: int = 0) -> Trace:
    """Decodes tokens in a session of their own, goes on for max_tokens greedy ones, and returns how they were routed.

    Raises ContextFull where the tokens do not fit the model's context, ValueError for bad ones.
    """
    with model.recording() as chunks:
        if max_tokens:
            model.generate(tokens, max_tokens=max_tokens)
        else:
            with model.session() as session:
                session.decode(tokens)
    shape = (-1, model.config.n_layers, model.config.n_experts_used)
    routing = np.frombuffer(b"".join(chunks), np.int32).reshape(shape)
    return Trace(routing.astype(np.uint16), model.config.n_experts)


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
