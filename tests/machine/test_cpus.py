"""Threads and limits from fake /proc and /sys trees: cgroup versions 1 and 2, containers, big.LITTLE boards."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
from fake_root import tree

from smallthinker_edge import SmallThinker
from smallthinker_edge._native import kernels
from smallthinker_edge.machine import cpus


def cores(name: str, values: list[int]) -> dict[str, str]:
    return {f"sys/devices/system/cpu/cpu{i}/{name}": str(value) for i, value in enumerate(values)}


# Capacities and clocks as Linux reports them on the boards.
RK3588 = [397] * 4 + [1024] * 4
RK3588_CLOCKS = [1800000] * 4 + [2400000] * 2 + [2352000] * 2
SNAPDRAGON_865 = [284] * 4 + [871] * 3 + [1024]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {0, 1, 2, 3, 4, 5, 6, 7}),
        (cores("cpu_capacity", RK3588), {4, 5, 6, 7}),
        (cores("cpufreq/cpuinfo_max_freq", RK3588_CLOCKS), {4, 5, 6, 7}),
        (cores("cpu_capacity", SNAPDRAGON_865), {4, 5, 6, 7}),
        (cores("cpu_capacity", [1024] * 8), {0, 1, 2, 3, 4, 5, 6, 7}),
        (cores("cpu_capacity", RK3588[:7]), {0, 1, 2, 3, 4, 5, 6, 7}),  # one core says nothing: no guessing
    ],
)
def test_big_cores_are_those_near_the_fastest(tmp_path: Path, files: dict[str, str], expected: set[int]) -> None:
    assert cpus.big_cpus(tree(tmp_path, files), range(8)) == expected


def test_only_allowed_cores_are_compared(tmp_path: Path) -> None:
    root = tree(tmp_path, cores("cpu_capacity", RK3588))
    assert cpus.big_cpus(root, [0, 1]) == {0, 1}
    assert cpus.big_cpus(root, [1, 6]) == {6}


V2 = {"sys/fs/cgroup/cgroup.controllers": "cpu memory"}


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, 0),
        ({**V2, "proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 0),
        ({**V2, "proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
        ({**V2, "proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"}, 2),
        ({**V2, "proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "10000 100000"}, 1),
        # The unit is unlimited, the slice around it is not.
        (
            {
                **V2,
                "proc/self/cgroup": "0::/app.slice/llm.service",
                "sys/fs/cgroup/app.slice/cpu.max": "300000 100000",
                "sys/fs/cgroup/app.slice/llm.service/cpu.max": "max 100000",
            },
            3,
        ),
        # A container without a cgroup namespace: /proc names the host's path, the mount is the container's own.
        ({**V2, "proc/self/cgroup": "0::/docker/abc", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4),
        (
            {
                "proc/self/cgroup": "4:memory:/box\n3:cpu,cpuacct:/box\n0::/",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "250000",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            0,
        ),
        ({**V2, "proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "rubbish"}, 0),
    ],
)
def test_cpu_quota_is_the_tightest_one(tmp_path: Path, files: dict[str, str], quota: int) -> None:
    assert cpus.cpu_quota(tree(tmp_path, files)) == quota


def test_auto_threads_keep_to_the_quota(tmp_path: Path) -> None:
    one = tree(tmp_path, {**V2, "proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "100000 100000"})
    assert cpus.auto_threads(one) == 1
    assert cpus.auto_threads(tmp_path / "nothing") == len(cpus.allowed_cpus())


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_threads_start_on_the_chosen_cpus_and_the_caller_stays_free() -> None:
    before = os.sched_getaffinity(0)
    one = {min(before)}
    with cpus.started_on(one):
        assert os.sched_getaffinity(0) == one
    assert os.sched_getaffinity(0) == before


def test_places_go_round_the_cpus() -> None:
    assert cpus.places(3, {5, 2}) == [2, 5, 2]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_pinned_threads_stay_on_their_cpus_and_the_caller_goes_back(demo_model: Path) -> None:
    before = os.sched_getaffinity(0)
    others = set(os.listdir("/proc/self/task"))
    with SmallThinker(demo_model, threads=3, pin=True) as model, model.session() as session:
        session.decode([1, 2, 3])
        started = [int(task) for task in set(os.listdir("/proc/self/task")) - others]
        places = sorted(next(iter(os.sched_getaffinity(task))) for task in started)
        assert all(len(os.sched_getaffinity(task)) == 1 for task in started)
        assert places == sorted(cpus.places(3, before)[1:])
        assert os.sched_getaffinity(0) == before


# Best first, by machine: what Linux must report of a processor for each kernel table.
X86 = {
    "avx512vnni": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
    "avxvnni": {"avx2", "fma", "f16c", "avx_vnni"},
    "avx2": {"avx2", "fma", "f16c"},
}
ARM64 = {"i8mm": {"asimddp", "i8mm"}, "dotprod": {"asimddp"}, "neon": {"asimd"}}


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc/cpuinfo")
def test_every_kernel_table_that_the_processor_can_run_is_offered() -> None:
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    has = next((set(value.split()) for key, _, value in lines if key.strip() in ("flags", "Features")), set())
    tables = {"x86_64": X86, "aarch64": ARM64}.get(platform.machine(), {})
    assert kernels.tables() == [*(name for name, needs in tables.items() if needs <= has), "ref"]
