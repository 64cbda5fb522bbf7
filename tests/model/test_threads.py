"""The library's own threads, and the caller's: how much stack they need, which signals they leave to the program, and
how a program ends while they work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import zlib

import pytest
from gguf_files import write_model
from small_model import SHAPE

from smallthinker_edge import Session, SmallThinker
from smallthinker_edge.files.pack import pack

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc")
THREADS = 3
OWN_STACK = 256  # KiB, ST_THREAD_STACK
MOST_USED = 64  # KiB of a stack: half of what musl gives a thread

PRELUDE = f"""
import os, re, signal, sys, threading, time
from smallthinker_edge import SmallThinker

def tids():
    return set(os.listdir("/proc/self/task"))

before = tids()
model = SmallThinker(sys.argv[1], threads={THREADS}, memory="1GiB", kv="q8_0")
ours = tids() - before
LONG = dict(max_tokens=900, temperature=1.0, seed=1, logit_bias=dict.fromkeys(model.tokenizer.eos_ids, -1e9))

def use():
    with model.session() as session:
        session.decode(list(range(1, 300)))
        session.decode([1, 2, 3], all_logits=True)
        session.save(sys.argv[1] + ".session")
    return model.generate("hello world", max_tokens=5).tokens
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_model(tmp_path_factory.mktemp("threads") / "model.gguf", **SHAPE)
    target = path.replace(".gguf", ".stpk")
    pack(path, target)
    return target


def run(packed: str, code: str, shell: str = "") -> subprocess.CompletedProcess[str]:
    """The code after PRELUDE in a process of its own, which may be limited by commands of the shell before it."""
    command = ["sh", "-c", f'{shell}\nexec "$@"', "sh", sys.executable, "-c", PRELUDE + code, packed]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


# Signals


def test_our_threads_leave_signals_to_the_program(packed: str) -> None:
    done = run(
        packed,
        """
masks = [re.search(r"SigBlk:\\s*(\\w+)", open(f"/proc/self/task/{tid}/status").read())[1] for tid in ours]
print(*masks)
""",
    )
    assert done.stderr == ""
    masks = [int(mask, 16) for mask in done.stdout.split()]
    assert len(masks) >= THREADS  # the team but for the caller, and the reader

    def blocked(mask: int, number: int) -> bool:
        return bool(mask >> (number - 1) & 1)

    for mask in masks:
        assert all(blocked(mask, n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM))
        assert all(not blocked(mask, n) for n in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGABRT))


def test_a_signal_that_the_program_waits_for_is_not_taken_by_our_threads(packed: str) -> None:
    """In one of them its default action would end the process."""
    done = run(
        packed,
        """
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
print(signal.sigwait({signal.SIGTERM}).name)
""",
    )
    assert (done.stdout, done.stderr, done.returncode) == ("SIGTERM\n", "", 0)


def test_a_handler_runs_while_a_thread_computes(packed: str) -> None:
    done = run(
        packed,
        """
caught = threading.Event()
signal.signal(signal.SIGUSR1, lambda *_: caught.set())
thread = threading.Thread(target=lambda: [use() for _ in iter(caught.is_set, True)])
thread.start()
time.sleep(0.2)
os.kill(os.getpid(), signal.SIGUSR1)
thread.join()
print("handled")
""",
    )
    assert (done.stdout, done.stderr, done.returncode) == ("handled\n", "", 0)


# Stacks


def test_no_thread_of_ours_uses_much_of_its_small_stack(packed: str) -> None:
    """Pages of a new stack are there when they have been written to. A guard page below tells it from other memory."""
    done = run(
        packed,
        f"""
use()
size = guard = None
for line in open("/proc/self/smaps"):
    if place := re.match(r"([0-9a-f]+)-([0-9a-f]+) (....)", line):
        start, end = int(place[1], 16), int(place[2], 16)
        size = (end - start) >> 10 if start == guard and place[3] == "rw-p" else None
        guard = end if place[3] == "---p" and end - start == os.sysconf("SC_PAGESIZE") else None
    elif line.startswith("Rss:") and size == {OWN_STACK}:
        print(line.split()[1])
""",
    )
    assert done.stderr == ""
    used = [int(size) for size in done.stdout.split()]
    assert len(used) >= THREADS
    assert max(used) <= MOST_USED


@pytest.mark.parametrize("shell", ["", "ulimit -s 256", "ulimit -s 256; ulimit -v 4000000"])
def test_callers_with_small_stacks_get_the_same_tokens(packed: str, shell: str) -> None:
    done = run(
        packed,
        """
found = []
threading.stack_size(128 << 10)  # musl's default
thread = threading.Thread(target=lambda: found.append(use()))
thread.start()
thread.join()
assert found == [use()], found
print("same")
""",
        shell,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("same\n", "", 0)


def test_a_caller_with_the_smallest_stack_decodes(packed: str) -> None:
    done = run(
        packed,
        """
found = []
session = model.session()
threading.stack_size(64 << 10)
thread = threading.Thread(target=lambda: found.append(session.decode(list(range(1, 300)))))
thread.start()
thread.join()
assert (found[0] == model.session().decode(list(range(1, 300)))).all()
print("same")
""",
    )
    assert (done.stdout, done.stderr, done.returncode) == ("same\n", "", 0)


# The end of a program


@pytest.mark.parametrize("daemon", [True, False])
def test_a_program_ends_while_a_thread_decodes(packed: str, daemon: bool) -> None:
    done = run(
        packed,
        f"""
started = threading.Event()

def decode():
    stop = time.monotonic() + 1
    while time.monotonic() < stop or {daemon}:
        started.set()
        with model.session() as session:
            session.decode(list(range(1, 300)))

threading.Thread(target=decode, daemon={daemon}).start()
started.wait()
print("ends")
""",
    )
    assert (done.stdout, done.stderr, done.returncode) == ("ends\n", "", 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_program_that_generates(packed: str, number: signal.Signals) -> None:
    """The default action of SIGTERM, KeyboardInterrupt of SIGINT, also where streams and sessions are open."""
    done = run(
        packed,
        f"""
signal.signal(signal.SIGINT, signal.default_int_handler)
session = model.session()
session.decode([1, 2, 3])
stream = model.stream("hello", **LONG)
next(stream)
threading.Timer(0.2, os.kill, (os.getpid(), {int(number)})).start()
while True:
    use()
""",
    )
    assert done.returncode == -number
    assert done.stderr.splitlines()[-1:] == (["KeyboardInterrupt"] if number == signal.SIGINT else [])


def test_handlers_at_exit_may_use_the_model(packed: str) -> None:
    done = run(
        packed,
        """
import atexit
atexit.register(lambda: print(len(use()) > 0))
stream = model.stream("hello", **LONG)
next(stream)
""",
    )
    assert (done.stdout, done.stderr, done.returncode) == ("True\n", "", 0)


@pytest.mark.parametrize("late", ["atexit.register(opens)", "threading.Thread(target=opens).start()"])
def test_a_model_may_be_opened_while_the_interpreter_ends(packed: str, late: str) -> None:
    """Which starts no threads of Python any more."""
    done = run(
        packed,
        f"""
import atexit

def opens():
    time.sleep(0.5)
    with SmallThinker(sys.argv[1]) as other:
        print(other.generate("hello world", max_tokens=5).tokens == use())

{late}
""",
    )
    assert (done.stdout, done.stderr, done.returncode) == ("True\n", "", 0)


@pytest.mark.skipif(os.cpu_count() == 1, reason="one CPU")
def test_no_bit_depends_on_how_many_threads_a_token_used(packed: str) -> None:
    """Another program takes a CPU, so that (where there are two) fewer are used, and gives it back."""
    busy = "import os; os.sched_setaffinity(0, {max(os.sched_getaffinity(0))}); print(flush=True)\nwhile True: pass"

    def some(model: SmallThinker, session: Session, until: int) -> list[int]:
        sums = []
        for token in range(2000):
            if session.position == 400:
                session.reset()
            sums.append(zlib.crc32(session.decode([token % 512])))
            if model.stats()["threads_in_use"] == until:
                break
        return sums

    with SmallThinker(packed, threads=1) as model, model.session() as session:
        expected = some(model, session, 0)
    with SmallThinker(packed, threads=2) as model, model.session() as session:
        for until in (1, 2):
            with subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE) as other:
                assert other.stdout is not None
                other.stdout.readline()
                sums = some(model, session, until)
                other.kill()
            assert sums == expected[: len(sums)]
            session.reset()
        assert some(model, session, 0) == expected


# Python without a global lock


def test_a_python_that_was_told_to_do_without_its_lock_is_refused() -> None:
    code = "import sys; sys._is_gil_enabled = lambda: False; import smallthinker_edge"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: smallthinker_edge needs Python's global lock")


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="only where Python can do without its lock")
def test_the_lock_is_on_once_the_library_is_imported() -> None:
    code = "import smallthinker_edge, sys; print(sys._is_gil_enabled())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("True\n", 0)
    assert "has been enabled to load module 'smallthinker_edge._native" in done.stderr
