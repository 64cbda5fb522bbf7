"""`mqtt`: the commands of a home for an MQTT broker's clients."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from pathlib import Path

from smallthinker_edge.cli.arguments import OK, Command, checking_arguments, need_package, positive_int, show_log
from smallthinker_edge.cli.wyoming import add_home_arguments, load_home

USER_VARIABLE, PASSWORD_VARIABLE = "SMALLTHINKER_MQTT_USER", "SMALLTHINKER_MQTT_PASSWORD"
PORT, TLS_PORT = 1883, 8883


def mqtt_arguments(parser: argparse.ArgumentParser) -> None:
    add_home_arguments(parser)
    parser.add_argument("--host", default="localhost", metavar="NAME", help="the broker (default: this machine)")
    parser.add_argument(
        "--port", type=positive_int, metavar="N", help=f"its port (default: {PORT}, {TLS_PORT} with --tls)"
    )
    parser.add_argument(
        "--topic", default="smallthinker", help="what topics begin with: TOPIC/command, TOPIC/result, TOPIC/status"
    )
    parser.add_argument("--user", metavar="NAME", help=f"at the broker (or set {USER_VARIABLE})")
    parser.add_argument("--password-file", metavar="FILE", help=f"the user's password (or set {PASSWORD_VARIABLE})")
    parser.add_argument("--tls", action="store_true", help="encrypt")
    parser.add_argument(
        "--ca-file", metavar="FILE", help="authorities that vouch for the broker (default: the system's)"
    )
    parser.add_argument("--cert-file", metavar="FILE", help="certificate that the broker asks for")
    parser.add_argument("--key-file", metavar="FILE", help="its key")
    parser.add_argument("--mqtt-3", action="store_true", help="speak MQTT 3.1.1, for brokers that do not know MQTT 5")


def password(path: str | None) -> str | None:
    """Of a file or of the environment."""
    if path is None:
        return os.environ.get(PASSWORD_VARIABLE)
    return Path(path).read_text(encoding="utf-8").strip()


def mqtt(arguments: argparse.Namespace) -> int:
    need_package("mqtt", "paho", "mqtt", "paho-mqtt")
    from smallthinker_edge.home import HomeModel
    from smallthinker_edge.home.mqtt import MqttService, Settings
    from smallthinker_edge.model import SmallThinker

    show_log()
    home, stop = load_home(arguments.home), threading.Event()
    settings = Settings(
        host=arguments.host,
        port=arguments.port or (TLS_PORT if arguments.tls else PORT),
        topic=arguments.topic,
        user=arguments.user or os.environ.get(USER_VARIABLE),
        password=password(arguments.password_file),
        tls=arguments.tls,
        ca_file=arguments.ca_file,
        cert_file=arguments.cert_file,
        key_file=arguments.key_file,
        old=arguments.mqtt_3,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with (
        checking_arguments(),
        SmallThinker(arguments.model, threads=arguments.threads) as model,
        MqttService(HomeModel(model, home).understand, settings),
    ):
        stop.wait()
    return OK


COMMANDS = (Command("mqtt", "answer sentences that an MQTT broker brings", mqtt_arguments, mqtt),)
