import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import overload

import numpy as np
import numpy.typing as npt

@dataclass(frozen=True)
class TensorInfo:
    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    part: int

class StringArray(Sequence[str]):
    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __iter__(self) -> Iterator[str]: ...
    def raw(self, index: int) -> bytes: ...

class GGUFFile:
    path: str
    paths: list[str]
    version: int
    alignment: int
    metadata: dict[str, object]
    tensors: dict[str, TensorInfo]
    key_ranges: dict[str, tuple[int, int]]
    header_end: int
    def __init__(
        self, path: str | os.PathLike[str], more_types: dict[int, tuple[str, int, int]] | None = ...
    ) -> None: ...
    def __enter__(self) -> GGUFFile: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
    @property
    def closed(self) -> bool: ...
    def close(self) -> None: ...
    def data(self, name: str) -> npt.NDArray[np.uint8]: ...
    def release(self, name: str | None = None, cache: bool = False) -> None: ...
    def expect_rows(self, name: str) -> None: ...
