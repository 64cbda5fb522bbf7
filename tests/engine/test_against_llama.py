"""Files of every type that llama.cpp's quantiser makes: what we lose against F16 is no more than what llama.cpp loses.

The other engine runs in a Python of its own: LLAMA_PYTHON names it, or .venv-llama of `make bench`; skipped without.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from gguf_files import write_model
from reference import Reference
from small_model import divergence

from smallthinker_edge import SmallThinker

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("LLAMA_PYTHON", ROOT / ".venv-llama/bin/python"))
# All experts are used: random weights route almost at random, and a flipped expert would say nothing of arithmetic. Six
# layers: llama.cpp takes four for another kind of model.
SHAPE = {"n_layers": 6, "d_model": 256, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "n_experts": 8,
         "n_experts_used": 8, "d_ffn": 512, "vocab_size": 1024, "types": "F16", "context_length": 1024}  # fmt: skip
# Names of llama.cpp's mixtures and their numbers (llama_ftype).
FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15,
              "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30}  # fmt: skip
TOKENS = np.random.default_rng(3).integers(0, 1000, 48).tolist()
THEIRS = """
import ctypes, json, sys, numpy, llama_cpp
source, target, kind, logits, tokens = sys.argv[1:]
options = llama_cpp.llama_model_quantize_default_params()
options.ftype, options.nthread = int(kind), 2
assert llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(options)) == 0
model = llama_cpp.Llama(target, n_ctx=256, n_threads=2, logits_all=True, verbose=False, n_batch=64)
ids = json.loads(tokens)
model.eval(ids)
numpy.save(logits, numpy.array(model.scores[: len(ids)], numpy.float32))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    if not PYTHON.is_file() or subprocess.run([PYTHON, "-c", "import llama_cpp"], capture_output=True).returncode:
        pytest.skip("llama-cpp-python is not there: LLAMA_PYTHON names a Python that has it")
    return write_model(tmp_path_factory.mktemp("llama") / "f16.gguf", **SHAPE)


@pytest.mark.parametrize("name", FILE_TYPES)
def test_no_type_loses_more_than_with_llama_cpp(name: str, source: str, tmp_path: Path) -> None:
    target, logits = str(tmp_path / "m.gguf"), str(tmp_path / "logits.npy")
    command = [PYTHON, "-c", THEIRS, source, target, str(FILE_TYPES[name]), logits, str(TOKENS)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    expected = Reference.from_gguf(source).logits(TOKENS)
    with SmallThinker(target, threads=2) as model, model.session() as session:
        ours = divergence(expected, session.decode(TOKENS, all_logits=True)).mean()
    theirs = divergence(expected, np.load(logits)).mean()
    print(f"{name}: KL to F16 {ours:.3e}, llama.cpp {theirs:.3e}")
    assert ours < 1.02 * theirs  # both err by about the same rounding of weights; of 48 positions' mean, 2 % is chance
