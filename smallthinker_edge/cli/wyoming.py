"""`wyoming`: the commands of a home as a Wyoming service, for Home Assistant."""

from __future__ import annotations

import argparse
import asyncio
from contextlib import ExitStack
from typing import TYPE_CHECKING, Literal

from smallthinker_edge import __version__
from smallthinker_edge.cli.arguments import (
    OK,
    Command,
    checking_arguments,
    memory_size,
    need_package,
    positive_int,
    show_log,
)
from smallthinker_edge.home.understand import EMBEDDED

if TYPE_CHECKING:
    from smallthinker_edge.home import Home


def add_home_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default=str(EMBEDDED), metavar="FILE", help="model of home commands (default: the embedded one)"
    )
    parser.add_argument("--home", metavar="FILE", help="names of the home's areas and devices, as docs/home.md says")
    # A second thread costs a model of a few megabytes more in waiting than it gives, above all beside whisper.
    parser.add_argument("--threads", type=positive_int, default=1, metavar="N", help="of this model (default: 1)")


def load_home(path: str | None) -> Home:
    """The home of a file, one without names for None. OSError, or UsageError for a file of another kind."""
    from smallthinker_edge.home import Home

    with checking_arguments():
        return Home() if path is None else Home.load(path)


def wyoming_arguments(parser: argparse.ArgumentParser) -> None:
    add_home_arguments(parser)
    parser.add_argument(
        "--uri",
        default="tcp://127.0.0.1:10400",
        help="tcp://HOST:PORT, unix://PATH or stdio:// (default: tcp://127.0.0.1:10400)",
    )
    parser.add_argument(
        "-m", "--answers", metavar="FILE", help="large model that answers, in text, what is no command (default: none)"
    )
    parser.add_argument(
        "--answer-threads", type=positive_int, metavar="N", help="of the large model (default: usable CPUs)"
    )
    parser.add_argument("--memory", type=memory_size, metavar="SIZE", help="budget of the process with a large model")
    parser.add_argument("--context", type=positive_int, metavar="N", help="positions of the large model")
    parser.add_argument(
        "--max-tokens", type=positive_int, default=256, metavar="N", help="longest answer of it (default: 256)"
    )
    parser.add_argument("--system", metavar="TEXT", help="what the large model is told first")
    parser.add_argument(
        "--seconds", type=float, default=10.0, metavar="S", help="for a command, then an error (default: 10)"
    )
    parser.add_argument(
        "--zeroconf", nargs="?", const="smallthinker", metavar="NAME", help="let Home Assistant find it by this name"
    )


def wyoming(arguments: argparse.Namespace) -> int:
    for package in ("wyoming", *(["zeroconf"] if arguments.zeroconf else [])):
        need_package("wyoming", package, "wyoming")
    from smallthinker_edge.home import HomeModel
    from smallthinker_edge.home.wyoming import SYSTEM, Settings, WyomingService, run
    from smallthinker_edge.model import SmallThinker

    show_log()
    home = load_home(arguments.home)
    settings = Settings(
        answer_seconds=arguments.seconds, most_tokens=arguments.max_tokens, system=arguments.system or SYSTEM
    )
    with ExitStack() as stack, checking_arguments():
        small = stack.enter_context(SmallThinker(arguments.model, threads=arguments.threads))
        large = None
        if arguments.answers is not None:
            threads: int | Literal["auto"] = arguments.answer_threads or "auto"
            large = SmallThinker(arguments.answers, arguments.memory, threads, arguments.context)
            stack.enter_context(large)

        async def serve() -> None:
            service = WyomingService(HomeModel(small, home).understand, home, large, settings, __version__)
            await run(service, arguments.uri, arguments.zeroconf)

        asyncio.run(serve())
    return OK


COMMANDS = (Command("wyoming", "turn transcripts into intents for Home Assistant", wyoming_arguments, wyoming),)
