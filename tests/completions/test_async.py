"""The asynchronous twins: they never block the loop, and end with the task that waits for them."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_model

from smallthinker_edge import SmallThinker
from smallthinker_edge.completions.answers import Cancel

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallThinker]:
    path = write_model(tmp_path_factory.mktemp("async") / "m.gguf", context_length=4096)
    with SmallThinker(path, threads=1, context=4096) as model:
        yield model


class Gate:
    """Processors that let the compute thread go on only as the test says, and count what it does."""

    def __init__(self) -> None:
        self.reached, self.open, self.tokens = threading.Event(), threading.Event(), 0

    def __call__(self, ids: Any, logits: Any) -> Any:
        self.tokens += 1
        self.reached.set()
        assert self.open.wait(30)
        return logits


def endless(model: SmallThinker) -> dict[str, Any]:
    return {
        "max_tokens": 3000,
        "logit_bias": dict.fromkeys(model.tokenizer.eos_ids, -1e9),
        "temperature": 1.0,
        "seed": 1,
    }


async def until(event: threading.Event) -> None:
    while not event.is_set():
        await asyncio.sleep(0.001)


def test_the_twins_give_what_the_calls_give(model: SmallThinker) -> None:
    async def main() -> None:
        options: dict[str, Any] = {"max_tokens": 9, "temperature": 1.0, "seed": 3}
        chat = await model.acreate_chat_completion(MESSAGES, **options)
        assert chat["choices"] == model.create_chat_completion(MESSAGES, **options)["choices"]
        text = await model.acreate_completion("hello", **options)
        assert text["choices"] == model.create_completion("hello", **options)["choices"]
        chunks = [chunk async for chunk in await model.acreate_completion("hello", stream=True, **options)]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text["choices"][0]["text"]
        chat_chunks = [chunk async for chunk in await model.acreate_chat_completion(MESSAGES, stream=True, **options)]
        deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chat_chunks]
        assert "".join(deltas) == chat["choices"][0]["message"]["content"]

    asyncio.run(main())


def test_the_loop_goes_on_while_a_token_is_computed(model: SmallThinker) -> None:
    async def main() -> None:
        gate = Gate()
        task = asyncio.create_task(model.acreate_completion("hello", max_tokens=2, logits_processors=gate))
        await until(gate.reached)  # the thread is inside, and here the loop turns
        assert not task.done()
        gate.open.set()
        assert (await task)["usage"]["completion_tokens"] <= 2

    asyncio.run(main())


def test_errors_come_before_anything_is_queued(model: SmallThinker) -> None:
    async def main() -> None:
        gate = Gate()
        task = asyncio.create_task(model.acreate_completion("hello", max_tokens=2, logits_processors=gate))
        await until(gate.reached)
        wrong: dict[str, Any] = {"max_token": 3}
        with pytest.raises(TypeError, match="max_token"):
            await model.acreate_completion("hello", **wrong)
        with pytest.raises(ValueError, match="temperature"):
            await model.acreate_chat_completion(MESSAGES, stream=True, temperature=-1)
        gate.open.set()
        await task

    asyncio.run(main())


def test_errors_of_the_computation_are_raised(model: SmallThinker) -> None:
    def broken(ids: Any, logits: Any) -> Any:
        raise KeyError("mine")

    async def main() -> None:
        with pytest.raises(KeyError, match="mine"):
            await model.acreate_completion("hello", logits_processors=broken)
        with pytest.raises(KeyError, match="mine"):
            async for _ in await model.acreate_completion("hello", stream=True, logits_processors=broken):
                pass
        assert (await model.acreate_completion("hello", max_tokens=1))["choices"]

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_cancelling_the_task_ends_the_computation(model: SmallThinker, stream: bool) -> None:
    async def work(gate: Gate) -> None:
        options = endless(model)
        if stream:
            async for _ in await model.acreate_completion("hello", stream=True, logits_processors=gate, **options):
                pass
        else:
            await model.acreate_completion("hello", logits_processors=gate, **options)

    async def main() -> None:
        gate = Gate()
        task = asyncio.create_task(work(gate))
        await until(gate.reached)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.open.set()
        # The thread is free for the next one, which would wait for 3000 tokens otherwise.
        await model.acreate_completion("hello", max_tokens=1)
        assert gate.tokens <= 2

    asyncio.run(main())


@pytest.mark.parametrize("how", ["close", "drop", "never_read"])
def test_a_stream_that_is_left_ends(model: SmallThinker, how: str) -> None:
    async def main() -> None:
        gate = Gate()
        chunks: Any = await model.acreate_completion("hello", stream=True, logits_processors=gate, **endless(model))
        await until(gate.reached)
        if how == "close":
            closing = asyncio.create_task(chunks.aclose())
            await asyncio.sleep(0)
            gate.open.set()
            await closing
            with pytest.raises(StopAsyncIteration):
                await chunks.__anext__()
        elif how == "drop":
            gate.open.set()
            async for _ in chunks:
                break
            del chunks
        else:
            del chunks
            gc.collect()
            gate.open.set()
        await model.acreate_completion("hello", max_tokens=1)
        assert gate.tokens < 2000

    asyncio.run(main())


def test_what_waits_for_its_turn_and_is_cancelled_is_never_computed(model: SmallThinker) -> None:
    async def main() -> None:
        first, second = Gate(), Gate()
        running = asyncio.create_task(model.acreate_completion("hello", max_tokens=2, logits_processors=first))
        await until(first.reached)
        waiting = asyncio.create_task(model.acreate_completion("hello", max_tokens=2, logits_processors=second))
        stream = await model.acreate_completion("hello", max_tokens=2, stream=True, logits_processors=second)
        await asyncio.sleep(0.05)
        waiting.cancel()
        await stream.aclose()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        first.open.set()
        await running
        await model.acreate_completion("hello", max_tokens=1)
        assert second.tokens == 0

    asyncio.run(main())


def test_a_finaliser_may_set_the_signal_that_is_just_being_set() -> None:
    cancel = Cancel(None)

    def setting() -> None:
        sys.setprofile(lambda *_: cancel.set())  # at every call of what set() does, as the collector may
        try:
            cancel.set()
        finally:
            sys.setprofile(None)

    thread = threading.Thread(target=setting, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert cancel.is_set()


def test_a_slow_reader_does_not_hold_the_computation(model: SmallThinker) -> None:
    async def main() -> None:
        slow = await model.acreate_completion("hello", max_tokens=200, stream=True, temperature=1.0, seed=2)
        await slow.__anext__()  # and reads no more for now
        await model.acreate_completion("hello", max_tokens=1)
        rest = [chunk async for chunk in slow]
        assert rest[-1]["choices"][0]["finish_reason"] in ("stop", "length")

    asyncio.run(main())


def test_callers_cancel_signal_still_works(model: SmallThinker) -> None:
    async def main() -> None:
        cancel = threading.Event()
        cancel.set()
        answer = await model.acreate_completion("hello", cancel=cancel)
        assert answer["choices"][0]["text"] == ""

    asyncio.run(main())


def test_a_loop_that_ends_in_the_middle_ends_the_computation(model: SmallThinker) -> None:
    kept: list[Any] = []

    async def main() -> None:
        kept.append(await model.acreate_completion("hello", stream=True, **endless(model)))
        await kept[0].__anext__()

    asyncio.run(main())
    assert model.create_completion("hello", max_tokens=1)["choices"]
    asyncio.run(model.acreate_completion("hello", max_tokens=1))


def test_a_closed_model_says_so(tiny_model: Path) -> None:
    model = SmallThinker(tiny_model)
    model.close()

    async def main() -> None:
        with pytest.raises((ValueError, RuntimeError)):
            await model.acreate_completion("hello")

    asyncio.run(main())
