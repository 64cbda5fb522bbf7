"""`doctor`: what this machine offers."""

from __future__ import annotations

import argparse

from smallthinker_edge.cli.arguments import OK, Command


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", nargs="?", default=".", metavar="PATH", help="where models are kept: a file to read, or a folder"
    )


def doctor(arguments: argparse.Namespace) -> int:
    from smallthinker_edge.machine.doctor import report

    print(report(arguments.path))
    return OK


COMMANDS = (
    Command("doctor", "show what this machine offers: kernels, memory, speed of storage", doctor_arguments, doctor),
)
