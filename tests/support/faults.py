"""What the library does on files, memory and threads, again and again, each time with another call of it failing.

A process of its own, started by test_faults.py with the shim (tests/native/fault_shim.c) preloaded. After each fault:
an exception of ours or the right result; a model that works when the fault is over, and closes; no file, thread or
memory left behind; under the name that was to be written, the old file or the new one. Prints JSON: how many runs.

    LD_PRELOAD=fault_shim.so python tests/support/faults.py FOLDER SCENARIO [--all]
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import gc
import json
import os
import shutil
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from checkpoint_files import write_checkpoint
from gguf_files import write_model
from small_model import SHAPE

from smallthinker_edge import OutOfMemoryError, SmallThinker, SmallThinkerError
from smallthinker_edge.files.convert import convert
from smallthinker_edge.files.pack import pack, unpack
from smallthinker_edge.opening import plan_memory

KINDS = ("OPEN", "DIRECT", "READ", "WRITE", "RESERVE", "TRUNCATE", "SYNC", "RENAME", "ALLOC", "MAP", "THREAD")
# By name, the kinds that it must have met.
SCENARIOS = {
    "paged": {"OPEN", "READ", "WRITE", "SYNC", "RENAME", "ALLOC", "MAP", "THREAD"},
    "paged-untied": {"OPEN", "READ", "WRITE", "SYNC", "RENAME", "ALLOC", "MAP", "THREAD"},
    "free": {"OPEN", "READ", "WRITE", "SYNC", "RENAME", "ALLOC", "MAP", "THREAD"},
    "gguf": {"OPEN", "READ", "WRITE", "SYNC", "RENAME", "ALLOC", "MAP", "THREAD"},
    "pack": {"OPEN", "READ", "WRITE", "RESERVE", "SYNC", "RENAME", "ALLOC"},
    "unpack": {"OPEN", "READ", "WRITE", "RESERVE", "SYNC", "RENAME", "ALLOC"},
    "convert": {"OPEN", "READ", "WRITE", "TRUNCATE", "SYNC", "RENAME", "ALLOC"},
    "requantize": {"OPEN", "READ", "WRITE", "TRUNCATE", "SYNC", "RENAME", "ALLOC"},
}
MEMORY_KINDS = ("ALLOC", "THREAD")  # of our shared object only: what fails is an error of ours
SHORT, END, STALL = -1, -2, -3
EVER = 1 << 30
OLD = b"what was there before"
PROMPT = "hello world hello there"
# Kind, what happens instead, and whether it goes on happening.
ACTIONS: list[tuple[str, int, bool]] = [
    *[("OPEN", code, False) for code in (errno.EIO, errno.EMFILE, errno.EACCES, errno.EINTR)],
    *[("DIRECT", code, True) for code in (errno.EINVAL, errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EIO)],
    ("READ", errno.EIO, False),
    ("READ", errno.EIO, True),
    ("READ", errno.EINTR, False),
    ("READ", SHORT, False),
    ("READ", SHORT, True),
    ("READ", END, False),
    ("READ", STALL, False),
    ("WRITE", errno.ENOSPC, False),
    ("WRITE", errno.EIO, True),
    ("WRITE", errno.EINTR, False),
    ("WRITE", SHORT, True),
    ("RESERVE", errno.ENOSPC, False),
    ("RESERVE", errno.EOPNOTSUPP, False),
    ("TRUNCATE", errno.EIO, False),
    ("SYNC", errno.EIO, False),
    ("SYNC", errno.EINVAL, False),
    ("RENAME", errno.ENOSPC, False),
    ("ALLOC", errno.ENOMEM, False),
    ("ALLOC", errno.ENOMEM, True),
    ("MAP", errno.ENOMEM, False),
    ("MAP", errno.ENOMEM, True),
    ("THREAD", errno.EAGAIN, False),
]
# Those that the library gets over: the caller sees nothing of them.
HARMLESS = {("DIRECT", code) for _, code, _ in ACTIONS} | {
    ("READ", errno.EINTR), ("READ", SHORT), ("READ", STALL), ("WRITE", errno.EINTR), ("WRITE", SHORT),
    ("RESERVE", errno.EOPNOTSUPP), ("SYNC", errno.EINVAL),
}  # fmt: skip


class Shim:
    """The preloaded library."""

    def __init__(self, folder: Path) -> None:
        self.library = ctypes.CDLL(None)
        self.library.fault_scope.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_char_p]
        self.library.fault_arm.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_long, ctypes.c_int]
        for name in ("fault_calls", "fault_live", "fault_live_bytes", "fault_rain"):
            getattr(self.library, name).restype = ctypes.c_long
        maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        code = [line[0].split("-") for line in maps if "/_core." in line[-1]]
        start, end = int(code[0][0], 16), int(code[-1][1], 16)
        self.library.fault_scope(start, end, os.fsencode(folder))

    def arm(self, kind: str | None, first: int = 0, last: int = 0, action: int = 0) -> None:
        self.library.fault_arm(-1 if kind is None else KINDS.index(kind), first, last, action)

    def rain(self, kind: str, action: int, per_million: int) -> int:
        """While armed, lets calls of a kind do an action by chance; how many did so since the last such call."""
        done: int = self.library.fault_rain(KINDS.index(kind), action, per_million)
        return done

    def disarm(self) -> None:
        self.library.fault_disarm()

    def calls(self) -> dict[str, int]:
        return {kind: self.library.fault_calls(i) for i, kind in enumerate(KINDS)}

    def live(self) -> tuple[int, int]:
        """Blocks that the shared object has, and their bytes."""
        return self.library.fault_live(), self.library.fault_live_bytes()


def held() -> tuple[int, int]:
    """Open files and threads of this process."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


class Use:
    """Opens a model, generates, saves a session and goes on with it; after a fault, the same again."""

    def __init__(self, shim: Shim, folder: Path, path: str, **options: Any) -> None:
        self.shim, self.path, self.options = shim, path, options
        self.saved = folder / "session"

    def __call__(self) -> Any:
        with SmallThinker(self.path, threads=2, context=256, **self.options) as model:
            try:
                return self.work(model)
            except (SmallThinkerError, OSError):
                self.shim.disarm()
                check(self.work(model) == self.expected, "the model works again when the fault is over")
                raise

    def work(self, model: SmallThinker) -> Any:
        tokens = model.generate(PROMPT, max_tokens=4).tokens
        with model.session() as session:
            session.decode(tokens)
            session.save(self.saved)
            logits = session.decode([65])
        with model.load_session(self.saved) as again:
            check((again.decode([65]) == logits).all(), "a saved session goes on like the session")
        model.stats()
        return tokens, logits.tobytes()

    expected: Any = None

    def before(self) -> None:
        self.saved.unlink(missing_ok=True)

    def after(self, failed: bool) -> None:
        pass


class Write:
    """Writes a file over an older one."""

    def __init__(self, shim: Shim, target: Path, write: Callable[[str], object]) -> None:
        self.shim, self.target, self.write = shim, target, write

    expected: Any = None

    def __call__(self) -> Any:
        self.write(str(self.target))
        self.shim.disarm()
        return self.target.read_bytes()

    def before(self) -> None:
        self.target.write_bytes(OLD)

    def after(self, failed: bool) -> None:
        content = self.target.read_bytes()
        check(content in (OLD, self.expected) if failed else content == self.expected, "the file is the old or the new")
        check(not list(self.target.parent.glob(".*.part")), "no part is left")


Scenario = Use | Write


def check(true: bool, what: str) -> None:
    if not true:
        raise AssertionError(what)


def scenarios(shim: Shim, folder: Path) -> dict[str, Callable[[], Scenario]]:
    """By name, what makes each; its files first."""

    def gguf() -> str:
        return write_model(folder / "model.gguf", **SHAPE)

    def packed(**shape: Any) -> str:
        path = folder / "model.stpk"
        pack(write_model(folder / "model.gguf", **(SHAPE | shape)), str(path))
        return str(path)

    def budget(path: str) -> int:
        return plan_memory(path, context=256).total + (64 << 20)

    def tied() -> Use:
        path = packed()
        return Use(shim, folder, path, memory=budget(path), verify=True)

    def untied() -> Use:
        path = packed(tied=False, lm_head_profiler=32)
        return Use(shim, folder, path, memory=budget(path), kv="q8_0")

    def converted() -> Write:
        write_checkpoint(folder / "checkpoint", tied=False, shards=2)
        return Write(shim, folder / "out.gguf", lambda target: convert(str(folder / "checkpoint"), target, "q4_0"))

    def packs() -> Write:
        path = gguf()
        return Write(shim, folder / "out.stpk", lambda target: pack(path, target))

    def unpacks() -> Write:
        path = packed()
        return Write(shim, folder / "out.gguf", lambda target: unpack(path, target))

    def requantized() -> Write:
        path = write_model(folder / "model.gguf", types="F16")
        return Write(shim, folder / "out.gguf", lambda target: convert(path, target, "q8_0"))

    return {
        "paged": tied,
        "paged-untied": untied,
        "free": lambda: Use(shim, folder, packed()),
        "gguf": lambda: Use(shim, folder, gguf()),
        "pack": packs,
        "unpack": unpacks,
        "convert": converted,
        "requantize": requantized,
    }


def places(calls: int, every: bool) -> Iterator[int]:
    """Which call is to fail: each, or the first ones, the last, and some between."""
    some = {1, 2, 3, calls, *range(4, calls, max(1, calls // 4))}
    yield from range(1, calls + 1) if every else sorted(n for n in some if 1 <= n <= calls)


class Faults:
    """Runs a scenario with faults, and counts what came of it."""

    def __init__(self, shim: Shim, scenario: Scenario) -> None:
        self.shim, self.scenario = shim, scenario
        self.done: Counter[str] = Counter()
        for _ in range(2):  # what is made once and kept is made now
            scenario.before()
            shim.arm(None)
            scenario.expected = scenario()
            shim.disarm()
        self.calls = shim.calls()
        gc.collect()
        gc.freeze()
        self.held, self.live = held(), shim.live()

    def run_all(self, every: bool) -> None:
        for kind, action, on in ACTIONS:
            for n in places(self.calls[kind], every):
                try:
                    self.run(kind, n, EVER if on else n, action)
                except BaseException:
                    print(f"{kind} {n}, action {action}{' and on' if on else ''}:", file=sys.stderr)
                    raise

    def run(self, kind: str, first: int, last: int, action: int) -> None:
        self.scenario.before()
        self.shim.arm(kind, first, last, action)
        failed = False
        try:
            result = self.scenario()
        except Exception as problem:
            self.shim.disarm()
            failed = True
            expected = OutOfMemoryError if kind in MEMORY_KINDS else (SmallThinkerError, OSError)
            if not isinstance(problem, expected):
                raise
            self.done[f"{kind}: {type(problem).__name__}"] += 1
            if (kind, action) in HARMLESS:
                raise AssertionError("this is to be got over") from problem
        else:
            self.shim.disarm()
            check(result == self.scenario.expected, "the result is right")
            self.done[f"{kind}: got over"] += 1
        self.scenario.after(failed)
        self.check_nothing_left()

    def check_nothing_left(self) -> None:
        until = time.monotonic() + 5
        while (found := (held(), self.shim.live())) != (self.held, self.live) and time.monotonic() < until:
            gc.collect()
            time.sleep(0.001)
        check(
            found == (self.held, self.live),
            f"(files, threads), (blocks, bytes): {found}, at the beginning {(self.held, self.live)}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--all", action="store_true", help="every call, not some")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve() / "faults"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    warnings.simplefilter("ignore")
    shim = Shim(folder)
    scenario = scenarios(shim, folder)[arguments.scenario]()
    faults = Faults(shim, scenario)
    try:
        faults.run_all(arguments.all)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    print(json.dumps({"calls": faults.calls, "done": faults.done}))


if __name__ == "__main__":
    main()
