"""Home commands: sentences in, commands out, and the services that Home Assistant and MQTT speak to."""

from smallthinker_edge.home.names import Device, Home
from smallthinker_edge.home.schema import ACTIONS, Command
from smallthinker_edge.home.understand import HomeModel, open_home_model

__all__ = ["ACTIONS", "Command", "Device", "Home", "HomeModel", "open_home_model"]
