"""Memory limits from fake /proc and /sys trees: cgroup versions 1 and 2, and containers."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_root import tree

from smallthinker_edge.machine import cgroup

V2 = {"sys/fs/cgroup/cgroup.controllers": "cpu memory"}


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, 0),
        ({**V2, "proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "max"}, 0),
        ({**V2, "proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "1073741824"}, 1 << 30),
        (
            {
                **V2,
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/memory.max": "500000000",
                "sys/fs/cgroup/a/b/memory.max": "1073741824",
            },
            500000000,
        ),
        # memory.high slows down what memory.max would kill.
        (
            {**V2, "proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/memory.high": "700"},
            700,
        ),
        (
            {**V2, "proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "600", "sys/fs/cgroup/memory.high": "700"},
            600,
        ),
        (
            {**V2, "proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "600", "sys/fs/cgroup/memory.high": "max"},
            600,
        ),
        (  # ... at any level
            {
                **V2,
                "proc/self/cgroup": "0::/a/b/c",
                "sys/fs/cgroup/a/memory.high": "800",
                "sys/fs/cgroup/a/memory.max": "900",
                "sys/fs/cgroup/a/b/memory.high": "max",
                "sys/fs/cgroup/a/b/memory.max": "850",
                "sys/fs/cgroup/a/b/c/memory.max": "max",
            },
            800,
        ),
        (  # a namespace of cgroups whose root is below this process's own: what is seen counts
            {**V2, "proc/self/cgroup": "0::/../../other", "sys/fs/cgroup/memory.max": "750"},
            750,
        ),
        (  # both versions, the memory controller in version 2
            {
                "proc/self/cgroup": "5:cpu:/x\n0::/a",
                "sys/fs/cgroup/cpu/x/tasks": "",
                "sys/fs/cgroup/unified/cgroup.controllers": "memory",
                "sys/fs/cgroup/unified/a/memory.max": "1000",
            },
            1000,
        ),
        (
            {"proc/self/cgroup": "4:memory:/box", "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "1073741824"},
            1 << 30,
        ),
        ({"proc/self/cgroup": "4:memory:/", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}, 0),
    ],
)
def test_memory_limit_is_the_tightest_one(tmp_path: Path, files: dict[str, str], limit: int) -> None:
    assert cgroup.memory_limit(tree(tmp_path, files)) == limit


def limited(folder: str, limit: int | str, use: int, stat: str, version: int = 2) -> dict[str, str]:
    """The files of one memory cgroup."""
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    values = dict(zip(names, (str(limit), str(use)), strict=True)) | {"memory.stat": stat}
    return {f"sys/fs/cgroup/{folder}{name}": value for name, value in values.items()}


@pytest.mark.parametrize(
    ("files", "found"),
    [
        # Version 2: the limit of the group around this one counts.
        (
            {
                "proc/self/cgroup": "0::/a/b",
                **limited("a/", 1000, 600, "anon 7\ninactive_file 100"),
                **limited("a/b/", "max", 500, "anon 7\ninactive_file 100"),
            },
            [(1000, 500)],
        ),
        # Version 1 says "none" with a huge number.
        (
            {
                "proc/self/cgroup": "5:cpu:/x\n4:memory:/a\n0::/",
                **limited("memory/", 9223372036854771712, 1024, "total_inactive_file 24", 1),
                **limited("memory/a/", 4096, 1024, "inactive_file 3\ntotal_inactive_file 24", 1),
            },
            [(4096, 1000)],
        ),
        # A container: /proc names the host's path, the visible root is the container's own.
        ({"proc/self/cgroup": "0::/docker/0123", **limited("", 1000, 10, "anon 7")}, [(1000, 10)]),
    ],
)
def test_limits_come_with_what_is_used_of_them(
    tmp_path: Path, files: dict[str, str], found: list[tuple[int, int]]
) -> None:
    assert cgroup.memory(tree(tmp_path, files)) == found
