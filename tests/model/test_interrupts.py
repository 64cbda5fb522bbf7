"""What ends early must end at once and leave everything usable: dropped streams, cancelled prompts, Ctrl-C, forks."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from countdown import Countdown
from gguf_files import write_model
from small_model import SHAPE, tokens

from smallthinker_edge import DecodeCancelled, OpenedBeforeFork, Session, SmallThinker
from smallthinker_edge.files.pack import pack
from smallthinker_edge.generation import stream as stream_module

PROMPT = list(range(60, 100))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One full layer to three window layers of 64 positions."""
    return write_model(tmp_path_factory.mktemp("interrupts") / "model.gguf", **SHAPE | {"window": 64})


@pytest.fixture(scope="module")
def packed(path: str) -> str:
    target = path.replace(".gguf", ".stpk")
    pack(path, target)
    return target


@pytest.fixture
def model(packed: str) -> Iterator[SmallThinker]:
    with SmallThinker(packed, context=1024, threads=2) as model:
        yield model


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A deadlock ends the test run with every thread's stack instead of blocking it."""
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


# Streams


def test_a_dropped_stream_gives_its_session_back_at_once(model: SmallThinker) -> None:
    gc.disable()
    try:
        for _ in model.stream(PROMPT, max_tokens=50):
            break
        result = model.generate(PROMPT, max_tokens=2)
    finally:
        gc.enable()
    assert result.timings.reused_tokens == len(PROMPT) - 1


def test_dropped_streams_never_block(model: SmallThinker) -> None:
    gc.collect()
    threshold = gc.get_threshold()
    gc.set_threshold(1)  # a finaliser may run at any allocation
    try:
        for i in range(300):
            for _ in model.stream([*PROMPT, i], max_tokens=50):
                break
    finally:
        gc.set_threshold(*threshold)


def test_a_stream_in_a_cycle_that_the_collector_finds_gives_back_too(model: SmallThinker) -> None:
    for i in range(30):
        ring: dict[str, Any] = {"stream": model.stream([*PROMPT, i], max_tokens=50)}
        ring["self"] = ring
        next(ring["stream"])
        del ring
    gc.collect()
    assert model.generate(PROMPT, max_tokens=2).timings.reused_tokens == len(PROMPT) - 1


def test_a_stream_is_no_cycle(model: SmallThinker) -> None:
    stream = model.stream(PROMPT, max_tokens=50)
    next(stream)
    gone = weakref.ref(stream)
    gc.disable()
    try:
        del stream
        assert gone() is None
    finally:
        gc.enable()


def test_a_stream_closed_from_another_thread_ends(model: SmallThinker) -> None:
    stream = model.stream(
        PROMPT, max_tokens=900, temperature=1.0, seed=1, logit_bias=dict.fromkeys(model.tokenizer.eos_ids, -1e9)
    )
    pieces: list[str] = []
    reader = threading.Thread(target=lambda: pieces.extend(stream))
    reader.start()
    while not pieces:
        time.sleep(0.001)
    stream.close()
    reader.join(30)
    assert not reader.is_alive()
    assert stream.result is not None
    assert stream.result.finish_reason == "cancelled"


# Cancelling and Ctrl-C


def slow_prompt(model: SmallThinker) -> np.ndarray:
    """Tokens of one chunk."""
    return tokens(500, seed=3) % model.config.vocab_size


LONG: dict[str, Any] = {
    "n_layers": 64, "d_model": 512, "n_heads": 8, "n_kv_heads": 2, "head_dim": 64, "n_experts": 8, "n_experts_used": 4,
    "d_ffn": 512, "context_length": 1024,
}  # fmt: skip


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallThinker]:
    """A chunk of 500 tokens takes well over a second, spread over many layers."""
    path = write_model(tmp_path_factory.mktemp("long") / "long.gguf", **LONG)
    with SmallThinker(path, threads=1, context=1024) as model:
        yield model


def decode_for_ever(session: Session, ids: np.ndarray, cancel: Countdown | None = None) -> None:
    while True:
        session.decode(ids, cancel=cancel)
        session.reset()


def test_a_cancelled_chunk_is_left_in_the_middle(long: SmallThinker) -> None:
    session = long.session()
    session.decode([1, 2, 3])
    signal_ = Countdown(2)  # the first look is before the chunk
    with pytest.raises(DecodeCancelled) as caught:
        session.decode(slow_prompt(long), cancel=signal_)
    assert signal_.looks == -1
    assert caught.value.done == 0
    assert (session.position, session.tokens) == (3, [1, 2, 3])
    fresh = long.session()
    fresh.decode([1, 2, 3])
    assert np.array_equal(session.decode([4, 5]), fresh.decode([4, 5]))


def test_an_error_of_the_cancel_signal_is_raised(long: SmallThinker) -> None:
    class Broken:
        looks = 0

        def is_set(self) -> bool:
            self.looks += 1
            if self.looks > 1:
                raise KeyError("broken")
            return False

    session = long.session()
    with pytest.raises(KeyError, match="broken"):
        session.decode(slow_prompt(long), cancel=Broken())
    assert session.position == 0


def test_ctrl_c_leaves_a_chunk_in_the_middle(long: SmallThinker) -> None:
    session = long.session()
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            decode_for_ever(session, slow_prompt(long))
    finally:
        signal.signal(signal.SIGINT, before)
    session.reset()
    assert np.array_equal(session.decode([4, 5]), long.session().decode([4, 5]))


def test_a_thread_that_waits_for_its_turn_can_be_cancelled(long: SmallThinker) -> None:
    first, second = long.session(), long.session()
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            first.decode(slow_prompt(long))
            first.reset()

    other = threading.Thread(target=compute)
    other.start()
    try:
        time.sleep(0.1)
        with pytest.raises(DecodeCancelled):
            decode_for_ever(second, np.array([1]), Countdown(3))
    finally:
        stop.set()
        other.join()


class Injected(BaseException):
    pass


def with_injections(action: Callable[[], object], check: Callable[[], None]) -> int:
    """Runs the action again and again, an exception raised at the first call that it makes, then at the second, ...

    Calls are of Python and of C functions, as they are when an interrupt's handler may run. Returns how many.
    """
    for n in range(100000):
        left = n

        def tracer(frame: FrameType, event: str, arg: object) -> None:
            nonlocal left
            if event in ("call", "c_return") and "smallthinker_edge" in frame.f_code.co_filename:
                left -= 1
                if left == -1:
                    raise Injected

        sys.setprofile(tracer)
        try:
            action()
            return n
        except Injected:
            pass
        finally:
            sys.setprofile(None)
            check()
    raise AssertionError("never done")


@pytest.mark.parametrize("kind", ["decode", "rewind", "rewind_to_mark", "load", "fork"])
def test_a_session_is_consistent_after_an_exception_at_any_call(model: SmallThinker, kind: str, tmp_path: Path) -> None:
    session = model.session()
    ids = tokens(700).tolist()
    session.decode(ids[:100])
    session.mark()
    session.decode(ids[100:400])
    saved = str(tmp_path / "saved")
    session.save(saved)
    file = str(tmp_path / "again")
    actions: dict[str, Callable[[], object]] = {
        "decode": lambda: session.decode([7, 8]),
        "rewind": lambda: session.rewind(1),
        "rewind_to_mark": lambda: session.rewind(session.position - 100),
        "load": lambda: session.load(saved),
        "fork": lambda: session.fork(),
    }

    def check() -> None:
        """Saved and loaded it is itself, and goes on as a session with these tokens does."""
        session.save(file)
        with model.session() as fresh:
            fresh.load(file)
            assert fresh.tokens == session.tokens
        if session.position < 450:
            return
        session.load(saved)

    assert with_injections(actions[kind], check) >= 2
    went_on = session.decode([9])
    with model.session() as fresh:
        fresh.decode(session.tokens[:-1])
        assert np.array_equal(fresh.decode([9]), went_on)


# What is raised inside of a generator that is being closed has nobody to go to.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_generation_is_consistent_after_an_exception_at_any_call(model: SmallThinker) -> None:
    expected = model.generate(PROMPT, max_tokens=3).tokens

    def check() -> None:
        assert model.generate(PROMPT, max_tokens=3).tokens == expected

    assert with_injections(lambda: model.generate(PROMPT, max_tokens=3), check) > 20


def test_totals_can_be_asked_for_after_an_exception_at_any_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "MOST_NEWS", 0)
    totals = stream_module.Totals()
    timings = stream_module.Timings(2, 1.0, 1, 1.0)

    def check() -> None:
        totals.figures()

    assert with_injections(lambda: totals.add(timings, 1), check) >= 2
    totals.add(timings, 1)
    assert totals.figures()["prompt_tokens"] >= 2


# Closing


def test_close_gives_threads_and_files_back_at_once(packed: str) -> None:
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    def files() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = threads(), files()
    model = SmallThinker(packed, threads=3, memory="8GiB")
    session = model.session()
    session.decode([1, 2, 3])
    stream = model.stream(PROMPT, max_tokens=50)
    next(stream)
    assert threads() > before[0]
    model.close()
    assert (threads(), files()) == before
    with pytest.raises(ValueError, match="closed"):
        session.decode([4])
    with pytest.raises(ValueError, match="closed"):
        next(stream)
    stream.close()
    session.close()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_the_collector_may_take_a_model_while_it_reads(path: str, packed: str) -> None:
    for _ in range(20):
        model = SmallThinker(packed, verify=True, threads=2)
        ring = [model]
        ring.append(ring)  # type: ignore[arg-type]
        model.session().decode([1, 2, 3])
        del model, ring
        gc.collect()


# Forks


def run_in_child(work: Callable[[], None]) -> int:
    """The exit status of a forked child that does some work and ends like any Python program."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            sys.stdout.flush()
            os._exit(status)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("the child hangs")


def test_a_forked_child_gets_an_error_and_can_close(model: SmallThinker) -> None:
    session = model.session()
    session.decode([1, 2, 3])
    stream = model.stream(PROMPT, max_tokens=50)
    next(stream)

    def work() -> None:
        for use in (lambda: model.generate("hello"), lambda: session.decode([4]), lambda: next(stream), model.stats):
            with pytest.raises(OpenedBeforeFork):
                use()
        stream.close()
        session.close()
        model.close()
        gc.collect()

    assert run_in_child(work) == 0
    assert len(model.generate("hello", max_tokens=3).tokens) > 0


def test_a_forked_child_does_not_wait_for_the_parents_compute_thread(model: SmallThinker) -> None:
    asyncio.run(model.acreate_completion("hello", max_tokens=1))

    def work() -> None:
        for stream in (False, True):
            with pytest.raises(OpenedBeforeFork):
                asyncio.run(model.acreate_completion("hello", max_tokens=1, stream=stream))
        model.close()

    assert run_in_child(work) == 0
    asyncio.run(model.acreate_completion("hello", max_tokens=1))


def test_a_child_may_open_its_own_model(model: SmallThinker, path: str) -> None:
    expected = model.generate(PROMPT, max_tokens=4).tokens

    def work() -> None:
        with SmallThinker(path, threads=2) as own:
            assert own.generate(PROMPT, max_tokens=4).tokens == expected

    assert run_in_child(work) == 0


def test_a_fork_while_another_thread_computes(model: SmallThinker) -> None:
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            model.generate(PROMPT, max_tokens=20, temperature=1.0)

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        for _ in range(10):

            def work() -> None:
                with pytest.raises(OpenedBeforeFork):
                    model.generate("hello")
                model.close()

            assert run_in_child(work) == 0
    finally:
        stop.set()
        thread.join()


def test_parent_and_child_that_just_end(packed: str) -> None:
    code = f"""
import os, sys
from smallthinker_edge import SmallThinker
model = SmallThinker({packed!r}, threads=2)
session = model.session()
session.decode([1, 2, 3])
stream = model.stream([1, 2, 3])
next(stream)
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def ends_by_itself(queue: Any) -> None:
    queue.put("done")


def test_a_multiprocessing_child_ends(model: SmallThinker) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=ends_by_itself, args=(queue,))
    child.start()
    assert queue.get(timeout=30) == "done"
    child.join(30)
    assert child.exitcode == 0
