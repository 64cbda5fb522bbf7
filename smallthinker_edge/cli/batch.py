"""`map`: one task over the lines of a file."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smallthinker_edge.cli.arguments import (
    FAILED,
    OK,
    Command,
    UsageError,
    add_model_arguments,
    checking_arguments,
    positive_int,
)
from smallthinker_edge.cli.generate import add_sampling_arguments, sampling_options
from smallthinker_edge.cli.progress import Progress as Shown
from smallthinker_edge.cli.progress import progress

if TYPE_CHECKING:
    from smallthinker_edge.batch.run import Progress
    from smallthinker_edge.batch.task import Task
    from smallthinker_edge.batch.worker import Opening, Workers

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")


def map_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("input", metavar="INPUT", help="a JSON object on each line (.jsonl), or lines of text")
    parser.add_argument(
        "--task", required=True, metavar="FILE", help="what to ask, with {field} places; .json: messages, or a request"
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="answers; gone on with if it is there")
    parser.add_argument("--lines", choices=("json", "text"), help="what lines are (default: by the input's name)")
    parser.add_argument("--id", default="id", metavar="NAME", help="field that names a line (default: id)")
    parser.add_argument("--schema", metavar="FILE", help="JSON schema that answers keep to (extra `structured`)")
    parser.add_argument("--retry-errors", action="store_true", help="ask again where an answer is an error")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--processes", type=positive_int, default=1, metavar="N", help="processes that share --memory (default: 1)"
    )
    where.add_argument(
        "--scheduler", metavar="ADDRESS", help="of a Dask cluster, tcp://HOST:8786 (extra `cluster`); see docs/batch.md"
    )
    add_sampling_arguments(parser)


def map_lines(arguments: argparse.Namespace) -> int:
    from smallthinker_edge.batch.output import Output
    from smallthinker_edge.batch.run import run
    from smallthinker_edge.batch.worker import Opening

    task = task_of(arguments)
    opening = Opening(
        arguments.model,
        arguments.memory,
        arguments.threads or "auto",
        arguments.pin,
        arguments.context,
        arguments.kv,
        arguments.head_threshold,
        arguments.verify,
    )
    with Output(
        arguments.output, arguments.input, task.digest(opening.answering), retry=arguments.retry_errors
    ) as output:
        if output.done < output.total:
            with checking_arguments():
                workers = workers_of(arguments, task, opening, output.model)
            try:
                with progress() as shown:
                    run(output, workers, show_answers(shown))
            except KeyboardInterrupt:
                print(f"stopped at {output.done} of {output.total}; the same command goes on", file=sys.stderr)
                raise
            finally:
                workers.close()
        print(f"{output.done} lines answered, {output.errors} of them with an error: {arguments.output}")
        return FAILED if output.errors else OK


def task_of(arguments: argparse.Namespace) -> Task:
    """The task of the command line. UsageError for one that the library would not take."""
    from smallthinker_edge.batch.task import LineKind, read_task

    given: dict[str, Any] = sampling_options(arguments)
    lines: LineKind = arguments.lines or ("json" if Path(arguments.input).suffix in JSON_SUFFIXES else "text")
    try:
        if arguments.schema is not None:
            schema = json.loads(Path(arguments.schema).read_text(encoding="utf-8"))
            given["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        return read_task(arguments.task, lines, given, arguments.id)
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"{arguments.task}: {error}") from error


def workers_of(arguments: argparse.Namespace, task: Task, opening: Opening, expected: str | None) -> Workers:
    if arguments.scheduler is not None:
        from smallthinker_edge.batch.cluster import Cluster

        quiet_dask()
        return Cluster(arguments.scheduler, task, opening, expected)
    from smallthinker_edge.batch.here import Processes, ThisProcess

    if arguments.processes == 1:
        return ThisProcess(task, opening, expected)
    return Processes(task, opening, expected, arguments.processes)


def quiet_dask() -> None:
    """What Dask logs in this process is left out: what a user can do something about becomes an error of ours."""
    if find_spec("dask") is not None:
        import dask.config

        dask.config.set({"logging": {"distributed": "critical", "distributed.client": "critical"}})


def show_answers(shown: Shown) -> Progress:
    """Progress in lines, and how many of them have an error."""
    return lambda done, total, errors: shown(done, total, f"lines, {errors} with an error" if errors else "lines")


COMMANDS = (Command("map", "ask a task about each line of a file", map_arguments, map_lines),)
