"""A system without memory: an exception of ours, and a model that goes on when there is some again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from gguf_files import write_model

PROGRAM = """
import resource, sys
from smallthinker_edge import OutOfMemoryError, SmallThinker, SmallThinkerError

most = resource.getrlimit(resource.RLIMIT_AS)[1]

def limit(more):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, most))

model = SmallThinker(sys.argv[1], context=30000, threads=2)
expected = model.generate([65], max_tokens=3).tokens
session = model.session()
saved = model.session()
saved.decode([65] * 9000)
kept, written = sys.argv[1] + ".kept", sys.argv[1] + ".written"
saved.save(kept)
failed, ids, many = 0, [65] * 20000, range(1 << 23)
for more in (0, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24):
    limit(more)
    for use in (
        lambda: session.decode(ids, all_logits=True),
        lambda: session.decode(ids),
        lambda: model.session().decode([1, 2, 3]),
        lambda: SmallThinker(sys.argv[1], context=30000),
        lambda: model.generate(ids, max_tokens=1),
        lambda: model.detokenize(ids),
        lambda: session.decode(many),
        lambda: saved.save(written),
        lambda: model.load_session(kept),
        lambda: model.load_session(kept).save(written),
    ):
        try:
            use()
        except OutOfMemoryError:
            failed += 1
        except (SmallThinkerError, ValueError):
            pass  # there was enough to see what is wrong with it
    limit(1 << 40)
    session.reset()
    assert saved.tokens == model.load_session(kept).tokens
    assert model.generate([65], max_tokens=3).tokens == expected
assert failed > 12
print("survived")
"""


EACH = """
import _testcapi, sys
import numpy as np
from smallthinker_edge import OutOfMemoryError, SmallThinker

model = SmallThinker(sys.argv[1], context=1024, threads=1)
session = model.session()
session.decode(list(range(300)))
other = session.fork()
uses = {"fork": lambda: session.fork(), "mark": session.mark, "rewind": lambda: session.rewind(0)}
use, failed = uses[sys.argv[2]], 0
for n in range(200):
    _testcapi.set_nomemory(n, n + 1)
    try:
        use()
    except OutOfMemoryError:
        failed += 1
    finally:
        _testcapi.remove_mem_hooks()
assert failed > 10, failed
session.decode([1, 2])
other.decode([3, 4])
for one, tokens in ((session, [1, 2]), (other, [3, 4])):
    fresh = model.session()
    fresh.decode(list(range(300)))
    fresh.decode(tokens)
    assert one.tokens == fresh.tokens
    assert np.array_equal(one.decode([5]), fresh.decode([5]))
print("survived")
"""


@pytest.mark.parametrize("use", ["fork", "mark", "rewind"])
def test_any_allocation_of_python_may_fail(tmp_path: Path, use: str) -> None:
    """Of those calls that need nothing of NumPy, in which a small one that fails is a SystemError, or worse."""
    pytest.importorskip("_testcapi")
    path = write_model(tmp_path / "m.gguf", context_length=1024, window=64)
    done = subprocess.run(
        [sys.executable, "-c", EACH, path, use], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout, done.stderr) == ("survived\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and RLIMIT_AS")
def test_no_memory_is_an_exception_and_no_more(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", context_length=30000)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, path], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout, done.stderr) == ("survived\n", "")
