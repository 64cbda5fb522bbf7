"""`info`, `convert`, `pack`, `unpack`, `verify`, `plan`: what is done with model files."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING

from smallthinker_edge.cli.arguments import (
    OK,
    Command,
    UsageError,
    add_kv_argument,
    checking_arguments,
    mebibytes,
    memory_size,
    one_line,
    positive_int,
    shorten,
)
from smallthinker_edge.cli.evaluate import print_kl
from smallthinker_edge.cli.progress import progress, shown_name
from smallthinker_edge.opening import DEFAULT_CONTEXT

if TYPE_CHECKING:
    from smallthinker_edge.files.config import ModelConfig
    from smallthinker_edge.files.gguf import GGUFFile

VALUE_WIDTH = 72


def info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="GGUF file (the first part of a split one)")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")


def info(arguments: argparse.Namespace) -> int:
    from smallthinker_edge.files.config import ModelConfig
    from smallthinker_edge.files.gguf import GGUFFile
    from smallthinker_edge.files.packed import as_model

    with GGUFFile(arguments.file) as gguf:
        size = sum(os.path.getsize(path) for path in gguf.paths)
        parts = f", {len(gguf.paths)} parts" if len(gguf.paths) > 1 else ""
        print(f"{one_line(gguf.paths[0])}: GGUF version {gguf.version}, {mebibytes(size)}{parts}")
        print_metadata(gguf)
        print_tensors(gguf, arguments.tensors)
        print_config(ModelConfig.from_gguf(as_model(gguf)))
    return OK


def print_metadata(gguf: GGUFFile) -> None:
    print(f"\nMetadata ({len(gguf.metadata)} keys)")
    names = [shown_name(key) for key in gguf.metadata]
    width = max(map(len, names), default=0)
    for name, value in zip(names, gguf.metadata.values(), strict=True):
        print(f"  {name:<{width}}  {describe(value)}")


def describe(value: object) -> str:
    """A metadata value on one line; arrays by their length and first items."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        items = [repr(value[i]) for i in range(min(len(value), 8))]
        text = f"{len(value)} items: " + shorten(", ".join(items), VALUE_WIDTH - 12)
        return text + (", ..." if len(value) > 8 and not text.endswith("...") else "")
    if isinstance(value, float):
        return f"{value:.9g}"
    return shorten(repr(value), VALUE_WIDTH)


def print_tensors(gguf: GGUFFile, each: bool) -> None:
    print(f"\nTensors ({len(gguf.tensors)})")
    if each:
        names = [shown_name(name) for name in gguf.tensors]
        width = max(map(len, names), default=0)
        for name, tensor in zip(names, gguf.tensors.values(), strict=True):
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
        if isinstance(value, str):
            value = shown_name(value)
        elif isinstance(value, tuple):
            layers = [str(layer) for layer, flag in enumerate(value) if flag]
            value = "all layers" if len(layers) == len(value) else "layers " + ", ".join(layers) if layers else "none"
        print(f"  {field.name:<22}  {value}")


def convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        metavar="DIR",
        help="Hugging Face checkpoint of a SmallThinker model, or a GGUF file of any tensor types",
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="GGUF file to write")
    parser.add_argument("--type", choices=("q4_0", "q8_0", "f16"), default="q4_0", help="of matrices (default: q4_0)")
    parser.add_argument(
        "--bundle", metavar="FILE", help="expert bundle of the authors' engine, for a GGUF without experts"
    )
    parser.add_argument(
        "--imatrix", metavar="FILE", help="importance matrix by which q4_0 is rounded: of `imatrix`, or llama.cpp's"
    )
    parser.add_argument("--kl", metavar="TEXT", help="measure on this text file how far the result is from its source")


def convert(arguments: argparse.Namespace) -> int:
    from smallthinker_edge.files.convert import convert as write_gguf

    if arguments.kl is not None:
        if arguments.bundle is not None:
            raise UsageError("--kl needs a source that is a model by itself, without --bundle")
        open(arguments.kl, "rb").close()  # before minutes are spent
    with showing_notes(), checking_arguments():
        with progress() as show:
            write_gguf(
                *(arguments.folder, arguments.output, arguments.type, show),
                bundle=arguments.bundle,
                imatrix=arguments.imatrix,
            )
        if arguments.kl is not None:
            print_kl(arguments.folder, arguments.output, arguments.kl)
    return OK


@contextmanager
def showing_notes() -> Iterator[None]:
    """What the library warns of becomes a line of its own on stderr, without the place in the code."""

    def show_note(message: Warning | str, *_: object, **__: object) -> None:
        print(f"note: {one_line(message)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show_note
        yield


def pack_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="GGUF", help="model to pack")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="packed file to write")
    group = parser.add_argument_group("fit to a task, smaller and not quite the same model")
    group.add_argument("--drop-below", type=float, metavar="F", help="leave experts out that fewer of the tokens use")
    group.add_argument("--trace", metavar="FILE", help="how texts of the task use experts: trace -o writes it")
    group.add_argument("--kl", metavar="TEXT", help="text file of the task, to measure on what the dropping costs")


def pack(arguments: argparse.Namespace) -> int:
    from smallthinker_edge.files.pack import pack as write_packed
    from smallthinker_edge.measure.trace import Trace

    given = [value is not None for value in (arguments.drop_below, arguments.trace, arguments.kl)]
    if any(given) and not all(given):
        raise UsageError("--drop-below, --trace and --kl go together")
    drop = None
    if all(given):
        open(arguments.kl, "rb").close()  # before minutes are spent
        drop = Trace.load(arguments.trace).rarely_used(arguments.drop_below)
    with checking_arguments():
        with progress() as show:
            write_packed(arguments.file, arguments.output, show, drop=drop)
        if drop is not None:
            print(f"{drop.sum()} of {drop.size} experts dropped: {mebibytes(os.path.getsize(arguments.output))}")
            print_kl(arguments.file, arguments.output, arguments.kl)
    return OK


def unpack_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="packed file")
    parser.add_argument(
        "-o", "--output", required=True, metavar="GGUF", help="model file to write; of a split model all parts"
    )


def unpack(arguments: argparse.Namespace) -> int:
    from smallthinker_edge.files.pack import unpack as write_source

    with progress() as show:
        written = write_source(arguments.file, arguments.output, show)
    if len(written) > 1:
        print("\n".join(map(one_line, written)))
    return OK


def verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="packed file to check")


def verify(arguments: argparse.Namespace) -> int:
    from smallthinker_edge.files.packed import verify as check_packed

    with progress() as show:
        parts = check_packed(arguments.file, show)
    print(f"{parts} parts, every checksum matches")
    return OK


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    add_kv_argument(parser)
    parser.add_argument("file", metavar="FILE", help="GGUF or packed file, or one of the Hub: hf:ORG/NAME/FILE")
    parser.add_argument("--memory", type=memory_size, metavar="SIZE", help="budget of the whole process, such as 1GiB")
    parser.add_argument(
        "--context",
        type=positive_int,
        default=DEFAULT_CONTEXT,
        metavar="N",
        help=f"positions (default: {DEFAULT_CONTEXT})",
    )
    parser.add_argument("--packed", action="store_true", help="of a GGUF: as for the packed file made of it")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print bytes by name, for programs")


def plan(arguments: argparse.Namespace) -> int:
    from smallthinker_edge.cli.hub import plan_remote
    from smallthinker_edge.opening import plan_memory

    if arguments.file.startswith("hf:"):
        return plan_remote(arguments)
    made = plan_memory(arguments.file, arguments.memory, arguments.context, arguments.kv, packed=arguments.packed)
    print(json.dumps(made.figures(), indent=1) if arguments.as_json else made.table())
    return OK


COMMANDS = (
    Command("info", "print what is in a model file", info_arguments, info),
    Command("convert", "write the GGUF of a Hugging Face checkpoint folder", convert_arguments, convert),
    Command("pack", "write a packed file, whose experts can be paged from storage", pack_arguments, pack),
    Command("unpack", "write the GGUF back that a packed file was made of", unpack_arguments, unpack),
    Command("verify", "check every checksum of a packed file", verify_arguments, verify),
    Command("plan", "show where the memory of a process would go", plan_arguments, plan),
)
