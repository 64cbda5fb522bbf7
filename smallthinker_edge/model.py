"""SmallThinker: a model opened for generating text. The front door of the library.

It ties loader, tokenizer, session and sampler together; each of them knows nothing of the others.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import psutil

from smallthinker_edge import budget
from smallthinker_edge._native.engine import Engine
from smallthinker_edge._native.gguf import GGUFFile
from smallthinker_edge._native.sampler import Sampler
from smallthinker_edge.chat import Messages, encode_chat
from smallthinker_edge.config import ModelConfig
from smallthinker_edge.errors import ContextFull, ModelFormatError
from smallthinker_edge.loader import Loader, usable_cpus
from smallthinker_edge.session import CancelSignal, Session
from smallthinker_edge.tokenizer import Tokenizer

DEFAULT_CONTEXT = 4096
BATCH = 512


@dataclass(frozen=True)
class Timings:
    """Seconds and tokens of one generation; the first token belongs to the prompt."""

    prompt_tokens: int
    prompt_seconds: float
    decode_tokens: int
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Decode speed, 0.0 where nothing was decoded after the first token."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass(frozen=True)
class GenerationResult:
    """text: without the stop string; tokens: all that were sampled, the ending one included;
    finish_reason: "stop" (end token or stop string), "length" (max_tokens or the context) or "cancelled"."""

    text: str
    tokens: list[int]
    finish_reason: str
    timings: Timings


@dataclass
class _Run:
    """What a generation leaves behind, filled while it is streamed."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "cancelled"
    prompt_tokens: int = 0
    started: float = 0.0
    first: float = 0.0
    ended: float = 0.0

    def timings(self) -> Timings:
        first = self.first or self.ended
        return Timings(self.prompt_tokens, first - self.started, max(0, len(self.tokens) - 1), self.ended - first)


class _StopFilter:
    """Holds text back while it may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """The text that is safe to show; after a stop string `hit` is true and the rest is dropped."""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.hit = True
            return self._held[: min(found)]
        keep = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._held)), keep, -1):
                if self._held.endswith(stop[:size]):
                    keep = size
                    break
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class SmallThinker:
    """A SmallThinker model in memory.

    Args:
        path: a GGUF file (or the first of a split one).
        memory: budget of the whole process in bytes or as a string ("8GiB"); None sets no limit.
        threads: compute threads; None takes what affinity and cgroup allow.
        context: positions of a session; None takes the model's own up to 4096.

    Raises:
        ModelFormatError: the file is damaged or of another kind.
        MemoryBudgetError: the budget is too small; the message names one that works.
        OSError: the file cannot be opened. ValueError: an argument is out of range.

    The environment variable SMALLTHINKER_CPU names a kernel table to use instead of the best one. Methods may be
    called from several threads; computing takes turns.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        memory: int | str | None = None,
        threads: int | None = None,
        context: int | None = None,
    ) -> None:
        if threads is not None and not 1 <= threads <= 256:
            raise ValueError("threads must be in 1..256")
        self._engine: Engine | None = None
        self._gguf = GGUFFile(path)
        try:
            self.config = ModelConfig.from_gguf(self._gguf)
            self.context = min(DEFAULT_CONTEXT, self.config.context_length) if context is None else context
            if not 1 <= self.context <= self.config.context_length:
                raise ValueError(f"context must be in 1..{self.config.context_length}, the model's own")
            self.tokenizer = Tokenizer.from_gguf_metadata(self._gguf.metadata)
            if self.tokenizer.vocab_size != self.config.vocab_size:
                raise ModelFormatError("tokens and embedding rows differ in number", field="tokenizer.ggml.tokens")
            if memory is not None:
                budget.check(memory, self._gguf, self.config, self.context, BATCH)
            template = self._gguf.metadata.get("tokenizer.chat_template")
            self.chat_template = template if isinstance(template, str) else None
            kernels = os.environ.get("SMALLTHINKER_CPU") or None
            engine = Engine(self.config, threads or usable_cpus(), kernels, BATCH)
            Loader(self._gguf, self.config, engine).load()
        except BaseException:
            self._gguf.close()
            raise
        self._engine = engine
        self._turn = threading.Lock()

    def tokenize(self, text: str | bytes, *, add_bos: bool | None = None, parse_special: bool = True) -> list[int]:
        """Token ids; see Tokenizer.encode."""
        return self.tokenizer.encode(text, add_bos=add_bos, parse_special=parse_special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of token ids; bytes that are no UTF-8 show as U+FFFD."""
        return self.tokenizer.decode(tokens)

    def session(self, context: int | None = None) -> Session:
        """A new session of `context` positions (default: the model's `context`) for people who sample themselves."""
        size = self.context if context is None else context
        if not 1 <= size <= self.config.context_length:
            raise ValueError(f"context must be in 1..{self.config.context_length}")
        return Session(self._open_engine(), self.config.vocab_size, size, BATCH, self._turn)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 256,
        stop: str | Sequence[str] = (),
        cancel: CancelSignal | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        repetition_window: int = 64,
        seed: int | None = None,
        logit_bias: Mapping[int, float] | None = None,
    ) -> GenerationResult:
        """Continues a prompt.

        Args:
            prompt: text, or token ids that are taken as they are.
            max_tokens: most tokens to sample; fewer where the context ends first.
            stop: strings that end the text; they are not part of it.
            cancel: a threading.Event or the like; when set, generation ends within one token.
            temperature, ...: see Sampler. The default is greedy.

        Raises:
            ContextFull: the prompt leaves no room. ValueError: an argument is out of range, or the prompt is empty.
        """
        sampler = Sampler(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
            repetition_window=repetition_window, seed=seed, logit_bias=logit_bias,
        )  # fmt: skip
        run = _Run()
        text = "".join(self._run(prompt, sampler, max_tokens, stop, cancel, run))
        return GenerationResult(text, run.tokens, run.finish_reason, run.timings())

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 256,
        stop: str | Sequence[str] = (),
        cancel: CancelSignal | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        repetition_window: int = 64,
        seed: int | None = None,
        logit_bias: Mapping[int, float] | None = None,
    ) -> Iterator[str]:
        """Like generate(), as pieces of text while they are made. Closing the iterator stops the generation."""
        sampler = Sampler(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
            repetition_window=repetition_window, seed=seed, logit_bias=logit_bias,
        )  # fmt: skip
        return self._run(prompt, sampler, max_tokens, stop, cancel, _Run())

    def chat(self, messages: Messages, **options: object) -> GenerationResult:
        """Answers a conversation: [{"role": "user", "content": ...}, ...]. Options as in generate().

        Raises ChatTemplateError for bad messages or a template that cannot be rendered.
        """
        return self.generate(encode_chat(self.tokenizer, messages, self.chat_template), **options)  # type: ignore[arg-type]

    def stream_chat(self, messages: Messages, **options: object) -> Iterator[str]:
        """Like chat(), as pieces of text while they are made. Options as in generate()."""
        return self.stream(encode_chat(self.tokenizer, messages, self.chat_template), **options)  # type: ignore[arg-type]

    def stats(self) -> dict[str, object]:
        """Bytes and settings: weights and buffers, resident memory of the process, threads, kernel table."""
        engine = self._open_engine()
        return {
            "model_bytes": engine.bytes,
            "rss_bytes": psutil.Process().memory_info().rss,
            "threads": engine.threads,
            "kernels": engine.kernels,
            "context": self.context,
        }

    def close(self) -> None:
        """Frees the weights once no session uses them. Safe to call twice."""
        self._engine = None
        self._gguf.close()

    def __enter__(self) -> SmallThinker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_engine(self) -> Engine:
        if self._engine is None:
            raise ValueError("the model is closed")
        return self._engine

    def _run(
        self,
        prompt: str | Sequence[int],
        sampler: Sampler,
        max_tokens: int,
        stop: str | Sequence[str],
        cancel: CancelSignal | None,
        run: _Run,
    ) -> Iterator[str]:
        """Checks the arguments at once, then returns the iterator that does the work."""
        stops = [stop] if isinstance(stop, str) else list(stop)
        if not all(isinstance(text, str) and text for text in stops):
            raise ValueError("stop must be a non-empty string or a list of them")
        if max_tokens < 1:
            raise ValueError("max_tokens must be at least 1")
        ids = self.tokenize(prompt) if isinstance(prompt, str | bytes) else [int(token) for token in prompt]
        if not ids:
            raise ValueError("the prompt has no tokens")
        if len(ids) > self.context:
            raise ContextFull(f"the prompt has {len(ids)} tokens, the context {self.context}")
        session = self.session(min(self.context, len(ids) + max_tokens))
        return self._pieces(ids, sampler, max_tokens, _StopFilter(stops), cancel, run, session)

    def _pieces(
        self,
        ids: list[int],
        sampler: Sampler,
        max_tokens: int,
        stops: _StopFilter,
        cancel: CancelSignal | None,
        run: _Run,
        session: Session,
    ) -> Iterator[str]:
        run.prompt_tokens, run.started = len(ids), time.perf_counter()
        decoder = self.tokenizer.stream()
        pending: list[int] = ids
        try:
            while True:
                logits = session.decode(pending, cancel=cancel)
                if cancel is not None and cancel.is_set():
                    run.finish_reason = "cancelled"
                    break
                token = sampler.sample(logits, ids + run.tokens)
                run.tokens.append(token)
                run.first = run.first or time.perf_counter()
                if token in self.tokenizer.eos_ids:
                    run.finish_reason = "stop"
                    break
                if piece := stops.push(decoder.push(token)):
                    yield piece
                if stops.hit:
                    run.finish_reason = "stop"
                    break
                if len(run.tokens) >= max_tokens or session.position >= session.context:
                    run.finish_reason = "length"
                    break
                pending = [token]
            if not stops.hit and (rest := stops.push(decoder.flush()) + stops.flush()):
                yield rest
        finally:
            run.ended = time.perf_counter()
            session.close()
