from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

Q8X4_BYTES: int
ACTIVE_BYTES: int
FFN_PART: int
ACTIVE: np.dtype[Any]
FIRED: np.dtype[Any]

READ_STEP: int
KERNELS: dict[str, tuple[int, str, int]]

def tables() -> list[str]: ...
def kv_head_bytes(hd: int) -> int: ...
def pack_tile16(type: int, src: Bytes, rows: int, cols: int) -> Bytes: ...
def unpack_tile16(type: int, src: Bytes, rows: int, cols: int) -> Bytes: ...
def pack_rows(src: Bytes, rows: int, cols: int, back: bool = ...) -> Bytes: ...
def pack_down(src: Bytes, d: int, f: int, transposed: bool = ...) -> Bytes: ...
def unpack_down(src: Bytes, d: int, f: int, transposed: bool = ...) -> Bytes: ...
def multiply(g: Floats, up: Floats) -> Any: ...

class Table:
    """Has a method for every kernel, which tests call with arrays of their own; see kernels.pyx."""

    name: str
    def __init__(self, name: str) -> None: ...
    def activate(self, g: Floats, up: Floats) -> Any: ...
    def __getattr__(self, kernel: str) -> Callable[..., Any]: ...

def allocate(size: int) -> Bytes: ...

class Timer:
    threads: int
    def __init__(self, table: str, threads: int) -> None: ...
    @staticmethod
    def kernels() -> list[str]: ...
    @staticmethod
    def item_bytes(kernel: str, rows: int, cols: int, tokens: int = ...) -> int: ...
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
