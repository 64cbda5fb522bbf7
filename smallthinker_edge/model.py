"""SmallThinker: a model opened for generating text. The front door of the library.

It ties engine, tokenizer, session and sampler together; each of them knows nothing of the others.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from smallthinker_edge._native.capture import MatrixInputs
from smallthinker_edge._native.engine import Engine
from smallthinker_edge._native.locks import Turns
from smallthinker_edge._native.sampler import Sampler
from smallthinker_edge.completions.calls import CompletionCalls
from smallthinker_edge.errors import ContextFull, MemoryBudgetError, OpenedBeforeFork, tells_of_memory
from smallthinker_edge.files.config import ModelFile
from smallthinker_edge.files.hot_experts import profile_path, save_profile
from smallthinker_edge.files.session_file import model_hash
from smallthinker_edge.generation.choice import Choice
from smallthinker_edge.generation.overflow import TurnDropper, shift_limit
from smallthinker_edge.generation.reuse import SessionStore, common_prefix
from smallthinker_edge.generation.saved_prefixes import SHORTEST, SavedPrefixes
from smallthinker_edge.generation.speculation import BatchCosts
from smallthinker_edge.generation.stream import Generation, GenerationResult, TextStream, Totals
from smallthinker_edge.machine import thermal
from smallthinker_edge.machine.memory import parse_memory, process_memory
from smallthinker_edge.opening import Settings, open_model
from smallthinker_edge.options import OPTIONS, GenerationOptions, checked_options
from smallthinker_edge.session import Session
from smallthinker_edge.text.chat import Messages, encode_chat, takes_tools
from smallthinker_edge.text.grammar import Grammars

if TYPE_CHECKING:
    from typing_extensions import Unpack


@tells_of_memory
class SmallThinker(CompletionCalls):
    """A SmallThinker model in memory.

    Args:
        path: a GGUF file (or any part of a split one), or a packed file.
        memory: budget of the whole process in bytes or as a string ("8GiB"); "auto" takes what the cgroup and the
            system have left; None sets no limit. A packed file's experts are paged from storage where they do not
            all fit; a GGUF must fit whole.
        threads: compute threads; "auto" takes what affinity and cgroup allow, and on a chip with cores of
            different speed only the fast ones. Decoding uses fewer while another program takes their CPUs.
        context: positions of a session; None takes the model's own up to 4096.
        kv: keys and values in "f16"; in "q8_0", which takes about half the memory of the layers that see the whole
            context and changes logits slightly, window layers staying in F16; in "q8_0-all", those too (see
            docs/context.md). "auto" takes the first of these that suits the budget: logits then depend on it.
        keep_sessions: how many finished generations keep their KV cache, so that a prompt that begins like one of them
            (a chat's next turn, the same system prompt) computes only what is new. The memory plan holds one whose
            context is full; under a budget, so many are kept as fit into that together.
        prefix_folder: where the beginnings of chats that others have too, a long system prompt with its tools, are
            saved when they are first computed, and found again by the next start; None saves nothing. The folder
            holds what the prompts say. prefix_bytes: most of all its files, as `memory`; the ones used longest ago go
            first.
        head_threshold: where the file has a predictor of the LM head, generation computes only the logits whose score
            is above this; the others cannot be sampled. "auto" takes the file's own, else 0. None: all logits, and
            the predictor takes no memory. What a Session returns to its user is always whole, unless asked otherwise.
        profile: a file of save_profile() whose experts are read first; None takes the one beside a packed model.
        pin: each compute thread stays on one CPU, the calling one while it computes (Linux). Off by default: it helps
            where the system moves threads about, and hurts where others want those CPUs.
        structured: make ready for structured output (the extra `structured`), so that the memory plan holds what it
            takes. Without a budget that is done by itself when it is first asked for.
        verify: compare the checksums of a packed file: of the dense weights now, of an expert when it is first read.
            Where that is wrong, decoding raises ExpertReadError.
        on_load: called with (layers loaded, all layers) while the file is opened.

    Raises:
        ModelFormatError: the file is damaged or of another kind.
        MemoryBudgetError: the budget is too small; the message names one that works.
        MissingExtra: `structured` without the package that it needs.
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
        structured: bool = False,
        prefix_folder: str | os.PathLike[str] | None = None,
        prefix_bytes: int | str = "1GiB",
        on_load: Callable[[int, int], object] | None = None,
    ) -> None:
        super().__init__()
        if keep_sessions < 0:
            raise ValueError("keep_sessions must be at least 0")
        most_saved = parse_memory(prefix_bytes)
        self._engine: Engine | None = None
        settings = Settings(memory, threads, context, kv, head_threshold, profile, pin, verify, structured, on_load)
        opened = open_model(path, settings)
        self._file, engine = opened.file, opened.engine
        self.paths = opened.file.paths  # of the file, or of all parts of a split one
        self.config, self.context, self.head_threshold = opened.config, opened.context, opened.head_threshold
        self.tokenizer, self._grammars = opened.tokenizer, opened.grammars
        self.plan, self.kv = opened.plan, opened.plan.kv
        template = self._file.metadata.get("tokenizer.chat_template")
        self.chat_template = template if isinstance(template, str) else None
        self._turns = Turns()
        # What these hold must not hold the model: it gives its memory back as soon as nobody has it.
        self._model_hash = cache(partial(_hash_of_open, engine, self._file, self.plan.limit is not None))
        new = partial(Session, engine, self.config.vocab_size, self.context, self._turns, self.kv, self._model_hash)
        saved = None
        if prefix_folder is not None:
            saved = SavedPrefixes(prefix_folder, most_saved, new, self.kv, self._model_hash)
        self._sessions = SessionStore(keep_sessions, new, saved)
        self._saves_prefixes = saved is not None
        self._costs, self._totals = BatchCosts(), Totals()
        store = weakref.ref(self._sessions)  # the engine's memory must not hold what holds the engine
        engine.memory.relieve = lambda: (idle := store()) is not None and idle.relieve()
        self._engine = engine

    @classmethod
    def from_pretrained(
        cls,
        repo: str,
        memory: int | str | None = None,
        file: str | None = None,
        **options: Any,
    ) -> SmallThinker:
        """A model of the Hugging Face Hub, fetched into its cache where it is not there. Needs the [hub] extra.

        Args:
            repo: "ORG/NAME", or "ORG/NAME@REVISION".
            memory: as of SmallThinker(); with one, what is not packed yet is packed, so that experts can be paged.
            file: a name or pattern, where the repository has several models; see docs/hub.md for what is taken else.
            options: as of SmallThinker().

        Raises HubError where it cannot be had or there is no room, and as SmallThinker() and convert().
        """
        from smallthinker_edge.files.pull import prepare, pull  # which a device does not need

        return cls(pull(prepare(repo, file, pack=memory is not None)), memory, **options)

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

    @contextmanager
    def capturing(self, inputs: MatrixInputs) -> Iterator[list[bytes]]:
        """Fills `inputs` at every decode, of all sessions, and collects the experts chosen; see measure/imatrix.py."""
        engine = self._open_engine()
        with self.recording() as chunks:
            with self._turns.wait():
                engine.capture = inputs
            try:
                yield chunks
            finally:
                with self._turns.wait():
                    engine.capture = None

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
                (default: the model's). The memory plan sets one session with the defaults aside; what
                others take counts in the budget too, and expert slots make room.

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
        try:
            session.load(path)
        except BaseException:
            session.close()
            raise
        return session

    def fingerprint(self) -> str:
        """64 hex digits of its weights, but for the experts'; a GGUF and the packed file made of it have the same.

        The first call reads these weights.
        """
        return self._model_hash().hex()

    def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerationOptions]) -> GenerationResult:
        """Continues a prompt.

        Args:
            prompt: text, or token ids that are taken as they are.
            options: max_tokens, stop, temperature, ...: see options.GenerationOptions.

        Raises:
            ContextFull: the prompt leaves no room. ValueError: an argument is out of range, or the prompt is empty.
            TypeError: an option that there is not, or of another type.
        """
        return self.stream(prompt, **options).read()

    def stream(self, prompt: str | Sequence[int], **options: Unpack[GenerationOptions]) -> TextStream:
        """Like generate(), as pieces of text while they are made; arguments are checked at once."""
        self._open_engine()
        given = checked_options(options)
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
        # These look at, or may choose, tokens of which the predictor knows nothing.
        objects = any(given[name] is not None for name in ("sampler", "constraint", "logprobs"))
        whole = objects or given["logit_bias"] or given["logits_processors"]
        return TextStream(
            Generation(
                self._sessions,
                self.tokenizer,
                self._choice(given, len(ids)),
                ids,
                given,
                drop=drop,
                costs=self._costs,
                head_threshold=None if whole else self.head_threshold,
                totals=self._totals,
            )
        )

    def _choice(self, options: Mapping[str, Any], prompt_tokens: int) -> Choice:
        sampler = options["sampler"]
        if sampler is None:
            breakers = self.tokenizer.tokens_with(options["dry_breakers"]) if options["dry_multiplier"] else ()
            given = {name: options[name] for name in OPTIONS if OPTIONS[name].sampling}
            sampler = Sampler(**given, prompt_tokens=prompt_tokens, breaker_tokens=breakers)
        return Choice(sampler, options["logits_processors"], options["constraint"], options["logprobs"])

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
        stream = self.stream_chat(
            messages, tools=tools, documents=documents, chat_template_kwargs=chat_template_kwargs, **options
        )
        return stream.read()

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
        ids = self.encode_chat(messages, tools=tools, documents=documents, chat_template_kwargs=chat_template_kwargs)
        if options.get("shared_prefix") is None:
            options["shared_prefix"] = self.shared_prefix(
                ids, messages, tools=tools, documents=documents, chat_template_kwargs=chat_template_kwargs
            )
        return self.stream(ids, **options)

    def encode_chat(
        self,
        messages: Messages,
        *,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, up to where the answer starts; arguments and errors as in chat().

        continue_final_message: up to the end of the last message's text, which the answer then goes on with.
        """
        return encode_chat(
            self.tokenizer,
            messages,
            self._tool_template() if tools else self.chat_template,
            continue_final_message=continue_final_message,
            tools=tools,
            documents=documents,
            variables=chat_template_kwargs,
        )

    def shared_prefix(
        self,
        ids: Sequence[int],
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> int:
        """How many of a conversation's ids every other one with the same system prompt and tools has too.

        0 where that is not worth a file of `prefix_folder`, or there is none. Arguments as of encode_chat().
        """
        if not self._saves_prefixes or len(ids) <= SHORTEST:
            return 0
        head = list(itertools.takewhile(lambda message: message["role"] in ("system", "developer"), messages))
        shared = len(ids)
        for text in ("A", "0"):  # no message begins like both
            other = self.encode_chat(
                [*head, {"role": "user", "content": text}],
                tools=tools,
                documents=documents,
                chat_template_kwargs=chat_template_kwargs,
            )
            shared = min(shared, common_prefix(ids, other))
        return shared if shared >= SHORTEST else 0

    def _tool_template(self) -> str | None:
        """The file's template for the use of tools where it has one, as transformers chooses."""
        with_tools = self._file.metadata.get("tokenizer.chat_template.tool_use")
        return with_tools if isinstance(with_tools, str) else self.chat_template

    @property
    def takes_tools(self) -> bool:
        """Whether the model's chat template tells it of tools; create_chat_completion() does so in text otherwise."""
        return takes_tools(self._tool_template())

    @property
    def name(self) -> str:
        """The model file's name without its ending."""
        return os.path.splitext(os.path.basename(self._file.path))[0]

    @property
    def is_open(self) -> bool:
        """Whether close() has not been called."""
        return self._engine is not None

    def grammars(self) -> Grammars:
        """Makes constraints for generate(constraint=...): `model.grammars().regex("yes|no")`, one for each call.

        Raises MissingExtra without the extra `structured`, MemoryBudgetError in a model that was opened with a budget
        and without structured=True.
        """
        if self._grammars is None:
            if self.plan.limit is not None:
                raise MemoryBudgetError("the budget does not hold structured output: open it with structured=True")
            self._grammars = Grammars(self.tokenizer)
        return self._grammars

    def _answering(self) -> SmallThinker:
        return self

    def stats(self) -> dict[str, object]:
        """Bytes and settings, sums over all generations, and for a packed file the pager's counts since it was opened.

        session_bytes: what keys, values and logits of all sessions take. threads_in_use: of the threads, for the next
        token.
        prompt_tokens, of which reused_tokens were known from an earlier one; generated_tokens; prompt_seconds and
        generation_seconds: of the generations that have ended.
        decode_seconds: computing, prompts included, of all sessions; it is the sum of attention_seconds (the router
        too), expert_seconds, head_seconds, wait_seconds (for reads of experts) and other_seconds (the embedding, and
        what is around the layers), all on the clock of the calling thread.
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
        seconds, paging = engine.times(), engine.paging_stats()
        if paging:
            times = seconds["decode_seconds"], paging["stall_seconds"], paging["disk_seconds"], engine.threads
            paging["stall_share"] = stall_share(*times)
            paging["stall_share_within_tokens"] = stall_share(*times, tail=paging["tail_seconds"])
        return {
            "model_bytes": engine.bytes,
            "session_bytes": engine.memory.in_use,
            **process_memory(),
            "threads": engine.threads,
            "threads_in_use": engine.threads_in_use,
            "kernels": engine.weights.kernels,
            "context": self.context,
            "kv": self.kv,
            **({} if engine.head_share is None else {"head_share": engine.head_share}),
            **self._totals.figures(),
            **seconds,
            **paging,
            **thermal.readings(),
        }

    def close(self) -> None:
        """Gives memory, files and threads back. Sessions and streams of the model raise ValueError from then on.

        Where another thread computes, it waits until that call ends. Safe to call twice. RuntimeError from a signal
        handler that interrupts a computation of this very thread.
        """
        engine, self._engine = self._engine, None
        self._stop_computing()
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


def _hash_of_open(engine: Engine, file: ModelFile, budget: bool) -> bytes:
    """model_hash() of a model that is open here; else raises as everything else of it does."""
    engine.check_usable()
    return model_hash(file, budget)


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
