"""The smallthinker-edge command: reads arguments, calls the library, prints.

A module is a family of commands and a row of its COMMANDS is one of them. Nothing here computes: whatever the command
line can do, Python code can do with the package's functions.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from smallthinker_edge import __version__
from smallthinker_edge.cli import (
    batch,
    chat,
    complete,
    demo,
    evaluate,
    files,
    generate,
    hub,
    machine,
    measure,
    mqtt,
    serve,
    wyoming,
)
from smallthinker_edge.cli.arguments import FAILED, INTERRUPTED, USAGE, UsageError, one_line
from smallthinker_edge.errors import SmallThinkerError

COMMANDS = (
    *generate.COMMANDS,
    *chat.COMMANDS,
    *batch.COMMANDS,
    *serve.COMMANDS,
    *wyoming.COMMANDS,
    *mqtt.COMMANDS,
    *files.COMMANDS,
    *hub.COMMANDS,
    *demo.COMMANDS,
    *measure.COMMANDS,
    *evaluate.COMMANDS,
    *machine.COMMANDS,
    *complete.COMMANDS,
)


class Parser(argparse.ArgumentParser):
    """An argparse parser that tells what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"error: {one_line(message)} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="smallthinker-edge", description="Runs SmallThinker language models.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = commands.add_parser(command.name, help=command.help, description=command.help)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def report(message: object) -> None:
    """One line on stderr, whatever the message holds."""
    print(f"error: {one_line(message)}", file=sys.stderr)


def describe_os_error(error: OSError) -> str:
    if error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code.

    0 done; 1 a SmallThinkerError or a file that cannot be read, told in one line on stderr; 2 wrong usage;
    130 stopped with Ctrl-C.
    """
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):  # a terminal that cannot show a character shows "?" instead
            output.reconfigure(errors="replace")
    try:
        arguments = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed the usage, the help or the version
        return stop.code if isinstance(stop.code, int) else USAGE
    try:
        run: Callable[[argparse.Namespace], int] = arguments.run
        code = run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except UsageError as error:
        report(error)
        return USAGE
    except BrokenPipeError:  # the reader of a pipe went away, as `| head` does; nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        report(error if isinstance(error, SmallThinkerError) else describe_os_error(error))
        return FAILED
    except SmallThinkerError as error:
        report(error)
        return FAILED
    except MemoryError:
        report("out of memory")
        return FAILED
