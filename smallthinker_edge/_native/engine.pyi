from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from smallthinker_edge.files.config import ModelConfig
from smallthinker_edge.session import CancelSignal

Matrix = tuple[int, npt.NDArray[np.uint8]]

class KVCache:
    position: int
    context: int
    kv: str
    lost: int
    ring_blocks: int
    def __init__(self, engine: Engine, context: int, kv: str = ...) -> None: ...
    @property
    def bytes(self) -> int: ...
    def room(self) -> int: ...
    def rewindable(self, position: int) -> bool: ...
    def rewind(self, position: int) -> None: ...
    def fork(self) -> KVCache: ...
    @property
    def tokens(self) -> npt.NDArray[np.int32]: ...
    def blocks(self) -> list[npt.NDArray[np.uint8]]: ...
    def restore(self, tokens: npt.NDArray[np.int32], lost: int) -> None: ...

def kv_bytes(config: ModelConfig, context: int, kv: str = ...) -> int: ...
def part_bytes(config: ModelConfig, batch: int) -> int: ...

class Engine:
    config: ModelConfig
    threads: int
    exact: bool
    routing: list[bytes] | None
    forget_rows: Callable[[], None] | None
    def __init__(
        self,
        config: ModelConfig,
        threads: int,
        kernels: str | None = ...,
        batch: int = ...,
        exact: bool = ...,
        cpus: Sequence[int] | None = ...,
    ) -> None: ...
    @property
    def kernels(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    def set_embedding(self, type: int, data: npt.NDArray[np.uint8], view: bool) -> None: ...
    def set_predictor(self, type: int, data: npt.NDArray[np.uint8]) -> None: ...
    def set_head(
        self, norm: npt.NDArray[np.float32], type: int | None = ..., data: npt.NDArray[np.uint8] | None = ...
    ) -> None: ...
    def set_layer(
        self,
        l: int,
        attn_norm: npt.NDArray[np.float32],
        ffn_norm: npt.NDArray[np.float32],
        router: npt.NDArray[np.float32],
        q: Matrix,
        k: Matrix,
        v: Matrix,
        o: Matrix,
    ) -> None: ...
    def set_experts(self, l: int, gate: Matrix, up: Matrix, down: Matrix) -> None: ...
    def decode(
        self,
        cache: KVCache,
        tokens: npt.NDArray[np.int32],
        logits: npt.NDArray[np.float32] | None,
        head_threshold: float | None = ...,
        cancel: CancelSignal | None = ...,
    ) -> None: ...
    def close(self) -> None: ...
    def check_usable(self) -> None: ...
    @property
    def head_share(self) -> float | None: ...
    def final_states(self, out: npt.NDArray[np.float32]) -> None: ...
    def page_experts(
        self,
        path: str,
        offsets: npt.NDArray[np.int64],
        blob_bytes: int,
        slots: int,
        types: list[tuple[int, int, int]],
        *,
        io_threads: int = ...,
        policy: str | None = ...,
        ahead: int = ...,
        piece: int = ...,
        lent: int = ...,
        sums: npt.NDArray[np.uint32] | None = None,
        cached: bool = ...,
    ) -> None: ...
    def expert_uses(self, uses: npt.NDArray[np.float64]) -> bool: ...
    def warm(self, ids: npt.NDArray[np.int32], uses: npt.NDArray[np.float64]) -> None: ...
    def pager_stats(self) -> dict[str, int | float | bool] | None: ...
