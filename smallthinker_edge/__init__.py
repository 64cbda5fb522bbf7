"""smallthinker_edge: SmallThinker mixture-of-experts language models on small machines, as a library.

from smallthinker_edge import SmallThinker
with SmallThinker("model.gguf") as model:
    print(model.generate("Once upon a time", max_tokens=50).text)
"""

import sys

from smallthinker_edge._native.sampler import Sampler
from smallthinker_edge.errors import (
    ChatTemplateError,
    ContextFull,
    DecodeCancelled,
    ExpertReadError,
    GrammarError,
    HubError,
    MemoryBudgetError,
    MissingExtra,
    ModelFormatError,
    NotFiniteError,
    OpenedBeforeFork,
    OutOfMemoryError,
    SessionBusy,
    SessionFormatError,
    SmallThinkerError,
)
from smallthinker_edge.generation.choice import TokenLogprobs
from smallthinker_edge.generation.stream import GenerationResult, TextStream, Timings
from smallthinker_edge.model import SmallThinker
from smallthinker_edge.options import CancelSignal, Constraint, GenerationOptions, LogitsProcessor, TokenSampler
from smallthinker_edge.session import Session

# Free-threaded Python has turned its lock on for the modules above, unless it was told not to. What several threads
# change (locks.pyx, owners of KV blocks, bytes of sessions) relies on it.
if not getattr(sys, "_is_gil_enabled", lambda: True)():
    raise ImportError("smallthinker_edge needs Python's global lock: run it without PYTHON_GIL=0 and without -X gil=0")

__version__ = "0.1.0"

__all__ = [
    "CancelSignal",
    "ChatTemplateError",
    "Constraint",
    "ContextFull",
    "DecodeCancelled",
    "ExpertReadError",
    "GenerationOptions",
    "GenerationResult",
    "GrammarError",
    "HubError",
    "LogitsProcessor",
    "MemoryBudgetError",
    "MissingExtra",
    "ModelFormatError",
    "NotFiniteError",
    "OpenedBeforeFork",
    "OutOfMemoryError",
    "Sampler",
    "Session",
    "SessionBusy",
    "SessionFormatError",
    "SmallThinker",
    "SmallThinkerError",
    "TextStream",
    "Timings",
    "TokenLogprobs",
    "TokenSampler",
]
