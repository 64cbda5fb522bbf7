"""Systems with pages of 16 and 64 KiB (Raspberry Pi 5, Apple, some servers): nothing here may assume 4 KiB."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_model
from shims import build_shim, run_with
from small_model import SHAPE

from smallthinker_edge.files.pack import pack

PROGRAM = """
import json, mmap, os, sys
from smallthinker_edge import SmallThinker
from smallthinker_edge.opening import plan_memory

path, results = sys.argv[1], []
memory = plan_memory(path, context=1024).total + (64 << 20)
for options in (dict(memory=memory), dict(memory=memory, kv="q8_0", verify=True), dict()):  # the last one: page cache
    with SmallThinker(path, threads=2, context=1024, **options) as model:
        slots = [model.stats()["slots"]]
        sessions = [model.session() for _ in range(3)]
        for session in sessions:
            logits = session.decode(list(range(1, 300)), all_logits=True)
        slots.append(model.stats()["slots"])
        sessions[0].save(path + ".session")
        for session in sessions:
            session.close()
        with model.load_session(path + ".session") as session:
            results.append([float(x) for x in session.decode([7])[:50]])
        results.append(model.generate("hello world", max_tokens=8).tokens)
        direct = model.stats()["direct_io"]
print(json.dumps({"page": mmap.PAGESIZE, "os": os.sysconf("SC_PAGESIZE"), "direct": direct, "results": results}))
"""


@pytest.fixture(scope="module")
def page_shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shim("page_shim", tmp_path_factory.mktemp("shim"), FAKE_PAGE="4096")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_model(tmp_path_factory.mktemp("pages") / "model.gguf", **SHAPE | {"window": 64})
    target = path.replace(".gguf", ".stpk")
    pack(path, target)
    return target


def run(shim: Path, packed: str, **variables: str) -> Any:
    return json.loads(run_with(shim, ["-c", PROGRAM, packed], **variables))


def test_nothing_depends_on_the_size_of_pages(page_shim: Path, packed: str) -> None:
    expected = run(page_shim, packed, FAKE_PAGE="4096")
    for size in (16384, 65536):
        found = run(page_shim, packed, FAKE_PAGE=str(size))
        assert (found["page"], found["os"]) == (size, size)
        assert found["results"] == expected["results"]


def test_storage_with_larger_blocks_is_read_through_the_page_cache(page_shim: Path, packed: str) -> None:
    expected = run(page_shim, packed, FAKE_PAGE="4096", FAKE_DIRECT="1")
    found = run(page_shim, packed, FAKE_PAGE="65536", FAKE_DIRECT="1")
    assert not found["direct"]
    assert found["results"] == expected["results"]
