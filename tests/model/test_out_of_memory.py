"""A system without memory: an exception of ours, and a model that goes on when there is some again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from gguf_files import write_model

PROGRAM = """
import resource, sys
import numpy as np
from smallthinker_edge import OutOfMemoryError, SmallThinker, SmallThinkerError

def limit(more):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + more, resource.getrlimit(resource.RLIMIT_AS)[1]))

model = SmallThinker(sys.argv[1], context=30000, threads=2)
expected = model.generate([65], max_tokens=3).tokens
session = model.session()
failed = 0
for more in (0, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24):
    limit(more)
    for use in (
        lambda: session.decode(np.zeros(20000, np.int32), all_logits=True),
        lambda: session.decode(np.zeros(20000, np.int32)),
        lambda: model.session().decode([1, 2, 3]),
        lambda: SmallThinker(sys.argv[1], context=30000),
    ):
        try:
            use()
        except OutOfMemoryError:
            failed += 1
        except MemoryError:
            pass  # of Python's own objects
    limit(1 << 40)
    session.reset()
    assert model.generate([65], max_tokens=3).tokens == expected
assert failed > 3
print("survived")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and RLIMIT_AS")
def test_no_memory_is_an_exception_and_no_more(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", context_length=30000)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, path], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout, done.stderr) == ("survived\n", "")
