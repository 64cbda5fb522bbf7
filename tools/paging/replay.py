"""Replays a routing trace through cache policies at several sizes and prints hit rates; draws them where asked.

    smallthinker-edge trace -m model.stpk --random 1000 -o trace.npz
    python tools/paging/replay.py trace.npz --slots 200 335 500 [--shift] [--skip 0.25] [--plot hits.png]

Run by people who choose an eviction policy. It models the pager without time: one access per expert, layer and token.
"""

from __future__ import annotations

import argparse
import heapq
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from smallthinker_edge.measure.trace import Trace

HALF_LIFE = 128.0  # tokens
HALF_LIVES, FIRST, MEMORY = np.array([2.0, 8.0, 32.0, 128.0, 512.0]), 2, 64.0  # as in src/paging/eviction.c
Accesses = list[list[int]]  # of every layer of every token, the experts it needs together


class Scored:
    """Evicts the smallest score of those that the layer in work does not need; a heap with stale entries."""

    def __init__(self, slots: int, touch: Callable[[float, float], float]) -> None:
        self.slots, self.touch = slots, touch
        self.score: dict[int, float] = {}
        self.cached: set[int] = set()
        self.heap: list[tuple[float, int]] = []

    def access(self, ids: list[int], now: float) -> int:
        """How many of the ids were cached; caches them all."""
        hits = sum(id_ in self.cached for id_ in ids)
        for id_ in ids:
            self.score[id_] = self.touch(self.score.get(id_, 0.0), now)
            heapq.heappush(self.heap, (self.score[id_], id_))
            self.cached.add(id_)
        while len(self.cached) > self.slots:
            held = []
            while True:
                score, id_ = heapq.heappop(self.heap)
                if id_ in self.cached and score == self.score[id_]:
                    if id_ not in ids:
                        self.cached.discard(id_)
                        break
                    held.append((score, id_))
            for entry in held:
                heapq.heappush(self.heap, entry)
        return hits


def lru(slots: int, accesses: Accesses, layers: int) -> Iterator[int]:
    cache: OrderedDict[int, None] = OrderedDict()
    for ids in accesses:
        yield sum(id_ in cache for id_ in ids)
        for id_ in ids:
            cache[id_] = None
            cache.move_to_end(id_)
        while len(cache) > slots:
            cache.popitem(last=False)


def frequency(slots: int, accesses: Accesses, layers: int, half_life: float = HALF_LIFE) -> Iterator[int]:
    """Uses that decay by half every 128 tokens."""

    def touch(score: float, now: float) -> float:
        return math.log2((2 ** (score - now / half_life) if score else 0.0) + 1) + now / half_life

    cache = Scored(slots, touch)
    for i, ids in enumerate(accesses):
        yield cache.access(ids, i // layers + 1)


def forecast(slots: int, accesses: Accesses, layers: int) -> Iterator[int]:
    """The pager's: what src/paging/eviction.c does, token by token, with the rates of a layer side by side."""
    size = 1 + max(max(ids) for ids in accesses)
    layer_of, cached = np.full(size, -1), np.zeros(size, bool)
    rates, grown = np.zeros((size, len(HALF_LIVES))), np.ones((size, len(HALF_LIVES)))
    error, falls = np.zeros(len(HALF_LIVES)), 0.5 ** (1 / HALF_LIVES)
    for i, ids in enumerate(accesses):
        token, layer = divmod(i, layers)
        yield int(cached[ids].sum())
        cached[ids], layer_of[ids] = True, layer
        best = min(range(len(error)), key=lambda k: (error[k], k != FIRST))
        of_layer = np.flatnonzero(layer_of == layer)
        if token > 0:
            grown[of_layer] = 1 / (1 - falls**token)
        error = error * 0.5 ** (1 / (MEMORY * layers)) + ((rates[of_layer] * grown[of_layer]) ** 2).sum(axis=0)
        error += (1 - 2 * rates[ids] * grown[ids]).sum(axis=0)
        rates[of_layer] *= falls
        rates[ids] += 1 - falls
        kept = np.flatnonzero(cached)
        over = len(kept) - slots
        if over > 0:
            kept = np.setdiff1d(kept, ids)
            wait = 1 / (rates[kept, best] * grown[kept, best])
            next_use = ((layer_of[kept] - layer - 1) % layers + 1) / layers + wait
            cached[kept[np.argsort(-next_use, kind="stable")[:over]]] = False


def two_queues(slots: int, accesses: Accesses, layers: int) -> Iterator[int]:
    """2Q (Johnson and Shasha 1994), simplified: a quarter of the slots is a FIFO for newcomers, whose ids are
    remembered for half as many more; who returns from there enters the LRU main queue."""
    newcomers: OrderedDict[int, None] = OrderedDict()
    ghosts: OrderedDict[int, None] = OrderedDict()
    main: OrderedDict[int, None] = OrderedDict()
    quarter = max(1, slots // 4)
    for ids in accesses:
        yield sum(id_ in main or id_ in newcomers for id_ in ids)
        for id_ in ids:
            if id_ in main:
                main.move_to_end(id_)
            elif id_ in ghosts:
                del ghosts[id_]
                main[id_] = None
            elif id_ not in newcomers:
                newcomers[id_] = None
        while len(main) + len(newcomers) > slots:
            if len(newcomers) > quarter or not main:
                id_, _ = newcomers.popitem(last=False)
                ghosts[id_] = None
                if len(ghosts) > slots // 2:
                    ghosts.popitem(last=False)
            else:
                main.popitem(last=False)


def s3_fifo(slots: int, accesses: Accesses, layers: int) -> Iterator[int]:
    """S3-FIFO (Yang et al. 2023): a small FIFO of a tenth, a main FIFO with reinsertion, and ghosts."""
    small: deque[int] = deque()
    main: deque[int] = deque()
    ghosts: OrderedDict[int, None] = OrderedDict()
    uses: dict[int, int] = {}  # of what is cached, at most 3
    tenth = max(1, slots // 10)

    def evict() -> None:
        if len(small) > tenth or not main:
            id_ = small.popleft()
            if uses[id_] > 1:
                main.append(id_)
            else:
                del uses[id_]
                ghosts[id_] = None
                if len(ghosts) > slots:
                    ghosts.popitem(last=False)
            return
        id_ = main.popleft()
        if uses[id_] > 0:
            uses[id_] -= 1
            main.append(id_)
        else:
            del uses[id_]

    for ids in accesses:
        yield sum(id_ in uses for id_ in ids)
        for id_ in ids:
            if id_ in uses:
                uses[id_] = min(3, uses[id_] + 1)
                continue
            uses[id_] = 0
            if id_ in ghosts:
                del ghosts[id_]
                main.append(id_)
            else:
                small.append(id_)
        while len(uses) > slots:
            evict()


def pinned(slots: int, accesses: Accesses, layers: int) -> Iterator[int]:
    """The best fixed set for the whole trace, known beforehand, which never changes."""
    counts = Counter(id_ for ids in accesses for id_ in ids)
    fixed = {id_ for id_, _ in counts.most_common(slots)}
    for ids in accesses:
        yield sum(id_ in fixed for id_ in ids)


def belady(slots: int, accesses: Accesses, layers: int) -> Iterator[int]:
    """Evicts what is needed last, knowing the future: no policy that must cache what it reads does better."""
    later: list[dict[int, float]] = [{} for _ in accesses]
    seen: dict[int, float] = {}
    for i in range(len(accesses) - 1, -1, -1):
        later[i] = {id_: seen.get(id_, math.inf) for id_ in accesses[i]}
        seen.update(dict.fromkeys(accesses[i], float(i)))
    needed: dict[int, float] = {}
    heap: list[tuple[float, int]] = []
    for i, ids in enumerate(accesses):
        yield sum(id_ in needed for id_ in ids)
        for id_, when in later[i].items():
            needed[id_] = when
            heapq.heappush(heap, (-when, id_))
        while len(needed) > slots:
            when, id_ = heapq.heappop(heap)
            if needed.get(id_) == -when:
                del needed[id_]


POLICIES: dict[str, Callable[[int, Accesses, int], Iterator[int]]] = {
    "lru": lru, "frequency": frequency, "forecast": forecast, "2q": two_queues, "s3-fifo": s3_fifo, "pinned": pinned,
    "belady": belady,
}  # fmt: skip


def accesses_of(trace: Trace) -> Accesses:
    """The trace as lists of pager ids, layer by layer."""
    _, layers, used = trace.routing.shape
    ids = trace.routing.astype(np.int64) + (np.arange(layers) * trace.experts)[None, :, None]
    rows: Accesses = ids.reshape(-1, used).tolist()
    return rows


def shifted(trace: Trace, seed: int = 0) -> Trace:
    """The trace, then the trace again with the experts of every layer renamed: a change of topic half-way."""
    rng = np.random.default_rng(seed)
    names = np.stack([rng.permutation(trace.experts) for _ in range(trace.routing.shape[1])]).astype(np.uint16)
    renamed = names[np.arange(trace.routing.shape[1])[None, :, None], trace.routing]
    return Trace(np.concatenate((trace.routing, renamed)), trace.experts)


def hit_rate(policy: str, trace: Trace, slots: int, skip: float = 0.0) -> float:
    """Share of accesses that find their expert; those of the first `skip` of the tokens are not counted."""
    tokens, layers, used = trace.routing.shape
    hits = list(POLICIES[policy](slots, accesses_of(trace), layers))
    first = int(tokens * skip) * layers
    return sum(hits[first:]) / ((len(hits) - first) * used)


def draw(rates: dict[str, list[float]], slots: Sequence[int], path: str) -> None:
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).subplots()
    for policy, values in rates.items():
        axes.plot(slots, values, marker="o", label=policy, linestyle="--" if policy in ("pinned", "belady") else "-")
    axes.set(xlabel="expert slots", ylabel="hit rate")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trace", type=Path, help=".npz file of `smallthinker-edge trace`")
    parser.add_argument(
        "--slots", type=int, nargs="+", default=[160, 240, 335, 480, 640], help="cache sizes in experts"
    )
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--shift", action="store_true", help="append the trace with renamed experts: a topic change")
    parser.add_argument("--skip", type=float, default=0.25, help="share of tokens that only warm the cache (0.25)")
    parser.add_argument("--plot", metavar="PNG", help="draw hit rate against slots; needs matplotlib")
    arguments = parser.parse_args()

    trace = Trace.load(arguments.trace)
    trace = shifted(trace) if arguments.shift else trace
    tokens, layers, used = trace.routing.shape
    print(f"{tokens} tokens, {layers} layers, {used} of {trace.experts} experts")
    print("slots".ljust(12) + "".join(f"{slots:>8}" for slots in arguments.slots))
    rates = {}
    for policy in arguments.policies:
        rates[policy] = [hit_rate(policy, trace, slots, arguments.skip) for slots in arguments.slots]
        print(policy.ljust(12) + "".join(f"{rate:>8.3f}" for rate in rates[policy]), flush=True)
    if arguments.plot:
        draw(rates, arguments.slots, arguments.plot)


if __name__ == "__main__":
    main()
