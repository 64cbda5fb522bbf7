from typing import Any

import numpy as np
import numpy.typing as npt

TYPES: dict[str, int]

def quantize(type: str, source: npt.NDArray[Any]) -> npt.NDArray[np.uint8]: ...
def quantize_rows(
    source: npt.NDArray[Any], weight: npt.NDArray[np.float32], feedback: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.uint8]: ...
