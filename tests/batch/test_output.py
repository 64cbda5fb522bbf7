"""The file of answers: in order, whole after any end of a run, and never one that belongs to something else."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from smallthinker_edge.batch.output import AHEAD, Output, OutputError, read_lines
from smallthinker_edge.batch.task import LONGEST_LINE, Line

TASK, MODEL = "0123456789abcdef", "fedcba9876543210"


def fields_for(line: Line, fails: frozenset[int] = frozenset()) -> dict[str, Any]:
    if line.number in fails:
        return {"error": {"type": "ValueError", "message": f"no {line.number}"}}
    return {"id": line.number * 7, "answer": f"answer to {line.data.decode()}\n"}


def answer_some(output: Output, order: random.Random, steps: int, fails: frozenset[int] = frozenset()) -> bool:
    """Answers lines in any order, eight at a time; whether all were answered after so many steps."""
    pending, flying = output.pending(), list[Line]()
    while True:
        flying += [line for _, line in zip(range(8 - len(flying)), pending, strict=False)]
        if not flying:
            return True
        if not steps:
            return False
        steps -= 1
        line = flying.pop(order.randrange(len(flying)))
        output.add(line, fields_for(line, fails), MODEL)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f"line {i}\n" if i % 5 else "  \n" for i in range(60)), encoding="utf-8")
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def expected(source: Path) -> list[dict[str, Any]]:
    return [{"line": line.number, **fields_for(line)} for line in read_lines(source)]


def without_source(path: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "source"} for record in records(path)]


def test_answers_stand_in_the_order_of_the_input_and_nothing_else_is_left(source: Path, target: Path) -> None:
    with Output(target, source, TASK) as output:
        assert answer_some(output, random.Random(1), 1000)
        assert (output.done, output.total, output.errors) == (48, 48, 0)
    assert without_source(target) == expected(source)
    assert sorted(path.name for path in target.parent.iterdir()) == ["in.jsonl", "out.jsonl"]


def killed_run(target: Path, source: Path, seed: int) -> tuple[int, bool]:
    """(lines answered, whether that was all) by a process that ends without a word."""
    child = os.fork()
    if child == 0:
        try:
            output = Output(target, source, TASK)
            before = output.done
            done = answer_some(output, random.Random(seed), seed % 20)
            os._exit(2 * (output.done - before) + done)
        finally:
            os._exit(255)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code < 255, "an exception, told above"
    return code // 2, bool(code % 2)


@pytest.mark.parametrize("seed", range(25))
def test_a_run_that_is_killed_anywhere_loses_nothing_and_repeats_nothing(source: Path, target: Path, seed: int) -> None:
    draw, ahead, asked, torn = random.Random(seed), Path(f"{target}{AHEAD}"), 0, 0
    while not (run := killed_run(target, source, draw.randrange(10**6)))[1]:
        asked += run[0]
        damaged = draw.choice([target, ahead])
        content = damaged.read_bytes()
        if content and draw.random() < 0.5:
            last = content.rfind(b"\n", 0, -1) + 1
            damaged.write_bytes(content[: draw.randrange(last, len(content))] + b"\0" * draw.choice([0, 0, 9]))
            torn += 1
    with Output(target, source, TASK) as output:
        assert list(output.pending()) == []
    assert without_source(target) == expected(source)
    assert asked + run[0] <= 48 + torn, "what is on disk is not asked again"
    assert not ahead.exists()


def test_errors_stay_beside_their_lines_until_they_are_tried_again(source: Path, target: Path) -> None:
    fails = frozenset({3, 17, 18, 59})
    with Output(target, source, TASK) as output:
        answer_some(output, random.Random(1), 1000, fails)
        assert output.errors == 4
    assert [record["line"] for record in records(target) if "error" in record] == sorted(fails)
    with Output(target, source, TASK) as output:
        assert (output.errors, list(output.pending())) == (4, [])
    with Output(target, source, TASK, retry=True) as output:
        assert (output.errors, output.done) == (0, 44)
        asked = list(output.pending())
        assert [line.number for line in asked] == sorted(fails)
        for line in asked[2:]:
            output.add(line, fields_for(line, frozenset({59})), MODEL)
    with Output(target, source, TASK) as output:
        assert [line.number for line in output.pending()] == [3, 17]
        assert output.errors == 1
        answer_some(output, random.Random(1), 1000)
    assert [record["line"] for record in records(target)] == [line.number for line in read_lines(source)]
    assert [record["line"] for record in records(target) if "error" in record] == [59]


def test_a_retry_that_is_killed_keeps_the_good_answers(source: Path, target: Path) -> None:
    with Output(target, source, TASK) as output:
        answer_some(output, random.Random(1), 1000, frozenset({7}))
    content = target.read_bytes()
    with Output(target, source, TASK, retry=True) as output:
        assert output.done == 47
    target.write_bytes(content)  # it was killed before the file was cut
    with Output(target, source, TASK, retry=True) as output:
        assert (output.done, output.errors) == (47, 0)
        answer_some(output, random.Random(1), 1000)
    assert without_source(target) == expected(source)


def test_lines_may_be_added_to_the_input(source: Path, target: Path) -> None:
    with Output(target, source, TASK) as output:
        answer_some(output, random.Random(1), 1000)
    with source.open("a", encoding="utf-8") as file:
        file.write("one more\n")
    with Output(target, source, TASK) as output:
        assert [line.data for line in output.pending()] == [b"one more"]


def answered(source: Path, target: Path, model: str = MODEL) -> None:
    with Output(target, source, TASK) as output:
        for line in output.pending():
            output.add(line, fields_for(line), model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace(TASK, "f" * 16), "another task"),
        (lambda text: text.replace(MODEL, "f" * 16, 3), "several models"),
        (lambda text: text.replace('"line": 3', '"line": 4'), "answer to line 3"),
        (lambda text: text + text.splitlines()[0] + "\n", "more answers"),
        (lambda text: "my thesis", "answer to line 2"),
        (lambda text: "my thesis\n", "answer to line 2"),
        (lambda text: text[:-1].rpartition("\n")[0] + "\nmy notes", "answer to line 60"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left_alone(source: Path, target: Path, change: Any, said: str) -> None:
    answered(source, target)
    target.write_text(change(target.read_text(encoding="utf-8")), encoding="utf-8")
    content = target.read_bytes()
    with pytest.raises(OutputError, match=said):
        Output(target, source, TASK, retry=True)
    assert target.read_bytes() == content


def test_an_input_that_has_changed_is_refused(source: Path, target: Path) -> None:
    answered(source, target)
    source.write_text(source.read_text(encoding="utf-8").replace("line 33", "line 34"), encoding="utf-8")
    with pytest.raises(OutputError, match=r"line 34 of .* has changed"):
        Output(target, source, TASK)


def test_the_input_is_never_written_to(source: Path) -> None:
    content = source.read_bytes()
    with pytest.raises(OutputError, match="is the input"):
        Output(source, source, TASK)
    assert source.read_bytes() == content


def test_an_input_that_is_not_there_makes_no_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Output(tmp_path / "out.jsonl", tmp_path / "absent.jsonl", TASK)
    assert list(tmp_path.iterdir()) == []


def test_two_runs_never_write_one_file(source: Path, target: Path) -> None:
    with Output(target, source, TASK), pytest.raises(OutputError, match="another run"):
        Output(target, source, TASK)
    Output(target, source, TASK).close()


def test_what_waited_for_a_file_that_is_gone_is_forgotten(source: Path, target: Path) -> None:
    with Output(target, source, TASK) as output:
        lines = list(output.pending())
        output.add(lines[5], fields_for(lines[5]), MODEL)
    target.unlink()
    with Output(target, source, TASK) as output:
        assert output.done == 0


def test_what_waits_is_taken_up_only_for_the_same_line_task_and_model(source: Path, target: Path) -> None:
    with Output(target, source, TASK) as output:
        lines = list(output.pending())
        for line in lines[5:8]:
            output.add(line, fields_for(line), MODEL)
    ahead = Path(f"{target}{AHEAD}")
    first, second, third = ahead.read_text(encoding="utf-8").splitlines()
    ahead.write_text("\n".join([first, second.replace(TASK, "f" * 16), third]) + "\n\n{}\n", encoding="utf-8")
    changed = f"line {lines[7].number - 1}\n"
    source.write_text(source.read_text(encoding="utf-8").replace(changed, "new\n"), encoding="utf-8")
    with Output(target, source, TASK) as output:
        assert (output.done, output.model) == (1, MODEL)
        assert lines[5].number not in [line.number for line in output.pending()]


def test_lines_keep_their_numbers_and_long_ones_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes(b"a\r\n\n" + b"x" * (3 * LONGEST_LINE) + b"\nb\xc2\x85c\n \nlast")
    lines = list(read_lines(path))
    assert [(line.number, line.data[:9]) for line in lines] == [
        (1, b"a"), (3, b"x" * 9), (4, b"b\xc2\x85c"), (6, b"last")]  # fmt: skip
    assert LONGEST_LINE < len(lines[1].data) <= LONGEST_LINE + 2


def test_strange_texts_come_back_as_they_were(source: Path, target: Path) -> None:
    text = 'a\n\u2028\x00"\\ \U0001f600 \ud800'
    with Output(target, source, TASK) as output:
        line = next(output.pending())
        output.add(line, {"answer": text}, MODEL)
    assert records(target)[0]["answer"] == text
