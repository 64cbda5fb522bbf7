"""Long prefixes on disk: computed once, also over restarts, within a bound; and conversations within the budget."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from gguf_files import write_model
from small_model import SHAPE

from smallthinker_edge import GenerationResult, SmallThinker

SYSTEM = {"role": "system", "content": "You know all about lamps. " * 30}
OPTIONS: Any = {"max_tokens": 6, "temperature": 1.0, "seed": 1}


def ask(model: SmallThinker, question: str, system: dict[str, str] = SYSTEM) -> GenerationResult:
    return model.chat([system, {"role": "user", "content": question}], **OPTIONS)


@pytest.fixture(scope="module", params=[0, 64], ids=["full", "windows"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    shape = {**SHAPE, "context_length": 2048} | ({"window": request.param} if request.param else {})
    return write_model(tmp_path_factory.mktemp("prefixes") / "m.gguf", **shape)


def opened(path: str, folder: Path, **more: Any) -> SmallThinker:
    return SmallThinker(path, threads=1, context=2048, prefix_folder=folder, **more)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.stsession"), key=lambda file: file.stat().st_mtime_ns)


def test_a_system_prompt_is_computed_once_also_over_restarts(path: str, tmp_path: Path) -> None:
    with SmallThinker(path, threads=1, context=2048) as model:
        fresh = [ask(model, question) for question in ("Why?", "And Why not?")]
        whole = len(model.encode_chat([SYSTEM, {"role": "user", "content": "x"}]))
    with opened(path, tmp_path / "p") as model:
        first = ask(model, "Why?")
        assert first.timings.reused_tokens == 0
        assert len(files(tmp_path / "p")) == 1
    with opened(path, tmp_path / "p") as model:
        second = ask(model, "And Why not?")
        assert whole - 30 < second.timings.reused_tokens < whole
        assert len(files(tmp_path / "p")) == 1
    assert [first.tokens, second.tokens] == [result.tokens for result in fresh]
    assert (tmp_path / "p").stat().st_mode & 0o077 == 0


def test_the_shared_prefix_ends_where_the_user_begins(path: str, tmp_path: Path) -> None:
    with opened(path, tmp_path / "p") as model:
        for question in ("A", "0", "Abc", "", "<|im_end|>"):
            messages = [SYSTEM, {"role": "user", "content": question}]
            ids = model.encode_chat(messages)
            shared = model.shared_prefix(ids, messages)
            assert model.detokenize(ids[:shared]).endswith("<|im_start|>user\n")
        short = [{"role": "user", "content": "hello " * 300}]
        assert model.shared_prefix(model.encode_chat(short), short) == 0


def test_calls_in_openais_shape_find_it_too(path: str, tmp_path: Path) -> None:
    for expected in (0, 300):
        with opened(path, tmp_path / "p") as model:
            usage = model.create_chat_completion([SYSTEM, {"role": "user", "content": f"{expected}"}], max_tokens=2)[
                "usage"
            ]
            assert usage["prompt_tokens_details"]["cached_tokens"] >= expected


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_what_is_damaged_is_passed_over(
    path: str, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(path, tmp_path) as model:
        first = ask(model, "Why?")
    (file,) = files(tmp_path)
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[-100] ^= 1
    file.write_bytes({"cut": data[:-50], "flipped": data, "empty": b"", "foreign": b"x" * 500}[damage])
    caplog.set_level(logging.WARNING, "smallthinker_edge")
    with opened(path, tmp_path) as model:
        again = ask(model, "Why?")
        assert (again.tokens, again.timings.reused_tokens) == (first.tokens, 0)
        assert ("passed over" in caplog.text) == (damage in ("cut", "flipped"))


def test_another_models_and_another_caches_files_are_left_alone(path: str, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other.gguf", **{**SHAPE, "context_length": 2048, "seed": 9})
    folder = tmp_path / "p"
    for file, kv in ((path, "f16"), (path, "q8_0-all"), (other, "f16")):
        for reused in (False, True):
            with opened(file, folder, kv=kv) as model:
                assert (ask(model, "Why?").timings.reused_tokens > 0) == reused
    assert len(files(folder)) == 3


def test_the_folder_keeps_to_its_bound(path: str, tmp_path: Path) -> None:
    with opened(path, tmp_path / "p") as model:
        ask(model, "Why?")
    size = files(tmp_path / "p")[0].stat().st_size
    names: list[str] = []
    with opened(path, tmp_path / "q", prefix_bytes=int(2.5 * size)) as model:
        for i in range(4):
            ask(model, "Why?", {"role": "system", "content": f"{i}" + SYSTEM["content"]})
            names.append(files(tmp_path / "q")[-1].name)
            os.utime(files(tmp_path / "q")[-1], ns=(i * 10**9, i * 10**9))
    assert [file.name for file in files(tmp_path / "q")] == names[-2:]
    with opened(path, tmp_path / "q", prefix_bytes=int(2.5 * size)) as model:  # use makes the older one the newer
        assert ask(model, "And?", {"role": "system", "content": "2" + SYSTEM["content"]}).timings.reused_tokens
        ask(model, "Why?", {"role": "system", "content": "9" + SYSTEM["content"]})
    assert names[2] in [file.name for file in files(tmp_path / "q")]
    assert names[3] not in [file.name for file in files(tmp_path / "q")]
    with opened(path, tmp_path / "r", prefix_bytes=size // 2) as model:
        ask(model, "Why?")
    assert not files(tmp_path / "r")


def test_a_folder_that_cannot_be_written_is_only_a_warning(
    path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with opened(path, tmp_path / "file") as model:
        assert ask(model, "Why?").tokens
    assert "cannot be saved" in caplog.text


def test_several_threads_share_a_folder(path: str, tmp_path: Path) -> None:
    systems = [{"role": "system", "content": f"{i}" + SYSTEM["content"]} for i in range(3)]
    with SmallThinker(path, threads=1, context=2048) as model:
        expected = [ask(model, "Why?", system).tokens for system in systems]
    with opened(path, tmp_path / "p", keep_sessions=2) as model, ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: (i % 3, ask(model, "Why?", systems[i % 3]).tokens), range(12)))
    assert all(tokens == expected[i] for i, tokens in results)
    assert len(files(tmp_path / "p")) == 3


def test_what_is_in_memory_is_taken_first(path: str, tmp_path: Path) -> None:
    with opened(path, tmp_path / "p", keep_sessions=3) as model:
        history = [SYSTEM, {"role": "user", "content": "Why? " * 20}]
        first = model.chat(history, **OPTIONS)
        for file in files(tmp_path / "p"):
            file.write_bytes(b"gone")
        history += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "So?"}]
        assert model.chat(history, **OPTIONS).timings.reused_tokens >= first.timings.prompt_tokens - 1


def in_use(model: SmallThinker) -> int:
    return int(str(model.stats()["session_bytes"]))


def test_conversations_are_kept_as_far_as_the_budget_goes(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", **{**SHAPE, "context_length": 2048})
    rng = np.random.default_rng(1)
    prompts: Sequence[list[int]] = [rng.integers(0, 256, 400).tolist() for _ in range(6)]
    memory = psutil.Process().memory_info().rss + (800 << 20)  # what this process of many tests holds already counts
    with SmallThinker(path, threads=1, context=2048, memory=memory, keep_sessions=8) as model:
        most, seen = model.plan.sessions, []
        watch: Any = lambda *_: seen.append(in_use(model))  # noqa: E731
        for prompt in prompts:
            model.generate(
                prompt, max_tokens=300, on_text=watch, logit_bias=dict.fromkeys(model.tokenizer.eos_ids, -1e9)
            )
        assert max(seen) <= most
        assert in_use(model) > most // 2
        reused = [model.generate([*prompt, 7], max_tokens=1).timings.reused_tokens for prompt in prompts[-2:]]
        assert reused == [400, 400]  # the newest two are there
        assert model.generate([*prompts[0], 7], max_tokens=1).timings.reused_tokens == 0  # the oldest made room
