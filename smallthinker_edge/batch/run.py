"""A run of a task over a file of lines: hands lines to workers, and puts what they answer on disk at once."""

from __future__ import annotations

from collections.abc import Callable

from smallthinker_edge.batch.output import Output
from smallthinker_edge.batch.worker import Workers

# Called with (lines that have an answer, all lines, those of the answers that are errors).
Progress = Callable[[int, int, int], None]


def run(output: Output, workers: Workers, progress: Progress | None = None) -> None:
    """Answers the lines that have no answer yet.

    Killed at any moment, it loses at most the answers that were being computed; the next run goes on. Raises as
    Workers.answers() and Output.add().
    """
    pending, waiting = output.pending(), 0
    line = next(pending, None)
    while line is not None or waiting:
        if progress is not None:
            progress(output.done, output.total, output.errors)
        while line is not None and workers.has_room():
            workers.submit(line)
            waiting += 1
            line = next(pending, None)
        for answered, answer in workers.answers():
            output.add(answered, answer.fields, answer.model)
            waiting -= 1
    if progress is not None:
        progress(output.done, output.total, output.errors)
