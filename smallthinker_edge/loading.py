"""Puts a GGUF file's tensors into an Engine, which reads them piece by piece: the peak is the packed model and 32 MiB.

Called by opening.py. It knows tensor names and types, and nothing of what is computed. A predictor of the LM head is
read whole before, to be looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import numpy as np

from smallthinker_edge._native.engine import Engine
from smallthinker_edge._native.layouts import TYPES
from smallthinker_edge.errors import ModelFormatError
from smallthinker_edge.files.config import ModelConfig, ModelFile, tensor_name
from smallthinker_edge.files.gguf import StoredBytes

Progress = Callable[[int, int], object]  # layers that are loaded, and all
Matrix = tuple[int, StoredBytes]
UNREAD = 64 << 20  # bytes that the engine is told of before it reads them


def forget(source: ModelFile, name: str) -> None:
    """Takes a tensor's pages out of the system's cache, unless its file is closed already."""
    with suppress(ValueError):
        source.forget(name)


class Loader:
    """One pass over a file's tensors into an engine made for the same config.

    Args:
        paged: leave the experts out. predictor: take the LM head's predictor too, where there is one.
    """

    def __init__(
        self, gguf: ModelFile, config: ModelConfig, engine: Engine, *, paged: bool = False, predictor: bool = False
    ) -> None:
        self.gguf = gguf
        self.config = config
        self.engine = engine
        self.paged = paged
        self.predictor = predictor and config.lm_head_predictor_size > 0

    def load(self, progress: Progress | None = None) -> None:
        """Fills the engine. Raises OutOfMemoryError, ModelFormatError for a predictor that is not made of numbers or a
        file that was cut short meanwhile, OSError where it cannot be read. progress: called with (layers done, all)."""
        if self.predictor:
            self._load_predictor(tensor_name("lm_head_profiler"))
        embedding = tensor_name("token_embd")
        number, data = self._matrix(embedding)
        norm = self.gguf.stored(tensor_name("output_norm"))
        if self.config.tied:
            self.engine.weights.set_embedding(number, data)
            self.engine.weights.set_head(norm)
        else:
            self.engine.weights.set_embedding_rows(number, data.file.fileno(), data.offset)
            self.engine.weights.set_head(norm, *self._matrix(tensor_name("output")))
        loaded, layers = 0, self.config.n_layers
        for layer in range(layers):
            self._load_layer(layer)
            if self.engine.weights.unread >= UNREAD or layer + 1 == layers:
                self.engine.load()
                if progress is not None:
                    for done in range(loaded, layer + 1):
                        progress(done + 1, layers)
                loaded = layer + 1
        if not self.config.tied:
            self.gguf.expect_rows(embedding)
            if self.paged:  # there is a budget to keep to
                self.engine.forget_rows = partial(forget, self.gguf, embedding)  # which does not refer to the engine

    def _load_predictor(self, name: str) -> None:
        """A score that is not a number would silence its row for good, so each scale (or weight) is looked at."""
        data = self.gguf.data(name)
        kind = self.gguf.tensors[name].type
        if kind in ("Q4_0", "Q8_0"):
            scales = data.reshape(-1, TYPES[kind].bytes)[:, :2]
            exponents = np.ascontiguousarray(scales).view("<u2") & 0x7C00
            broken = exponents == 0x7C00
        elif kind == "F32":
            broken = data.view("<u4") & 0x7F800000 == 0x7F800000
        else:
            largest = 0x7C00 if kind == "F16" else 0x7F80
            broken = data.view("<u2") & largest == largest
        if broken.any():
            raise ModelFormatError("holds scales or weights that are not finite", path=self.gguf.path, field=name)
        self.engine.weights.set_predictor(*self._matrix(name))

    def _load_layer(self, layer: int) -> None:
        def name(role: str) -> str:
            return tensor_name(role, layer)

        norms = self.gguf.stored(name("attn_norm")), self.gguf.stored(name("ffn_norm"))
        router = self.gguf.stored(name("ffn_gate_inp"))
        q, k, v = self._query_key_value(layer)
        self.engine.weights.set_layer(layer, *norms, router, q, k, v, self._matrix(name("attn_output")))
        if self.paged:
            return
        roles = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
        self.engine.weights.set_experts(layer, *(self._matrix(name(role)) for role in roles))

    def _matrix(self, name: str) -> tuple[int, StoredBytes]:
        return TYPES[self.gguf.tensors[name].type].number, self.gguf.stored(name)

    def _query_key_value(self, layer: int) -> Sequence[Matrix]:
        """q, k and v, cut out of the fused tensor where the file has that."""
        fused = tensor_name("attn_qkv", layer)
        if fused not in self.gguf.tensors:
            return [self._matrix(tensor_name(role, layer)) for role in ("attn_q", "attn_k", "attn_v")]
        number, data = self._matrix(fused)
        config = self.config
        row = data.size // self.gguf.tensors[fused].shape[1]
        cuts = np.cumsum([config.n_heads, config.n_kv_heads, config.n_kv_heads]) * config.head_dim * row
        starts = (0, cuts[0], cuts[1])
        return [(number, data.part(int(a), int(b))) for a, b in zip(starts, cuts, strict=True)]
