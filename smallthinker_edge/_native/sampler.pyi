from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

class Sampler:
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    repetition_window: int
    presence_penalty: float
    frequency_penalty: float
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_window: int
    prompt_tokens: int
    breaker_tokens: frozenset[int]
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
        presence_penalty: float | None = ...,
        frequency_penalty: float | None = ...,
        dry_multiplier: float | None = ...,
        dry_base: float | None = ...,
        dry_allowed_length: int | None = ...,
        dry_window: int | None = ...,
        seed: int | None = ...,
        logit_bias: Mapping[int, float] | None = ...,
        prompt_tokens: int = ...,
        breaker_tokens: Iterable[int] = ...,
    ) -> None: ...
    def reset(self) -> None: ...
    def sample(self, logits: npt.NDArray[np.floating], history: Sequence[int] = ...) -> int: ...
