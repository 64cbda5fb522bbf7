"""Logits against llama.cpp's, an independent implementation: recorded by tools/models/record_golden.py."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from home_chats import home_chats
from reference import Reference
from small_model import divergence, open_session

from smallthinker_edge._native import kernels
from smallthinker_edge.files.gguf import GGUFFile
from smallthinker_edge.text.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
DEMO = Path(__file__).parents[2] / "smallthinker_edge" / "data" / "demo.gguf"


@pytest.mark.parametrize("table", kernels.tables())
@pytest.mark.parametrize("name", ["random", "mixed", "demo"])
def test_logits_agree_with_llama_cpp(name: str, table: str) -> None:
    model = DEMO if name == "demo" else GOLDEN / f"{name}.gguf"
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


@pytest.mark.parametrize("table", kernels.tables())
def test_the_demo_model_agrees_with_the_reference(table: str) -> None:
    # 30 sentences: a near-tie of a router, about one in a hundred positions, then weighs what it weighs in use.
    reference = Reference.from_gguf(DEMO)
    agree, kls = [], []
    tokenizer = Tokenizer.from_gguf_metadata(GGUFFile(DEMO).metadata)
    for chat in home_chats(30):
        ids = np.array(tokenizer.encode(chat))
        expected = reference.logits(ids.tolist())
        got = open_session(str(DEMO), table=table, context=len(ids)).decode(ids, all_logits=True)
        agree.append(expected.argmax(1) == got.argmax(1))
        kls.append(divergence(expected, got))
    assert np.concatenate(kls).mean() < 1e-3
    assert np.concatenate(agree).mean() > 0.99


def test_the_demo_model_is_exact_with_exact_activations() -> None:
    reference = Reference.from_gguf(DEMO)
    tokenizer = Tokenizer.from_gguf_metadata(GGUFFile(DEMO).metadata)
    errors = []
    for chat in home_chats(6):
        ids = np.array(tokenizer.encode(chat))
        expected = reference.logits(ids.tolist(), kv="f16")
        got = open_session(str(DEMO), table="ref", exact=True, context=len(ids)).decode(ids, all_logits=True)
        errors.append(np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1))
    # Keys and values are rounded to float16: one that falls on the other side of a rounding moves a row by more.
    assert np.median(np.concatenate(errors)) < 1e-4
