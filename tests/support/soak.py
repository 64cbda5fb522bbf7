"""A day's tokens in a loop: sessions that are filled, forked, rewound, saved, reset and closed, under a memory budget.

Run by test_soak.py as a process of its own, and by people on real models (under tools/paging/capped.py). Prints JSON:
what was done, the memory at regular places, and a hash of the same tokens' logits at each of these.

    python tests/support/soak.py MODEL.stpk --tokens 1000000 [--memory 1GiB] [--context 1024]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from smallthinker_edge import ContextFull, MemoryBudgetError, Session, SmallThinker
from smallthinker_edge.machine.memory import parse_memory, process_memory
from smallthinker_edge.opening import plan_memory

SESSIONS = 3  # open at once, besides the one that generate() keeps
PLACES = 20  # where memory and logits are looked at
HARDLY_ANY = 1 << 20  # bytes of slots beyond the least that works


def least_memory(path: Path, context: int) -> int:
    """A budget in which the model just works with the sessions here, their forks and marks."""
    sessions = (SESSIONS + 1) * plan_memory(path, context=context).sessions
    try:
        SmallThinker(path, memory=1, context=context).close()
    except MemoryBudgetError as refusal:
        needed = re.search(r"needs (\d+) ", str(refusal))
        assert needed is not None, refusal
        return int(needed.group(1)) + HARDLY_ANY + sessions
    raise AssertionError("a budget of one byte was accepted")


class Soak:
    """Random steps over a few sessions; every one adds to `tokens` and `done`."""

    def __init__(self, model: SmallThinker, file: Path, seed: int = 0) -> None:
        self.model, self.file, self.draw = model, file, random.Random(seed)
        self.sessions = [model.session() for _ in range(SESSIONS)]
        self.tokens = 0
        self.done: Counter[str] = Counter()
        self.steps = [
            (40, self.decode), (10, self.prompt), (10, self.rewind), (8, self.fork), (6, self.reset), (6, self.renew),
            (4, self.back_to_a_mark), (4, self.save_and_load), (4, self.fill), (4, self.generate),
        ]  # fmt: skip

    def step(self) -> None:
        i = self.draw.randrange(SESSIONS)
        (step,) = self.draw.choices([s for _, s in self.steps], [weight for weight, _ in self.steps])
        step(i, self.sessions[i])
        self.done[step.__name__] += 1

    def ids(self, most: int) -> list[int]:
        return [self.draw.randrange(self.model.config.vocab_size) for _ in range(self.draw.randint(1, max(1, most)))]

    def feed(self, session: Session, ids: list[int]) -> None:
        session.decode(ids)
        self.tokens += len(ids)

    def decode(self, i: int, session: Session) -> None:
        for token in self.ids(64):
            if session.position == session.context:
                session.reset()
            self.feed(session, [token])

    def prompt(self, i: int, session: Session) -> None:
        if session.position == session.context:
            session.reset()
        self.feed(session, self.ids(min(300, session.context - session.position)))

    def rewind(self, i: int, session: Session) -> None:
        count = self.draw.randint(0, min(255, session.position))
        if session.rewindable(count):
            session.rewind(count)

    def fork(self, i: int, session: Session) -> None:
        other = (i + 1) % SESSIONS
        self.sessions[other].close()
        self.sessions[other] = session.fork()

    def reset(self, i: int, session: Session) -> None:
        session.reset()

    def renew(self, i: int, session: Session) -> None:
        session.close()
        self.sessions[i] = self.model.session()

    def back_to_a_mark(self, i: int, session: Session) -> None:
        start = session.position
        session.mark()
        if start < session.context:
            self.feed(session, self.ids(min(400, session.context - start)))
        session.rewind(session.position - start)
        if start and session.rewindable(1):
            session.rewind(1)  # beyond the mark, which goes: marks that pile up are memory that is asked for

    def save_and_load(self, i: int, session: Session) -> None:
        session.save(self.file)
        session.close()
        self.sessions[i] = self.model.load_session(self.file)

    def fill(self, i: int, session: Session) -> None:
        """To the end of the context, and one token too many."""
        while session.position < session.context:
            self.feed(session, self.ids(min(200, session.context - session.position)))
        try:
            session.decode([0])
        except ContextFull:
            return
        raise AssertionError("the context is full, and took another token")

    def generate(self, i: int, session: Session) -> None:
        prompt = self.ids(self.model.context // 4)
        result = self.model.generate(
            prompt, max_tokens=40, temperature=1.0, seed=self.tokens, overflow="shift", speculate=4
        )
        self.tokens += len(prompt) + len(result.tokens)


def probe(model: SmallThinker) -> str:
    """Hash of 48 fixed tokens' logits in a session of their own, a prompt and single tokens."""
    draw, digest = random.Random(1), hashlib.sha256()
    ids = [draw.randrange(model.config.vocab_size) for _ in range(48)]
    with model.session() as session:
        digest.update(session.decode(ids[:32], all_logits=True).tobytes())
        for token in ids[32:]:
            digest.update(session.decode([token]).tobytes())
    return digest.hexdigest()


def run(path: Path, tokens: int, memory: int | str | None, context: int) -> dict[str, Any]:
    size = least_memory(path, context) if memory is None else parse_memory(memory)
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        SmallThinker(path, memory=size, context=context, threads=2) as model,
    ):
        soak = Soak(model, Path(folder) / "saved")
        for i, session in enumerate(soak.sessions):
            soak.fill(i, session)
        soak.tokens = 0
        places: list[dict[str, Any]] = []
        high = 0
        while len(places) < PLACES:
            while soak.tokens < tokens * (len(places) + 1) / PLACES:
                soak.step()
                high = max(high, process_memory()["rss_bytes"])
            stats = model.stats()
            counts = {key: stats[key] for key in ("hits", "ahead_hits", "misses", "evictions", "read_errors", "slots")}
            places.append({"tokens": soak.tokens, "highest_rss": high, "logits": probe(model), **counts})
            high = 0
        return {
            "memory": size,
            "least_slots": model.plan.slots,
            "experts": model.config.n_layers * model.config.n_experts,
            "tokens": soak.tokens,
            "seconds": round(time.monotonic() - started, 1),
            "steps": soak.done,
            "places": places,
            **process_memory(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="packed file")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--memory", help="budget (default: the least that works, and 1 MiB)")
    parser.add_argument("--context", type=int, default=1024)
    arguments = parser.parse_args()
    print(json.dumps(run(arguments.model, arguments.tokens, arguments.memory, arguments.context), indent=1))


if __name__ == "__main__":
    main()
