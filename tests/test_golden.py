"""Logits against llama.cpp's, an independent implementation: recorded by tools/record_golden.py."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from test_engine import divergence, open_session

from smallthinker_edge._native import kernels

GOLDEN = Path(__file__).parent / "fixtures" / "golden"


@pytest.mark.parametrize("table", kernels.tables())
@pytest.mark.parametrize("name", ["random", "mixed"])
def test_logits_agree_with_llama_cpp(name: str, table: str) -> None:
    model = GOLDEN / f"{name}.gguf"
    with np.load(GOLDEN / f"{name}.npz") as recorded:
        provenance = json.loads(str(recorded["provenance"]))
        assert hashlib.sha256(model.read_bytes()).hexdigest() in json.dumps(provenance)
        prompts = [key.removeprefix("tokens_") for key in recorded if key.startswith("tokens_")]
        assert prompts
        for i in prompts:
            tokens, first = recorded[f"tokens_{i}"], int(recorded[f"first_{i}"])
            expected = recorded[f"logits_{i}"].astype(np.float32)
            got = open_session(str(model), table=table, context=len(tokens)).decode(tokens, all_logits=True)[first:]
            assert divergence(expected, got).mean() < 1e-3
