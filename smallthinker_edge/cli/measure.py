"""`bench`, `trace` and `report`: what is measured of a machine, of a text's way through the experts, and of a run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

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
from smallthinker_edge.cli.generate import add_sampling_arguments, given_text, sampling_options
from smallthinker_edge.cli.progress import progress


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
            with progress() as show:
                text = run_bench(**options, progress=show)
            print(text)
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

    from smallthinker_edge.measure.trace import draw_heatmap, hot_share, record

    with open_model(arguments) as model:
        if arguments.random:
            draw = random.Random(0)
            tokens = [draw.randrange(model.config.vocab_size) for _ in range(arguments.random)]
        else:
            tokens = model.tokenize(given_text(arguments.prompt))
        with checking_arguments():
            with progress() as show:
                recorded = record(model, tokens, arguments.max_tokens, show)
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


def imatrix_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--text", required=True, metavar="FILE", help="text file of at least one window of tokens")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="importance matrix to write, for convert")
    parser.add_argument(
        "--window", type=positive_int, default=512, metavar="N", help="tokens from an empty context (default: 512)"
    )
    parser.add_argument(
        "--products", action="store_true", help="also of pairs of columns: a larger file, and a far smaller error"
    )
    parser.add_argument(
        "--parse-special", action="store_true", help="recognise special tokens in the text, as in chats"
    )


def imatrix(arguments: argparse.Namespace) -> int:
    from smallthinker_edge.measure.evaluate import read_text
    from smallthinker_edge.measure.imatrix import measure_importance

    text = read_text(arguments.text)
    with open_model(arguments) as model, checking_arguments(), progress() as show:
        tokens = model.tokenize(text, parse_special=arguments.parse_special)
        measure_importance(
            *(model, tokens, arguments.output, arguments.window),
            products=arguments.products,
            dataset=Path(arguments.text).name,
            progress=show,
        )
    return OK


def report_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "-p", "--prompt", action="append", metavar="TEXT", help="what to run; may be repeated (default: some questions)"
    )
    source.add_argument("--prompts", metavar="FILE", help="text file with a prompt on each line")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="HTML page to write; the JSON beside it ends in .json"
    )
    add_sampling_arguments(parser)


def report(arguments: argparse.Namespace) -> int:
    from smallthinker_edge.files.atomic import atomic_file
    from smallthinker_edge.measure.page import render
    from smallthinker_edge.measure.report import QUESTIONS, run_report

    page = Path(arguments.output)
    beside = page.with_suffix(".json")
    if page == beside:
        raise UsageError("the page cannot end in .json: its figures are written there")
    prompts = arguments.prompt or QUESTIONS
    if arguments.prompts is not None:
        lines = Path(arguments.prompts).read_text(encoding="utf-8", errors="replace").splitlines()
        prompts = [line for line in lines if line.strip()]
    with open_model(arguments) as model, checking_arguments(), progress() as show:
        figures = run_report(model, prompts, show, **sampling_options(arguments)).figures()
    for path, text in ((beside, json.dumps(figures) + "\n"), (page, render(figures))):
        with atomic_file(path) as file:
            file.write(0, text.encode(errors="replace"))
        print(one_line(path))
    return OK


COMMANDS = (
    Command("bench", "time memory and kernels of this machine", bench_arguments, bench),
    Command("trace", "record which experts a text uses", trace_arguments, trace),
    Command("imatrix", "measure on a text what matters to a quantisation", imatrix_arguments, imatrix),
    Command("report", "run prompts, and draw where time, memory and experts went", report_arguments, report),
)
