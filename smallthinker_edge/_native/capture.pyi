import numpy as np
import numpy.typing as npt

from smallthinker_edge.files.config import ModelConfig

class MatrixInputs:
    attention: npt.NDArray[np.float32]
    output: npt.NDArray[np.float32]
    ffn: npt.NDArray[np.float32]
    neurons: npt.NDArray[np.float32]
    def __init__(self, config: ModelConfig, tokens: int, first: int, layers: int) -> None: ...
