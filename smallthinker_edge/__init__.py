"""smallthinker_edge: SmallThinker mixture-of-experts language models on small machines, as a library.

from smallthinker_edge import SmallThinker
with SmallThinker("model.gguf") as model:
    print(model.generate("Once upon a time", max_tokens=50).text)
"""

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
