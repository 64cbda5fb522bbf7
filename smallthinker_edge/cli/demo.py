"""`demo`: sentences that people said, each with the commands that the embedded model makes of them.

It works the same with output to a file. Shows, and judges nothing else.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from smallthinker_edge.cli.arguments import OK, Command, add_threads_argument, show_text
from smallthinker_edge.home.schema import Command as HomeCommand
from smallthinker_edge.home.understand import HomeModel, open_home_model

SENTENCES = Path(__file__).resolve().parents[1] / "data" / "demo_commands.json"


@dataclass(frozen=True)
class DemoSentence:
    """A sentence, and the commands that are right for it."""

    sentence: str
    expected: list[HomeCommand]


def load_sentences(path: Path) -> list[DemoSentence]:
    """The sentences that the demo shows. Raises OSError where the file cannot be read."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    return [DemoSentence(entry["sentence"], entry["expected"]) for entry in entries]


def run_demo(*, interactive: bool = False, threads: int | None = None) -> None:
    """Shows the sentences, then speed and memory; with `interactive`, reads more from the user.

    Raises FileNotFoundError where this installation lacks the embedded model or its sentences.
    """
    if not SENTENCES.is_file():
        raise FileNotFoundError(f"the demo's sentences are not part of this installation ({SENTENCES} is missing)")
    sentences = load_sentences(SENTENCES)
    with open_home_model(threads=threads) as model:
        config = model.config
        print(
            f"Embedded model: {config.n_layers} layers, {config.n_experts} experts each, "
            f"{config.n_experts_used} a token. Right and wrong are marked.\n"
        )
        home_model = HomeModel(model)
        start = time.perf_counter()
        right = sum(show_sentence(home_model, sentence) for sentence in sentences)
        seconds = time.perf_counter() - start
        print(
            f"{right} of {len(sentences)} right; {1000 * seconds / len(sentences):.0f} ms a sentence, "
            f"{psutil.Process().memory_info().rss / 2**20:.0f} MiB resident"
        )
        if interactive:
            converse(home_model)
    if not interactive:
        print(f"\nSentences of your own: {program()} demo --interactive")
    print(f"A real SmallThinker model: {program()} chat -m SmallThinker-4B-A0.6B.gguf")


def show_sentence(home_model: HomeModel, sentence: DemoSentence) -> bool:
    """Prints a sentence with its commands; whether they are right."""
    commands = home_model.understand(sentence.sentence)
    right = commands == sentence.expected
    print(f"> {sentence.sentence}\n  ", end="")
    show_text(written(commands))
    print("\n  (right)\n" if right else f"\n  (wrong: {written(sentence.expected)})\n", flush=True)
    return right


def written(commands: list[HomeCommand]) -> str:
    """Commands as JSON, one alone without its list."""
    return json.dumps(commands[0] if len(commands) == 1 else commands, ensure_ascii=False)


def converse(home_model: HomeModel) -> None:
    """Answers lines from stdin until it ends; what was understood last is known to the next line."""
    print("\nType a command; an empty line or Ctrl-D ends.")
    prompt = "> " if sys.stdin.isatty() else ""
    previous: list[HomeCommand] = []
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if not line:
            return
        previous = home_model.understand(line, previous)
        print("  ", end="")
        show_text(written(previous))
        print(flush=True)


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
    add_threads_argument(parser)


def demo(arguments: argparse.Namespace) -> int:
    run_demo(interactive=arguments.interactive, threads=arguments.threads)
    return OK


COMMANDS = (Command("demo", "turn home commands into JSON with the embedded model", demo_arguments, demo),)
