"""`generate`: a model's text in the terminal; and what other commands that make text share with it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from smallthinker_edge.cli.arguments import (
    OK,
    Command,
    add_model_arguments,
    checking_arguments,
    mebibytes,
    one_line,
    open_model,
    show_text,
)
from smallthinker_edge.cli.progress import progress
from smallthinker_edge.options import OPTIONS, Option

if TYPE_CHECKING:
    from smallthinker_edge.generation.stream import GenerationResult
    from smallthinker_edge.model import SmallThinker


def token_bias(text: str) -> tuple[int, float]:
    """(token id, bias) from "ID=BIAS"."""
    token, equals, bias = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"write ID=BIAS, not {text!r}")
    return int(token), float(bias)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a generation that can be typed; those not given keep their defaults."""
    group = parser.add_argument_group("sampling (default: greedy)", argument_default=argparse.SUPPRESS)
    for name, option in OPTIONS.items():
        if not option.help:
            continue
        how: dict[str, Any] = {"metavar": option.metavar, "help": option.help}
        if option.kind in ("int", "float"):
            how["type"] = number_type(name, option)
            how["help"] += "" if option.default is None else f" (default: {option.default})"
        elif option.kind == "choice":
            how |= {"choices": option.choices, "metavar": None}
        else:
            how |= {"action": "append", "type": token_bias if option.kind == "bias" else str}
        group.add_argument("--" + name.replace("_", "-"), **how)


def number_type(name: str, option: Option) -> Callable[[str], object]:
    """What argparse calls with the text of a number."""

    def number(text: str) -> object:
        try:
            return option.checked(name, int(text) if option.kind == "int" else float(text))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return number


def sampling_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments for generate() that the user gave."""
    options = {name: getattr(arguments, name) for name in OPTIONS if hasattr(arguments, name)}
    if "logit_bias" in options:
        options["logit_bias"] = dict(options["logit_bias"])
    return options


def given_text(text: str) -> str:
    """The text of an argument; - is stdin."""
    return sys.stdin.read() if text == "-" else text


def generate_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("-p", "--prompt", required=True, metavar="TEXT", help="text to continue; - is stdin")
    parser.add_argument("--stats", action="store_true", help="print tokens, speed and memory to stderr at the end")
    add_sampling_arguments(parser)


def generate(arguments: argparse.Namespace) -> int:
    prompt = given_text(arguments.prompt)
    with open_model(arguments) as model:
        if model.chat_template is not None and len(model.tokenizer.split_specials(prompt)) == 1:
            print(
                f"hint: this model was trained on conversations: smallthinker-edge chat -m {one_line(arguments.model)} "
                "asks it that way; generate only continues the text",
                file=sys.stderr,
            )
        with progress(transient=True) as show_prompt:
            on_prompt = partial(show_prompt, name="tokens of the prompt")
            with checking_arguments():
                stream = model.stream(prompt, **{**sampling_options(arguments), "on_prompt": on_prompt})
            try:
                for piece in stream:
                    show_text(piece)
            finally:
                print(flush=True)
        if arguments.stats:
            print_stats(model, stream.result)
    return OK


def print_stats(model: SmallThinker, result: GenerationResult | None) -> None:
    if result is not None:
        timings = result.timings
        print(
            f"prompt: {timings.prompt_tokens} tokens, {timings.prompt_seconds:.3f} s; "
            f"decode: {timings.decode_tokens} tokens, {timings.tokens_per_second:.1f} tokens/s; "
            f"ended by: {result.finish_reason}",
            file=sys.stderr,
        )
    for name, value in model.stats().items():
        shown = mebibytes(value) if name.endswith("_bytes") and isinstance(value, int) else value
        print(f"{name.removesuffix('_bytes').replace('_', ' ')}: {shown}", file=sys.stderr)


COMMANDS = (Command("generate", "continue a text", generate_arguments, generate),)
