"""Embed the library in an application: sentences become commands, and commands become action.

    python examples/home_commands.py "dim the bedroom lamp to thirty percent"

Uses the embedded model, so it runs as it stands. A real application calls `understand` for each sentence of its speech
recogniser and sends the commands to its devices.
"""

from __future__ import annotations

import sys

from smallthinker_edge.home import Command, Device, Home, HomeModel, open_home_model

HOME = Home(
    areas=("Kitchen", "Bedroom"),
    devices=(Device("Bedroom Lamp", area="Bedroom"), Device("Blinds", area="Kitchen", aliases=("roller shutters",))),
)


def carry_out(command: Command) -> str:
    """What the application would do."""
    action = command["action"]
    if action == "unknown":
        return "say: I did not understand that."
    details = ", ".join(f"{key}={value}" for key, value in command.items() if key != "action")
    return f"{action}: {details}" if details else action


def main() -> None:
    sentences = sys.argv[1:] or [
        "Could you dim the bedroom lamp to thirty percent, please?",
        "put milk on the shopping list and close the kitchen blinds",
        "and open them again at half past seven tomorrow",
        "the sea is a strange colour today",
    ]
    previous: list[Command] = []
    with open_home_model() as model:
        home_model = HomeModel(model, HOME)
        for sentence in sentences:
            print(f"> {sentence}")
            previous = home_model.understand(sentence, previous)
            for command in previous:
                print(f"  {carry_out(command)}")


if __name__ == "__main__":
    main()
