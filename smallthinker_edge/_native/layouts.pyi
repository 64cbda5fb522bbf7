from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

class TypeInfo(NamedTuple):
    number: int
    columns: int
    bytes: int
    tiled: bool
    sparse: bool

TYPES: dict[str, TypeInfo]
OTHER_TYPES: dict[int, str]
EXPERT_LAYOUTS: tuple[str, ...]
KV_TYPES: dict[str, tuple[int, int]]

def kv_kinds(head_dim: int, windows: bool) -> list[str]: ...

class Expert:
    def __init__(self, d: int, f: int, types: Sequence[int], transposed: bool) -> None: ...
    @property
    def sizes(self) -> tuple[int, int, int]: ...
    @property
    def layout(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    def pack(self, gate: Bytes, up: Bytes, down: Bytes, blob: Bytes) -> None: ...
    def unpack(self, blob: Bytes, gate: Bytes, up: Bytes, down: Bytes) -> None: ...
