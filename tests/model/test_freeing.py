"""A model that nobody has any longer is gone at once: no cycle keeps its weights until the collector comes."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_model

from smallthinker_edge import SmallThinker
from smallthinker_edge.files.pack import pack
from smallthinker_edge.home.understand import HomeModel, open_home_model

MESSAGES = [{"role": "user", "content": "hello"}]
needs_grammars = pytest.mark.skipif(
    importlib.util.find_spec("llguidance") is None, reason="the extra `structured` is not installed"
)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("model")
    plain, packed = Path(write_model(folder / "m.gguf", context_length=512)), folder / "m.stpk"
    pack(plain, packed)
    return {"plain": plain, "packed": packed}


@pytest.fixture(autouse=True)
def without_the_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def decode(model: SmallThinker) -> None:
    with model.session() as session:
        session.decode([1, 2, 3])


def fork_and_save(model: SmallThinker) -> None:
    with tempfile.TemporaryDirectory() as folder, model.session() as session:
        session.decode([1, 2, 3])
        session.fork().decode([4])
        session.save(Path(folder) / "s")
        model.load_session(Path(folder) / "s").decode([5])


def leave_a_stream(model: SmallThinker) -> None:
    for _ in model.stream([65, 66], max_tokens=20):
        break


def fail(model: SmallThinker) -> None:
    with pytest.raises(ValueError, match="temperature"):
        model.generate([65], temperature=-1.0)
    with pytest.raises(RuntimeError, match="mine"):
        model.generate([65], logits_processors=raise_mine)


def raise_mine(tokens: Any, logits: Any) -> Any:
    raise RuntimeError("mine")


def leave_a_chat_stream(model: SmallThinker) -> None:
    next(iter(model.create_chat_completion(MESSAGES, stream=True, max_tokens=20)))


def chat_async(model: SmallThinker) -> None:
    asyncio.run(model.acreate_chat_completion(MESSAGES, max_tokens=4))


def leave_an_async_stream(model: SmallThinker) -> None:
    async def leave() -> None:
        async for _ in await model.acreate_chat_completion(MESSAGES, stream=True, max_tokens=20):
            break

    asyncio.run(leave())


USES: dict[str, Callable[[SmallThinker], object]] = {
    "open": lambda model: None,
    "decode": decode,
    "fork and save": fork_and_save,
    "generate": lambda model: model.generate([65, 66], max_tokens=4),
    "speculate": lambda model: model.generate([65, 66] * 20, max_tokens=4, speculate=4),
    "stream": lambda model: list(model.stream([65, 66], max_tokens=4)),
    "stream left": leave_a_stream,
    "error": fail,
    "completion": lambda model: model.create_completion("hello", max_tokens=4, n=2),
    "chat": lambda model: model.create_chat_completion(MESSAGES, max_tokens=4),
    "chat stream left": leave_a_chat_stream,
    "async": chat_async,
    "async stream left": leave_an_async_stream,
    "stats": lambda model: model.stats(),
}


def is_gone(part: weakref.ref[Any]) -> bool:
    """At once, or when the thread that computes for coroutines has seen that nobody reads on."""
    end = time.monotonic() + 60
    while part() is not None and threading.active_count() > 1 and time.monotonic() < end:
        time.sleep(0.01)
    return part() is None


def without_model(model: SmallThinker, use: Callable[[SmallThinker], object]) -> list[weakref.ref[Any]]:
    use(model)
    return [weakref.ref(part) for part in (model, model._file, model._sessions, model.tokenizer)]


@pytest.mark.parametrize("kind", ["plain", "packed"])
@pytest.mark.parametrize("use", USES)
def test_after(paths: dict[str, Path], kind: str, use: str) -> None:
    for part in without_model(SmallThinker(paths[kind], threads=1), USES[use]):
        assert is_gone(part)


@needs_grammars
def test_after_grammars(paths: dict[str, Path]) -> None:
    def use(model: SmallThinker) -> None:
        model.create_chat_completion(MESSAGES, max_tokens=20, response_format={"type": "json_object"})

    for part in without_model(SmallThinker(paths["plain"], threads=1), use):
        assert is_gone(part)


def test_after_saved_prefixes(paths: dict[str, Path], tmp_path: Path) -> None:
    def use(model: SmallThinker) -> None:
        for text in ("one", "two"):
            messages = [{"role": "system", "content": "s" * 300}, {"role": "user", "content": text}]
            model.create_chat_completion(messages, max_tokens=2)

    for part in without_model(SmallThinker(paths["plain"], threads=1, prefix_folder=tmp_path), use):
        assert is_gone(part)
    assert list(tmp_path.iterdir())


def test_after_understanding() -> None:
    for part in without_model(
        open_home_model(threads=1), lambda model: HomeModel(model).understand("turn on the light")
    ):
        assert is_gone(part)
