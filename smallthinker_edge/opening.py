"""Opens a model file: checks it, plans the memory, makes an engine and has it take the weights.

Called by model.py. Nothing is computed here, and nothing is kept: what a file has become is an OpenedModel.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from smallthinker_edge._native.engine import Engine
from smallthinker_edge._native.layouts import KV_TYPES, TYPES
from smallthinker_edge._native.paging import ExpertPaging
from smallthinker_edge.errors import MemoryBudgetError, ModelFormatError
from smallthinker_edge.files.config import ModelConfig, ModelFile
from smallthinker_edge.files.gguf import GGUFFile
from smallthinker_edge.files.hot_experts import load_profile, profile_path, warm_up
from smallthinker_edge.files.pack import blob_bytes
from smallthinker_edge.files.packed import PackedFile, as_model, expert_infos
from smallthinker_edge.loading import Loader, Progress
from smallthinker_edge.machine import cpus
from smallthinker_edge.machine.memory import available_memory, drop_library_cache, parse_memory, process_memory
from smallthinker_edge.plan import Plan, make_plan, warn_of_few_slots
from smallthinker_edge.text.grammar import Grammars
from smallthinker_edge.text.tokenizer import Tokenizer

DEFAULT_CONTEXT = 4096
KV_CHOICES = (*KV_TYPES, "auto")
BATCH = 512  # most tokens computed together
BUILDING = 160 << 20  # bytes that the tokenizer takes while it is built, and a grammar's, generously
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How to open a file; the arguments of SmallThinker() that decide it or watch it, as its user gave them."""

    memory: int | str | None
    threads: int | Literal["auto"] | None
    context: int | None
    kv: str
    head_threshold: float | Literal["auto"] | None
    profile: str | os.PathLike[str] | None
    pin: bool
    verify: bool
    structured: bool
    on_load: Progress | None

    def __post_init__(self) -> None:
        if not isinstance(self.thread_count, int) or not 1 <= self.thread_count <= 256:
            raise ValueError('threads must be in 1..256, or "auto"')
        if self.kv not in KV_CHOICES:
            raise ValueError(f"kv must be one of {', '.join(KV_CHOICES)}, not {self.kv!r}")

    @property
    def thread_count(self) -> int:
        return cpus.auto_threads() if self.threads is None or self.threads == "auto" else self.threads


@dataclass(frozen=True)
class OpenedModel:
    """A model file and what was made of it. Whoever has it closes the engine, then the file.

    Attributes:
        context: positions of a session. head_threshold: the one to use, None where the head is computed whole.
        grammars: where they were asked for.
    """

    file: ModelFile
    config: ModelConfig
    context: int
    head_threshold: float | None
    engine: Engine
    tokenizer: Tokenizer
    grammars: Grammars | None
    plan: Plan


def open_model(path: str | os.PathLike[str], settings: Settings) -> OpenedModel:
    """Opens a GGUF or packed file. Raises as SmallThinker() does; nothing is left open then."""
    gguf = GGUFFile(path)
    engine: Engine | None = None
    try:
        file = as_model(gguf)
        config = ModelConfig.from_gguf(file)
        context = min(DEFAULT_CONTEXT, config.context_length) if settings.context is None else settings.context
        if not 1 <= context <= config.context_length:
            raise ValueError(f"context must be in 1..{config.context_length}, the model's own")
        threshold = _head_threshold(settings.head_threshold, config)
        engine = _make_engine(config, settings, threshold is not None)
        experts = Experts(file, config, settings) if isinstance(file, PackedFile) else None
        budget = None if settings.memory is None else parse_memory(settings.memory)

        def plan(process: int | None = None) -> Plan:
            slot_bytes = experts.size if experts else 0
            predictor, count = threshold is not None, settings.thread_count
            return make_plan(
                *(file, config, context, BATCH, budget, slot_bytes, settings.kv, predictor, count), process=process
            )

        def load(progress: Progress | None) -> None:
            if experts and experts.sums is not None:
                experts.file.check_dense(experts.sums)
            Loader(file, config, engine, paged=experts is not None, predictor=threshold is not None).load(progress)

        before = process_memory()["rss_bytes"]
        if budget is None or _fits(plan, before + BUILDING):
            with _started(partial(_text_side, file, config, settings)) as building:
                load(_watching(building, settings.on_load))
                tokenizer, grammars = building.result()
            made = plan(max(before, process_memory()["rss_bytes"] - engine.weights.bytes))
        else:  # so that what is too much is known before it is taken
            tokenizer, grammars = _text_side(file, config, settings)
            made = plan()
            load(settings.on_load)
        # Both plans count all of Python's part. Experts only come now: where memory new to the process is slow, reading
        # into it beside the tokenizer makes that wait.
        warn_of_few_slots(made, config)
        if experts:
            experts.start_paging(engine, made)
        if experts and made.limit is not None:
            file.forget()  # what was read until now is in the page cache, which a memory limit counts
            drop_library_cache()
        engine.keep_to(made.sessions, made.most_sessions, context, made.kv)
        return OpenedModel(file, config, context, threshold, engine, tokenizer, grammars, made)
    except BaseException:
        gguf.close()
        if engine is not None:
            engine.close()
        raise


def _fits(plan: Callable[[int], Plan], process: int) -> bool:
    """Whether there is a plan where the process itself takes so many bytes."""
    try:
        plan(process)
    except MemoryBudgetError:
        return False
    return True


def _text_side(file: ModelFile, config: ModelConfig, settings: Settings) -> tuple[Tokenizer, Grammars | None]:
    """The tokenizer, and grammars where they are asked for."""
    tokenizer = Tokenizer.from_gguf_metadata(file.metadata)
    if tokenizer.vocab_size != config.vocab_size:
        raise ModelFormatError("tokens and embedding rows differ in number", field="tokenizer.ggml.tokens")
    return tokenizer, Grammars(tokenizer) if settings.structured else None


@contextmanager
def _started(call: Callable[[], T]) -> Iterator[Future[T]]:
    """A call under way in a thread of its own, which is waited for; where there can be none, it is made at once."""
    with ThreadPoolExecutor(1, thread_name_prefix="smallthinker-open") as pool:
        try:
            future = pool.submit(call)
        except RuntimeError:  # a limit of threads, or the interpreter is ending
            future = Future()
            future.set_result(call())
        yield future


def _watching(building: Future[Any], progress: Progress | None) -> Progress:
    """Progress that ends with what is being built: loading need not go on where that has failed."""

    def watch(done: int, of: int) -> None:
        if building.done():
            building.result()
        if progress is not None:
            progress(done, of)

    return watch


def _head_threshold(given: float | str | None, config: ModelConfig) -> float | None:
    """The threshold to use, None where the head is to be computed whole."""
    threshold = config.lm_head_threshold if given == "auto" else given
    if threshold is not None and (not isinstance(threshold, int | float) or math.isnan(threshold)):
        raise ValueError(f'head_threshold must be a number, "auto" or None, not {given!r}')
    return threshold if config.lm_head_predictor_size else None


def _make_engine(config: ModelConfig, settings: Settings, predictor: bool) -> Engine:
    """An engine whose threads are on the CPUs that they should be on."""
    automatic = settings.threads is None or settings.threads == "auto"
    kernels = os.environ.get("SMALLTHINKER_CPU") or None
    usable = cpus.big_cpus() if automatic else cpus.allowed_cpus()
    with cpus.started_on(usable):
        places = cpus.places(settings.thread_count, usable) if settings.pin else None
        return Engine(config, settings.thread_count, kernels, BATCH, cpus=places, predictor=predictor)


class Experts:
    """The experts of a packed file, which stay there until they are needed."""

    def __init__(self, file: PackedFile, config: ModelConfig, settings: Settings) -> None:
        self.file, self.config = file, config
        self.offsets, self.size = file.experts(config)
        self.sums: npt.NDArray[np.uint32] | None = file.checksums(config) if settings.verify else None
        self.profile = settings.profile

    def start_paging(self, engine: Engine, plan: Plan) -> None:
        """Has the engine take them from the file, and reads those ahead that will be needed first."""
        layers = (expert_infos(self.file, layer) for layer in range(self.config.n_layers))
        types = [(TYPES[g.type].number, TYPES[u.type].number, TYPES[d.type].number) for g, u, d in layers]
        free = plan.limit is None  # then the page cache may help
        paging = ExpertPaging(
            self.config,
            self.file.path,
            self.offsets,
            self.size,
            plan.slots,
            sessions=None if free else plan.sessions,
            # The rows of an untied embedding come through the page cache, which grows by what the system reads around
            # them: with 8 GiB for the 21B the memory of an empty KV cache was needed for that.
            lend=self.config.tied,
            sums=None if self.sums is None else self.sums[-len(self.offsets) :],
            cached=free,
        )
        engine.page_experts(paging, types)
        absent = self.file.absent(self.config)
        for layer in np.flatnonzero(absent.any(1)).tolist():
            engine.weights.set_absent(layer, absent[layer])
        path = profile_path(self.file.path) if self.profile is None else self.profile
        uses = load_profile(path, len(self.offsets)) if self.profile is not None or os.path.isfile(path) else None
        every = free and plan.slots >= (~absent).sum() and plan.total < available_memory()
        if uses is not None or every:
            warm_up(paging, np.zeros(len(self.offsets)) if uses is None else uses, every, absent.ravel())


def plan_memory(
    path: str | os.PathLike[str],
    memory: int | str | None = None,
    context: int = DEFAULT_CONTEXT,
    kv: str = "f16",
    *,
    packed: bool = False,
) -> Plan:
    """How SmallThinker(path, memory, context=context, kv=kv) would divide its memory; loads no weights.

    packed: of a GGUF, how the packed file made of it would.

    Raises as SmallThinker() does.
    """
    with GGUFFile(path) as gguf:
        file = as_model(gguf)
        config = ModelConfig.from_gguf(file)
        tokenizer = Tokenizer.from_gguf_metadata(file.metadata)
        slot_bytes = blob_bytes(gguf, config) if packed and not isinstance(file, PackedFile) else 0
        if isinstance(file, PackedFile):
            slot_bytes = file.experts(config)[1]
        positions = min(context, config.context_length)
        plan = make_plan(file, config, positions, BATCH, memory, slot_bytes, kv, threads=cpus.auto_threads())
        warn_of_few_slots(plan, config)
        del tokenizer  # it was built so that its memory counts
        return plan
