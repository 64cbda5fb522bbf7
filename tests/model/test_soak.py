"""Memory has a constant high-water mark and logits stay the same, however long sessions come and go: soak.py in short.

`make test-soak` runs it with a million tokens (eight hours at 35 tokens/s), which takes minutes.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soak
from gguf_files import write_model

from smallthinker_edge import SmallThinker
from smallthinker_edge.files.pack import pack

TOKENS = int(os.environ.get("SOAK_TOKENS", "30000"))
WARM_UP = max(10_000, TOKENS // 20)  # tokens until every buffer has been as full as it gets
MOST_GROWTH = 1 << 20  # bytes: one per token of the long run
SECONDS = 1800
SHAPE: dict[str, Any] = {"n_layers": 4, "d_model": 128, "head_dim": 32, "n_experts": 32, "n_experts_used": 2,
                         "d_ffn": 384, "window": 64, "context_length": 1024}  # fmt: skip


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("soak") / "model.gguf", **SHAPE)


@pytest.fixture(scope="module")
def report(gguf: str) -> dict[str, Any]:
    target = gguf.replace(".gguf", ".stpk")
    pack(gguf, target)
    command = [sys.executable, soak.__file__, target, "--tokens", str(TOKENS)]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
    report = json.loads(run.stdout)
    if path := os.environ.get("SOAK_REPORT"):
        Path(path).write_text(run.stdout)
    return report


def test_memory_does_not_grow_with_tokens(report: dict[str, Any]) -> None:
    places = report["places"]
    first = max(place["highest_rss"] for place in places if place["tokens"] <= WARM_UP * 1.1)
    later = max(place["highest_rss"] for place in places if place["tokens"] > WARM_UP * 1.1)
    assert places[-1]["tokens"] >= TOKENS
    assert later - first <= MOST_GROWTH


def test_the_last_tokens_logits_are_the_first_ones(report: dict[str, Any], gguf: str) -> None:
    with SmallThinker(gguf, threads=1) as model:
        assert {place["logits"] for place in report["places"]} == {soak.probe(model)}


def test_experts_are_evicted_and_read_all_the_time(report: dict[str, Any]) -> None:
    places = report["places"]
    assert report["least_slots"] < report["experts"]
    for before, after in itertools.pairwise(places):
        assert after["evictions"] > before["evictions"]
        assert after["hits"] > before["hits"]
    assert places[-1]["read_errors"] == 0


def test_every_kind_of_step_was_taken(report: dict[str, Any]) -> None:
    assert set(report["steps"]) == {
        "decode", "prompt", "rewind", "fork", "reset", "renew", "back_to_a_mark", "save_and_load", "fill", "generate",
    }  # fmt: skip
