"""`demo`: home commands that the embedded model was not trained on, each with the JSON it makes of them.

It works the same with output to a file. Shows, and judges nothing else.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from smallthinker_edge.cli.arguments import OK, Command, positive_int, show_text
from smallthinker_edge.errors import ContextFull
from smallthinker_edge.generation.stream import GenerationResult
from smallthinker_edge.model import SmallThinker

DATA = Path(__file__).resolve().parents[1] / "data"
MODEL = DATA / "demo.gguf"
SENTENCES = DATA / "demo_commands.json"
# The longest answers of the demo's grammar, several commands in one sentence, have about half as many tokens.
MAX_TOKENS = 256


@dataclass(frozen=True)
class DemoCommand:
    """A sentence that was held out from training, and the JSON value that is right for it."""

    command: str
    expected: Any


def load_commands(path: Path) -> list[DemoCommand]:
    """The sentences that the demo shows. Raises OSError where the file cannot be read."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    return [DemoCommand(entry["command"], entry["expected"]) for entry in entries]


def answer(model: SmallThinker, command: str) -> GenerationResult:
    """The model's JSON for one command, greedy."""
    return model.chat([{"role": "user", "content": command}], max_tokens=MAX_TOKENS)


def parse(text: str) -> tuple[bool, Any]:
    """(whether the text is JSON, its value)."""
    try:
        return True, json.loads(text)
    except ValueError:
        return False, None


def verdict(text: str, expected: Any) -> str:
    """What the demo says about an answer."""
    valid, value = parse(text)
    if not valid:
        return "not JSON"
    if value == expected:
        return "valid JSON, right"
    return "valid JSON, but expected " + json.dumps(expected, separators=(",", ":"), ensure_ascii=False)


def run_demo(*, interactive: bool = False, threads: int | None = None) -> None:
    """Shows the held-out commands, then speed and memory; with `interactive`, reads more from the user.

    Raises FileNotFoundError where this installation lacks the embedded model or its commands.
    """
    for path in (MODEL, SENTENCES):
        if not path.is_file():
            raise FileNotFoundError(f"the embedded demo model is not part of this installation ({path} is missing)")
    commands = load_commands(SENTENCES)
    with SmallThinker(MODEL, threads=threads) as model:
        config = model.config
        print(
            f"Embedded model: {config.n_layers} layers, {config.n_experts} experts each, "
            f"{config.n_experts_used} a token, {MODEL.stat().st_size / 1e6:.1f} MB. "
            "None of these sentences was in its training data.\n"
        )
        results = [show_command(model, command) for command in commands]
        print_summary(model, commands, results)
        if interactive:
            converse(model)
    print(f"\nA real SmallThinker model: {program()} chat -m SmallThinker-4B-A0.6B.gguf")


def show_command(model: SmallThinker, command: DemoCommand) -> GenerationResult:
    result = answer(model, command.command)
    print(f"> {command.command}\n  ", end="")
    show_text(result.text)
    print(f"\n  ({verdict(result.text, command.expected)})\n", flush=True)
    return result


def print_summary(model: SmallThinker, commands: list[DemoCommand], results: list[GenerationResult]) -> None:
    right = sum(
        parse(result.text) == (True, command.expected) for command, result in zip(commands, results, strict=True)
    )
    valid = sum(parse(result.text)[0] for result in results)
    prompt_tokens = sum(result.timings.prompt_tokens for result in results)
    prompt_seconds = sum(result.timings.prompt_seconds for result in results)
    decode_tokens = sum(result.timings.decode_tokens for result in results)
    decode_seconds = sum(result.timings.decode_seconds for result in results)
    print(f"{len(results)} commands: {valid} valid JSON, {right} right")
    print(
        f"{decode_tokens / max(decode_seconds, 1e-9):.0f} tokens/s decode, "
        f"{prompt_tokens / max(prompt_seconds, 1e-9):.0f} tokens/s prompt, "
        f"{psutil.Process().memory_info().rss / 2**20:.0f} MiB resident"
    )


def converse(model: SmallThinker) -> None:
    """Answers lines from stdin until it ends."""
    print("\nType a command; an empty line or Ctrl-D ends.")
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if not line:
            return
        try:
            text = answer(model, line).text
        except ContextFull as error:
            print(f"  {error}")
            continue
        print("  ", end="")
        show_text(text)
        print("" if parse(text)[0] else "\n  (not JSON)", flush=True)


def program() -> str:
    """How to call the command line from this shell: a .venv that is not activated needs its path."""
    if shutil.which("smallthinker-edge"):
        return "smallthinker-edge"
    script = Path(sys.executable).with_name("smallthinker-edge")
    if not script.exists():
        return f"{sys.executable} -m smallthinker_edge"
    return str(script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script)


def demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", "--interactive", action="store_true", help="then type commands of your own")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="compute threads (default: usable CPUs)")


def demo(arguments: argparse.Namespace) -> int:
    run_demo(interactive=arguments.interactive, threads=arguments.threads)
    return OK


COMMANDS = (Command("demo", "turn home commands into JSON with the embedded model", demo_arguments, demo),)
