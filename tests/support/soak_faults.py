"""soak.py in bad weather: two threads take its steps while system calls fail, stall and come back short by chance.

A process of its own, started by test_soak_faults.py with the shim (tests/native/fault_shim.c) preloaded. After each
round, with other faults than the last: sessions hold what they say and go on like fresh ones, the model's logits are
what they were, as many files and threads are open; at the end, closed, as much memory is held as before. Prints JSON.

    LD_PRELOAD=fault_shim.so python tests/support/soak_faults.py FOLDER (--rounds N | --seconds S) [--seed N]
"""

from __future__ import annotations

import argparse
import errno
import gc
import itertools
import json
import random
import shutil
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from countdown import Countdown
from faults import END, SHORT, STALL, Shim, check, held
from gguf_files import write_model
from soak import SESSIONS, Soak, least_memory, probe

from smallthinker_edge import Session, SmallThinker, SmallThinkerError
from smallthinker_edge.files.pack import pack

SHAPE: dict[str, Any] = {"n_layers": 4, "d_model": 128, "head_dim": 32, "n_experts": 32, "n_experts_used": 2,
                         "d_ffn": 384, "window": 64, "context_length": 512}  # fmt: skip
CONTEXT = 512
WORKERS = 2
STEPS = 12  # of each worker in a round
# Of a million calls of a kind, how many fail, and in which ways.
WEATHER: dict[str, tuple[int, tuple[int, ...]]] = {
    "OPEN": (100_000, (errno.EIO, errno.EMFILE, errno.EINTR, errno.EACCES)),
    "READ": (5_000, (errno.EIO, errno.EINTR, SHORT, END, STALL)),
    "WRITE": (50_000, (errno.ENOSPC, errno.EIO, errno.EINTR, SHORT, STALL)),
    "SYNC": (50_000, (errno.EIO, errno.EINVAL, STALL)),
    "RENAME": (200_000, (errno.ENOSPC, errno.EIO)),
    "ALLOC": (10_000, (errno.ENOMEM,)),
    "MAP": (50_000, (errno.ENOMEM,)),
    "THREAD": (300_000, (errno.EAGAIN,)),
}


class FaultySoak(Soak):
    """Steps that may fail in our ways, and cancelled ones."""

    def __init__(self, model: SmallThinker, file: Path, seed: int) -> None:
        super().__init__(model, file, seed)
        self.failed: Counter[str] = Counter()
        self.broken: BaseException | None = None
        self.steps += [(10, self.cancelled), (6, self.cancelled_generation), (3, self.open_another)]

    def step(self) -> None:
        try:
            for i, session in enumerate(self.sessions):
                if is_closed(session):  # where a step ended between closing one and making another
                    self.sessions[i] = self.model.session()
            super().step()
        except (SmallThinkerError, OSError) as problem:
            self.failed[type(problem).__name__] += 1

    def steps_of_a_round(self) -> None:
        try:
            for _ in range(STEPS):
                self.step()
        except BaseException as problem:
            self.broken = problem

    def cancelled(self, i: int, session: Session) -> None:
        if session.position == session.context:
            session.reset()
        ids = self.ids(min(300, session.context - session.position))
        session.decode(ids, cancel=Countdown(self.draw.randrange(3)))
        self.tokens += len(ids)

    def cancelled_generation(self, i: int, session: Session) -> None:
        signal = Countdown(self.draw.randrange(20))
        result = self.model.generate(self.ids(40), max_tokens=40, temperature=1.0, seed=self.tokens, cancel=signal)
        self.tokens += len(result.tokens)

    def open_another(self, i: int, session: Session) -> None:
        with SmallThinker(self.model.paths[0], threads=2, context=64, verify=True) as other:
            other.generate([1, 2, 3], max_tokens=2)


def is_closed(session: Session) -> bool:
    try:
        return session.position < 0
    except ValueError:
        return True


def check_session(model: SmallThinker, session: Session, file: Path) -> None:
    """It is what it says: saved and loaded it is the same, and its next logits are those of its tokens."""
    tokens = session.tokens
    check(len(tokens) == session.position, "a session has as many tokens as positions")
    session.save(file)
    if session.position == session.context:
        return
    with model.load_session(file) as loaded, model.session() as fresh:
        check(loaded.tokens == tokens, "a saved session has the tokens")
        if tokens:
            fresh.decode(tokens)
        logits = fresh.decode([9])
        check(np.array_equal(loaded.decode([9]), logits), "a loaded session goes on like a fresh one")
        with session.fork() as fork:
            check(np.array_equal(fork.decode([9]), logits), "a session goes on like a fresh one")


class Storm:
    """Rounds of faults over one model."""

    def __init__(self, shim: Shim, folder: Path, seed: int) -> None:
        self.shim, self.folder, self.draw = shim, folder, random.Random(seed)
        self.path = folder / "model.stpk"
        pack(write_model(folder / "model.gguf", **SHAPE), str(self.path))
        self.memory = least_memory(self.path, CONTEXT) + (WORKERS * SESSIONS << 20)
        self.injected: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def run(self, rounds: int, until: float) -> dict[str, Any]:
        with SmallThinker(self.path, threads=1) as model:
            expected = probe(model)
        self.shim.arm(None)
        with self.open() as model:
            model.generate([1, 2, 3], max_tokens=2)
        self.shim.disarm()
        gc.collect()
        before = held(), self.shim.live()
        done: Counter[str] = Counter()
        with self.open() as model:
            workers = [FaultySoak(model, self.folder / f"saved{i}", self.draw.getrandbits(32)) for i in range(WORKERS)]
            opened = held()
            for n in itertools.count(1):
                self.round(workers)
                for worker in workers:
                    for session in worker.sessions:
                        if not is_closed(session):
                            check_session(model, session, self.folder / "check")
                check(probe(model) == expected, "the logits are what they were")
                check(held() == opened, f"files and threads: {held()}, at the beginning {opened}")
                if n >= rounds or time.monotonic() > until:
                    break
            stats = model.stats()
            for worker in workers:
                done += worker.done
                for session in worker.sessions:
                    session.close()
        failed = sum((worker.failed for worker in workers), Counter[str]())
        tokens = sum(worker.tokens for worker in workers)
        del workers, worker, session
        gc.collect()
        after = held(), self.shim.live()
        check(after == before, f"(files, threads), (blocks, bytes): {after}, before {before}")
        counts = {"rounds": n, "tokens": tokens, "steps": done, "failed": failed, "injected": self.injected}
        return {**counts, "calls": self.calls, "read_errors": stats["read_errors"]}

    def open(self) -> SmallThinker:
        return SmallThinker(self.path, memory=self.memory, context=CONTEXT, threads=2, verify=True)

    def round(self, workers: list[FaultySoak]) -> None:
        weather = {kind: self.draw.choice(actions) for kind, (_, actions) in WEATHER.items()}
        for kind, action in weather.items():
            self.shim.rain(kind, action, WEATHER[kind][0])
        self.shim.arm(None)
        threads = [threading.Thread(target=worker.steps_of_a_round) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.shim.disarm()
        self.calls.update(self.shim.calls())
        for kind, action in weather.items():
            self.injected[f"{kind} {NAMES.get(action) or errno.errorcode[action]}"] += self.shim.rain(kind, 0, 0)
        for worker in workers:
            if worker.broken is not None:
                raise worker.broken


NAMES = {SHORT: "short", END: "end of file", STALL: "stalled"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=1 << 60)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve() / "storm"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    warnings.simplefilter("ignore")
    storm = Storm(Shim(folder), folder, arguments.seed)
    try:
        report = storm.run(arguments.rounds, time.monotonic() + arguments.seconds)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
