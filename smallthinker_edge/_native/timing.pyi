from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

READ_STEP: int
KERNELS: dict[str, tuple[int, str, int]]

def allocate(size: int) -> Bytes: ...

class Timer:
    threads: int
    def __init__(self, table: str, threads: int) -> None: ...
    @staticmethod
    def kernels() -> list[str]: ...
    @staticmethod
    def line_bytes(kernel: str, cols: int) -> int: ...
    @staticmethod
    def item_bytes(kernel: str, rows: int, cols: int, tokens: int = ..., transposed: bool = ...) -> int: ...
    def run(
        self,
        kernel: str,
        data: Bytes,
        stride: int,
        first: int,
        count: int,
        *,
        rows: int = ...,
        cols: int = ...,
        tokens: int = ...,
        index: npt.NDArray[np.int32] | None = ...,
        active: npt.NDArray[Any] | None = ...,
        transposed: bool = ...,
        streams: int = ...,
        ahead: int = ...,
    ) -> float: ...
    def ffn(
        self,
        data: Bytes,
        d: int,
        f: int,
        used: int,
        gate: Floats,
        *,
        whole: bool,
        first: int,
        tokens: int,
        transposed: bool = ...,
    ) -> float: ...
