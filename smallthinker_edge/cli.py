"""The smallthinker-edge command: reads arguments, calls the library, prints.

One row of COMMANDS is one subcommand. Nothing here computes: whatever the command line can do,
Python code can do with the public API.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from smallthinker_edge import __version__
from smallthinker_edge.errors import ContextFull, SmallThinkerError

if TYPE_CHECKING:
    from smallthinker_edge._native.gguf import GGUFFile
    from smallthinker_edge.config import ModelConfig
    from smallthinker_edge.generation import GenerationResult
    from smallthinker_edge.model import SmallThinker

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
VALUE_WIDTH = 72


class UsageError(Exception):
    """An argument that only the library could judge, such as a context longer than the model's."""


@dataclass(frozen=True)
class Command:
    """A subcommand: name, one line of help, what adds its arguments, what runs it and gives the exit code."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


# Argument types


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def memory_size(text: str) -> int:
    """Bytes, from "1GiB", "900MB" or a plain number."""
    from smallthinker_edge.budget import parse_memory

    try:
        return parse_memory(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def token_bias(text: str) -> tuple[int, float]:
    """(token id, bias) from "ID=BIAS"."""
    token, equals, bias = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"write ID=BIAS, not {text!r}")
    return int(token), float(bias)


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
    parser.add_argument("--threads", type=positive_int, metavar="N", help="compute threads (default: usable CPUs)")
    parser.add_argument("--pin", action="store_true", help="keep each compute thread on one CPU")
    parser.add_argument(
        "--context",
        type=positive_int,
        metavar="N",
        help="positions to make room for (default: the model's, to 4096)",
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


def add_kv_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kv",
        choices=("f16", "q8_0", "q8_0-all", "auto"),
        default="f16",
        help="KV cache: q8_0 takes half the memory, but in window layers (q8_0-all: there too); auto: by the budget",
    )


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


@contextmanager
def checking_arguments() -> Iterator[None]:
    """What the library raises for an argument out of range becomes a UsageError."""
    try:
        yield
    except SmallThinkerError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


def open_model(arguments: argparse.Namespace) -> SmallThinker:
    from smallthinker_edge.model import SmallThinker

    with checking_arguments():
        return SmallThinker(
            arguments.model,
            memory=arguments.memory,
            threads=arguments.threads,
            pin=arguments.pin,
            context=arguments.context,
            kv=arguments.kv,
            head_threshold=arguments.head_threshold,
            verify=arguments.verify,
        )


def show(pieces: Iterator[str]) -> str:
    """Prints a stream as it comes; returns the whole text."""
    shown = []
    for piece in pieces:
        shown.append(piece)
        print(piece, end="", flush=True)
    return "".join(shown)


# generate


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


# chat


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


# info


def info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="GGUF file (the first part of a split one)")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")


def info(arguments: argparse.Namespace) -> int:
    from smallthinker_edge._native.gguf import GGUFFile
    from smallthinker_edge.config import ModelConfig

    with GGUFFile(arguments.file) as gguf:
        size = sum(os.path.getsize(path) for path in gguf.paths)
        parts = f", {len(gguf.paths)} parts" if len(gguf.paths) > 1 else ""
        print(f"{gguf.paths[0]}: GGUF version {gguf.version}, {mebibytes(size)}{parts}")
        print_metadata(gguf)
        print_tensors(gguf, arguments.tensors)
        print_config(ModelConfig.from_gguf(gguf))
    return OK


def print_metadata(gguf: GGUFFile) -> None:
    print(f"\nMetadata ({len(gguf.metadata)} keys)")
    width = max(map(len, gguf.metadata), default=0)
    for key, value in gguf.metadata.items():
        print(f"  {key:<{width}}  {describe(value)}")


def describe(value: object) -> str:
    """A metadata value on one line; arrays by their length and first items."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        items = [repr(value[i]) for i in range(min(len(value), 8))]
        text = f"{len(value)} items: " + shorten(", ".join(items), VALUE_WIDTH - 12)
        return text + (", ..." if len(value) > 8 and not text.endswith("...") else "")
    if isinstance(value, float):
        return f"{value:.9g}"
    return shorten(repr(value), VALUE_WIDTH)


def shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def print_tensors(gguf: GGUFFile, each: bool) -> None:
    print(f"\nTensors ({len(gguf.tensors)})")
    if each:
        width = max(map(len, gguf.tensors), default=0)
        for name, tensor in gguf.tensors.items():
            shape = " x ".join(map(str, tensor.shape))
            print(f"  {name:<{width}}  {tensor.type:<5} {shape:<22} {tensor.nbytes:>13,} bytes")
    count, size = Counter[str](), Counter[str]()
    for name, tensor in gguf.tensors.items():
        purpose = "experts" if "_exps." in name else "all other"
        for key in (tensor.type, purpose):
            count[key] += 1
            size[key] += tensor.nbytes
    for key in sorted(size, key=lambda key: (key in ("experts", "all other"), -size[key])):
        print(f"  {key:<9} {count[key]:>5} tensors {size[key]:>16,} bytes  {mebibytes(size[key]):>12}")


def print_config(config: ModelConfig) -> None:
    print("\nModel")
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, tuple):
            layers = [str(layer) for layer, flag in enumerate(value) if flag]
            value = "all layers" if len(layers) == len(value) else "layers " + ", ".join(layers) if layers else "none"
        print(f"  {field.name:<22}  {value}")


def mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


# demo


def demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", "--interactive", action="store_true", help="then type commands of your own")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="compute threads (default: usable CPUs)")


def demo(arguments: argparse.Namespace) -> int:
    from smallthinker_edge.demo import run_demo

    run_demo(interactive=arguments.interactive, threads=arguments.threads)
    return OK


# Files: convert, pack, verify, plan


def show_progress(done: int, total: int, name: str = "") -> None:
    """One line on stderr that is rewritten; nothing where stderr is no terminal."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r\x1b[K{done}/{total} {name}", end=end, file=sys.stderr, flush=True)


def convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        metavar="DIR",
        help="Hugging Face checkpoint of a SmallThinker model, or a GGUF file of any tensor types",
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="GGUF file to write")
    parser.add_argument("--type", choices=("q4_0", "q8_0", "f16"), default="q4_0", help="of matrices (default: q4_0)")


def convert(arguments: argparse.Namespace) -> int:
    from smallthinker_edge.convert import convert as write_gguf

    with showing_notes(), checking_arguments():
        write_gguf(arguments.folder, arguments.output, arguments.type, show_progress)
    return OK


@contextmanager
def showing_notes() -> Iterator[None]:
    """What the library warns of becomes a line of its own on stderr, without the place in the code."""

    def show_note(message: Warning | str, *_: object, **__: object) -> None:
        print(f"note: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show_note
        yield


def pack_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="GGUF", help="model to pack")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="packed file to write")


def pack(arguments: argparse.Namespace) -> int:
    from smallthinker_edge.packed import pack as write_packed

    write_packed(arguments.file, arguments.output, show_progress)
    return OK


def unpack_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="packed file")
    parser.add_argument(
        "-o", "--output", required=True, metavar="GGUF", help="model file to write; of a split model all parts"
    )


def unpack(arguments: argparse.Namespace) -> int:
    from smallthinker_edge.packed import unpack as write_source

    written = write_source(arguments.file, arguments.output, show_progress)
    if len(written) > 1:
        print("\n".join(written))
    return OK


def verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="packed file to check")


def verify(arguments: argparse.Namespace) -> int:
    from smallthinker_edge.packed import verify as check_packed

    print(f"{check_packed(arguments.file, show_progress)} parts, every checksum matches")
    return OK


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    add_kv_argument(parser)
    parser.add_argument("file", metavar="FILE", help="GGUF or packed file")
    parser.add_argument("--memory", type=memory_size, metavar="SIZE", help="budget of the whole process, such as 1GiB")
    parser.add_argument("--context", type=positive_int, default=4096, metavar="N", help="positions (default: 4096)")


def plan(arguments: argparse.Namespace) -> int:
    from smallthinker_edge.model import plan_memory

    print(plan_memory(arguments.file, arguments.memory, arguments.context, arguments.kv).table())
    return OK


# bench


def bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("memory", "kernels", "sparsity"), help="what to measure on this machine")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="largest team (default: usable CPUs)")
    parser.add_argument("--tables", nargs="+", metavar="NAME", help="kernel tables (default: all of this CPU)")
    parser.add_argument("--shapes", nargs="+", choices=("4b", "21b"), default=("4b", "21b"), help="default: both")
    parser.add_argument("--json", metavar="FILE", dest="json_path", help="write all figures there too")
    parser.add_argument("--plot", metavar="FILE", help="of sparsity: draw the curves (needs the [plots] extra)")


def bench(arguments: argparse.Namespace) -> int:
    from smallthinker_edge.bench import run_bench

    options = {name: value for name, value in vars(arguments).items() if name not in ("run", "command")}
    try:
        with checking_arguments():
            print(run_bench(**options))
    except ModuleNotFoundError as error:
        raise UsageError(f"--plot needs {error.name}: pip install 'smallthinker_edge[plots]'") from error
    return OK


# doctor


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", nargs="?", default=".", metavar="PATH", help="where models are kept: a file to read, or a folder"
    )


def doctor(arguments: argparse.Namespace) -> int:
    from smallthinker_edge.doctor import report

    print(report(arguments.path))
    return OK


# trace


def trace_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("-p", "--prompt", metavar="TEXT", help="text to run; - is stdin")
    source.add_argument("--random", type=positive_int, metavar="N", help="that many random tokens instead")
    parser.add_argument("--max-tokens", type=int, default=0, metavar="N", help="go on for N greedy tokens (default: 0)")
    parser.add_argument("-o", "--output", metavar="FILE", help="trace to write (.npz), for tools/replay.py")
    parser.add_argument("--heatmap", metavar="PNG", help="draw how often each expert is used; needs matplotlib")
    parser.add_argument("--save-profile", action="store_true", help="keep the hot experts beside a packed model")


def trace(arguments: argparse.Namespace) -> int:
    import random

    from smallthinker_edge.trace import draw_heatmap, record

    with open_model(arguments) as model:
        if arguments.random:
            draw = random.Random(0)
            tokens = [draw.randrange(model.config.vocab_size) for _ in range(arguments.random)]
        else:
            tokens = model.tokenize(sys.stdin.read() if arguments.prompt == "-" else arguments.prompt)
        with checking_arguments():
            recorded = record(model, tokens, arguments.max_tokens)
            if arguments.save_profile:
                print(f"hot experts: {model.save_profile()}")
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
    Command("generate", "continue a text", generate_arguments, generate),
    Command("chat", "talk with a model in the terminal", chat_arguments, chat),
    Command("info", "print what is in a model file", info_arguments, info),
    Command("demo", "turn home commands into JSON with the embedded model", demo_arguments, demo),
    Command("convert", "write the GGUF of a Hugging Face checkpoint folder", convert_arguments, convert),
    Command("pack", "write a packed file, whose experts can be paged from storage", pack_arguments, pack),
    Command("unpack", "write the GGUF back that a packed file was made of", unpack_arguments, unpack),
    Command("verify", "check every checksum of a packed file", verify_arguments, verify),
    Command("plan", "show where the memory of a process would go", plan_arguments, plan),
    Command("bench", "time memory and kernels of this machine", bench_arguments, bench),
    Command("doctor", "show what this machine offers: kernels, memory, speed of storage", doctor_arguments, doctor),
    Command("trace", "record which experts a text uses", trace_arguments, trace),
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="smallthinker-edge", description="Runs SmallThinker language models.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = commands.add_parser(command.name, help=command.help, description=command.help)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def report(message: object) -> None:
    """One line on stderr, whatever the message holds."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)


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
