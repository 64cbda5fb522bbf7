from typing import Any

import numpy as np
import numpy.typing as npt

TYPES: dict[str, int]

def quantize(type: str, source: npt.NDArray[Any]) -> npt.NDArray[np.uint8]: ...
