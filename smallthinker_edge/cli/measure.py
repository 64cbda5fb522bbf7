"""`bench` and `trace`: what is measured of this machine, and of a text's way through the experts."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from smallthinker_edge.cli.arguments import (
    OK,
    Command,
    UsageError,
    add_model_arguments,
    checking_arguments,
    one_line,
    open_model,
    positive_int,
)


def bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("memory", "kernels", "sparsity"), help="what to measure on this machine")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="largest team (default: usable CPUs)")
    parser.add_argument("--tables", nargs="+", metavar="NAME", help="kernel tables (default: all of this CPU)")
    parser.add_argument("--shapes", nargs="+", choices=("4b", "21b"), default=("4b", "21b"), help="default: both")
    parser.add_argument("--json", metavar="FILE", dest="json_path", help="write all figures there too")
    parser.add_argument("--plot", metavar="FILE", help="of sparsity: draw the curves (needs the [plots] extra)")


def bench(arguments: argparse.Namespace) -> int:
    from smallthinker_edge.measure.bench import run_bench

    options = {name: value for name, value in vars(arguments).items() if name not in ("run", "command")}
    try:
        with checking_arguments():
            print(run_bench(**options))
    except ModuleNotFoundError as error:
        raise UsageError(f"--plot needs {error.name}: pip install 'smallthinker_edge[plots]'") from error
    return OK


def trace_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("-p", "--prompt", metavar="TEXT", help="text to run; - is stdin")
    source.add_argument("--random", type=positive_int, metavar="N", help="that many random tokens instead")
    parser.add_argument("--max-tokens", type=int, default=0, metavar="N", help="go on for N greedy tokens (default: 0)")
    parser.add_argument("-o", "--output", metavar="FILE", help="trace to write (.npz), for tools/paging/replay.py")
    parser.add_argument("--heatmap", metavar="PNG", help="draw how often each expert is used; needs matplotlib")
    parser.add_argument("--save-profile", action="store_true", help="keep the hot experts beside a packed model")


def trace(arguments: argparse.Namespace) -> int:
    import random

    from smallthinker_edge.measure.trace import draw_heatmap, record

    with open_model(arguments) as model:
        if arguments.random:
            draw = random.Random(0)
            tokens = [draw.randrange(model.config.vocab_size) for _ in range(arguments.random)]
        else:
            tokens = model.tokenize(sys.stdin.read() if arguments.prompt == "-" else arguments.prompt)
        with checking_arguments():
            recorded = record(model, tokens, arguments.max_tokens)
            if arguments.save_profile:
                print(f"hot experts: {one_line(model.save_profile())}")
    use = recorded.use()
    print(f"{len(recorded.routing)} tokens; the most used fifth of the experts serves {hot_share(use):.0%} of the uses")
    if arguments.output:
        recorded.save(arguments.output)
    if arguments.heatmap:
        try:
            draw_heatmap(recorded, arguments.heatmap)
        except ImportError:
            raise UsageError("--heatmap needs matplotlib: pip install 'smallthinker_edge[plots]'") from None
    return OK


def hot_share(use: Any) -> float:
    """Share of all uses that falls on the most used fifth of all experts."""
    ranked = sorted(use.ravel().tolist(), reverse=True)
    return float(sum(ranked[: max(1, len(ranked) // 5)]) / sum(ranked))


COMMANDS = (
    Command("bench", "time memory and kernels of this machine", bench_arguments, bench),
    Command("trace", "record which experts a text uses", trace_arguments, trace),
)
