"""Perplexity and divergence: against sums by hand, plain NumPy over whole windows, and llama.cpp where it is there."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import gguf_files
import numpy as np
import pytest
from small_model import divergence

from smallthinker_edge import MemoryBudgetError, SmallThinker, SmallThinkerError
from smallthinker_edge.cli import main
from smallthinker_edge.files.pack import pack
from smallthinker_edge.measure import evaluate
from smallthinker_edge.measure.losses import Divergence, Perplexity, compared, cut, first_counted, losses

SHAPE = {"n_layers": 2, "d_model": 64, "vocab_size": 320, "context_length": 256}
WORDS = b"hello world then on the in an order to tell hers "


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same random weights in Q8_0 and Q4_0."""
    folder = tmp_path_factory.mktemp("pair")
    for type_ in ("Q8_0", "Q4_0"):
        gguf_files.write_model(folder / f"{type_}.gguf", types=type_, seed=5, **SHAPE)
    return folder / "Q8_0.gguf", folder / "Q4_0.gguf"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """About 200 tokens."""
    path = tmp_path / "text.txt"
    path.write_bytes(WORDS * 8)
    return path


# Numbers


def test_a_loss_is_minus_the_log_of_the_targets_probability() -> None:
    logits = np.log(np.array([[1, 2, 1], [8, 1, 1]], np.float32)) + 7
    found = losses(logits, np.array([1, 2], np.int32))["loss"]
    assert found == pytest.approx([math.log(2), math.log(10)], rel=1e-6)
    both = Perplexity.of(found)
    assert both.perplexity == pytest.approx(math.sqrt(20), rel=1e-6)
    assert both.error == pytest.approx(math.sqrt(20) * (math.log(10) - math.log(2)) / 2, rel=1e-6)


def test_logits_far_apart_overflow_nothing() -> None:
    logits = np.array([[3e38, -3e38, 0]], np.float32)
    assert losses(logits, np.array([0], np.int32))["loss"][0] == 0
    assert np.isfinite(losses(logits, np.array([1], np.int32))["loss"][0])


def test_divergence_is_of_the_first_from_the_second() -> None:
    a, b = (np.log(np.array([p], np.float32)) for p in ((0.5, 0.5), (0.25, 0.75)))
    target = np.array([1], np.int32)
    there, back = compared(a, b, target)[0], compared(b, a, target)[0]
    assert there["kl"] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75), rel=1e-6)
    assert back["kl"] == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel=1e-6)
    assert (there["loss_a"], there["loss_b"]) == pytest.approx((math.log(2), -math.log(0.75)), rel=1e-6)
    assert not there["same_top1"], "equal logits: the first is taken"


def test_quantiles_and_agreement_are_over_positions() -> None:
    records = np.zeros(5, compared(np.zeros((1, 2)), np.zeros((1, 2)), np.zeros(1, np.int32)).dtype)
    records["kl"], records["same_top1"] = [4, 0, 1, 3, 2], [True, False, True, True, False]
    found = Divergence.of(records)
    assert (found.mean, found.median, found.largest, found.top1) == (2, 2, 4, 0.6)
    assert found.quantiles[0.75] == 3
    assert found.error == pytest.approx(math.sqrt(2.5 / 5))


def test_windows_are_whole_and_begin_with_the_models_bos() -> None:
    assert [w.tolist() for w in cut(range(11), 5)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert [w.tolist() for w in cut(range(11), 5, bos=99)] == [[99, 1, 2, 3, 4], [99, 6, 7, 8, 9]]
    assert (first_counted(512), 511 - first_counted(512)) == (256, 255)
    with pytest.raises(ValueError, match="11 tokens"):
        cut(range(11), 12)
    with pytest.raises(ValueError, match="at least 4"):
        cut(range(11), 3)


# Models


def by_hand(model: SmallThinker, tokens: list[int], window: int) -> np.ndarray:
    """All logits [n, V] that count, each window decoded whole."""
    rows = []
    for at in range(0, len(tokens) // window * window, window):
        with model.session() as session:
            rows.append(session.decode(tokens[at : at + window], all_logits=True)[window // 2 : window - 1])
    return np.concatenate(rows)


@pytest.mark.parametrize("window", [4, 31, 150])
def test_the_second_half_of_each_window_counts(pair: tuple[Path, Path], text: Path, window: int) -> None:
    with SmallThinker(pair[0]) as a, SmallThinker(pair[1]) as b:
        tokens = evaluate.text_tokens(a, text.read_bytes())
        assert 150 <= len(tokens) < 300
        of_a, of_b = by_hand(a, tokens, window), by_hand(b, tokens, window)
        targets = [t for at in range(0, len(tokens) // window * window, window)
                   for t in tokens[at + window // 2 + 1 : at + window]]  # fmt: skip
        exact = of_a.astype(np.longdouble)
        expected = np.log(np.exp(exact).sum(1)) - exact[np.arange(len(targets)), targets]
        assert evaluate.perplexity(a, tokens, window)["loss"] == pytest.approx(expected.astype(float), rel=1e-9)
        found = evaluate.compare(a, b, tokens, window)
        assert found["kl"] == pytest.approx(divergence(of_a, of_b), abs=1e-12)
        assert (found["same_top1"] == (of_a.argmax(1) == of_b.argmax(1))).all()
        assert found["kl"].mean() > 1e-5
        assert not evaluate.compare(a, a, tokens, window)["kl"].any()


def test_a_model_that_wants_a_bos_gets_it_in_every_window(tmp_path: Path, text: Path) -> None:
    path = gguf_files.write_model(tmp_path / "m.gguf", **SHAPE, metadata={"tokenizer.ggml.add_bos_token": True})
    with SmallThinker(path) as model:
        tokens = evaluate.text_tokens(model, text.read_bytes())
        assert tokens[0] == model.tokenizer.bos_id
        replaced = list(tokens)
        replaced[64] = replaced[128] = tokens[0]
        assert (by_hand(model, tokens, 64) != by_hand(model, replaced, 64)).any()
        targets = [t for at in (0, 64, 128) for t in tokens[at + 33 : at + 64]]
        expected = losses(by_hand(model, replaced, 64), np.array(targets, np.int32))
        assert (evaluate.perplexity(model, tokens, 64) == expected).all()


def test_special_tokens_are_text_in_a_text(pair: tuple[Path, Path]) -> None:
    with SmallThinker(pair[0]) as model:
        assert len(evaluate.text_tokens(model, b"<|im_end|>")) == len("<|im_end|>")


def test_results_do_not_depend_on_rows_budget_or_paging(
    pair: tuple[Path, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SmallThinker(pair[0]) as a, SmallThinker(pair[1]) as b:
        tokens = evaluate.text_tokens(a, text.read_bytes())
        expected = evaluate.compare(a, b, tokens, 100)
        monkeypatch.setattr(evaluate, "ROWS", 3)
        assert (evaluate.compare(a, b, tokens, 100) == expected).all()
    monkeypatch.undo()
    packed = tmp_path / "b.stpk"
    pack(pair[1], packed)
    with evaluate.opened_pair(pair[0], packed, memory="2GiB", context=100) as (a, b):
        assert (evaluate.compare(a, b, tokens, 100) == expected).all()


def test_less_room_for_logits_means_fewer_rows_at_a_time(pair: tuple[Path, Path], text: Path) -> None:
    with SmallThinker(pair[0]) as a, SmallThinker(pair[1]) as b:
        tokens = evaluate.text_tokens(a, text.read_bytes())
        expected = evaluate.compare(a, b, tokens, 100)
        with b.session() as session:
            session.prefill(tokens[:100])
            cache = session.kv_bytes
        row = 4 * b.config.vocab_size
        b._engine.memory.limit = cache + 5 * row  # the first model has decoded 64 rows when the second finds no room
        assert (evaluate.compare(a, b, tokens, 100) == expected).all()
        b._engine.memory.limit = cache + row // 2
        with pytest.raises(MemoryBudgetError):
            evaluate.compare(a, b, tokens, 100)


def test_two_models_keep_to_one_budget(pair: tuple[Path, Path], text: Path) -> None:
    script = (
        "import sys; from smallthinker_edge.measure import evaluate as e\n"
        "from smallthinker_edge.machine.memory import process_memory\n"
        "text = e.read_text(sys.argv[3])\n"
        "with e.opened_pair(*sys.argv[1:3], memory='150MiB', context=64) as (a, b):\n"
        "    e.compare(a, b, e.text_tokens(a, text), 64)\n"
        "    assert a.plan.limit < 150 << 20 and b.plan.limit <= 150 << 20\n"
        "    print(process_memory()['peak_bytes'])\n"
        "try: e.opened_pair(*sys.argv[1:3], memory='60MiB', context=64).__enter__()\n"
        "except MemoryError as error: print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script, *pair, text], capture_output=True, text=True, check=True)
    peak, refused = ran.stdout.splitlines()
    assert int(peak) <= 150 << 20
    assert "the two models together need" in refused


def test_logits_of_a_window_are_never_in_memory_at_once(tmp_path: Path) -> None:
    path = gguf_files.write_model(tmp_path / "m.gguf", **SHAPE | {"vocab_size": 60_000, "context_length": 2048})
    script = (
        "import sys; from smallthinker_edge import SmallThinker\n"
        "from smallthinker_edge.measure import evaluate as e\n"
        "from smallthinker_edge.machine.memory import process_memory\n"
        "with SmallThinker(sys.argv[1]) as model:\n"
        "    e.perplexity(model, [5] * 100, 100)\n"
        "    before = process_memory()['peak_bytes']\n"
        "    e.perplexity(model, [5] * 2048, 2048)\n"
        "    print(process_memory()['peak_bytes'] - before)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    rows = 1024 * 60_000 * 4
    assert int(ran.stdout) < rows / 6


def test_models_of_different_vocabularies_are_not_compared(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = gguf_files.write_model(tmp_path / "other.gguf", **SHAPE | {"vocab_size": 352})
    with SmallThinker(pair[0]) as a, SmallThinker(other) as b, pytest.raises(SmallThinkerError, match="vocabularies"):
        evaluate.compare(a, b, list(range(64)), 32)


def test_perplexity_is_llama_cpps(tmp_path: Path, text: Path) -> None:
    """Its own logits, counted as its llama-perplexity counts them: no window slides, half of each is context only.

    Weights are float32: rounded activations could let a router's near-tie fall the other way.
    """
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python, the [bench] extra, is not installed")
    path = gguf_files.write_model(tmp_path / "m.gguf", types="F32", **SHAPE)
    with SmallThinker(path) as model:
        tokens = evaluate.text_tokens(model, text.read_bytes())
        ours = Perplexity.of(evaluate.perplexity(model, tokens, 64)["loss"])
    llama = llama_cpp.Llama(path, n_ctx=64, n_batch=64, logits_all=True, verbose=False, flash_attn=False)
    assert llama.tokenize(text.read_bytes(), add_bos=False, special=False) == tokens
    total = count = 0
    for at in range(0, len(tokens) - 63, 64):
        llama.reset()
        llama.eval(tokens[at : at + 64])
        for position in range(32, 63):
            row = np.array(llama.scores[position], np.float64)
            total += np.log(np.exp(row - row.max()).sum()) + row.max() - row[tokens[at + position + 1]]
            count += 1
    assert (ours.count, ours.perplexity) == (count, pytest.approx(math.exp(total / count), rel=1e-3))


# Runs that go on


def kill_after(windows: int, pair: tuple[Path, Path], text: Path, state: Path) -> None:
    """Runs compare() in another process and kills it when so many windows are done."""
    script = (
        "import os, sys\nfrom smallthinker_edge.measure import evaluate as e\n"
        "text = e.read_text(sys.argv[3])\n"
        "def progress(done, total, records):\n"
        f"    done < {windows} or os.kill(os.getpid(), 9)\n"
        "with e.opened_pair(*sys.argv[1:3]) as (a, b):\n"
        "    state = e.State(sys.argv[4], e.run_key([a, b], text, 16), seconds=0)\n"
        "    e.compare(a, b, e.text_tokens(a, text), 16, state, progress)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script, *pair, text, state], check=False)
    assert ran.returncode == -9


def test_a_killed_run_goes_on_where_it_stopped(pair: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    path, content = tmp_path / "state", evaluate.read_text(text)
    kill_after(4, pair, text, path)
    seen = []
    with evaluate.opened_pair(*pair) as (a, b):
        tokens = evaluate.text_tokens(a, content)
        expected = evaluate.compare(a, b, tokens, 16)
        state = evaluate.State(path, evaluate.run_key([a, b], content, 16))
        found = evaluate.compare(a, b, tokens, 16, state, lambda done, total, records: seen.append((done, total)))
    assert seen[0][0] == 4
    assert seen[-1] == (len(tokens) // 16, len(tokens) // 16)
    assert (found == expected).all()


@pytest.mark.parametrize("what", ["other text", "other window", "other file", "damaged", "other kind"])
def test_a_state_of_another_run_is_not_taken_up(
    what: str, pair: tuple[Path, Path], text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, content = tmp_path / "state", evaluate.read_text(text)
    with SmallThinker(pair[0]) as a, SmallThinker(pair[1]) as b:
        keys = {
            "other text": evaluate.run_key([a], content + b".", 16),
            "other window": evaluate.run_key([a], content, 32),
            "other file": evaluate.run_key([b], content, 16),
        }
        tokens = evaluate.text_tokens(a, content)
        key = evaluate.run_key([a], content, 16)
        kind = "kl" if what == "other kind" else "loss"
        evaluate.State(path, keys.get(what, key)).save(np.full(21, 9, [(kind, "<f8")]), now=True)
        if what == "damaged":
            path.write_bytes(path.read_bytes()[:200])
        found = evaluate.perplexity(a, tokens, 16, evaluate.State(path, key))
        assert (found == evaluate.perplexity(a, tokens, 16)).all()
    assert "begins anew" in caplog.text


# The commands


def test_the_commands_print_and_write_the_figures(
    pair: tuple[Path, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    arguments = ["--context", "50", "--json", str(out)]
    assert main(["compare", *map(str, pair), "--text", str(text), *arguments]) == 0
    printed, figures = capsys.readouterr().out, json.loads(out.read_text())
    with SmallThinker(pair[0]) as a, SmallThinker(pair[1]) as b:
        tokens = evaluate.text_tokens(a, text.read_bytes())
        records = evaluate.compare(a, b, tokens, 50)
    assert figures["kl"]["mean"] == records["kl"].mean()
    assert figures["positions"]["kl"] == records["kl"].tolist()
    assert figures["models"][1]["perplexity"] == math.exp(records["loss_b"].mean())
    assert f"{records['kl'].mean():.6f}" in printed
    assert f"{records['same_top1'].mean():.2%}" in printed
    assert main(["perplexity", str(pair[1]), str(text), *arguments]) == 0
    assert f"{figures['models'][1]['perplexity']:.4f}" in capsys.readouterr().out
    assert json.loads(out.read_text())["positions"]["loss"] == records["loss_b"].tolist()
    assert sorted(os.listdir(tmp_path)) == ["figures.json", "text.txt"]


def test_an_interrupted_command_goes_on(
    pair: tuple[Path, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, computed, window = tmp_path / "figures.json", [], evaluate._window

    def interrupted(*arguments: object) -> np.ndarray:
        if len(computed) == 2:
            computed.append(None)
            raise KeyboardInterrupt
        computed.append(None)
        return window(*arguments)

    command = ["perplexity", str(pair[0]), str(text), "--context", "32", "--json", str(out)]
    monkeypatch.setattr(evaluate, "_window", interrupted)
    assert main(command) == 130
    assert not out.exists()
    assert main(command) == 0
    figures = json.loads(out.read_text())
    assert len(computed) == figures["windows"] + 1, "the interrupted window only was computed twice"
    assert main(command) == 0
    assert json.loads(out.read_text()) == figures


@pytest.mark.parametrize("context", ["500", "200", "3"])
def test_a_window_that_cannot_be_is_wrong_usage(
    context: str, pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_bytes(WORDS)
    assert main(["perplexity", str(pair[0]), str(tmp_path / "short.txt"), "--context", context]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("type_", ["Q8_0", "IQ3_S"])
def test_convert_measures_what_it_wrote_against_its_source(
    type_: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of types that do not run, an F16 file stands for the source."""
    folder = tmp_path / "models"
    folder.mkdir()
    source, target, exact = folder / "source.gguf", folder / "m.gguf", tmp_path / "f16.gguf"
    gguf_files.write_model(source, types=type_, **SHAPE | {"d_model": 256, "d_ffn": 256, "head_dim": 64})
    assert main(["convert", str(source), "-o", str(target), "--kl", str(text)]) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["m.gguf", "source.gguf"]
    main(["convert", str(source), "-o", str(exact), "--type", "f16"])
    with SmallThinker(source if type_ == "Q8_0" else exact) as a, SmallThinker(target) as b:
        tokens = evaluate.text_tokens(a, text.read_bytes())
        kl = evaluate.compare(a, b, tokens, len(tokens))["kl"].mean()
    assert kl > 1e-5
    assert f"{kl:.6f}" in printed


def test_a_text_that_is_not_there_stops_convert_before_it_begins(pair: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    assert main(["convert", str(pair[0]), "-o", str(target), "--kl", str(tmp_path / "none.txt")]) == 1
    assert not target.exists()
