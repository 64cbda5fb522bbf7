"""Memory budgets: what "auto" takes, and what is dropped from the page cache."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from smallthinker_edge.machine import cgroup, memory


def test_auto_is_what_is_free_and_what_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    own = psutil.Process().memory_info().rss
    monkeypatch.setattr(cgroup, "memory", lambda: [(3000, 1000)])
    assert abs(memory.parse_memory("auto") - own - 1800) < 1 << 20
    monkeypatch.setattr(cgroup, "memory", lambda: [(1000, 3000)])
    assert memory.parse_memory("auto") < own + (1 << 20)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_the_cache_of_modules_and_of_shared_libraries_is_dropped() -> None:
    loaded = memory._loaded_files()
    assert memory.__file__ in loaded
    assert any("/libc.so" in path or "/libc.musl" in path or "/ld-musl" in path for path in loaded)
    assert all(Path(path).is_file() for path in loaded)
