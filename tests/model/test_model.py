"""The public class: generation, stop strings, cancelling, budgets and bad arguments."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import MERGES, write_model

from smallthinker_edge import ContextFull, MemoryBudgetError, ModelFormatError, Sampler, SmallThinker
from smallthinker_edge.machine.memory import parse_memory


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model") / "m.gguf", context_length=256)


@pytest.fixture(scope="module")
def model(path: str) -> SmallThinker:
    return SmallThinker(path, threads=2)


def shown(model: SmallThinker, tokens: list[int]) -> str:
    """The text of an answer: 256 bytes and the merges' results, not the specials and the padding behind them."""
    return model.detokenize([token for token in tokens if token < 256 + len(MERGES)])


def test_generate_is_greedy_decoding_of_the_session(model: SmallThinker) -> None:
    session, tokens = model.session(), []
    logits = session.decode(model.tokenize("hello world"))
    for _ in range(12):
        tokens.append(int(logits.argmax()))
        logits = session.decode(tokens[-1:])
    result = model.generate("hello world", max_tokens=12)
    assert result.tokens == tokens
    assert result.finish_reason == "length"
    assert result.text == shown(model, tokens)
    assert (result.timings.prompt_tokens, result.timings.decode_tokens) == (len(model.tokenize("hello world")), 11)


def test_stream_gives_the_text_of_generate(model: SmallThinker) -> None:
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 1.0, "seed": 4}
    stream = model.stream("hello", **options)
    assert stream.result is None
    assert "".join(stream) == model.generate("hello", **options).text
    assert stream.result is not None
    assert stream.result.finish_reason == "length"


def test_closing_a_stream_ends_the_generation(model: SmallThinker) -> None:
    stream = model.stream([65], max_tokens=100, temperature=3.0, seed=1)
    shown = next(stream)
    stream.close()
    stream.close()
    assert stream.result is not None
    assert (stream.result.text, stream.result.finish_reason) == (shown, "cancelled")
    assert list(stream) == []


def test_same_seed_same_text(model: SmallThinker) -> None:
    texts = [model.generate("hello", max_tokens=15, temperature=1.5, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_sampler_of_ones_own_chooses_the_tokens(model: SmallThinker) -> None:
    text = [7, 9, 7, 9, 7, 9]
    seen: list[tuple[tuple[int, ...], int]] = []

    class Dictation:
        def sample(self, logits: np.ndarray, history: Sequence[int], /) -> int:
            seen.append((logits.shape, len(history)))
            return text[len(history)]

    result = model.generate(text[:2], max_tokens=4, sampler=Dictation(), temperature=3.0)
    assert result.tokens == text[2:]
    assert seen == [((model.config.vocab_size,), n) for n in range(2, 6)]


def test_a_stop_string_ends_the_text_before_itself(model: SmallThinker) -> None:
    full = model.generate("hello", max_tokens=30).text
    stop = full[5:8]
    result = model.generate("hello", max_tokens=30, stop=[stop, "never seen"])
    assert result.text == full[: full.index(stop)]
    assert result.finish_reason == "stop"
    assert "".join(model.stream("hello", max_tokens=30, stop=stop)) == result.text


def test_an_end_token_stops(model: SmallThinker) -> None:
    end = min(model.tokenizer.eos_ids)
    result = model.generate("hello", logit_bias={end: 1000.0})
    assert (result.tokens, result.text, result.finish_reason) == ([end], "", "stop")


def test_generation_is_cancelled_from_another_thread(model: SmallThinker) -> None:
    cancel, pieces = threading.Event(), []
    for piece in model.stream([65], max_tokens=200, cancel=cancel, temperature=3.0, seed=1):
        pieces.append(piece)
        if len(pieces) == 3:
            thread = threading.Thread(target=cancel.set)
            thread.start()
            thread.join()
    assert 3 <= len(pieces) <= 4


def test_cancelling_before_the_start_gives_nothing(model: SmallThinker) -> None:
    cancel = threading.Event()
    cancel.set()
    result = model.generate("hello", cancel=cancel)
    assert (result.tokens, result.finish_reason) == ([], "cancelled")


def test_the_context_ends_a_generation(path: str) -> None:
    with SmallThinker(path, context=20) as model:
        result = model.generate([65] * 15, max_tokens=100, logit_bias=dict.fromkeys(model.tokenizer.eos_ids, -np.inf))
        assert result.finish_reason == "length"
        assert len(result.tokens) == 6  # five fit behind the prompt, and the last needs no position
        with pytest.raises(ContextFull, match="21 tokens"):
            model.generate([65] * 21)


def test_chat_uses_chatml(model: SmallThinker) -> None:
    prompt = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    expected = model.generate(prompt, max_tokens=5).tokens
    assert model.chat([{"role": "user", "content": "hello"}], max_tokens=5).tokens == expected
    pieces = model.stream_chat([{"role": "user", "content": "hello"}], max_tokens=5)
    assert "".join(pieces) == shown(model, expected)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_tokens": 0}, ValueError), ({"stop": ""}, ValueError), ({"temperature": -1}, ValueError),
        ({"unknown": 1}, TypeError), ({"top_p": 2.0}, ValueError),
    ],
)  # fmt: skip
def test_bad_options_are_refused_at_once(model: SmallThinker, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        model.stream("hello", **options)


def test_bad_arguments_are_refused(path: str) -> None:
    for options in ({"threads": 0}, {"context": 0}, {"context": 257}, {"memory": "1 elephant"}, {"memory": -5}):
        with pytest.raises(ValueError, match=r"must|cannot"):
            SmallThinker(path, **options)
    with pytest.raises(TypeError):
        SmallThinker(path, unknown=1)  # type: ignore[call-arg]
    with pytest.raises(FileNotFoundError):
        SmallThinker(path + ".absent")


def test_a_budget_that_cannot_work_names_one_that_does(path: str) -> None:
    with pytest.raises(MemoryBudgetError, match=r"needs (\d+) bytes") as caught:
        SmallThinker(path, memory="1MiB")
    needed = int(re.findall(r"needs (\d+) bytes", str(caught.value))[0])
    SmallThinker(path, memory=needed + (8 << 20)).close()


@pytest.mark.parametrize(
    ("text", "size"), [("1GiB", 1 << 30), ("1.5 MB", 1500000), ("4096", 4096), (77, 77), ("2k", None)]
)
def test_memory_sizes(text: int | str, size: int | None) -> None:
    if size is None:
        with pytest.raises(ValueError, match="cannot read"):
            parse_memory(text)
    else:
        assert parse_memory(text) == size


def test_the_kernel_table_can_be_chosen(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALLTHINKER_CPU", "ref")
    assert SmallThinker(path).stats()["kernels"] == "ref"
    monkeypatch.setenv("SMALLTHINKER_CPU", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        SmallThinker(path)


def test_stats_tell_the_threads(path: str) -> None:
    with SmallThinker(path, threads=3) as model:
        assert (model.stats()["threads"], model.stats()["threads_in_use"]) == (3, 3)


def test_closing_twice_is_fine_and_use_after_is_an_error(path: str) -> None:
    model = SmallThinker(path)
    model.close()
    model.close()
    with pytest.raises(ValueError, match="closed"):
        model.session()


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"not a model" * 100)
    with pytest.raises(ModelFormatError, match=r"other\.gguf"):
        SmallThinker(other)


def test_own_sampling_with_a_session(model: SmallThinker) -> None:
    sampler = Sampler(temperature=1.0, seed=3)
    with model.session() as session:
        tokens = [sampler.sample(session.decode(model.tokenize("hello")))]
        for _ in range(4):
            tokens.append(sampler.sample(session.decode(tokens[-1:])))
    assert tokens == model.generate("hello", max_tokens=5, temperature=1.0, seed=3).tokens[:5]


def test_stats_sum_all_generations(path: str) -> None:
    with SmallThinker(path) as model:
        results = [model.generate([65, 66, 67, *more], max_tokens=5) for more in ([], [68], [69] * 4)]
        stream = model.stream([65, 66], max_tokens=5)
        next(stream)
        before = model.stats()
        assert before["prompt_tokens"] == 3 + 4 + 7
        assert before["generated_tokens"] == sum(len(result.tokens) for result in results)
        assert before["reused_tokens"] == sum(result.timings.reused_tokens for result in results) > 0
        stream.close()
        stream.close()
        assert model.stats()["prompt_tokens"] == 3 + 4 + 7 + 2
        never_read = model.stream([65])
        never_read.close()
        assert model.stats()["prompt_tokens"] == 3 + 4 + 7 + 2
