"""The MQTT service with a real mosquitto: what it answers, and brokers that end and come back."""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("paho.mqtt")
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from smallthinker_edge.home.mqtt import BadMessage, MqttService, Request, Settings, parse
from smallthinker_edge.home.schema import Command

MOSQUITTO = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
ON: Command = {"action": "on", "device": "lights"}
pytestmark = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not there: apt-get install mosquitto")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Broker:
    """A mosquitto of this test's own, which can be killed and started again on its port."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = free_port()
        self._config = folder / "mosquitto.conf"
        lines = [f"listener {self.port} 127.0.0.1", "user root", "persistence false", *options]
        if not any(option.startswith("allow_anonymous") for option in options):
            lines.append("allow_anonymous true")
        self._config.write_text("\n".join(lines) + "\n")
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        assert MOSQUITTO is not None
        self._process = subprocess.Popen([MOSQUITTO, "-c", str(self._config)], stderr=subprocess.DEVNULL)
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self._process.poll() is None
                time.sleep(0.05)
        raise AssertionError("mosquitto does not listen")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class Listener:
    """A client of the broker that keeps what it hears by topic, and sends sentences."""

    def __init__(self, port: int, user: str | None = None) -> None:
        self.results: queue.Queue[dict[str, Any]] = queue.Queue()
        self.statuses: queue.Queue[str] = queue.Queue()
        self._client = Client(CallbackAPIVersion.VERSION2)
        if user is not None:
            self._client.username_pw_set(user, "secret")
        self._subscribed = threading.Event()
        self._client.on_connect = lambda client, *_: client.subscribe([("t/result", 1), ("t/status", 1)])
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = self._hear
        self._client.reconnect_delay_set(1, 1)
        self._client.max_inflight_messages_set(1000)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        assert self._subscribed.wait(10)

    def _hear(self, client: Client, data: Any, message: Any) -> None:
        if message.topic == "t/status":
            self.statuses.put(message.payload.decode())
        else:
            self.results.put(json.loads(message.payload))

    def say(self, payload: str | bytes, retain: bool = False) -> None:
        self._client.publish("t/command", payload, 1, retain).wait_for_publish(10)

    def ask(self, payload: str | bytes) -> dict[str, Any]:
        self.say(payload)
        return self.results.get(timeout=20)

    def await_status(self, wanted: str) -> None:
        while self.statuses.get(timeout=30) != wanted:
            pass

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(tmp_path)
    yield broker
    broker.kill()


@pytest.fixture
def listener(broker: Broker) -> Iterator[Listener]:
    listener = Listener(broker.port)
    yield listener
    listener.close()


@contextmanager
def serving(broker: Broker, understand: Callable[..., list[Command]], **settings: Any) -> Iterator[MqttService]:
    settings = {"host": "127.0.0.1", "port": broker.port, "topic": "t", "most_seconds_apart": 1, **settings}
    with MqttService(understand, Settings(**settings)) as service:
        yield service


def understand(text: str, previous: Sequence[Command] = ()) -> list[Command]:
    if text == "fail":
        raise ZeroDivisionError
    if text == "and the hall too":
        return [{**command, "area": "hall"} for command in previous] or [{"action": "unknown"}]
    return [ON] if "light" in text else [{"action": "unknown"}]


@pytest.mark.parametrize("old", [False, True])
def test_sentences_are_answered_with_their_ids(broker: Broker, listener: Listener, old: bool) -> None:
    with serving(broker, understand, old=old):
        listener.await_status("online")
        assert listener.ask("light on") == {"text": "light on", "commands": [ON]}
        assert listener.ask('{"text": "Licht", "id": "é1"}') == {
            "id": "é1", "text": "Licht", "commands": [{"action": "unknown"}],
        }  # fmt: skip
        assert listener.ask('{"text": "fail", "id": 7}')["error"] == "failed"
        assert listener.ask('{"text": "light", "id": 8}')["commands"] == [ON]
    listener.await_status("offline")


def test_a_conversation_goes_on(broker: Broker, listener: Listener) -> None:
    with serving(broker, understand):
        listener.await_status("online")
        listener.ask('{"text": "light on", "conversation": "c"}')
        assert listener.ask('{"text": "and the hall too", "conversation": "c"}')["commands"] == [{**ON, "area": "hall"}]
        assert listener.ask('{"text": "and the hall too"}')["commands"] == [{"action": "unknown"}]


BROKEN = {
    "empty": b"", "spaces": b"  ", "no utf-8": b"\xff\xfe", "no json": b"{", "no text": b"{}",
    "a number": b'{"text": 4}',
    "half a surrogate": b'{"text": "\\ud800"}', "an id of another kind": b'{"text": "light", "id": [1]}',
    "an endless id": b'{"text": "light", "id": "' + b"x" * 1000 + b'"}', "deep": b'{"text": ' + b"[" * 15_000,
    "a conversation of another kind": b'{"text": "light", "conversation": {}}', "long": b"x" * 5000,
}  # fmt: skip


def test_broken_messages_get_an_error_and_the_next_sentence_an_answer(broker: Broker, listener: Listener) -> None:
    with serving(broker, understand):
        listener.await_status("online")
        for name, payload in BROKEN.items():
            assert listener.ask(payload)["error"] == "bad-message", name
        listener.say(b"x" * 3_000_000)  # the broker does not pass it on
        assert listener.ask("light") == {"text": "light", "commands": [ON]}


@pytest.mark.parametrize("payload", BROKEN.values(), ids=BROKEN)
def test_broken_messages_are_refused(payload: bytes) -> None:
    with pytest.raises(BadMessage):
        parse(payload, 1000)


def test_messages_are_plain_or_json() -> None:
    assert parse(b" turn it on \n", 100) == Request("turn it on")
    assert parse(b'{"text": "on", "id": 3, "conversation": "c", "more": 1}', 100) == Request("on", 3, "c")


def test_a_retained_sentence_is_not_said_again(broker: Broker, listener: Listener) -> None:
    listener.say("light on", retain=True)
    for old in (False, True):
        with serving(broker, understand, old=old):
            listener.await_status("online")
            assert listener.ask("other")["text"] == "other"


def test_a_flood_is_bounded_and_every_sentence_gets_an_answer(broker: Broker, listener: Listener) -> None:
    gate = threading.Event()

    def slowly(text: str, previous: Sequence[Command] = ()) -> list[Command]:
        gate.wait(20)
        return [ON]

    with serving(broker, slowly, most_pending=4):
        listener.await_status("online")
        for number in range(300):
            listener.say(json.dumps({"text": "light", "id": number}))
        refused = [listener.results.get(timeout=20) for _ in range(295)]
        assert {result["error"] for result in refused} == {"busy"}
        gate.set()
        done = [listener.results.get(timeout=20) for _ in range(5)]
        assert {result["id"] for result in refused + done} == set(range(300))
        assert all(result["commands"] == [ON] for result in done)


def test_a_broker_that_ends_is_waited_for(broker: Broker, listener: Listener) -> None:
    with serving(broker, understand):
        listener.await_status("online")
        assert listener.ask("light")["commands"]
        for _ in range(2):
            broker.kill()
            time.sleep(1.5)
            broker.start()
            listener.await_status("online")
            assert listener.ask("light")["commands"] == [ON]


def test_a_broker_that_comes_later_is_found(tmp_path: Path) -> None:
    broker = Broker(tmp_path)
    broker.kill()
    with serving(broker, understand):
        time.sleep(1)
        broker.start()
        listener = Listener(broker.port)
        listener.await_status("online")
        listener.close()
        broker.kill()  # it ends without a broker too


def test_the_last_will_is_kept_by_the_broker(broker: Broker, listener: Listener, demo_model: Path) -> None:
    command = [sys.executable, "-m", "smallthinker_edge", "mqtt", "--host", "127.0.0.1", "--port", str(broker.port)]
    for end in ("kill", "terminate"):
        child = subprocess.Popen([*command, "--topic", "t"], stderr=subprocess.PIPE)
        try:
            listener.await_status("online")
            assert listener.ask("turn on the kitchen light")["commands"]
            getattr(child, end)()
            listener.await_status("offline")
            assert child.wait(20) == (-9 if end == "kill" else 0)
        finally:
            child.kill()
            child.communicate()
        late = Listener(broker.port)
        assert late.statuses.get(timeout=10) == "offline"
        late.close()


def test_users_and_passwords(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    users = tmp_path / "users"
    users.write_text("edge:secret\n")
    subprocess.run(["mosquitto_passwd", "-U", str(users)], check=True)
    users.chmod(0o600)
    broker = Broker(tmp_path, "allow_anonymous false", f"password_file {users}")
    try:
        with serving(broker, understand, user="edge", password="secret"):
            listener = Listener(broker.port, "edge")
            listener.await_status("online")
            listener.close()
        with serving(broker, understand, user="edge", password="wrong"):
            for _ in range(100):
                if "does not let us in" in caplog.text:
                    break
                time.sleep(0.05)
        assert re.search("does not let us in: .*[Nn]ot authori[sz]ed", caplog.text)
    finally:
        broker.kill()


def test_tls(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    broker = Broker(tmp_path, f"listener {(secure := free_port())} 127.0.0.1", f"certfile {certificate}",
                    f"keyfile {key}")  # fmt: skip
    try:
        listener = Listener(broker.port)
        with serving(broker, understand, port=secure, tls=True, ca_file=str(certificate)):
            listener.await_status("online")
            assert listener.ask("light")["commands"] == [ON]
        listener.await_status("offline")
        with serving(broker, understand, port=secure, tls=True):  # an unknown authority
            time.sleep(1)
        assert listener.statuses.empty()
        listener.close()
    finally:
        broker.kill()


def test_topics_that_cannot_be_are_refused() -> None:
    for topic in ("", "$SYS", "home/#", "a+b"):
        with pytest.raises(ValueError, match="topic"):
            MqttService(understand, Settings(topic=topic))
