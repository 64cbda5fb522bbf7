"""`map` on this machine: answers and errors, options, refusals; in one process and in several that are killed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import gguf_files
import psutil
import pytest
from batches import answers, run_map, start_map, wait_for_answers, workers_of, write_batch

from smallthinker_edge import MemoryBudgetError, SmallThinker, cli
from smallthinker_edge.batch.here import MOST_DEATHS, Processes
from smallthinker_edge.batch.task import Line, Task
from smallthinker_edge.batch.worker import Opening
from smallthinker_edge.files.pack import pack

MIB = 1 << 20


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["map", *map(str, arguments)])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_answers_are_those_of_the_library(demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, source = write_batch(tmp_path, 12)
    target = tmp_path / "out.jsonl"
    code, out, err = call(capsys, "-m", demo_model, "--task", task, source, "-o", target, "--max-tokens", 40)
    assert (code, err) == (0, "")
    assert out.startswith("12 lines answered, 0 of them")
    with SmallThinker(demo_model) as model:
        for record, line in zip(answers(target), source.read_text(encoding="utf-8").splitlines(), strict=True):
            given = json.loads(line)
            messages = [{"role": "user", "content": given["sentence"]}]
            answer = model.create_chat_completion(messages, max_tokens=40)
            assert record["id"] == given["id"]
            assert record["answer"] == answer["choices"][0]["message"]["content"]
            assert record["finish_reason"] == answer["choices"][0]["finish_reason"] == "stop"
            for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
                assert record["usage"][name] == answer["usage"][name]
            assert json.loads(record["answer"]), "the demo model says JSON"


def test_errors_stand_beside_their_lines_and_can_be_tried_again(
    demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, source = write_batch(tmp_path, 6)
    lines = source.read_text(encoding="utf-8").splitlines()
    lines[1] = '{"id": 7}'
    lines[3] = json.dumps({"id": "long", "sentence": "light " * 3000})
    lines[4] = "{"
    source.write_text("\n".join(lines), encoding="utf-8")
    target = tmp_path / "out.jsonl"
    command = ["-m", demo_model, "--task", task, source, "-o", target]
    code, out, _ = call(capsys, *command)
    assert code == 1
    assert out.startswith("6 lines answered, 3 of them")
    records = answers(target)
    errors = [(record["line"], record.get("id"), record["error"]["type"]) for record in records if "error" in record]
    assert errors == [(2, 7, "ValueError"), (4, "long", "ContextFull"), (5, None, "ValueError")]
    assert "sentence" in records[1]["error"]["message"]
    again = target.read_bytes()
    assert call(capsys, *command)[0] == 1
    assert target.read_bytes() == again
    assert call(capsys, *command, "--retry-errors")[0] == 1, "they are wrong still"
    assert answers(target) == records


def test_completions_text_lines_and_options(
    demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, source, target = tmp_path / "task.json", tmp_path / "in.txt", tmp_path / "out.jsonl"
    task.write_text(json.dumps({"prompt": "{text} the", "max_tokens": 9, "logprobs": 1}), encoding="utf-8")
    source.write_text("turn on\n\nclose\n", encoding="utf-8")
    command = ["-m", demo_model, "--task", task, source, "-o", target, "--max-tokens", "4", "--seed", "3"]
    assert call(capsys, *command, "--temperature", "1.5")[0] == 0
    first, second = answers(target)
    assert (first["line"], second["line"], "id" in first) == (1, 3, False)
    with SmallThinker(demo_model) as model:
        expected = model.create_completion("turn on the", max_tokens=4, seed=3, temperature=1.5, logprobs=1)
    assert first["answer"] == expected["choices"][0]["text"]
    assert first["logprobs"] == json.loads(json.dumps(expected["choices"][0]["logprobs"]))
    assert first["usage"]["completion_tokens"] == 4


def test_answers_keep_to_a_schema(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    task, source, target, schema = (tmp_path / name for name in ("task.txt", "in.txt", "out.jsonl", "schema.json"))
    task.write_text("{text}", encoding="utf-8")
    source.write_text("a\nb\n", encoding="utf-8")
    shape = {"type": "object", "properties": {"mood": {"enum": ["glad", "sad"]}}, "required": ["mood"]}
    schema.write_text(json.dumps({**shape, "additionalProperties": False}), encoding="utf-8")
    command = ["-m", tiny_model, "--task", task, source, "--temperature", "2", "--seed", "1"]
    assert call(capsys, *command, "-o", target, "--schema", schema)[0] == 0
    assert {json.loads(record["answer"])["mood"] for record in answers(target)} <= {"glad", "sad"}
    task = tmp_path / "task.json"
    request = {
        "messages": [{"role": "user", "content": "{text}"}],
        "response_format": {"type": "regex", "pattern": "x|y"},
    }
    task.write_text(json.dumps(request), encoding="utf-8")
    assert call(capsys, "-m", tiny_model, "--task", task, source, "-o", tmp_path / "b.jsonl")[0] == 0
    assert {record["answer"] for record in answers(tmp_path / "b.jsonl")} <= {"x", "y"}
    schema.write_text('{"type": "strange"}', encoding="utf-8")
    code, _, err = call(capsys, *command, "-o", tmp_path / "c.jsonl", "--schema", schema)
    assert code == 1
    assert "strange" in err
    assert (tmp_path / "c.jsonl").read_bytes() == b"", "no line is to blame for a schema that is none"


def test_another_task_model_or_option_is_refused(
    demo_model: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, source = write_batch(tmp_path, 3)
    target, other = tmp_path / "out.jsonl", tmp_path / "other.txt"
    other.write_text("Please: {sentence}", encoding="utf-8")
    command = ["--task", task, source, "-o", target]
    assert call(capsys, "-m", demo_model, *command)[0] == 0
    content = target.read_bytes()
    source.write_text(source.read_text(encoding="utf-8") + '{"sentence": "more"}\n', encoding="utf-8")
    for arguments in (
        ["-m", tiny_model, *command],
        ["-m", demo_model, *command, "--temperature", "0.5"],
        ["-m", demo_model, *command, "--kv", "q8_0"],
        ["-m", demo_model, "--task", other, source, "-o", target],
    ):
        code, out, err = call(capsys, *arguments)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert "another" in err
        assert target.read_bytes() == content
    packed = tmp_path / "demo.stpk"
    pack(demo_model, packed)
    assert call(capsys, "-m", packed, *command, "--threads", "1")[0] == 0, "the same model"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--processes", "2", "--scheduler", "tcp://127.0.0.1:1"], "not allowed"),
        (["--processes", "0"], "at least 1"),
        (["--context", "100000"], "context"),
        (["--schema", "in.jsonl"], "Extra data"),
    ],
)
def test_wrong_usage(
    demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    task, source = write_batch(tmp_path, 2)
    arguments = [str(source) if word == source.name else word for word in arguments]
    code, _, err = call(capsys, "-m", demo_model, "--task", task, source, "-o", tmp_path / "out.jsonl", *arguments)
    assert code == 2
    assert said in err


def test_a_task_without_a_place_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, source = write_batch(tmp_path, 2)
    task.write_text("hello", encoding="utf-8")
    code, _, err = call(capsys, "-m", "absent.gguf", "--task", task, source, "-o", tmp_path / "out.jsonl")
    assert code == 2
    assert "no place" in err


# Several processes


@pytest.fixture(scope="module")
def reference(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[dict[str, Any]]]:
    """(task, input, the answers of one process that nobody disturbs)."""
    folder = tmp_path_factory.mktemp("batch")
    task, source = write_batch(folder, 150)
    code, _, err = run_map("-m", demo_model, "--task", task, source, "-o", folder / "reference.jsonl")
    assert code == 0, err
    return task, source, answers(folder / "reference.jsonl")


def test_processes_give_the_same_answers_within_the_budget(
    demo_model: Path, reference: tuple[Path, Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    task, source, expected = reference
    target, budget = tmp_path / "out.jsonl", 700 * MIB
    process = start_map("-m", demo_model, "--task", task, source, "-o", target, "--processes", 2, "--memory", budget)
    peaks = dict[int, int]()
    while process.poll() is None:
        family = [psutil.Process(process.pid)] if psutil.pid_exists(process.pid) else []
        for member in [*family, *(child for parent in family for child in parent.children())]:
            try:
                status = Path(f"/proc/{member.pid}/status").read_text(encoding="ascii")
            except OSError:
                continue
            if "VmHWM" in status:
                peaks[member.pid] = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        time.sleep(0.02)
    assert process.wait() == 0, process.stderr and process.stderr.read()
    assert answers(target) == expected
    assert len(peaks) >= 3, "two processes computed"
    assert sum(peaks.values()) <= budget


def test_a_worker_that_is_killed_is_replaced_and_its_line_computed(
    demo_model: Path, reference: tuple[Path, Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    task, source, expected = reference
    target = tmp_path / "out.jsonl"
    process = start_map("-m", demo_model, "--task", task, source, "-o", target, "--processes", 2)
    for count in (5, 20):
        wait_for_answers(target, count, process)
        process.send_signal(signal.SIGSTOP)  # so that it does not end while they are looked for
        worker = workers_of(process)[0]
        worker.kill()
        process.send_signal(signal.SIGCONT)
        worker.wait(60)  # until it has gone it would be found again
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err.count("SIGKILL") == 2
    assert answers(target) == expected


def test_a_run_that_is_killed_goes_on_and_its_workers_end_with_it(
    demo_model: Path, reference: tuple[Path, Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    task, source, expected = reference
    target = tmp_path / "out.jsonl"
    command = ["-m", demo_model, "--task", task, source, "-o", target, "--processes", 2]
    written = []
    for count in (1, 10, 20):
        process = start_map(*command)
        wait_for_answers(target, count, process)
        process.send_signal(signal.SIGSTOP)
        family = psutil.Process(process.pid).children()
        process.kill()
        process.communicate()
        assert psutil.wait_procs(family, timeout=60)[1] == [], "no worker outlives the run"
        written.append(target.read_bytes().count(b"\n"))
    assert written[0] < 150, "it was killed before the end"
    code, _, err = run_map(*command)
    assert code == 0, err
    assert answers(target) == expected


def test_ctrl_c_stops_and_the_same_command_goes_on(
    demo_model: Path, reference: tuple[Path, Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    task, source, expected = reference
    target = tmp_path / "out.jsonl"
    for extra in ([], ["--processes", 2]):
        process = start_map("-m", demo_model, "--task", task, source, "-o", target, *extra)
        wait_for_answers(target, target.read_bytes().count(b"\n") + 5 if target.exists() else 5, process)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 130, err
        assert "goes on" in err
        assert "Traceback" not in err
    assert run_map("-m", demo_model, "--task", task, source, "-o", target)[0] == 0
    assert answers(target) == expected


def test_a_line_that_ends_every_process_is_an_error(tmp_path: Path) -> None:
    path = gguf_files.write_model(tmp_path / "model.gguf", context_length=16384)
    task = Task({"prompt": "{text}", "max_tokens": 16000, "logit_bias": {2: -1e15}}, "text")
    workers = Processes(task, Opening(str(path), threads=1), None, 1)
    try:
        while not workers.has_room():
            assert list(workers.answers()) == []
        workers.submit(Line(1, b"a"))
        for death in range(MOST_DEATHS):
            [child] = [c for c in psutil.Process().children() if "spawn_main" in " ".join(c.cmdline())]
            child.kill()
            found = list(workers.answers())
            if death < MOST_DEATHS - 1:
                assert found == []
                assert list(workers.answers()) == [], "the next process is ready, and has the line now"
        [(line, answer)] = found
        assert line == Line(1, b"a")
        assert answer.fields["error"]["type"] == "WorkerLost"
        assert "SIGKILL" in answer.fields["error"]["message"]
    finally:
        workers.close()


def test_processes_that_cannot_open_the_model_end_the_run(demo_model: Path, tmp_path: Path) -> None:
    task, source = write_batch(tmp_path, 3)
    command = ["--task", task, source, "-o", tmp_path / "out.jsonl", "--processes", 2]
    code, _, err = run_map("-m", tmp_path / "absent.gguf", *command)
    assert (code, err.count("\n")) == (1, 1)
    assert "absent.gguf" in err
    code, _, err = run_map("-m", demo_model, *command, "--memory", "160MiB")
    assert (code, err.count("\n")) == (1, 1)
    assert "MiB" in err
    with pytest.raises(MemoryBudgetError, match="2 processes"):
        Processes(Task({"prompt": "{text}"}, "text"), Opening(str(demo_model), memory=MIB), None, 2)
