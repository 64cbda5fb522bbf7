"""`perplexity` and `compare`: what models make of a text, in figures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from smallthinker_edge.cli.arguments import (
    OK,
    Command,
    add_kv_argument,
    add_threads_argument,
    checking_arguments,
    memory_size,
    positive_int,
)
from smallthinker_edge.cli.progress import progress

if TYPE_CHECKING:
    from smallthinker_edge.measure.evaluate import Progress, State
    from smallthinker_edge.measure.losses import Records
    from smallthinker_edge.model import SmallThinker


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--context",
        type=positive_int,
        default=512,
        metavar="N",
        help="tokens of a window, of which the second half counts (default: 512, as llama-perplexity)",
    )
    parser.add_argument("--json", metavar="FILE", dest="json_path", help="write all figures there, by position too")
    parser.add_argument("--memory", type=memory_size, metavar="SIZE", help="budget of the whole process, such as 8GiB")
    add_threads_argument(parser)
    add_kv_argument(parser)


def perplexity_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="GGUF or packed file")
    parser.add_argument("text", metavar="TEXT", help="text file of at least one window of tokens")
    add_evaluation_arguments(parser)


def perplexity(arguments: argparse.Namespace) -> int:
    from smallthinker_edge.measure import evaluate
    from smallthinker_edge.model import SmallThinker

    text = evaluate.read_text(arguments.text)
    with checking_arguments(), SmallThinker(arguments.file, head_threshold=None, **options(arguments)) as model:
        tokens, state = evaluate.text_tokens(model, text), state_of(arguments, [model], text)
        with show_losses() as show:
            records = evaluate.perplexity(model, tokens, arguments.context, state, show)
        finish(arguments, [model], records, state)
    return OK


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="GGUF or packed file of the model to be compared with")
    parser.add_argument("b", metavar="B", help="GGUF or packed file of the model in question")
    parser.add_argument("--text", required=True, metavar="FILE", help="text file of at least one window of tokens")
    add_evaluation_arguments(parser)


def compare(arguments: argparse.Namespace) -> int:
    from smallthinker_edge.measure import evaluate

    text = evaluate.read_text(arguments.text)
    with checking_arguments(), evaluate.opened_pair(arguments.a, arguments.b, **options(arguments)) as (a, b):
        tokens, state = evaluate.text_tokens(a, text), state_of(arguments, [a, b], text)
        with show_losses() as show:
            records = evaluate.compare(a, b, tokens, arguments.context, state, show)
        finish(arguments, [a, b], records, state)
    return OK


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What SmallThinker() is to be given."""
    return {name: getattr(arguments, name) for name in ("memory", "threads", "context", "kv")}


def state_of(arguments: argparse.Namespace, models: Sequence[SmallThinker], text: bytes) -> State | None:
    """Where the run keeps what it has: beside the JSON, if there is to be one."""
    from smallthinker_edge.measure.evaluate import State, run_key

    if arguments.json_path is None:
        return None
    return State(f"{arguments.json_path}.state", run_key(models, text, arguments.context))


@contextmanager
def show_losses() -> Iterator[Progress]:
    """Progress of windows, with the figure so far."""
    with progress() as show:
        yield lambda done, total, records: show(
            done, total, f"windows, {so_far(records)} so far" if len(records) else "windows"
        )


def so_far(records: Records) -> str:
    from smallthinker_edge.measure.losses import Perplexity

    if "kl" in (records.dtype.names or ()):
        return f"KL {records['kl'].mean():.6f}"
    return f"perplexity {Perplexity.of(records['loss']).perplexity:.4f}"


def finish(
    arguments: argparse.Namespace, models: Sequence[SmallThinker], records: Records, state: State | None
) -> None:
    """Prints the figures and writes the JSON; the state is of no more use then."""
    from smallthinker_edge.files.atomic import atomic_file
    from smallthinker_edge.measure.evaluate import report

    figures = report(models, arguments.text, arguments.context, records)
    if len(models) == 2:
        print_divergence(figures["kl"])
    for name, model in zip("AB" if len(models) == 2 else ("",), figures["models"], strict=True):
        label = f"perplexity {name}".strip()
        print(f"{label:<16}{model['perplexity']:.4f} +/- {model['error']:.4f}   ({model['loss']:.5f} nats a token)")
    print(
        f"{figures['windows']} windows of {arguments.context} tokens, the second half of each counts: "
        f"{len(records)} tokens"
    )
    if state is not None:
        with atomic_file(arguments.json_path) as file:
            file.write(0, (json.dumps(figures) + "\n").encode())
        state.remove()


def print_divergence(figures: dict[str, Any]) -> None:
    """KL and agreement of Divergence's fields."""
    print(f"KL(A || B)      {figures['mean']:.6f} +/- {figures['error']:.6f} nats a token, mean")
    shown = ", ".join(f"{share * 100:g}% {value:.6f}" for share, value in figures["quantiles"].items())
    print(f"  median        {figures['median']:.6f}\n  quantiles     {shown}\n  largest       {figures['largest']:.6f}")
    print(f"top-1 the same  {figures['top1']:.2%}")


def print_kl(source: str, target: str, text: str) -> None:
    """Measures a file that was made of another on a text file, and prints how far they are apart."""
    from dataclasses import asdict

    from smallthinker_edge.measure.evaluate import divergence_from_source, read_text
    from smallthinker_edge.measure.losses import Divergence

    with show_losses() as show:
        records = divergence_from_source(source, target, read_text(text), show)
    print(f"A = {source}, B = {target}, on {len(records)} tokens of {text}")
    print_divergence(asdict(Divergence.of(records)))


COMMANDS = (
    Command("perplexity", "measure how well a model predicts a text", perplexity_arguments, perplexity),
    Command("compare", "measure how far a model's predictions are from another's", compare_arguments, compare),
)
