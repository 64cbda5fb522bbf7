"""The options of a generation, each one once: name, type, default, range, meaning, and how the command line spells it.

generate(), stream(), chat() and stream_chat() take GenerationOptions; the Sampler and the command line read OPTIONS. It
computes nothing and knows no model.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypedDict, get_args, get_type_hints

import numpy as np
import numpy.typing as npt

MOST_SPECULATED = 64
MOST_LOGPROBS = 20
# A bias, then a penalty of this size leave float32 logits finite.
LARGEST = 1e15


class CancelSignal(Protocol):
    """Anything with is_set(), such as threading.Event."""

    def is_set(self) -> bool: ...


class TokenSampler(Protocol):
    """What chooses tokens: a Sampler, or an object of your own for the `sampler` of generate() and stream()."""

    def sample(self, logits: npt.NDArray[np.float32], history: Sequence[int], /) -> int:
        """The next id, by the logits [V] of the last of the ids so far; logits may be changed in place."""


class Constraint(Protocol):
    """What only lets some texts through, such as a grammar. Made for one generation."""

    def allowed(self) -> npt.NDArray[np.uint32]:
        """Which tokens may come next, as bits: token t is bit t % 32 of word t // 32 of [ceil(V / 32)]."""

    def accept(self, token: int, /) -> None:
        """A token was chosen; it was allowed."""

    def forced(self) -> Sequence[int]:
        """The tokens that must come next, as far as there is no choice; the caller accepts each."""


# Tokens so far, int64 [n], and the logits of the next one, float32 [V]; returns those to use.
LogitsProcessor = Callable[[npt.NDArray[np.int64], npt.NDArray[np.float32]], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Option:
    """One option of a generation.

    Attributes:
        default: what None and an absent option stand for.
        kind: "int", "float", "choice", "texts" (a string or a list of them), "bias" ({token: number}), "object",
            "call" (a function), "calls" (a function or a list of them), "flag", "text", "mapping", "mappings" (a list
            of them) or "any".
        help: what it does, for people; "" where the command line does not have it.
        low, high: smallest and largest value of a number, None for no bound; above_low: low itself is too small.
        choices: of a "choice".
        metavar: what stands for a value in the command line's help.
        sampling: it belongs to the Sampler.
        attribute: what an "object" must have.
    """

    default: Any
    kind: str
    help: str = ""
    low: float | None = None
    high: float | None = None
    above_low: bool = False
    choices: tuple[str, ...] = ()
    metavar: str = "N"
    sampling: bool = False
    attribute: str = ""

    def checked(self, name: str, value: Any) -> Any:
        """The value as the library uses it; None gives the default. TypeError or ValueError, naming the option."""
        if value is None:
            return self.default
        return _CHECKS[self.kind](self, name, value)

    @property
    def range(self) -> str:
        """The allowed numbers in words: "in (0, 1]", ">= 1"."""
        if self.high is None:
            return f"{'>' if self.above_low else '>='} {self.low:g}"
        return f"in {'(' if self.above_low else '['}{self.low:g}, {self.high:g}]"


class CompletionOptions(TypedDict, total=False):
    """The options that every call takes by name; None, as clients send null, is the default.

    max_tokens: most tokens to sample; fewer where the context ends first.
    stop: a string, or several, that end the text; they are not part of it.
    cancel: a threading.Event or the like; when it is set the generation ends, in a long prompt too: it is looked at
        about every 50 ms, like Ctrl-C.
    temperature, top_k, top_p, min_p, repetition_penalty, repetition_window, presence_penalty, frequency_penalty,
        dry_multiplier, dry_base, dry_allowed_length, dry_window, seed, logit_bias: see Sampler. The default is greedy.
    dry_breakers: texts that end a repetition: no token that contains one counts as repeated.
    timeout: seconds after which the generation ends, as if cancelled, with finish_reason "timeout".
    logits_processors: a function, or a list of them, called in turn before every token is chosen with the ids so far,
        int64 [n], and float32 logits [V], which may be changed in place; each returns the logits to use.
    constraint: an options.Constraint, such as a grammar. Every token keeps to it; runs of tokens that it leaves no
        choice about are decoded together. Speculation does not guess then.
    shared_prefix: how many of the prompt's first tokens other prompts will begin with too: where the model has a folder
        for prefixes, they are saved there. Chats find that out by themselves.
    on_prompt: called with (tokens of the prompt that are computed, all of them), every 512 tokens.
    on_text: called with each piece of the text.
    overflow: what to do at the end of the context. "error": a prompt that is too long raises, an answer ends with
        "length". "shift": the oldest turns are dropped, never the system prompt nor the newest turn, and the rest is
        computed again (text without ChatML turns loses its oldest tokens).
    speculate: longest guess, in tokens, of what comes next where the text repeats itself; 0 never guesses. Tokens are
        the same ones, also when sampling with a seed. It guesses only where that promises speed.
    sampler: chooses every token instead of temperature to logit_bias: an object whose sample(logits, tokens) gets all
        logits, float32 [V], and the ids so far, prompt included, and returns the next id.
    """

    max_tokens: Annotated[int | None, Option(256, "int", "most tokens to make", low=1)]
    stop: Annotated[
        str | Sequence[str] | None, Option((), "texts", "end before this text; may be repeated", metavar="TEXT")
    ]
    cancel: Annotated[CancelSignal | None, Option(None, "object", attribute="is_set")]
    temperature: Annotated[float | None, Option(0.0, "float", "0 is greedy", low=0, metavar="T", sampling=True)]
    top_k: Annotated[
        int | None, Option(0, "int", "keep the K likeliest tokens; 0 keeps all", low=0, metavar="K", sampling=True)
    ]
    top_p: Annotated[
        float | None,
        Option(
            1.0, "float", "keep the likeliest tokens that make up P", low=0, high=1, above_low=True, metavar="P",
            sampling=True,
        ),
    ]  # fmt: skip
    min_p: Annotated[
        float | None,
        Option(0.0, "float", "drop tokens below P times the likeliest one", low=0, high=1, metavar="P", sampling=True),
    ]
    repetition_penalty: Annotated[
        float | None, Option(1.0, "float", "1 is none", low=1 / LARGEST, high=LARGEST, metavar="R", sampling=True)
    ]
    repetition_window: Annotated[
        int | None, Option(64, "int", "newest tokens the penalty looks at", low=0, sampling=True)
    ]
    presence_penalty: Annotated[
        float | None,
        Option(0.0, "float", "against tokens sampled before", low=-100, high=100, metavar="P", sampling=True),
    ]
    frequency_penalty: Annotated[
        float | None,
        Option(0.0, "float", "the same, each time they were", low=-100, high=100, metavar="P", sampling=True),
    ]
    dry_multiplier: Annotated[
        float | None,
        Option(0.0, "float", "against repeated passages; 0 is none", low=0, high=LARGEST, metavar="M", sampling=True),
    ]
    dry_base: Annotated[
        float | None,
        Option(1.75, "float", "growth with each token repeated", low=1, high=LARGEST, metavar="B", sampling=True),
    ]
    dry_allowed_length: Annotated[
        int | None, Option(2, "int", "tokens that may be repeated", low=0, high=LARGEST, sampling=True)
    ]
    dry_window: Annotated[int | None, Option(4096, "int", "newest tokens that DRY looks at", low=0, sampling=True)]
    dry_breakers: Annotated[
        str | Sequence[str] | None,
        Option(("\n", ":", '"', "*"), "texts", "ends a passage for DRY; may be repeated", metavar="TEXT"),
    ]
    seed: Annotated[int | None, Option(None, "int", "same seed, same text", low=0, high=2**64 - 1, sampling=True)]
    logit_bias: Annotated[
        Mapping[int, float] | None, Option({}, "bias", "may be repeated", metavar="ID=BIAS", sampling=True)
    ]
    overflow: Annotated[
        str | None,
        Option("error", "choice", "at the context's end; shift drops old turns", choices=("error", "shift")),
    ]
    speculate: Annotated[
        int | None, Option(0, "int", "guess up to N repeated tokens; same text, faster", low=0, high=MOST_SPECULATED)
    ]
    sampler: Annotated[TokenSampler | None, Option(None, "object", attribute="sample")]
    timeout: Annotated[
        float | None, Option(None, "float", "end after so long", low=0, above_low=True, metavar="SECONDS")
    ]
    logits_processors: Annotated[LogitsProcessor | Sequence[LogitsProcessor] | None, Option((), "calls")]
    constraint: Annotated[Constraint | None, Option(None, "object", attribute="allowed")]
    shared_prefix: Annotated[int | None, Option(0, "int", low=0)]
    on_prompt: Annotated[Callable[[int, int], object] | None, Option(None, "call")]
    on_text: Annotated[Callable[[str], object] | None, Option(None, "call")]


class GenerationOptions(CompletionOptions, total=False):
    """What generate(), stream(), chat() and stream_chat() take by name.

    logprobs: for each token of the answer, its log probability and those of so many likeliest ones, by the model's own
        logits: before penalties, processors and temperature. None: no probabilities; 0: of the tokens themselves.
    """

    logprobs: Annotated[int | None, Option(None, "int", low=0, high=MOST_LOGPROBS)]


OPTIONS: Mapping[str, Option] = {
    name: get_args(hint)[1] for name, hint in get_type_hints(GenerationOptions, include_extras=True).items()
}


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Every option by its name, those not given with their defaults.

    Raises TypeError for a name that is none or a value of a wrong type, ValueError for one out of range.
    """
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"there is no option {name!r}; there are {', '.join(OPTIONS)}")
    return {name: option.checked(name, options.get(name)) for name, option in OPTIONS.items()}


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _real(value: Any) -> float:
    if isinstance(value, bool | str | bytes):
        raise TypeError
    try:
        return float(value)
    except OverflowError:  # a whole number beyond doubles
        return math.inf if value > 0 else -math.inf


def _number(option: Option, name: str, value: Any) -> Any:
    try:
        number = _whole(value) if option.kind == "int" else _real(value)
    except (TypeError, ValueError):
        kind = "a whole number" if option.kind == "int" else "a number"
        raise TypeError(f"{name} must be {kind}, not {value!r:.60}") from None
    low, high = option.low, option.high
    low_enough = high is None or number <= high
    high_enough = low is None or (number > low if option.above_low else number >= low)
    if not (low_enough and high_enough) or (option.kind == "float" and not math.isfinite(number)):
        raise ValueError(f"{name} must be {option.range}, not {value!r:.60}")
    # Where there is no bound, what the core can count is as good as more.
    return min(number, 2**63 - 1) if option.kind == "int" and high is None else number


def _texts(option: Option, name: str, value: Any) -> list[str]:
    if not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a string or a list of them, not {value!r:.60}")
    texts = [value] if isinstance(value, str) else list(value)
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{name} must be a non-empty string or a list of them")
    return texts


def _bias(option: Option, name: str, value: Any) -> dict[int, float]:
    try:  # the names of a JSON object are strings: "7" is token 7
        pairs = dict(value).items()
        bias = {int(token) if isinstance(token, str) else _whole(token): _real(number) for token, number in pairs}
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be {{token: number}}, not {value!r:.60}") from None
    if min(bias, default=0) < 0 or not all(number <= LARGEST for number in bias.values()):
        raise ValueError(f"{name} must have tokens >= 0 and numbers <= {LARGEST:g}, not {value!r:.60}")
    return {token: number if number >= -LARGEST else -math.inf for token, number in bias.items()}


def _choice(option: Option, name: str, value: Any) -> str:
    if not isinstance(value, str) or value not in option.choices:
        raise ValueError(f"{name} must be one of {', '.join(option.choices)}, not {value!r:.60}")
    return str(value)


def _object(option: Option, name: str, value: Any) -> Any:
    if not callable(getattr(value, option.attribute, None)):
        raise TypeError(f"{name} must have {option.attribute}()")
    return value


def _call(option: Option, name: str, value: Any) -> Any:
    if not callable(value):
        raise TypeError(f"{name} must be a function, not {value!r:.60}")
    return value


def _calls(option: Option, name: str, value: Any) -> list[Any]:
    calls = list(value) if isinstance(value, Iterable) else [value]
    return [_call(option, name, call) for call in calls]


def _flag(option: Option, name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, not {value!r:.60}")
    return value


def _text(option: Option, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {value!r:.60}")
    return value


def _mapping(option: Option, name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be an object, not {value!r:.60}")
    return value


def _mappings(option: Option, name: str, value: Any) -> list[Mapping[str, Any]]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a list of objects, not {value!r:.60}")
    return [_mapping(option, f"each of {name}", item) for item in value]


def _any(option: Option, name: str, value: Any) -> Any:
    return value


_CHECKS = {
    "int": _number,
    "float": _number,
    "texts": _texts,
    "bias": _bias,
    "choice": _choice,
    "object": _object,
    "call": _call,
    "calls": _calls,
    "flag": _flag,
    "text": _text,
    "mapping": _mapping,
    "mappings": _mappings,
    "any": _any,
}
