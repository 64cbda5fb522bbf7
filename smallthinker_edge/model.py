"""SmallThinker: a model opened for generating text. The front door of the library.

It ties loader, tokenizer, session and sampler together; each of them knows nothing of the others.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from smallthinker_edge._native.engine import Engine
from smallthinker_edge._native.layouts import KV_TYPES, TYPES
from smallthinker_edge._native.locks import Turns
from smallthinker_edge._native.paging import ExpertPaging
from smallthinker_edge._native.sampler import Sampler
from smallthinker_edge.errors import ContextFull, ModelFormatError, OpenedBeforeFork
from smallthinker_edge.files.config import ModelConfig, ModelFile
from smallthinker_edge.files.gguf import GGUFFile
from smallthinker_edge.files.hot_experts import load_profile, profile_path, save_profile, warm_up
from smallthinker_edge.files.packed import PackedFile, as_model, expert_infos
from smallthinker_edge.files.session_file import model_hash
from smallthinker_edge.generation.overflow import TurnDropper, shift_limit
from smallthinker_edge.generation.reuse import SessionStore
from smallthinker_edge.generation.speculation import BatchCosts
from smallthinker_edge.generation.stream import Generation, GenerationResult, TextStream
from smallthinker_edge.machine import cpus, thermal
from smallthinker_edge.machine.memory import available_memory, drop_library_cache, process_memory
from smallthinker_edge.opening import Loader
from smallthinker_edge.options import OPTIONS, GenerationOptions, checked_options
from smallthinker_edge.plan import Plan, make_plan
from smallthinker_edge.session import Session
from smallthinker_edge.text.chat import Messages, encode_chat
from smallthinker_edge.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEFAULT_CONTEXT = 4096
KV_CHOICES = (*KV_TYPES, "auto")
BATCH = 512


class SmallThinker:
    """A SmallThinker model in memory.

    Args:
        path: a GGUF file (or any part of a split one), or a packed file.
        memory: budget of the whole process in bytes or as a string ("8GiB"); "auto" takes what the cgroup and the
            system have left; None sets no limit. A packed file's experts are paged from storage where they do not
            all fit; a GGUF must fit whole.
        threads: compute threads; "auto" takes what affinity and cgroup allow, and on a chip with cores of
            different speed only the fast ones.
        context: positions of a session; None takes the model's own up to 4096.
        kv: keys and values in "f16"; in "q8_0", which takes about half the memory of the layers that see the whole
            context and changes logits slightly, window layers staying in F16; in "q8_0-all", those too (see
            docs/context.md). "auto" takes the first of these that suits the budget: logits then depend on it.
        keep_sessions: how many finished generations keep their KV cache, so that a prompt that begins like one of them
            (a chat's next turn, the same system prompt) computes only what is new. The memory plan holds one.
        head_threshold: where the file has a predictor of the LM head, generation computes only the logits whose score
            is above this; the others cannot be sampled. "auto" takes the file's own, else 0. None: all logits, and
            the predictor takes no memory. What a Session returns to its user is always whole, unless asked otherwise.
        profile: a file of save_profile() whose experts are read first; None takes the one beside a packed model.
        pin: each compute thread stays on one CPU, the calling one while it computes (Linux). Off by default: it helps
            where the system moves threads about, and hurts where others want those CPUs.
        verify: compare the checksums of a packed file: of the dense weights now, of an expert when it is first read.
            Where that is wrong, decoding raises ExpertReadError.

    Raises:
        ModelFormatError: the file is damaged or of another kind.
        MemoryBudgetError: the budget is too small; the message names one that works.
        OSError: the file cannot be opened or read. ValueError: an argument is out of range.

    The environment variable SMALLTHINKER_CPU names a kernel table to use instead of the best one. Methods may be
    called from several threads; computing takes turns.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        memory: int | str | None = None,
        threads: int | Literal["auto"] | None = "auto",
        context: int | None = None,
        kv: str = "f16",
        keep_sessions: int = 1,
        head_threshold: float | Literal["auto"] | None = "auto",
        profile: str | os.PathLike[str] | None = None,
        pin: bool = False,
        verify: bool = False,
    ) -> None:
        automatic = threads is None or threads == "auto"
        count = cpus.auto_threads() if threads is None or threads == "auto" else threads
        if not isinstance(count, int) or not 1 <= count <= 256:
            raise ValueError('threads must be in 1..256, or "auto"')
        if keep_sessions < 0:
            raise ValueError("keep_sessions must be at least 0")
        if kv not in KV_CHOICES:
            raise ValueError(f"kv must be one of {', '.join(KV_CHOICES)}, not {kv!r}")
        self._engine: Engine | None = None
        self._threads = count
        engine: Engine | None = None
        gguf = GGUFFile(path)
        try:
            self._file: ModelFile = as_model(gguf)
            self.config = ModelConfig.from_gguf(self._file)
            self.context = min(DEFAULT_CONTEXT, self.config.context_length) if context is None else context
            if not 1 <= self.context <= self.config.context_length:
                raise ValueError(f"context must be in 1..{self.config.context_length}, the model's own")
            self.head_threshold = self._head_threshold(head_threshold)
            kernels = os.environ.get("SMALLTHINKER_CPU") or None
            usable = cpus.big_cpus() if automatic else cpus.allowed_cpus()
            with cpus.started_on(usable):
                places = cpus.places(count, usable) if pin else None
                predictor = self.head_threshold is not None
                engine = Engine(self.config, count, kernels, BATCH, cpus=places, predictor=predictor)
            experts, sums, slot_bytes = None, None, 0
            if isinstance(self._file, PackedFile):
                experts = offsets, slot_bytes = self._file.experts(self.config)
                sums = self._file.checksums(len(offsets)) if verify else None
            if experts and memory is None:  # nothing to divide: they can be read while Python builds the tokenizer
                self._start_paging(engine, experts, self._make_plan(None, kv, slot_bytes), profile, sums)
            self.tokenizer = Tokenizer.from_gguf_metadata(self._file.metadata)
            if self.tokenizer.vocab_size != self.config.vocab_size:
                raise ModelFormatError("tokens and embedding rows differ in number", field="tokenizer.ggml.tokens")
            template = self._file.metadata.get("tokenizer.chat_template")
            self.chat_template = template if isinstance(template, str) else None
            self.plan = self._make_plan(memory, kv, slot_bytes)
            self.kv = self.plan.kv
            self._load(engine, sums)
            if experts and memory is not None:
                self._start_paging(engine, experts, self.plan, profile, sums)
                self._drop_caches()
        except BaseException:
            gguf.close()
            if engine is not None:
                engine.close()
            raise
        self._turns = Turns()
        self._hash: bytes | None = None
        self._sessions = SessionStore(keep_sessions, self.session)
        self._costs = BatchCosts()
        self._engine = engine

    def _head_threshold(self, given: float | str | None) -> float | None:
        """The threshold to use, None where the head is to be computed whole."""
        threshold = self.config.lm_head_threshold if given == "auto" else given
        if threshold is not None and (not isinstance(threshold, int | float) or math.isnan(threshold)):
            raise ValueError(f'head_threshold must be a number, "auto" or None, not {given!r}')
        return threshold if self.config.lm_head_predictor_size else None

    def _make_plan(self, memory: int | str | None, kv: str, slot_bytes: int) -> Plan:
        predictor = self.head_threshold is not None
        return make_plan(self._file, self.config, self.context, BATCH, memory, slot_bytes, kv, predictor, self._threads)

    def _load(self, engine: Engine, sums: npt.NDArray[np.uint32] | None) -> None:
        """Fills the engine; the experts of a packed file stay there until they are needed."""
        packed = isinstance(self._file, PackedFile)
        if isinstance(self._file, PackedFile) and sums is not None:
            self._file.check_dense(sums)
        Loader(self._file, self.config, engine, paged=packed, predictor=self.head_threshold is not None).load()

    def _start_paging(
        self,
        engine: Engine,
        experts: tuple[npt.NDArray[np.int64], int],
        plan: Plan,
        profile: str | os.PathLike[str] | None,
        sums: npt.NDArray[np.uint32] | None,
    ) -> None:
        """Has the engine take a packed file's experts from there, and reads those ahead that will be needed first.

        experts: as PackedFile.experts() has them. sums: as PackedFile.checksums() has them, or None.
        """
        assert isinstance(self._file, PackedFile)
        offsets, size = experts
        if sums is not None:
            sums = sums[-len(offsets) :]
        layers = (expert_infos(self._file, layer) for layer in range(self.config.n_layers))
        types = [(TYPES[g.type].number, TYPES[u.type].number, TYPES[d.type].number) for g, u, d in layers]
        # The rows of an untied embedding come through the page cache, which grows by what the system reads around them:
        # with 8 GiB for the 21B the memory of an empty KV cache was needed for that.
        reserve = plan.kv_cache if self.config.tied else 0
        free = plan.limit is None  # then the page cache may help
        paging = ExpertPaging(
            self.config, self._file.path, offsets, size, plan.slots, lent=reserve, sums=sums, cached=free
        )
        engine.page_experts(paging, types)
        path = profile_path(self._file.path) if profile is None else profile
        uses = load_profile(path, len(offsets)) if profile is not None or os.path.isfile(path) else None
        every = free and plan.slots == len(offsets) and plan.total < available_memory()
        if uses is not None or every:
            warm_up(paging, np.zeros(len(offsets)) if uses is None else uses, every)

    def _drop_caches(self) -> None:
        """Takes what was read until now out of the page cache, which a memory limit counts."""
        self._file.forget()
        drop_library_cache()

    def save_profile(self, path: str | os.PathLike[str] | None = None) -> str:
        """Writes which experts were used lately, for the next start to read first, and returns the file's name.

        Args:
            path: default: beside the model file, with `.hot` added; it is found there by itself.

        Raises ValueError where the model is not a packed file, OSError where it cannot be written.
        """
        paging = self._open_engine().paging
        if paging is None:
            raise ValueError("only a packed file has a profile")
        uses = np.zeros(self.config.n_layers * self.config.n_experts)
        paging.uses(uses)
        target = profile_path(self._file.path) if path is None else os.fspath(path)
        save_profile(target, uses)
        return target

    @contextmanager
    def recording(self) -> Iterator[list[bytes]]:
        """Collects which experts are chosen, of all sessions, as int32 [tokens, L, K] in chunks; see trace.py."""
        engine = self._open_engine()
        chunks: list[bytes] = []
        with self._turns.wait():
            engine.routing = chunks
        try:
            yield chunks
        finally:
            with self._turns.wait():
                engine.routing = None

    def tokenize(self, text: str | bytes, *, add_bos: bool | None = None, parse_special: bool = True) -> list[int]:
        """Token ids; see Tokenizer.encode."""
        return self.tokenizer.encode(text, add_bos=add_bos, parse_special=parse_special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of token ids; bytes that are no UTF-8 show as U+FFFD."""
        return self.tokenizer.decode(tokens)

    def session(self, context: int | None = None, *, kv: str | None = None) -> Session:
        """A new session for people who sample themselves.

        Args:
            context: positions (default: the model's `context`). kv: type of its KV cache, "f16", "q8_0" or "q8_0-all"
                (default: the model's). The memory plan counts one session with the defaults.

        Raises ValueError for a context or type that the model does not have.
        """
        size = self.context if context is None else context
        if not 1 <= size <= self.config.context_length:
            raise ValueError(f"context must be in 1..{self.config.context_length}")
        engine = self._open_engine()
        return Session(engine, self.config.vocab_size, size, self._turns, kv or self.kv, self._model_hash)

    def load_session(
        self, path: str | os.PathLike[str], context: int | None = None, *, kv: str | None = None
    ) -> Session:
        """A new session as Session.save() wrote it; see session() and Session.load()."""
        session = self.session(context, kv=kv)
        session.load(path)
        return session

    def _model_hash(self) -> bytes:
        """See session_file.model_hash(): read once, when a session is first saved or loaded."""
        if self._hash is None:
            self._open_engine()
            self._hash = model_hash(self._file, self.plan.limit is not None)
        return self._hash

    def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerationOptions]) -> GenerationResult:
        """Continues a prompt.

        Args:
            prompt: text, or token ids that are taken as they are.
            options: max_tokens, stop, temperature, ...: see options.GenerationOptions.

        Raises:
            ContextFull: the prompt leaves no room. ValueError: an argument is out of range, or the prompt is empty.
            TypeError: an option that there is not, or of another type.
        """
        stream = self.stream(prompt, **options)
        for _ in stream:
            pass
        assert stream.result is not None  # a stream that has ended has one
        return stream.result

    def stream(self, prompt: str | Sequence[int], **options: Unpack[GenerationOptions]) -> TextStream:
        """Like generate(), as pieces of text while they are made; arguments are checked at once."""
        self._open_engine()
        given = checked_options(options)
        sampler = given["sampler"]
        if sampler is None:
            sampler = Sampler(**{name: given[name] for name in OPTIONS if OPTIONS[name].sampling})
        ids = self.tokenize(prompt) if isinstance(prompt, str | bytes) else [int(token) for token in prompt]
        if not ids:
            raise ValueError("the prompt has no tokens")
        if not all(0 <= token < self.config.vocab_size for token in given["logit_bias"]):
            raise ValueError(f"logit_bias has a token outside the vocabulary of {self.config.vocab_size}")
        drop = TurnDropper(self.tokenizer) if given["overflow"] == "shift" else None
        if len(ids) > self.context:
            shorter = drop(ids, shift_limit(self.context)) if drop else None
            if shorter is None:
                raise ContextFull(f"the prompt has {len(ids)} tokens, the context {self.context}")
            ids = shorter
        # A bias, or another sampler, may choose tokens of which the predictor knows nothing.
        threshold = None if given["logit_bias"] or given["sampler"] is not None else self.head_threshold
        return TextStream(
            Generation(
                self._sessions,
                self.tokenizer,
                sampler,
                ids,
                given["max_tokens"],
                given["stop"],
                given["cancel"],
                drop,
                given["speculate"],
                self._costs,
                threshold,
            )
        )

    def chat(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> GenerationResult:
        """Answers a conversation: [{"role": "user", "content": ...}, ...]. Options: see options.GenerationOptions.

        Args:
            messages: as OpenAI's API has them: text, null or text parts as content, `name`, `tool_calls`, role "tool".
            tools: JSON schemas of functions that the model may call, where its chat template takes some.
            documents: for templates that take some.
            chat_template_kwargs: more names for the template, such as {"enable_thinking": False}.

        Special tokens in messages are plain text; see chat.encode_chat. Raises ChatTemplateError for bad messages or a
        template that cannot be rendered.
        """
        return self.generate(self._encode_chat(messages, tools, documents, chat_template_kwargs), **options)

    def stream_chat(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> TextStream:
        """Like chat(), as pieces of text while they are made. Options: see options.GenerationOptions."""
        return self.stream(self._encode_chat(messages, tools, documents, chat_template_kwargs), **options)

    def _encode_chat(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
    ) -> list[int]:
        """With tools, the file's template for their use where it has one, as transformers chooses."""
        with_tools = self._file.metadata.get("tokenizer.chat_template.tool_use")
        template = with_tools if tools and isinstance(with_tools, str) else self.chat_template
        return encode_chat(self.tokenizer, messages, template, tools=tools, documents=documents, variables=variables)

    def stats(self) -> dict[str, object]:
        """Bytes and settings, and for a packed file the pager's counts since it was opened.

        hits: experts found in memory; ahead_hits: read ahead for that use; misses: read when they were needed.
        hit_rate: hits of all three. prediction_accuracy: share of the experts named by looking ahead that were then
        used. head_share: share of the LM head's rows that a predictor has let through so far. wasted_bytes: read
        ahead in vain. stall_seconds: time compute threads waited, summed over them;
        disk_seconds: time with a read under way. tail_seconds: time from a token's (or a prompt chunk's) last expert in
        memory to its logits, when no read of the next token can be named yet. stall_share: share of decode_seconds that
        a disk which never idles would save; stall_share_within_tokens, never larger: what a perfect overlap of
        computing and reading within each token would save (see stall_share()). peak_bytes: the process's own
        high-water mark. On boards that tell it, the temperature and what throttles the processor: see thermal.readings.
        """
        engine = self._open_engine()
        paging = engine.paging_stats()
        if paging:
            times = paging["decode_seconds"], paging["stall_seconds"], paging["disk_seconds"], engine.threads
            paging["stall_share"] = stall_share(*times)
            paging["stall_share_within_tokens"] = stall_share(*times, tail=paging["tail_seconds"])
        return {
            "model_bytes": engine.bytes,
            **process_memory(),
            "threads": engine.threads,
            "kernels": engine.weights.kernels,
            "context": self.context,
            "kv": self.kv,
            **({} if engine.head_share is None else {"head_share": engine.head_share}),
            **paging,
            **thermal.readings(),
        }

    def close(self) -> None:
        """Gives memory, files and threads back. Sessions and streams of the model raise ValueError from then on.

        Where another thread computes, it waits until that call ends. Safe to call twice. RuntimeError from a signal
        handler that interrupts a computation of this very thread.
        """
        engine, self._engine = self._engine, None
        if engine is not None:
            self._sessions.close()
            try:
                engine.check_usable()
            except OpenedBeforeFork:  # whoever had the turn is not in this process
                engine.close()
            else:
                with self._turns.wait():
                    engine.close()
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
        self._engine.check_usable()
        return self._engine


def stall_share(decode: float, stall: float, disk: float, threads: int, tail: float = 0.0) -> float:
    """Share of decode time spent waiting for reads that a perfect overlap of computing and reading would have hidden.

    With such an overlap decoding takes as long as the longer of computing (decode less the threads' mean stall) and
    reading. Arguments as in SmallThinker.stats(), in seconds, or differences of two of them.

    Without `tail`: reading may go on at any time, also across tokens. That is a bound and no more: the experts of a
    token cannot be named before the token is known. With tail=tail_seconds the disk idles at the end of each token, as
    it must, and only the rest of the computing can hide reads.
    """
    if decode <= 0:
        return 0.0
    computing = decode - stall / threads
    return max(0.0, 1 - max(computing, disk + tail) / decode)


def plan_memory(
    path: str | os.PathLike[str], memory: int | str | None = None, context: int = DEFAULT_CONTEXT, kv: str = "f16"
) -> Plan:
    """How SmallThinker(path, memory, context=context, kv=kv) would divide its memory; loads no weights.

    Raises as SmallThinker() does.
    """
    with GGUFFile(path) as gguf:
        file = as_model(gguf)
        config = ModelConfig.from_gguf(file)
        tokenizer = Tokenizer.from_gguf_metadata(file.metadata)
        slot_bytes = file.experts(config)[1] if isinstance(file, PackedFile) else 0
        positions = min(context, config.context_length)
        plan = make_plan(file, config, positions, BATCH, memory, slot_bytes, kv, threads=cpus.auto_threads())
        del tokenizer  # it was built so that its memory counts
        return plan
