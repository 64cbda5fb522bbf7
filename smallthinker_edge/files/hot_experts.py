"""Which experts a packed model uses most, kept beside it (`model.stpk.hot`) so that the next start reads them first.

Called by opening.py and model.py. A profile changes what is in memory at the start, never a result; a damaged one is
ignored.
"""

from __future__ import annotations

import json
import logging
import os

import numpy as np
import numpy.typing as npt

from smallthinker_edge._native.paging import ExpertPaging
from smallthinker_edge.files.atomic import atomic_file
from smallthinker_edge.printable import printable

logger = logging.getLogger(__name__)

LARGEST, LONGEST_NUMBER = 1 << 10, 32  # bytes of a profile of no experts, and more for each
FORMAT = "smallthinker-hot-experts-1"
Uses = npt.NDArray[np.float64]


def profile_path(model_path: str | os.PathLike[str]) -> str:
    """Where the profile of a model file belongs."""
    return os.fspath(model_path) + ".hot"


def save_profile(path: str | os.PathLike[str], uses: Uses) -> None:
    """Writes recent uses of every expert [L * E] as JSON, atomically. Raises OSError."""
    content = {"format": FORMAT, "uses": [round(use, 3) for use in uses.tolist()]}
    with atomic_file(path) as file:
        file.write(0, json.dumps(content).encode())


def load_profile(path: str | os.PathLike[str], experts: int) -> Uses | None:
    """The uses of a profile of that many experts; None, with a warning, where the file holds something else."""
    try:
        with open(path, encoding="ascii") as file:
            content = json.loads(file.read(LARGEST + LONGEST_NUMBER * experts))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r:.40}")
        uses = np.array(content["uses"], np.float64)
        if uses.shape != (experts,) or not np.isfinite(uses).all() or (uses < 0).any():
            raise ValueError(f"not {experts} counts")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as problem:
        logger.warning("%s", printable(f"{os.fspath(path)} is no profile of this model and is ignored: {problem}"))
        return None
    return uses


def warm_up(paging: ExpertPaging, uses: Uses, every: bool, absent: npt.NDArray[np.bool_]) -> None:
    """Starts reading the most used experts into free slots; those never used only with `every`.

    absent: bool [L * E], those that the file lacks.
    """
    order = np.argsort(-uses, kind="stable")
    order = order[~absent[order]]
    if not every:
        order = order[uses[order] > 0]
    paging.warm(order.astype(np.int32), uses[order])
