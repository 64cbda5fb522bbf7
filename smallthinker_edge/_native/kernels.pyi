from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.uint16]

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
    name: str
    def __init__(self, name: str) -> None: ...
    def quantize(self, x: Floats, out: Bytes) -> None: ...
    def gemm(
        self,
        type: int,
        w: Bytes,
        rows: int,
        cols: int,
        t0: int,
        t1: int,
        x: Bytes,
        y: Floats,
        ldy: int,
        repeat: int = ...,
    ) -> None: ...
    def rows(self, w: Bytes, cols: int, index: npt.NDArray[np.int32], x: Bytes, out: Floats) -> None: ...
    def ffn(
        self,
        gate: Bytes,
        up: Bytes,
        down: Bytes,
        d: int,
        f: int,
        x: Bytes,
        g0: int,
        g1: int,
        y: Floats,
        transposed: bool = ...,
    ) -> None: ...
    def down(
        self, w: Bytes, d: int, f: int, c0: int, c1: int, active: npt.NDArray[Any], weight: float, y: Floats
    ) -> None: ...
    def down_transposed(
        self, w: Bytes, d: int, f: int, c0: int, c1: int, fired: npt.NDArray[Any], weight: float, y: Floats
    ) -> None: ...
    def activate(self, g: Floats, up: Floats) -> Any: ...
    def attention(
        self,
        q: Floats,
        k: Halves,
        v: Halves,
        scale: float,
        scores: Floats,
        acc: Floats,
        m: Floats,
        l: Floats,
        repeat: int = ...,
    ) -> None: ...
    def kv_store(self, keys: Floats, values: Floats, first: int, k: Bytes, v: Bytes) -> None: ...
    def attention_q8(
        self,
        q: Bytes,
        hd: int,
        k: Bytes,
        v: Bytes,
        p0: int,
        p1: int,
        scale: float,
        scores: Floats,
        acc: Floats,
        m: Floats,
        l: Floats,
        repeat: int = ...,
    ) -> None: ...
    def rmsnorm(self, x: Floats, w: Floats, eps: float, out: Floats) -> None: ...
    def dot(self, a: Floats, b: Floats) -> float: ...
    def axpy(self, a: float, x: Floats, y: Floats) -> None: ...
    def to_f16(self, x: Floats, out: Halves) -> None: ...
    def from_f16(self, x: Halves, out: Floats) -> None: ...
    def rope(self, v: Floats, cosine: Floats, sine: Floats) -> None: ...
    def top_k(self, x: Floats, ids: npt.NDArray[np.int32]) -> None: ...

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
