"""`complete`: a script that lets a shell complete commands and options, made by shtab (extra `completion`)."""

from __future__ import annotations

import argparse

from smallthinker_edge.cli.arguments import OK, Command, need_package

SHELLS = ("bash", "zsh")


def complete_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help='eval "$(smallthinker-edge complete bash)" makes it work now')


def complete(arguments: argparse.Namespace) -> int:
    need_package("complete", "shtab", "completion")
    import shtab

    from smallthinker_edge.cli import build_parser

    print(shtab.complete(build_parser(), arguments.shell))
    return OK


COMMANDS = (Command("complete", "print a script that completes commands in a shell", complete_arguments, complete),)
