"""Perplexity of a model on a text, and how far a second model's predictions are from a first one's.

Called by `smallthinker-edge perplexity|compare`. It runs models over windows of tokens; losses.py has the numbers. A
run that is given a file for its state goes on where it stopped, with the same result to the last bit.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from smallthinker_edge.errors import MemoryBudgetError, ModelFormatError, SmallThinkerError
from smallthinker_edge.files.atomic import atomic_file
from smallthinker_edge.files.convert import convert
from smallthinker_edge.files.gguf import GGUFFile
from smallthinker_edge.machine.memory import parse_memory, process_memory
from smallthinker_edge.measure.losses import (
    COMPARED,
    LOSS,
    Divergence,
    Ids,
    Perplexity,
    Records,
    compared,
    cut,
    first_counted,
    losses,
)
from smallthinker_edge.model import SmallThinker
from smallthinker_edge.opening import DEFAULT_CONTEXT, plan_memory

logger = logging.getLogger(__name__)

WINDOW = 512
ROWS = 64  # of logits at a time: 39 MB for each model of a vocabulary of 152k
SAVE_SECONDS = 10.0
SLACK = 16 << 20  # of a model that is one of two: between its plan and its opening the process changes a little
FORMAT = "smallthinker-evaluation-1"
Progress = Callable[[int, int, Records], None]


class State:
    """What a run has measured so far, in a file that is written now and then and removed at the end.

    Args:
        path: the file. key: says of what run it is, see run_key(); the state of another run is not taken up.
        seconds: between two writings.
    """

    def __init__(self, path: str | os.PathLike[str], key: str, seconds: float = SAVE_SECONDS) -> None:
        self.path, self.key, self.seconds = os.fspath(path), key, seconds
        self.saved_at = time.monotonic()

    def load(self, kind: np.dtype[np.void]) -> Records:
        """The records there; none where there is no file, or, with a warning, not one of this run."""
        empty = np.empty(0, kind)
        try:
            with np.load(self.path, allow_pickle=False) as content:
                records, key = content["records"], str(content["key"])
        except FileNotFoundError:
            return empty
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as problem:
            logger.warning("%s is damaged, and the run begins anew: %s", self.path, problem)
            return empty
        if key != self.key or records.dtype != kind or records.ndim != 1:
            logger.warning("%s is of another run, and this one begins anew", self.path)
            return empty
        return np.asarray(records)

    def save(self, records: Records, *, now: bool = False) -> None:
        """Writes them, atomically, where it is time to. Raises OSError."""
        if not now and time.monotonic() - self.saved_at < self.seconds:
            return
        content = io.BytesIO()
        np.savez(content, records=records, key=np.array(self.key))
        with atomic_file(self.path) as file:
            file.write(0, content.getvalue())
        self.saved_at = time.monotonic()

    def remove(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self.path)


def run_key(models: Sequence[SmallThinker], text: bytes, window: int) -> str:
    """What decides the result of a run: files by name, size and time, text, window, KV cache and kernels."""
    parts: list[Any] = [FORMAT, window, hashlib.sha256(text).hexdigest()]
    for model in models:
        files = [(os.path.abspath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in model.paths]
        parts.append([files, model.kv, model.stats()["kernels"]])
    return json.dumps(parts)


def perplexity(
    model: SmallThinker,
    tokens: Sequence[int],
    window: int = WINDOW,
    state: State | None = None,
    progress: Progress | None = None,
) -> Records:
    """The loss at every position that counts.

    Args:
        model: opened with a context of at least `window`.
        tokens: of the text, as text_tokens() gives them.
        window: tokens of a window: each begins with an empty context, and its second half counts (losses.cut()).
        state: keeps what is measured, and gives back what an earlier run had measured.
        progress: called with (windows done, all windows, records so far).

    Returns LOSS records, window - 1 - window // 2 for each window. Raises ValueError for a window that the text or the
    model's context is too short for; and as Session.decode().
    """

    return _run([model], tokens, window, LOSS, losses, state, progress)


def compare(
    a: SmallThinker,
    b: SmallThinker,
    tokens: Sequence[int],
    window: int = WINDOW,
    state: State | None = None,
    progress: Progress | None = None,
) -> Records:
    """KL(A || B), both losses and whether the likeliest tokens agree, at every position that counts.

    Arguments as of perplexity(). Returns COMPARED records. Raises SmallThinkerError where the vocabularies differ.
    """
    if not same_vocabulary(a, b):
        raise SmallThinkerError("the two models have different vocabularies: their predictions cannot be compared")
    return _run([a, b], tokens, window, COMPARED, compared, state, progress)


def text_tokens(model: SmallThinker, text: str | bytes) -> list[int]:
    """The text's tokens as llama-perplexity has them: special tokens are not recognised in it."""
    return model.tokenize(text, parse_special=False)


def same_vocabulary(a: SmallThinker, b: SmallThinker) -> bool:
    """Whether every id stands for the same bytes in both."""
    size = a.tokenizer.vocab_size
    return size == b.tokenizer.vocab_size and all(
        a.tokenizer.token_bytes(token) == b.tokenizer.token_bytes(token) for token in range(size)
    )


def _run(
    models: Sequence[SmallThinker],
    tokens: Sequence[int],
    window: int,
    kind: np.dtype[np.void],
    numbers: Callable[..., Records],
    state: State | None,
    progress: Progress | None,
) -> Records:
    """All windows' records, from where the state ends."""
    for model in models:
        if window > model.context:
            raise ValueError(f"a window of {window} tokens is longer than the context, {model.context}")
    bos = models[0].tokenizer.bos_id if models[0].tokenizer.add_bos else None
    windows = cut(tokens, window, bos)
    each = window - 1 - first_counted(window)
    known = np.empty(0, kind) if state is None else state.load(kind)
    done = min(len(known) // each, len(windows))
    records = np.empty(len(windows) * each, kind)
    records[: done * each] = known[: done * each]
    try:
        while done < len(windows):
            if progress:
                progress(done, len(windows), records[: done * each])
            records[done * each : (done + 1) * each] = _window(models, windows[done], numbers)
            done += 1
            if state is not None:
                state.save(records[: done * each])
    except BaseException:
        if state is not None and done:
            state.save(records[: done * each], now=True)
        raise
    if progress:
        progress(done, len(windows), records)
    return records


def _window(models: Sequence[SmallThinker], ids: Ids, numbers: Callable[..., Records]) -> Records:
    """What numbers(logits [n, V] of each model, targets [n]) says of the window's positions that count.

    Some rows at a time, fewer where the memory budget has no room for so many.
    """
    at, last, rows = first_counted(len(ids)), len(ids) - 1, ROWS
    found = []
    with ExitStack() as stack:
        sessions = [stack.enter_context(model.session(len(ids))) for model in models]
        for session in sessions:
            session.prefill(ids[:at])
        while at < last:
            stop = min(at + rows, last)
            try:
                logits = (session.decode(ids[at:stop], all_logits=True) for session in sessions)
                found.append(numbers(*logits, ids[at + 1 : stop + 1]))
            except MemoryBudgetError:
                if rows == 1:
                    raise
                rows //= 2
                for session in sessions:
                    session.rewind(session.position - at)
            else:
                at = stop
    return np.concatenate(found)


@contextmanager
def opened_pair(
    a: str | os.PathLike[str], b: str | os.PathLike[str], memory: int | str | None = None, **options: Any
) -> Iterator[tuple[SmallThinker, SmallThinker]]:
    """Two models at once, within one budget for the process.

    What is left after the least that each needs is divided by what they could use. options: of SmallThinker().
    Raises MemoryBudgetError where both do not fit, and as SmallThinker().
    """
    limit = None if memory is None else parse_memory(memory)
    budgets: list[int | None] = [None, None]
    if limit is not None:
        budgets[:] = _shares([a, b], limit, options.get("context"), options.get("kv", "f16"))
    with ExitStack() as stack:
        models = []
        for path, share in zip((a, b), budgets, strict=True):
            used = process_memory()["rss_bytes"]
            budget = None if share is None else used + share
            models.append(stack.enter_context(SmallThinker(path, budget, head_threshold=None, **options)))
        yield models[0], models[1]


def _shares(paths: Sequence[str | os.PathLike[str]], limit: int, context: int | None, kv: str) -> tuple[int, ...]:
    """Bytes for each model, besides what the process has now."""
    used = process_memory()["rss_bytes"]
    plans = [plan_memory(path, None, context or DEFAULT_CONTEXT, kv) for path in paths]
    tokenizer = max(plan.process for plan in plans) - used  # and what is loaded with the first one
    least = [plan.fixed - plan.process + tokenizer + plan.least_slots * plan.slot_bytes for plan in plans]
    wish = [(plan.slots - plan.least_slots) * plan.slot_bytes for plan in plans]
    spare = limit - used - sum(least)
    if spare < 0:
        raise MemoryBudgetError(
            f"a budget of {limit} bytes is too small: the two models together need {limit - spare} bytes"
        )
    slack = min(spare // 4, SLACK)
    spare -= 2 * slack
    return tuple(need + slack + spare * more // max(1, sum(wish)) for need, more in zip(least, wish, strict=True))


def divergence_from_source(
    source: str | os.PathLike[str], target: str | os.PathLike[str], text: bytes, progress: Progress | None = None
) -> Records:
    """compare() of what a GGUF was made of and that file, with the usual window or one as long as a short text.

    source: a GGUF file, or what convert() takes: of a checkpoint folder, or of types that do not run, an F16 file
    is written beside the target meanwhile and stands for it. Raises as compare(), SmallThinker() and convert().
    """
    with ExitStack() as stack:
        if not runs(source):
            folder = os.path.dirname(os.path.abspath(target))
            exact = os.path.join(stack.enter_context(TemporaryDirectory(dir=folder)), "f16.gguf")
            convert(source, exact, "f16")
            source = exact
        a, b = stack.enter_context(opened_pair(source, target))
        tokens = text_tokens(a, text)
        return compare(a, b, tokens, min(WINDOW, len(tokens), a.context), None, progress)


def runs(path: str | os.PathLike[str]) -> bool:
    """Whether it is a model file whose tensor types all run."""
    try:
        with GGUFFile(path):
            return True
    except (ModelFormatError, IsADirectoryError):
        return False


def read_text(path: str | os.PathLike[str]) -> bytes:
    """A text file's bytes without a last line end, as llama-perplexity takes it. Raises OSError."""
    return Path(path).read_bytes().removesuffix(b"\n")


def report(models: Sequence[SmallThinker], text: str, window: int, records: Records) -> dict[str, Any]:
    """All figures of a run by name, for programs.

    models: the one of perplexity(), or the two of compare(). text: its file's name.
    """
    names = [name for name in records.dtype.names or () if name.startswith("loss")]
    each = window - 1 - first_counted(window)
    return {
        "definition": "as llama-perplexity: windows from an empty context, of each the second half counts; nats",
        "text": text,
        "window": window,
        "windows": len(records) // each,
        "tokens_counted": len(records),
        "models": [
            {"files": model.paths, "kv": model.kv, "kernels": model.stats()["kernels"]}
            | asdict(Perplexity.of(records[name]))
            for model, name in zip(models, names, strict=True)
        ],
        **({"kl": asdict(Divergence.of(records))} if "kl" in (records.dtype.names or ()) else {}),
        "first_position": first_counted(window),
        "positions": {name: records[name].tolist() for name in records.dtype.names or ()},
    }
