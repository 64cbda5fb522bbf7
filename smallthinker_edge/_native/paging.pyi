import os

import numpy as np
import numpy.typing as npt

from smallthinker_edge.files.config import ModelConfig

class ExpertPaging:
    slots: int
    def __init__(
        self,
        config: ModelConfig,
        path: str | os.PathLike[str],
        offsets: npt.NDArray[np.int64],
        blob_bytes: int,
        slots: int,
        *,
        io_threads: int = ...,
        ahead: int = ...,
        piece: int = ...,
        give_way_ns: int = ...,
        sessions: int | None = ...,
        lend: bool = ...,
        sums: npt.NDArray[np.uint32] | None = ...,
        cached: bool = ...,
    ) -> None: ...
    @property
    def bytes(self) -> int: ...
    def stats(self) -> dict[str, int | float | bool]: ...
    def uses(self, uses: npt.NDArray[np.float64]) -> None: ...
    def warm(self, ids: npt.NDArray[np.int32], uses: npt.NDArray[np.float64]) -> None: ...
