"""SmallThinker: a model opened for generating text. The front door of the library.

It ties loader, tokenizer, session and sampler together; each of them knows nothing of the others.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import psutil

from smallthinker_edge import budget, cpus, heat
from smallthinker_edge._native.engine import Engine
from smallthinker_edge._native.gguf import GGUFFile
from smallthinker_edge._native.sampler import Sampler
from smallthinker_edge.chat import Messages, encode_chat
from smallthinker_edge.config import ModelConfig
from smallthinker_edge.errors import ContextFull, ModelFormatError
from smallthinker_edge.loader import TYPE_NUMBER, Loader
from smallthinker_edge.packed import PackedFile, expert_infos, is_packed
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


class TextStream(Iterator[str]):
    """The pieces of a text while a model makes them. Made by SmallThinker.stream(); closing it stops the work.

    Attributes:
        result: the whole GenerationResult once the stream has ended or was closed, None before.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        sampler: Sampler,
        prompt: list[int],
        max_tokens: int,
        stops: Sequence[str],
        cancel: CancelSignal | None,
    ) -> None:
        self.result: GenerationResult | None = None
        self._session, self._tokenizer, self._sampler = session, tokenizer, sampler
        self._prompt, self._max_tokens, self._cancel = prompt, max_tokens, cancel
        self._stops = _StopFilter(stops)
        self._tokens: list[int] = []
        self._text: list[str] = []
        self._reason = "cancelled"
        self._started = self._first = 0.0
        self._pieces = self._run()

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Ends the generation. Safe to call twice."""
        self._pieces.close()
        if self.result is None:  # it never started
            self._finish()

    def _run(self) -> Generator[str, None, None]:
        self._started = time.perf_counter()
        try:
            for piece in self._generate():
                self._text.append(piece)
                yield piece
        finally:
            self._finish()

    def _generate(self) -> Iterator[str]:
        decoder = self._tokenizer.stream()
        pending = self._prompt
        while (token := self._next_token(pending)) is not None:
            self._tokens.append(token)
            if token in self._tokenizer.eos_ids:
                self._reason = "stop"
                break
            if piece := self._stops.push(decoder.push(token)):
                yield piece
            if self._stops.hit:
                self._reason = "stop"
                return
            if len(self._tokens) >= self._max_tokens or self._session.position >= self._session.context:
                self._reason = "length"
                break
            pending = [token]
        if rest := self._stops.push(decoder.flush()) + self._stops.flush():
            yield rest

    def _next_token(self, pending: list[int]) -> int | None:
        """Decodes what is pending and samples; None when cancelled."""
        if self._cancel is not None and self._cancel.is_set():
            return None
        logits = self._session.decode(pending, cancel=self._cancel)
        if self._cancel is not None and self._cancel.is_set():
            return None
        self._first = self._first or time.perf_counter()
        return self._sampler.sample(logits, self._prompt + self._tokens)

    def _finish(self) -> None:
        now = time.perf_counter()
        started = self._started or now
        first = self._first or now
        decoded = max(0, len(self._tokens) - 1)
        timings = Timings(len(self._prompt), first - started, decoded, now - first)
        self.result = GenerationResult("".join(self._text), self._tokens, self._reason, timings)
        self._session.close()


class SmallThinker:
    """A SmallThinker model in memory.

    Args:
        path: a GGUF file (or any part of a split one), or a packed file.
        memory: budget of the whole process in bytes or as a string ("8GiB"); None sets no limit. A packed file's
            experts are paged from storage where they do not all fit; a GGUF must fit whole.
        threads: compute threads; "auto" takes what affinity and cgroup allow, and on a chip with cores of
            different speed only the fast ones.
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
        threads: int | Literal["auto"] | None = "auto",
        context: int | None = None,
    ) -> None:
        automatic = threads is None or threads == "auto"
        count = cpus.auto_threads() if threads is None or threads == "auto" else threads
        if not isinstance(count, int) or not 1 <= count <= 256:
            raise ValueError('threads must be in 1..256, or "auto"')
        self._engine: Engine | None = None
        gguf = GGUFFile(path)
        try:
            self._file: GGUFFile | PackedFile = PackedFile(gguf) if is_packed(gguf) else gguf
            self.config = ModelConfig.from_gguf(self._file)
            self.context = min(DEFAULT_CONTEXT, self.config.context_length) if context is None else context
            if not 1 <= self.context <= self.config.context_length:
                raise ValueError(f"context must be in 1..{self.config.context_length}, the model's own")
            self.tokenizer = Tokenizer.from_gguf_metadata(self._file.metadata)
            if self.tokenizer.vocab_size != self.config.vocab_size:
                raise ModelFormatError("tokens and embedding rows differ in number", field="tokenizer.ggml.tokens")
            template = self._file.metadata.get("tokenizer.chat_template")
            self.chat_template = template if isinstance(template, str) else None
            kernels = os.environ.get("SMALLTHINKER_CPU") or None
            with cpus.started_on(cpus.big_cpus() if automatic else cpus.allowed_cpus()):
                engine = Engine(self.config, count, kernels, BATCH)
            self.plan = self._load(engine, memory)
        except BaseException:
            gguf.close()
            raise
        self._engine = engine
        self._turn = threading.Lock()

    def _load(self, engine: Engine, memory: int | str | None) -> budget.Plan:
        """Fills the engine within the budget; the experts of a packed file stay there until they are needed."""
        if not isinstance(self._file, PackedFile):
            plan = budget.make_plan(self._file, self.config, self.context, BATCH, memory)
            Loader(self._file, self.config, engine).load()
            return plan
        offsets, size = self._file.experts(self.config)
        plan = budget.make_plan(self._file, self.config, self.context, BATCH, memory, size)
        Loader(self._file, self.config, engine, paged=True).load()
        layers = (expert_infos(self._file, layer) for layer in range(self.config.n_layers))
        types = [(TYPE_NUMBER[g.type], TYPE_NUMBER[u.type], TYPE_NUMBER[d.type]) for g, u, d in layers]
        engine.page_experts(self._file.path, offsets, size, plan.slots, types)
        self._file.drop_cache()
        return plan

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
        stream = self.stream(
            prompt,
            max_tokens=max_tokens,
            stop=stop,
            cancel=cancel,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            repetition_window=repetition_window,
            seed=seed,
            logit_bias=logit_bias,
        )
        for _ in stream:
            pass
        assert stream.result is not None  # a stream that has ended has one
        return stream.result

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
    ) -> TextStream:
        """Like generate(), as pieces of text while they are made; arguments are checked at once."""
        sampler = Sampler(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
            repetition_window=repetition_window, seed=seed, logit_bias=logit_bias,
        )  # fmt: skip
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
        return TextStream(session, self.tokenizer, sampler, ids, max_tokens, stops, cancel)

    def chat(self, messages: Messages, **options: object) -> GenerationResult:
        """Answers a conversation: [{"role": "user", "content": ...}, ...]. Options as in generate().

        Raises ChatTemplateError for bad messages or a template that cannot be rendered.
        """
        return self.generate(encode_chat(self.tokenizer, messages, self.chat_template), **options)  # type: ignore[arg-type]

    def stream_chat(self, messages: Messages, **options: object) -> TextStream:
        """Like chat(), as pieces of text while they are made. Options as in generate()."""
        return self.stream(encode_chat(self.tokenizer, messages, self.chat_template), **options)  # type: ignore[arg-type]

    def stats(self) -> dict[str, object]:
        """Bytes and settings, for a packed file the pager's counts (see Engine.pager_stats), and on boards that tell
        it the temperature and what throttles the processor (see heat.readings)."""
        engine = self._open_engine()
        return {
            "model_bytes": engine.bytes,
            "rss_bytes": psutil.Process().memory_info().rss,
            "threads": engine.threads,
            "kernels": engine.kernels,
            "context": self.context,
            **(engine.pager_stats() or {}),
            **heat.readings(),
        }

    def close(self) -> None:
        """Frees the weights once no session uses them. Safe to call twice."""
        self._engine = None
        self._file.close()

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


def plan_memory(
    path: str | os.PathLike[str], memory: int | str | None = None, context: int = DEFAULT_CONTEXT
) -> budget.Plan:
    """How SmallThinker(path, memory, context=context) would divide its memory; loads no weights.

    Raises as SmallThinker() does.
    """
    with GGUFFile(path) as gguf:
        file = PackedFile(gguf) if is_packed(gguf) else gguf
        config = ModelConfig.from_gguf(file)
        tokenizer = Tokenizer.from_gguf_metadata(file.metadata)
        slot_bytes = file.experts(config)[1] if isinstance(file, PackedFile) else 0
        plan = budget.make_plan(file, config, min(context, config.context_length), BATCH, memory, slot_bytes)
        del tokenizer  # it was built so that its memory counts
        return plan
