from typing import Protocol

import numpy as np
import numpy.typing as npt

from smallthinker_edge.files.config import ModelConfig

Array = npt.NDArray[np.uint8]

class Slices(Protocol):
    @property
    def size(self) -> int: ...
    def __getitem__(self, part: slice, /) -> Array: ...

Matrix = tuple[int, Slices | Array]
Vector = npt.NDArray[np.float32]

class ModelWeights:
    config: ModelConfig
    exact: bool
    def __init__(self, config: ModelConfig, kernels: str | None = ..., exact: bool = ...) -> None: ...
    @property
    def kernels(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    def set_embedding(self, type: int, data: Slices | Array) -> None: ...
    def set_embedding_rows(self, type: int, fd: int, offset: int) -> None: ...
    def set_predictor(self, type: int, data: Slices | Array) -> None: ...
    def set_head(self, norm: Vector, type: int | None = ..., data: Slices | Array | None = ...) -> None: ...
    def set_layer(
        self,
        l: int,
        attn_norm: Vector,
        ffn_norm: Vector,
        router: Vector,
        q: Matrix,
        k: Matrix,
        v: Matrix,
        o: Matrix,
    ) -> None: ...
    def set_absent(self, l: int, absent: npt.NDArray[np.bool_]) -> None: ...
    def set_experts(self, l: int, gate: Matrix, up: Matrix, down: Matrix) -> None: ...
