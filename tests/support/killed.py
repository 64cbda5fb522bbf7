"""Writers of files that are killed (SIGKILL) at random moments, alone and two of one target at once.

A process of its own, started by test_killed.py: it forks each writer before there are threads. Whenever a writer is
gone, and while two write, the target is one of the two files that they write, whole; a writer that ends removes what
killed ones left. Prints JSON: how many were killed, and after how many rounds something was left.

    python tests/support/killed.py FOLDER WRITER [--kills 30]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

from checkpoint_files import write_checkpoint
from gguf_files import write_model

from smallthinker_edge import SmallThinker
from smallthinker_edge.files.convert import convert
from smallthinker_edge.files.pack import pack

WRITERS = ("convert", "pack", "save")
# Seconds from the start of a writer's loop to its end; several rounds of each writer fit.
LONGEST = 0.25
Write = Callable[[str], object]


def writers(folder: Path, name: str) -> Callable[[], list[Write]]:
    """Made in the process that writes: two functions that write files of different contents."""
    models = [write_model(folder / f"model{seed}.gguf", seed=seed) for seed in range(2)]
    if name == "pack":
        return lambda: [lambda target, path=path: pack(path, target) for path in models]
    if name == "convert":
        folders = [str(folder / f"checkpoint{i}") for i in range(2)]
        for i, path in enumerate(folders):
            write_checkpoint(Path(path), tied=bool(i), layers=1 + i)
        return lambda: [lambda target, path=path: convert(path, target) for path in folders]

    def sessions() -> list[Write]:
        model = SmallThinker(models[0], threads=1)
        found = []
        for tokens in ([1, 2, 3] * 50, [4, 5, 6] * 20):
            session = model.session()
            session.decode(tokens)
            found.append(session.save)
        return found

    return sessions


def forked(work: Callable[[], None]) -> int:
    """A child that runs something; its process id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    finally:
        os._exit(1)  # they are killed, so an end is a failure


def write_for_ever(make: Callable[[], list[Write]], target: str, ready: int, first: int) -> None:
    made = make()
    os.write(ready, b"x")
    for i in cycle((first, 1 - first)):
        made[i](target)


class Killing:
    """Starts writers of one target and kills them."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.target = folder / "out", folder / "out" / "target"
        self.folder.mkdir()
        self.make = writers(folder, name)
        self.contents = [self.written(i) for i in range(2)]
        assert self.contents[0] != self.contents[1]
        self.draw = random.Random(name)
        self.kills = self.leavers = 0

    def written(self, i: int) -> bytes:
        """What a writer writes that nobody kills, in a process of its own."""
        child = forked(lambda: (self.make()[i](str(self.target)), os._exit(0))[0])
        assert os.waitpid(child, 0)[1] == 0
        assert not self.parts(), "a writer that ends leaves nothing, and removes what others left"
        return self.target.read_bytes()

    def parts(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path != self.target]

    def start(self, first: int) -> int:
        reading, writing = os.pipe()
        child = forked(lambda: write_for_ever(self.make, str(self.target), writing, first))
        os.close(writing)
        assert os.read(reading, 1) == b"x"
        os.close(reading)
        return child

    def kill(self, *children: int) -> None:
        """After a while, in which the target is looked at."""
        end = time.monotonic() + self.draw.random() * LONGEST
        while True:
            assert self.target.read_bytes() in self.contents, "the target is one of the two files, whole"
            if time.monotonic() >= end:
                break
        for child in children:
            os.kill(child, signal.SIGKILL)
        for child in children:
            assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it wrote until it was killed"
        assert self.target.read_bytes() in self.contents, "the target is one of the two files, whole"
        self.kills += len(children)
        self.leavers += len(self.parts()) > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("writer", choices=WRITERS)
    parser.add_argument("--kills", type=int, default=30)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    killing = Killing(arguments.folder.resolve(), arguments.writer)
    while killing.kills < arguments.kills:
        killing.kill(killing.start(killing.kills % 2))
        killing.kill(killing.start(0), killing.start(1))
    for i in range(2):
        assert killing.written(i) == killing.contents[i]
    print(json.dumps({"kills": killing.kills, "leavers": killing.leavers}))


if __name__ == "__main__":
    main()
