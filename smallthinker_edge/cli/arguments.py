"""What several commands share: exit codes, argument types, the options of a model and how it is opened."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from smallthinker_edge.errors import MissingExtra, SmallThinkerError
from smallthinker_edge.opening import DEFAULT_CONTEXT, KV_CHOICES
from smallthinker_edge.printable import printable

if TYPE_CHECKING:
    from smallthinker_edge.model import SmallThinker

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class UsageError(Exception):
    """An argument that only the library could judge, such as a context longer than the model's."""


@dataclass(frozen=True)
class Command:
    """A subcommand: name, one line of help, what adds its arguments, what runs it and gives the exit code."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def memory_size(text: str) -> int:
    """Bytes, from "1GiB", "900MB" or a plain number."""
    from smallthinker_edge.machine.memory import parse_memory

    try:
        return parse_memory(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def head_threshold(text: str) -> float | str | None:
    """A score, "auto", or None from "full"."""
    if text in ("auto", "full"):
        return text if text == "auto" else None
    return float(text)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", required=True, metavar="FILE", help="GGUF file of a SmallThinker model")
    parser.add_argument(
        "--memory",
        type=memory_size,
        metavar="SIZE",
        help="budget of the whole process, such as 8GiB (default: none)",
    )
    add_threads_argument(parser)
    parser.add_argument("--pin", action="store_true", help="keep each compute thread on one CPU")
    parser.add_argument(
        "--context",
        type=positive_int,
        metavar="N",
        help=f"positions to make room for (default: the model's, to {DEFAULT_CONTEXT})",
    )
    parser.add_argument(
        "--head-threshold",
        type=head_threshold,
        default="auto",
        metavar="SCORE",
        help="with a predictor of the LM head: compute logits above this score (default: the file's); full: all",
    )
    parser.add_argument("--verify", action="store_true", help="compare a packed file's checksums as it is read")
    add_kv_argument(parser)


def add_threads_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=positive_int, metavar="N", help="compute threads (default: usable CPUs)")


def add_kv_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kv",
        choices=KV_CHOICES,
        default="f16",
        help="KV cache: q8_0 takes half the memory, but in window layers (q8_0-all: there too); auto: by the budget",
    )


def need_package(command: str, module: str, extra: str, package: str = "") -> None:
    """Raises MissingExtra where a module is missing that an extra installs; package: its name on PyPI, if another."""
    if find_spec(module) is None:
        raise MissingExtra(f"{command} needs {package or module}: pip install 'smallthinker_edge[{extra}]'")


@contextmanager
def checking_arguments() -> Iterator[None]:
    """What the library raises for an argument out of range becomes a UsageError."""
    try:
        yield
    except SmallThinkerError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


def open_model(arguments: argparse.Namespace, **more: Any) -> SmallThinker:
    """The model that was asked for; more: arguments of SmallThinker that only some commands have."""
    from smallthinker_edge.cli.progress import progress
    from smallthinker_edge.model import SmallThinker

    with checking_arguments(), progress(transient=True) as show:
        return SmallThinker(
            arguments.model,
            memory=arguments.memory,
            threads=arguments.threads,
            pin=arguments.pin,
            context=arguments.context,
            kv=arguments.kv,
            head_threshold=arguments.head_threshold,
            verify=arguments.verify,
            on_load=lambda done, total: show(done, total, "layers loaded"),
            **more,
        )


def show_log() -> None:
    """What a service tells while it runs goes to stderr."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")


def one_line(message: object) -> str:
    """A message with what it cites from files, on one line that a terminal only shows."""
    return printable(" ".join(str(message).split()))


def shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def show_text(text: str) -> None:
    """Prints what a model said, without a line end: exactly to a file or pipe, harmlessly to a terminal."""
    print(printable(text, keep="\n\t") if sys.stdout.isatty() else text, end="", flush=True)


def mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
