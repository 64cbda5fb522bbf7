"""A random model that is small and has whole blocks everywhere, sessions of it on any table, and tokens for it."""

from __future__ import annotations

from typing import Any

import numpy as np

from smallthinker_edge._native.engine import Engine
from smallthinker_edge._native.locks import Turns
from smallthinker_edge.files.config import ModelConfig
from smallthinker_edge.files.gguf import GGUFFile
from smallthinker_edge.loading import Loader
from smallthinker_edge.session import Session

SHAPE: dict[str, Any] = {
    "n_layers": 4, "d_model": 256, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "n_experts": 8, "n_experts_used": 2,
    "d_ffn": 128, "vocab_size": 512, "types": "Q4_0", "context_length": 1024,
}  # fmt: skip

# What differs between LM heads.
HEADS: dict[str, dict[str, Any]] = {
    "Q4_0": {},
    "untied": {"tied": False},
    "Q8_0": {"types": "Q8_0"},
    "Q6_K head": {"head_type": "Q6_K"},
    "F16": {"types": "F16"},
    "vocabulary of odd size": {"vocab_size": 519},
}


def open_session(path: str, *, threads: int = 1, table: str | None = None, batch: int = 512, exact: bool = False,
                 context: int = 1024, kv: str = "f16", predictor: bool = False) -> Session:  # fmt: skip
    gguf = GGUFFile(path)
    config = ModelConfig.from_gguf(gguf)
    engine = Engine(config, threads, table, batch, exact)
    Loader(gguf, config, engine, predictor=predictor).load()
    return Session(engine, config.vocab_size, context, Turns(), kv)


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 512, count)


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(softmax(p) || softmax(q)) of every row, in nats."""
    p, q = (x.astype(np.float64) - x.max(1, keepdims=True) for x in (p, q))
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p, q))
    return np.asarray((np.exp(p) * (p - q)).sum(1))
