from smallthinker_edge.files.config import ModelConfig

def buffer_sizes(
    config: ModelConfig,
    batch: int,
    threads: int,
    *,
    predictor: bool = ...,
    q8: bool = ...,
    row_experts: bool = ...,
) -> dict[str, int]: ...
def partial_sizes(config: ModelConfig, context: int, threads: int) -> dict[str, int]: ...
