"""What a model needs of memory, before anything is allocated.

Called by opening.py, with the user's `memory=` and for `smallthinker-edge plan`. It allocates nothing.
"""

from __future__ import annotations

import logging
import mmap
from dataclasses import asdict, dataclass, replace

from smallthinker_edge._native.buffers import buffer_sizes, partial_sizes
from smallthinker_edge._native.kv_cache import kv_bytes
from smallthinker_edge._native.layouts import KV_TYPES, TYPES, kv_kinds
from smallthinker_edge.errors import MemoryBudgetError
from smallthinker_edge.files.config import ModelConfig, ModelFile, tensor_name
from smallthinker_edge.files.packed import ExpertLayout, PackedFile, expert_infos
from smallthinker_edge.machine.memory import parse_memory, process_memory

logger = logging.getLogger(__name__)

# Kernel memory besides page tables, thread stacks, file pages (of an embedding that is read by rows, 6 MB), and what
# Python does while running.
MARGIN = 16 << 20
ENTRY = 8  # bytes a page takes in a page table


@dataclass(frozen=True)
class Plan:
    """Where a process's memory goes.

    Attributes:
        limit: the budget in bytes, None without one.
        kv: kind of the KV cache, a name of KV_TYPES.
        process: bytes that Python, libraries and tokenizer took when the plan was made.
        weights: of weights in memory; where experts are paged, of all others.
        kv_cache: of one session whose context is full, and of its tokens' ids.
        buffers: of the engine.
        logits: of one row.
        margin: what nobody can count.
        page_tables: of the kernel.
        slots: experts kept in memory; 0 where the weights are loaded whole.
        least_slots: of them; further sessions and logits may take the memory of the others.
        slot_bytes: of one slot.
    """

    limit: int | None
    kv: str
    process: int
    weights: int
    kv_cache: int
    buffers: int
    logits: int
    margin: int = MARGIN
    page_tables: int = 0
    slots: int = 0
    least_slots: int = 0
    slot_bytes: int = 0

    @property
    def fixed(self) -> int:
        """Bytes of everything but the expert slots."""
        return self.process + self.weights + self.sessions + self.buffers + self.margin + self.page_tables

    @property
    def sessions(self) -> int:
        """Bytes set aside for sessions: the KV cache of one, and a row of logits."""
        return self.kv_cache + self.logits

    @property
    def most_sessions(self) -> int | None:
        """Bytes that sessions may take before they are refused more; None without a budget."""
        if self.limit is None:
            return None
        return self.limit - self.fixed + self.sessions - self.least_slots * self.slot_bytes

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return self.fixed + self.slots * self.slot_bytes

    def figures(self) -> dict[str, int | str | None]:
        """Every field and the total by name, for programs."""
        return {**asdict(self), "total": self.total}

    def table(self) -> str:
        """The plan as lines of text, in MiB."""
        rows = [
            ("process and tokenizer", self.process),
            ("dense weights" if self.slot_bytes else "weights", self.weights),
            ("KV cache", self.kv_cache),
            ("buffers", self.buffers + self.logits),
            ("margin", self.margin),
            ("page tables", self.page_tables),
        ]
        if self.slots:
            rows.append((f"{self.slots} expert slots", self.slots * self.slot_bytes))
        rows.append(("total", self.total))
        if self.limit is not None:
            rows.append(("budget", self.limit))
        return "\n".join(f"{name:<24}{size / 2**20:>10.1f} MiB" for name, size in rows)


def make_plan(
    file: ModelFile,
    config: ModelConfig,
    context: int,
    batch: int,
    memory: int | str | None,
    slot_bytes: int = 0,
    kv: str = "f16",
    predictor: bool = True,
    threads: int = 1,
    process: int | None = None,
) -> Plan:
    """Divides a budget.

    Args:
        file, config: the model. context: positions of a session. batch: most tokens computed together.
        memory: the budget, see parse_memory(); None for no limit.
        slot_bytes: of one expert where a packed file lets experts be paged, else 0.
        kv: type of the KV cache: "f16", "q8_0", "q8_0-all", or "auto": the first of them with which the budget
            works and holds the experts that two tokens use; else the smallest.
        predictor: the LM head's predictor is used, where the file has one. threads: of the team.
        process: bytes that Python, libraries and the tokenizer take; None: what the process has now.

    Raises MemoryBudgetError, with the smallest budget that works and its parts, where `memory` is too little.
    """
    if kv == "auto":
        return _plan_kv(file, config, context, batch, memory, slot_bytes, predictor, threads, process)
    skip = set() if config.tied else {tensor_name("token_embd")}
    if not predictor:
        skip.add(tensor_name("lm_head_profiler"))
    if slot_bytes:
        skip |= {name for name in file.tensors if name.endswith("_exps.weight")}
    limit = None if memory is None else parse_memory(memory)
    plan = Plan(
        limit,
        kv,
        process=process_memory()["rss_bytes"] if process is None else max(0, process),
        weights=sum(info.nbytes for name, info in file.tensors.items() if name not in skip),
        kv_cache=kv_bytes(config, context, kv) + 4 * context,
        buffers=_buffer_bytes(file, config, context, batch, kv, predictor, threads),
        logits=4 * config.vocab_size,
        least_slots=config.n_experts if slot_bytes else 0,  # a prompt may use every expert of a layer at once
        slot_bytes=slot_bytes,
    )
    experts = config.n_layers * config.n_experts if slot_bytes else 0
    if isinstance(file, PackedFile):
        experts = max(plan.least_slots, experts - int(file.absent(config).sum()))
    few = plan.least_slots * slot_bytes
    plan = replace(plan, page_tables=_page_tables(plan.fixed, few, experts * slot_bytes, limit))
    if limit is None:
        return replace(plan, slots=experts)
    least = replace(plan, slots=plan.least_slots)
    if least.total > limit:
        hint = "" if slot_bytes else "; a packed file (smallthinker-edge pack) needs less"
        raise MemoryBudgetError(
            f"a budget of {limit} bytes is too small: this model with a context of {context} needs {least.total} "
            f"bytes{hint}\n{least.table()}"
        )
    slots = min(experts, (limit - plan.fixed) // slot_bytes) if slot_bytes else 0
    return replace(plan, slots=slots)


def warn_of_few_slots(plan: Plan, config: ModelConfig) -> None:
    """Tells the log where experts have too little room."""
    if plan.slot_bytes and plan.slots < config.n_layers * config.n_experts_used:
        message = "%d expert slots are fewer than one token uses: nearly every expert will be read again"
        logger.warning(message, plan.slots)


def _buffer_bytes(
    file: ModelFile,
    config: ModelConfig,
    context: int,
    batch: int,
    kv: str,
    predictor: bool,
    threads: int,
) -> int:
    """Bytes of the engine's buffers."""
    layers = (expert_infos(file, layer) for layer in range(config.n_layers))
    experts = {ExpertLayout.of(config, infos).expert.layout for infos in layers}
    q8 = TYPES["Q8_0"].number in KV_TYPES[kv]
    sizes = buffer_sizes(config, batch, threads, predictor=predictor, q8=q8, experts=experts)
    sizes |= partial_sizes(config, context, threads)
    return sum(sizes.values())


def _page_tables(parts: int, least: int, most: int, limit: int | None) -> int:
    """Bytes of the kernel's page tables, which a cgroup charges: an entry a page, set aside for huge pages too.

    For `parts` and between `least` and `most` bytes of slots, as far as the limit goes.
    """
    page = mmap.PAGESIZE
    tables = [(parts + slots) * ENTRY // (page - ENTRY) + 1 for slots in (least, most)]
    return tables[1] if limit is None else max(tables[0], min(tables[1], limit * ENTRY // page))


def _plan_kv(
    file: ModelFile,
    config: ModelConfig,
    context: int,
    batch: int,
    memory: int | str | None,
    slot_bytes: int,
    predictor: bool,
    threads: int,
    process: int | None,
) -> Plan:
    """The plan with the first type of keys and values that suits the budget, the smallest that works otherwise."""
    enough = config.n_layers * min(config.n_experts, 2 * config.n_experts_used) if slot_bytes else 0
    types = kv_kinds(config.head_dim, bool(config.window) and any(config.window_layout))
    for kv in types[:-1]:
        try:
            plan = make_plan(file, config, context, batch, memory, slot_bytes, kv, predictor, threads, process)
        except MemoryBudgetError:
            continue
        if plan.slots >= enough:
            return plan
    return make_plan(file, config, context, batch, memory, slot_bytes, types[-1], predictor, threads, process)
