"""Embed the library in an application: spoken-style home commands become JSON, and JSON becomes action.

    python examples/home_commands.py "dim the bedroom lamp to thirty percent"

Uses the embedded demo model, so it runs as it stands. A real application calls `understand` for each sentence
of its speech recogniser and sends the result to its devices.
"""

from __future__ import annotations

import json
import sys
from importlib.resources import as_file, files
from typing import Any

from smallthinker_edge import ContextFull, SmallThinker


def understand(model: SmallThinker, sentence: str) -> list[dict[str, Any]]:
    """The commands in a sentence; [{"action": "unknown"}] where there is none that the model understood."""
    unknown = [{"action": "unknown"}]
    try:
        text = model.chat([{"role": "user", "content": sentence}], max_tokens=200).text
        commands = json.loads(text)
    except (ContextFull, json.JSONDecodeError):
        return unknown
    commands = commands if isinstance(commands, list) else [commands]
    # A model's output is input like any other: look at it before acting on it.
    return [c for c in commands if isinstance(c, dict) and isinstance(c.get("action"), str)] or unknown


def carry_out(command: dict[str, Any]) -> str:
    """What the application would do."""
    action = command["action"]
    if action == "unknown":
        return "say: I did not understand that."
    details = ", ".join(f"{key}={value}" for key, value in command.items() if key != "action")
    return f"{action}: {details}"


def main() -> None:
    sentences = sys.argv[1:] or [
        "could you dim the bedroom lamp to thirty percent please",
        "put milk on the shopping list and close the kitchen blinds",
        "the sea is a strange colour today",
    ]
    with as_file(files("smallthinker_edge") / "data" / "demo.gguf") as path, SmallThinker(path) as model:
        for sentence in sentences:
            print(f"> {sentence}")
            for command in understand(model, sentence):
                print(f"  {carry_out(command)}")


if __name__ == "__main__":
    main()
