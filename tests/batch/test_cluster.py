"""`map` over a real Dask cluster on this machine: workers with files of their own, some of them killed or wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import gguf_files
import pytest
from batches import answers, run_map, start_map, wait_for_answers, write_batch

from smallthinker_edge.batch.cluster import Cluster
from smallthinker_edge.errors import SmallThinkerError
from smallthinker_edge.files.pack import pack

pytest.importorskip("distributed", reason="the extra `cluster` is not installed")

LINES = 60


class DaskCluster:
    """A scheduler and workers, each a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.workers = list[subprocess.Popen[str]]()
        self.scheduler = self._start("dask_scheduler", "--port", "0", "--no-dashboard")
        self._wait("scheduler.json", self.scheduler)
        self.address = json.loads((folder / "scheduler.json").read_text(encoding="utf-8"))["address"]

    def add_worker(self, **variables: str) -> subprocess.Popen[str]:
        """A worker without a nanny, so that one that is killed stays away."""
        name = f"w{len(self.workers)}"
        options = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--memory-limit", "0", "--name", name]
        worker = self._start("dask_worker", *options, **variables)
        self.workers.append(worker)
        return worker

    def close(self) -> None:
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()

    def _start(self, program: str, *options: str, **variables: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", f"distributed.cli.{program}", *options]
        file = str(self.folder / "scheduler.json")
        env = {**os.environ, "PYTHONPATH": os.getcwd(), **variables}
        with open(self.folder / "log", "a", encoding="utf-8") as log:
            return subprocess.Popen(
                [*command, "--scheduler-file", file], env=env, cwd=self.folder, stderr=log, text=True
            )

    def _wait(self, name: str, process: subprocess.Popen[str]) -> None:
        while not (self.folder / name).exists() or not (self.folder / name).read_text(encoding="utf-8"):
            assert process.poll() is None
            time.sleep(0.05)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[DaskCluster]:
    folder = tmp_path / "dask"
    folder.mkdir()
    cluster = DaskCluster(folder)
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def batch(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[dict[str, Any]]]:
    """(task, input, answers of one process)."""
    folder = tmp_path_factory.mktemp("batch")
    task, source = write_batch(folder, LINES)
    code, _, err = run_map("-m", demo_model, "--task", task, source, "-o", folder / "reference.jsonl")
    assert code == 0, err
    return task, source, answers(folder / "reference.jsonl")


Batch = tuple[Path, Path, list[dict[str, Any]]]


def test_a_worker_that_is_killed_loses_nothing_and_repeats_nothing(
    cluster: DaskCluster, batch: Batch, demo_model: Path, tmp_path: Path
) -> None:
    """One worker has a packed file and a budget, the other the GGUF; neither is where the command line says."""
    task, source, expected = batch
    target = tmp_path / "out.jsonl"
    pack(demo_model, tmp_path / "mine.stpk")
    shutil.copy(demo_model, tmp_path / "ours.gguf")
    first = cluster.add_worker(SMALLTHINKER_MODEL=str(tmp_path / "mine.stpk"), SMALLTHINKER_MEMORY="400MiB")
    cluster.add_worker(SMALLTHINKER_MODEL=str(tmp_path / "ours.gguf"))
    process = start_map(
        "-m", "nowhere.gguf", "--task", task, source, "-o", target, "--scheduler", cluster.address, "--threads", 1
    )
    wait_for_answers(target, 10, process)
    first.kill()
    assert target.read_bytes().count(b"\n") < LINES, "it was killed before the end"
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert answers(target) == expected


def test_a_connection_that_breaks_under_an_answer_is_the_schedulers() -> None:
    from distributed import CancelledError
    from distributed.comm import CommClosedError

    for error in (CommClosedError("in <TCP (closed)>: reset by peer"), CancelledError("key")):
        broken = Mock(**{"result.side_effect": error})
        with pytest.raises(SmallThinkerError, match="scheduler is gone"):
            Cluster._result(Mock(spec=Cluster), broken)


def test_a_run_that_is_killed_goes_on_with_other_workers(
    cluster: DaskCluster, batch: Batch, demo_model: Path, tmp_path: Path
) -> None:
    """Then without any cluster: a file of answers does not know who computed them."""
    task, source, expected = batch
    target = tmp_path / "out.jsonl"
    command = ["-m", demo_model, "--task", task, source, "-o", target]
    cluster.add_worker()
    cluster.add_worker()
    process = start_map(*command, "--scheduler", cluster.address)
    wait_for_answers(target, 10, process)
    process.kill()
    process.communicate()
    cluster.add_worker()
    process = start_map(*command, "--scheduler", cluster.address)
    wait_for_answers(target, 30, process)
    cluster.scheduler.kill()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    assert "scheduler" in err
    assert "Traceback" not in err
    assert target.read_bytes().count(b"\n") < LINES
    code, _, err = run_map(*command)
    assert code == 0, err
    assert answers(target) == expected


def test_workers_that_cannot_or_have_another_model_get_no_lines(
    cluster: DaskCluster, batch: Batch, demo_model: Path, tmp_path: Path
) -> None:
    task, source, expected = batch
    target = tmp_path / "out.jsonl"
    command = ["-m", demo_model, "--task", task, source, "-o", target]
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    source = tmp_path / "in.jsonl"
    source.write_text(lines[0], encoding="utf-8")
    command[4] = source
    assert run_map(*command)[0] == 0, "so the model is known"
    source.write_text("".join(lines), encoding="utf-8")
    cluster.add_worker(SMALLTHINKER_MODEL=str(tmp_path / "absent.gguf"))
    cluster.add_worker(SMALLTHINKER_MODEL=gguf_files.write_model(tmp_path / "other.gguf"))
    cluster.add_worker(SMALLTHINKER_MEMORY="1MiB")
    cluster.add_worker()
    code, _, err = run_map(*command, "--scheduler", cluster.address)
    assert code == 0, err
    assert answers(target) == expected
    for said in ("absent.gguf", "another one", "MemoryBudgetError"):
        assert said in err


def test_a_cluster_without_a_worker_that_can_ends_the_run(
    cluster: DaskCluster, batch: Batch, demo_model: Path, tmp_path: Path
) -> None:
    task, source, _ = batch
    cluster.add_worker(SMALLTHINKER_MODEL=str(tmp_path / "absent.gguf"))
    code, _, err = run_map(
        "-m", demo_model, "--task", task, source, "-o", tmp_path / "out.jsonl", "--scheduler", cluster.address
    )
    assert code == 1
    assert "absent.gguf" in err.splitlines()[-1]
    assert "Traceback" not in err
