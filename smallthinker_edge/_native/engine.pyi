from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from smallthinker_edge._native.capture import MatrixInputs
from smallthinker_edge._native.kv_cache import KVCache
from smallthinker_edge._native.paging import ExpertPaging
from smallthinker_edge._native.session_memory import SessionMemory
from smallthinker_edge._native.weights import ModelWeights
from smallthinker_edge.files.config import ModelConfig
from smallthinker_edge.options import CancelSignal

class Engine:
    weights: ModelWeights
    memory: SessionMemory
    paging: ExpertPaging | None
    threads: int
    routing: list[bytes] | None
    capture: MatrixInputs | None
    forget_rows: Callable[[], None] | None
    def __init__(
        self,
        config: ModelConfig,
        threads: int,
        kernels: str | None = ...,
        batch: int = ...,
        exact: bool = ...,
        cpus: Sequence[int] | None = ...,
        predictor: bool = ...,
    ) -> None: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def bytes(self) -> int: ...
    @property
    def threads_in_use(self) -> int: ...
    @property
    def buffer_bytes(self) -> int: ...
    @property
    def head_share(self) -> float | None: ...
    def load(self) -> None: ...
    def page_experts(self, paging: ExpertPaging, types: list[tuple[int, int, int]]) -> None: ...
    def keep_to(self, aside: int, limit: int | None, context: int, kv: str) -> None: ...
    def decode(
        self,
        cache: KVCache,
        tokens: npt.NDArray[np.int32],
        logits: npt.NDArray[np.float32] | None,
        head_threshold: float | None = ...,
        cancel: CancelSignal | None = ...,
        allowed: npt.NDArray[np.uint32] | None = ...,
    ) -> None: ...
    def final_states(self, out: npt.NDArray[np.float32]) -> None: ...
    def times(self) -> dict[str, float]: ...
    def paging_stats(self) -> dict[str, int | float | bool]: ...
    def check_usable(self) -> None: ...
    def close(self) -> None: ...
