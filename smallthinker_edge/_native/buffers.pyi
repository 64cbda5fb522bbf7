from collections.abc import Collection

from smallthinker_edge.files.config import ModelConfig

def buffer_sizes(
    config: ModelConfig,
    batch: int,
    threads: int,
    *,
    predictor: bool = ...,
    q8: bool = ...,
    experts: Collection[str] = ...,
) -> dict[str, int]: ...
def partial_sizes(config: ModelConfig, context: int, threads: int) -> dict[str, int]: ...
