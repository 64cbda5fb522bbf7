"""Measures what a model's matrices are multiplied with on a text, and writes it as an importance matrix.

Called by `smallthinker-edge imatrix`; files/imatrix.py has the file. The engine hands out the inputs of its matrices
(_native/capture.pyx), some tokens at a time; here they are squared and summed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from smallthinker_edge._native.capture import MatrixInputs
from smallthinker_edge.files.config import ModelConfig, tensor_name
from smallthinker_edge.files.imatrix import COUNTS, HEAD, PRODUCTS, SQUARES, ImportanceWriter, Tensor
from smallthinker_edge.measure.losses import Ids, cut
from smallthinker_edge.model import SmallThinker

Progress = Callable[[int, int, str], object]
Sums = dict[str, npt.NDArray[np.floating]]

PIECE = 64  # tokens whose inputs are held at a time: 67 MB for the 4B
PRODUCT_BYTES = 1 << 30  # of sums that are held at a time; where layers have more, the text runs several times
ATTENTION = ("attn_q", "attn_k", "attn_v")
GATES = ("ffn_gate_exps", "ffn_up_exps")


def measure_importance(
    model: SmallThinker,
    tokens: Sequence[int],
    target: str | os.PathLike[str],
    window: int = 512,
    *,
    products: bool = False,
    dataset: str = "",
    progress: Progress | None = None,
) -> None:
    """Writes the importance matrix of a text, in llama.cpp's GGUF form.

    Args:
        model: best in the types that are to be quantised: F16 or Q8_0.
        tokens: of the text; whole windows of them are run, each from an empty context.
        target: the file; it appears when it is whole.
        window: tokens, at least 4, at most the model's context.
        products: also the sums of products of all pairs of columns, by which convert() makes up for errors (see
            ImportanceMatrix). 4 (2 d^2 + a^2 + E f^2) bytes a layer, a being n_heads * head_dim: 3.3 GB for the 4B.
        dataset: the text's name, for the file.
        progress: called with (windows done, all of them, what is done).

    Raises ValueError for a window that the text or the context is too short for; and as Session.decode(), OSError.
    """
    if window > model.context:
        raise ValueError(f"a window of {window} tokens is longer than the context, {model.context}")
    config = model.config
    windows = cut(tokens, window, model.tokenizer.bos_id if model.tokenizer.add_bos else None)
    groups = list(layer_groups(config, products))
    written = list(tensors(config, products))
    with ImportanceWriter.to(target, written, [dataset], len(windows), window) as writer:
        for number, layers in enumerate(groups):
            measured = LayerSums(config, layers, products)
            inputs = MatrixInputs(config, min(PIECE, window), layers.start, len(layers))
            with model.capturing(inputs) as chosen:
                for i, ids in enumerate(windows):
                    if progress:
                        progress(number * len(windows) + i, len(groups) * len(windows), "windows")
                    for states in run(model, ids):
                        measured.add(inputs, np.frombuffer(chosen.pop(), np.int32), states)
            for name, values in measured.tensors():
                writer.write(name, values)
    if progress:
        progress(len(groups) * len(windows), len(groups) * len(windows), "windows")


def layer_groups(config: ModelConfig, products: bool) -> Iterator[range]:
    """Layers whose sums fit into PRODUCT_BYTES together."""
    width = config.n_heads * config.head_dim
    each = 4 * (2 * config.d_model**2 + width**2 + config.n_experts * config.d_ffn**2)
    count = max(1, PRODUCT_BYTES // each) if products else config.n_layers
    for first in range(0, config.n_layers, count):
        yield range(first, min(first + count, config.n_layers))


def run(model: SmallThinker, ids: Ids) -> Iterator[npt.NDArray[np.float32]]:
    """Decodes a window in pieces of at least two tokens; gives the head's input [n, d] of each."""
    with model.session(len(ids)) as session:
        for piece in np.array_split(ids, -(-len(ids) // PIECE)):
            states = np.empty((len(piece), model.config.d_model), np.float32)
            session.decode(piece, states=states)
            yield states


def tensors(config: ModelConfig, products: bool) -> Iterator[Tensor]:
    """What the file has."""
    d, width, f, experts = config.d_model, config.n_heads * config.head_dim, config.d_ffn, config.n_experts
    for layer in range(config.n_layers):
        roles = [*((role, d, 1) for role in ATTENTION), ("attn_output", width, 1)]
        roles += [*((role, d, experts) for role in GATES), ("ffn_down_exps", f, experts)]
        for role, columns, matrices in roles:
            yield Tensor(tensor_name(role, layer) + SQUARES, (matrices, columns))
            yield Tensor(tensor_name(role, layer) + COUNTS, (matrices, 1))
            if products and role not in (*ATTENTION[1:], *GATES[1:]):
                shape = (experts, f, f) if role == "ffn_down_exps" else (columns, columns)
                yield Tensor(tensor_name(role, layer) + PRODUCTS, shape)
    yield Tensor(HEAD + SQUARES, (1, d))
    yield Tensor(HEAD + COUNTS, (1, 1))
    if products:
        yield Tensor(HEAD + PRODUCTS, (d, d))


class LayerSums:
    """Sums over tokens of some layers, and of the head with the last one."""

    def __init__(self, config: ModelConfig, layers: range, products: bool) -> None:
        self._config, self._layers, self._products = config, layers, products
        self._sums: Sums = {}

    def _add(self, name: str, values: npt.NDArray[np.floating]) -> None:
        if name in self._sums:
            self._sums[name] += values
        else:
            self._sums[name] = values

    def add(self, inputs: MatrixInputs, chosen: npt.NDArray[np.int32], head: npt.NDArray[np.float32]) -> None:
        """A piece of n tokens: what their layers' matrices were multiplied with, their experts, the head's input."""
        config, n = self._config, len(head)
        routing = chosen.reshape(n, config.n_layers, config.n_experts_used)
        for i, layer in enumerate(self._layers):
            experts = routing[:, layer]
            self._dense(tensor_name("attn_q", layer), inputs.attention[i, :n])
            self._dense(tensor_name("attn_output", layer), inputs.output[i, :n])
            used = np.zeros((n, config.n_experts), np.float64)
            np.put_along_axis(used, experts, 1, axis=1)
            gate, down = tensor_name("ffn_gate_exps", layer), tensor_name("ffn_down_exps", layer)
            x, neurons = inputs.ffn[i, :n], inputs.neurons[i, :n].reshape(-1, config.d_ffn)
            self._add(gate + SQUARES, used.T @ np.square(x, dtype=np.float64))
            self._add(gate + COUNTS, used.sum(0)[:, None])
            self._add(down + COUNTS, used.sum(0)[:, None])
            squares, moments = np.zeros((config.n_experts, config.d_ffn)), []
            for expert in range(config.n_experts):
                own = neurons[experts.reshape(-1) == expert]
                squares[expert] = np.square(own, dtype=np.float64).sum(0)
                if self._products:
                    moments.append(own.T @ own)
            self._add(down + SQUARES, squares)
            if self._products:
                self._add(gate + PRODUCTS, x.T @ x)
                self._add(down + PRODUCTS, np.stack(moments))
        if self._layers.stop == config.n_layers:
            self._dense(HEAD, head)

    def _dense(self, name: str, x: npt.NDArray[np.float32]) -> None:
        self._add(name + SQUARES, np.square(x, dtype=np.float64).sum(0)[None, :])
        self._add(name + COUNTS, np.array([[float(len(x))]]))
        if self._products:
            self._add(name + PRODUCTS, x.T @ x)

    def tensors(self) -> Iterator[tuple[str, npt.NDArray[np.floating]]]:
        """By the names of the file: matrices with the same input have the same sums."""
        for name, values in self._sums.items():
            yield name, values
            for roles in (ATTENTION, GATES):
                for other in roles[1:]:
                    if f".{roles[0]}." in name and not name.endswith(PRODUCTS):
                        yield name.replace(roles[0], other), values
