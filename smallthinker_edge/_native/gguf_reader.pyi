from collections.abc import Iterator, Sequence
from typing import overload

from smallthinker_edge._native.source import SourceFile

class StringArray(Sequence[str]):
    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __iter__(self) -> Iterator[str]: ...
    def raw(self, index: int) -> bytes: ...

class Part:
    path: str
    file: SourceFile
    metadata: dict[str, object]
    tensors: list[tuple[str, str, tuple[int, ...], int, int]]
    version: int
    index: int
    alignment: int
    key_ranges: dict[str, tuple[int, int]]
    header_end: int
    def __init__(
        self, path: str, index: int = ..., more_types: dict[int, tuple[str, int, int]] | None = ...
    ) -> None: ...
