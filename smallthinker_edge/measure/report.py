"""A run of some prompts in figures: where the time goes, what the experts do, and what memory it takes.

Called by `smallthinker-edge report`, whose page page.py draws. It counts nothing itself: SmallThinker.stats() and
recording() do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from smallthinker_edge import GenerationResult, __version__
from smallthinker_edge.errors import ContextFull
from smallthinker_edge.measure.trace import traced
from smallthinker_edge.model import SmallThinker
from smallthinker_edge.options import GenerationOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

FORMAT = 1  # of the figures
# Parts of the computing, and the names that stats() has for their seconds.
PARTS = {
    "attention": "attention_seconds",
    "experts": "expert_seconds",
    "head": "head_seconds",
    "waiting": "wait_seconds",
    "other": "other_seconds",
}
USES = ("hits", "ahead_hits", "misses")  # of experts, by how they were found
COUNTS = (*USES, "read_bytes")
QUESTIONS = (
    "How does a refrigerator keep food cold?",
    "Write a short letter that thanks a neighbour for watering the plants.",
    "A train leaves at 9:40 and arrives at 13:05. How long does the journey take?",
)

Phase = Literal["prompt", "answer"]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Sample:
    """What happened between two looks at the model.

    Attributes:
        prompt: number of the prompt, from 0. phase: what was computed, the prompt or its answer.
        at: seconds from the start of the run to the end of the sample.
        tokens: how many were computed. seconds: of computing, by part; their sum is all of it.
        hits, ahead_hits, misses: uses of experts, see SmallThinker.stats(); read_bytes: of reads. All 0 where no expert
            is paged.
        rss_bytes: of the process, at the end. slots: experts that memory has room for then, 0 where none is paged.
    """

    prompt: int
    phase: Phase
    at: float
    tokens: int
    seconds: dict[str, float]
    hits: int
    ahead_hits: int
    misses: int
    read_bytes: int
    rss_bytes: int
    slots: int


@dataclass(frozen=True)
class Answer:
    """A prompt and what the model made of it. tokens: of the answer; reused_tokens: of the prompt, which cost nothing;
    seconds: until the first token of the answer, and from that to the last."""

    prompt: str
    text: str
    finish_reason: str
    prompt_tokens: int
    reused_tokens: int
    tokens: int
    prompt_seconds: float
    answer_seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class Report:
    """A run. experts: how often each was used, [L][E], by so many tokens; in every layer the uses add up to tokens * K.

    model, settings: what ran, and how. plan: bytes by name, see plan.Plan. peak_bytes: the process's high-water mark,
    loading included, None where the system does not tell it.
    """

    model: dict[str, Any]
    settings: dict[str, Any]
    plan: dict[str, int | str | None]
    peak_bytes: int | None
    answers: list[Answer]
    samples: list[Sample]
    tokens: int
    uses: list[list[int]]

    @property
    def paged(self) -> bool:
        """Whether experts are read from a file as they are needed."""
        return bool(self.plan["slots"])

    def times(self, phase: Phase) -> dict[str, float]:
        """Seconds of a phase's computing by part, "total" of all, and "tokens", how many were computed."""
        samples = [sample for sample in self.samples if sample.phase == phase]
        parts = {part: sum(sample.seconds[part] for sample in samples) for part in PARTS}
        return {**parts, "total": sum(parts.values()), "tokens": sum(sample.tokens for sample in samples)}

    def counts(self) -> dict[str, float]:
        """Uses of experts and bytes read in all, and hit_rate, the hits of all three."""
        sums = {name: sum(getattr(sample, name) for sample in self.samples) for name in COUNTS}
        uses = sum(sums[name] for name in USES)
        return {**sums, "hit_rate": sums["hits"] / uses if uses else 0.0}

    def figures(self) -> dict[str, Any]:
        """All of it for programs, as json.dumps() takes it."""
        return {
            "format": FORMAT,
            "version": __version__,
            "model": self.model,
            "settings": self.settings,
            "plan": self.plan,
            "peak_bytes": self.peak_bytes,
            "paged": self.paged,
            "paging": self.counts() if self.paged else None,
            "times": {phase: self.times(phase) for phase in ("prompt", "answer")},
            "experts": {"tokens": self.tokens, "uses": self.uses},
            "answers": [asdict(answer) for answer in self.answers],
            "samples": [asdict(sample) for sample in self.samples],
        }


class Watch:
    """Looks at a model while it runs. chunks: what recording() collects."""

    def __init__(self, model: SmallThinker, chunks: list[bytes]) -> None:
        self.samples: list[Sample] = []
        self._model, self._chunks = model, chunks
        self._token_bytes = model.config.n_layers * model.config.n_experts_used * 4
        self._started, self._seen = time.perf_counter(), 0
        self._last: dict[str, Any] = model.stats()

    def look(self, prompt: int, phase: Phase) -> None:
        """Takes a sample, where anything was computed since the last one."""
        new, self._seen = self._chunks[self._seen :], len(self._chunks)
        tokens = sum(map(len, new)) // self._token_bytes
        if not tokens:
            return
        last, now = self._last, dict[str, Any](self._model.stats())
        self._last = now
        counts: dict[str, Any] = {name: now.get(name, 0) - last.get(name, 0) for name in COUNTS}
        self.samples.append(
            Sample(
                prompt=prompt,
                phase=phase,
                at=time.perf_counter() - self._started,
                tokens=tokens,
                seconds={part: now[name] - last[name] for part, name in PARTS.items()},
                rss_bytes=now["rss_bytes"],
                slots=now.get("slots", 0),
                **counts,
            )
        )


def run_report(
    model: SmallThinker,
    prompts: Sequence[str] = QUESTIONS,
    progress: Progress | None = None,
    **options: Unpack[GenerationOptions],
) -> Report:
    """Runs prompts one after the other and returns what was measured.

    Nobody else should use the model meanwhile: what they compute would count.

    Args:
        prompts: messages of a user where the model has a chat template, texts to be continued otherwise.
        progress: called with (prompts done, all, what is being done).
        options: of the answers, see options.GenerationOptions.

    Raises ContextFull for a prompt that does not fit and ValueError for an empty one, or none, before anything is
    computed; and as SmallThinker.stream().
    """
    if not prompts:
        raise ValueError("there is no prompt")
    tokens = [prompt_tokens(model, prompt) for prompt in prompts]
    for number, ids in enumerate(tokens, 1):
        if not ids:
            raise ValueError(f"prompt {number} is empty")
        if len(ids) > model.context and options.get("overflow") != "shift":
            raise ContextFull(f"prompt {number} has {len(ids)} tokens, the context {model.context}")
    answers: list[Answer] = []
    report = progress or (lambda done, total, what: None)
    with model.recording() as chunks:
        watch = Watch(model, chunks)
        for number, (prompt, ids) in enumerate(zip(prompts, tokens, strict=True)):

            def on_prompt(done: int, total: int, number: int = number) -> None:
                watch.look(number, "prompt")
                report(number, len(prompts), f"prompt {number + 1}, {done} of {total} tokens")

            given: GenerationOptions = {**options, "on_prompt": on_prompt}
            stream = model.stream(ids, **given)
            for _ in stream:
                watch.look(number, "answer")
                report(number, len(prompts), f"answer {number + 1}, {len(stream.tokens)} tokens")
            watch.look(number, "answer")
            answers.append(answer_of(prompt, stream.read()))
    report(len(prompts), len(prompts), "done")
    trace = traced(model, chunks)
    stats: dict[str, Any] = model.stats()
    settings = {name: stats[name] for name in ("kernels", "threads", "context", "kv")}
    return Report(
        model={
            "name": model.name,
            "layers": model.config.n_layers,
            "experts": model.config.n_experts,
            "experts_used": model.config.n_experts_used,
        },
        settings=settings,
        plan=model.plan.figures(),
        peak_bytes=stats.get("peak_bytes"),
        answers=answers,
        samples=watch.samples,
        tokens=len(trace.routing),
        uses=trace.counts().tolist(),
    )


def prompt_tokens(model: SmallThinker, prompt: str) -> list[int]:
    """A prompt as the model is asked it."""
    if model.chat_template is None:
        return model.tokenize(prompt)
    return model.encode_chat([{"role": "user", "content": prompt}])


def answer_of(prompt: str, result: GenerationResult) -> Answer:
    timings = result.timings
    return Answer(
        prompt,
        result.text,
        result.finish_reason,
        timings.prompt_tokens,
        timings.reused_tokens,
        len(result.tokens),
        timings.prompt_seconds,
        timings.decode_seconds,
        timings.tokens_per_second,
    )
