from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

class Sampler:
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    repetition_window: int
    seed: int
    logit_bias: dict[int, float]
    def __init__(
        self,
        *,
        temperature: float | None = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        min_p: float | None = ...,
        repetition_penalty: float | None = ...,
        repetition_window: int | None = ...,
        seed: int | None = ...,
        logit_bias: Mapping[int, float] | None = ...,
    ) -> None: ...
    def reset(self) -> None: ...
    def sample(self, logits: npt.NDArray[np.floating], history: Sequence[int] = ...) -> int: ...
