"""A real `smallthinker-edge serve` in a process of its own, for tests."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx


class ServerProcess:
    """A server that runs. url: where; log: the lines it has written so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.log = process, list[str]()
        self.url = ""
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._ready.wait(60)
        assert self.url, "".join(self.log)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"running on (http://\S+)", line):
                self.url = found.group(1)
                self._ready.set()
        self._ready.set()

    def metrics(self, headers: dict[str, str] | None = None) -> dict[str, float]:
        """Every metric without labels, by its name."""
        text = httpx.get(f"{self.url}/metrics", headers=headers, timeout=30).text
        return {name: float(value) for name, value in re.findall(r"^smallthinker_(\w+) (\S+)$", text, re.MULTILINE)}

    def pending(self) -> float:
        return self.metrics()["pending_requests"]


@contextmanager
def serving(model: Path | str, *options: str, env: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    """A server for a model, on a free port; ended with SIGTERM, which it must obey."""
    command = [sys.executable, "-m", "smallthinker_edge", "serve", "-m", str(model), "--port", "0", "--threads", "1"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env=env)
    try:
        server = ServerProcess(process)
        yield server
        process.terminate()
        assert process.wait(60) in (0, -15), "".join(server.log)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def eventually(condition: Callable[[], bool]) -> None:
    """Waits until a condition holds; whoever never sees it fails."""
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it never came to be")
