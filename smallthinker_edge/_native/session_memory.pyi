from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from smallthinker_edge.files.config import ModelConfig

class SessionMemory:
    config: ModelConfig
    batch: int
    in_use: int
    aside: int
    limit: int | None
    relieve: Callable[[], bool] | None
    def __init__(self, config: ModelConfig, batch: int) -> None: ...

def new_logits(memory: SessionMemory, rows: int, width: int) -> npt.NDArray[np.float32]: ...
