"""`pull`, and `plan` of a file that is still on the Hugging Face Hub."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from smallthinker_edge.cli.arguments import FAILED, OK, Command, UsageError, checking_arguments
from smallthinker_edge.cli.files import showing_notes
from smallthinker_edge.cli.progress import progress


def pull_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repo", metavar="REPO", help="of the Hugging Face Hub: ORG/NAME or ORG/NAME@REVISION")
    parser.add_argument("--file", metavar="GLOB", help="which model, where the repository has several, as '*Q8_0*'")
    parser.add_argument("--no-pack", action="store_true", help="leave a GGUF as it is; it must fit into memory whole")


def pull(arguments: argparse.Namespace) -> int:
    from smallthinker_edge.files.pull import prepare
    from smallthinker_edge.files.pull import pull as fetch

    with checking_arguments(), showing_notes():
        order = prepare(arguments.repo, arguments.file, pack=not arguments.no_pack)
        print(order.describe(), file=sys.stderr)
        with progress() as show:
            path = fetch(order, show)
        print(path)
    return OK


def plan_remote(arguments: argparse.Namespace) -> int:
    """Fetches the header of a file, and says whether the model would fit as it is, and packed."""
    from smallthinker_edge.files.hub import Address, headers_only, listing
    from smallthinker_edge.files.pull import choose, gib

    with checking_arguments():
        address = Address.parse(arguments.file)
    found = listing(address.repo, address.revision)
    choice = choose(found.files, address.file, address.repo)
    if choice.kind == "checkpoint":
        raise UsageError(f"{address.repo} has a checkpoint only: plan reads the headers of GGUF and packed files")
    with headers_only(found, choice.names) as path:
        ways = {"packed": planned(arguments, path, "--packed")}
        if choice.kind == "gguf" and not arguments.packed:
            ways = {"as it is": planned(arguments, path)} | ways
    if arguments.as_json:
        print(json.dumps({way: figures if fits else {"error": figures} for way, (fits, figures) in ways.items()}))
    else:
        print(f"{found.repo}/{choice.names[0]}: {gib(sum(found.files[name] for name in choice.names))}")
        for way, (_, text) in ways.items():
            print(f"\n{way}:\n{text}")
    return OK if any(fits for fits, _ in ways.values()) else FAILED


def planned(arguments: argparse.Namespace, path: str, *more: str) -> tuple[bool, Any]:
    """Whether a model fits, and its plan or why it does not: from a process of its own, without the Hub's client."""
    command = [sys.executable, "-m", "smallthinker_edge", "plan", path, "--kv", arguments.kv, *more]
    command += ["--context", str(arguments.context), *(["--json"] if arguments.as_json else [])]
    command += [] if arguments.memory is None else ["--memory", str(arguments.memory)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        return False, "does not fit: " + ran.stderr.removeprefix("error: ").strip()
    return True, json.loads(ran.stdout) if arguments.as_json else ran.stdout.rstrip()


COMMANDS = (Command("pull", "fetch a model of the Hugging Face Hub, ready to run", pull_arguments, pull),)
