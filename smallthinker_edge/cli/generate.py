"""`generate` and `chat`: a model's text in the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from smallthinker_edge.cli.arguments import (
    OK,
    Command,
    add_model_arguments,
    checking_arguments,
    mebibytes,
    open_model,
    positive_int,
)
from smallthinker_edge.errors import ContextFull

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
    """Options named as the arguments of SmallThinker.generate(); those not given keep the API's defaults."""
    group = parser.add_argument_group("sampling (default: greedy)", argument_default=argparse.SUPPRESS)
    group.add_argument("--max-tokens", type=positive_int, metavar="N", help="most tokens to make (default: 256)")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default)")
    group.add_argument("--top-k", type=int, metavar="K", help="keep the K likeliest tokens; 0 keeps all (default)")
    group.add_argument("--top-p", type=float, metavar="P", help="keep the likeliest tokens that make up P")
    group.add_argument("--min-p", type=float, metavar="P", help="drop tokens below P times the likeliest one")
    group.add_argument("--repetition-penalty", type=float, metavar="R", help="1 is none (default)")
    group.add_argument("--repetition-window", type=int, metavar="N", help="newest tokens the penalty looks at")
    group.add_argument("--seed", type=int, metavar="N", help="same seed, same text")
    group.add_argument("--overflow", choices=("error", "shift"), help="at the context's end; shift drops old turns")
    group.add_argument("--speculate", type=int, metavar="N", help="guess up to N repeated tokens; same text, faster")
    group.add_argument("--logit-bias", type=token_bias, action="append", metavar="ID=BIAS", help="may be repeated")


SAMPLING = (
    "max_tokens", "stop", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "repetition_window",
    "seed", "logit_bias", "overflow", "speculate",
)  # fmt: skip


def sampling_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments for generate() that the user gave."""
    options = {name: getattr(arguments, name) for name in SAMPLING if hasattr(arguments, name)}
    if "logit_bias" in options:
        options["logit_bias"] = dict(options["logit_bias"])
    return options


def show(pieces: Iterator[str]) -> str:
    """Prints a stream as it comes; returns the whole text."""
    shown = []
    for piece in pieces:
        shown.append(piece)
        print(piece, end="", flush=True)
    return "".join(shown)


def generate_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("-p", "--prompt", required=True, metavar="TEXT", help="text to continue; - is stdin")
    parser.add_argument("--stats", action="store_true", help="print tokens, speed and memory to stderr at the end")
    add_sampling_arguments(parser)


def generate(arguments: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    with open_model(arguments) as model:
        if model.chat_template is not None and len(model.tokenizer.split_specials(prompt)) == 1:
            print(
                f"hint: this model was trained on conversations: smallthinker-edge chat -m {arguments.model} asks it "
                "that way; generate only continues the text",
                file=sys.stderr,
            )
        with checking_arguments():
            stream = model.stream(prompt, **sampling_options(arguments))
        try:
            show(stream)
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


def chat_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message to start with")
    add_sampling_arguments(parser)


def chat(arguments: argparse.Namespace) -> int:
    with suppress(ImportError):  # line editing and history, where Python has it
        import readline  # noqa: F401
    opening = [{"role": "system", "content": arguments.system}] if arguments.system else []
    options = sampling_options(arguments)
    with open_model(arguments) as model:
        if sys.stdin.isatty():
            print("Type a message. /reset forgets the conversation; Ctrl-C stops an answer, Ctrl-D ends.")
        history = list(opening)
        while (line := read_line()) is not None:
            if line == "/reset":
                history = list(opening)
            elif line.strip():
                answer_turn(model, history, line, options)
    return OK


def read_line() -> str | None:
    """The next line of the user; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def answer_turn(model: SmallThinker, history: list[dict[str, str]], line: str, options: dict[str, Any]) -> None:
    """Prints the answer to a line and adds both to the history; Ctrl-C ends an answer early."""
    question = {"role": "user", "content": line}
    pieces: list[str] = []
    try:
        with checking_arguments():
            stream = model.stream_chat([*history, question], **options)
        for piece in stream:
            pieces.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    except ContextFull as error:
        print(f"error: {error}; /reset starts anew", file=sys.stderr)
        return
    print(flush=True)
    history += [question, {"role": "assistant", "content": "".join(pieces)}]


COMMANDS = (
    Command("generate", "continue a text", generate_arguments, generate),
    Command("chat", "talk with a model in the terminal", chat_arguments, chat),
)
