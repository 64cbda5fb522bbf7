"""The MQTT service: sentences on TOPIC/command, their commands on TOPIC/result (extra `mqtt`). cli/mqtt.py runs it.

The network has paho's thread, understanding a thread of its own with a bounded queue before it. A broker that goes
away is waited for.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from smallthinker_edge.errors import SmallThinkerError
from smallthinker_edge.home.conversations import Conversations, remember
from smallthinker_edge.home.schema import Command, Understand

logger = logging.getLogger(__name__)

ONLINE, OFFLINE = "online", "offline"
NO_RETAINED = 2  # MQTT 5, 3.8.3.1: what lay at the broker before is not sent
QOS = 1
LONGEST_ID = 256


@dataclass(frozen=True)
class Settings:
    """Where the broker is, and bounds.

    Attributes:
        host, port, user, password: of the broker. topic: what all topics begin with.
        tls: encrypt, with the system's authorities or ca_file; cert_file and key_file: what the broker may ask for.
        old: speak MQTT 3.1.1, where nothing bounds the messages that the broker sends.
        most_pending: sentences that wait; one more is answered with an error. most_text: characters of one.
        most_bytes: of a message. most_unsent: results kept while the broker is away.
        seconds_apart: between tries to reach the broker, growing to most_seconds_apart. keepalive: seconds.
    """

    host: str = "localhost"
    port: int = 1883
    topic: str = "smallthinker"
    user: str | None = None
    password: str | None = None
    tls: bool = False
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    old: bool = False
    most_pending: int = 32
    most_text: int = 1000
    most_bytes: int = 1 << 14
    most_unsent: int = 256
    seconds_apart: int = 1
    most_seconds_apart: int = 60
    keepalive: int = 30


class BadMessage(Exception):
    """A message that holds no sentence; the text goes to whoever sent it."""


@dataclass(frozen=True)
class Request:
    """A sentence; key: what its sender calls it; conversation: "" for none."""

    text: str
    key: str | int | None = None
    conversation: str = ""


def parse(payload: bytes | bytearray, most_text: int) -> Request:
    """The sentence of a message: plain text, or JSON with text, id and conversation. Raises BadMessage."""
    try:
        text = payload.decode().strip()
        if not text.startswith("{"):
            request = Request(text)
        else:
            body = json.loads(text)
            request = Request(body.get("text"), body.get("id"), body.get("conversation", ""))
        request.text.encode()  # half a surrogate, or no text at all
    except (ValueError, RecursionError, AttributeError):
        raise BadMessage('a message is a sentence, or {"text": ..., "id": ...}, in UTF-8') from None
    if not isinstance(request.key, str | int | None) or len(str(request.key)) > LONGEST_ID:
        raise BadMessage(f"an id is a number or a string up to {LONGEST_ID} characters")
    if not isinstance(request.conversation, str):
        raise BadMessage("a conversation is a string")
    if not 0 < len(request.text) <= most_text:
        raise BadMessage(f"a sentence has 1 to {most_text} characters")
    return request


class MqttService:
    """Answers sentences that come from a broker. A context manager: connects in the background, and says goodbye.

    understand: sentence and commands before it to commands; called in a thread of its own, one call at a time. Raises
    ValueError for a topic that cannot be one, OSError for TLS files that cannot be read.
    """

    def __init__(self, understand: Understand, settings: Settings | None = None) -> None:
        self.settings = settings = settings or Settings()
        if not settings.topic or settings.topic.startswith("$") or set(settings.topic) & set("+#\0"):
            raise ValueError(f"{settings.topic!r} cannot begin a topic: it must be some text without + and #")
        self._understand, self._ending = understand, False
        self._requests: queue.Queue[Request | None] = queue.Queue(settings.most_pending)
        self._conversations: Conversations[list[Command]] = Conversations()
        self._worker = threading.Thread(target=self._work, name="smallthinker-mqtt", daemon=True)
        self._client = self._make_client(settings)

    def _make_client(self, settings: Settings) -> Client:
        protocol = MQTTProtocolVersion.MQTTv311 if settings.old else MQTTProtocolVersion.MQTTv5
        client = Client(CallbackAPIVersion.VERSION2, protocol=protocol)
        if settings.user is not None:
            client.username_pw_set(settings.user, settings.password)
        if settings.tls:
            client.tls_set(settings.ca_file, settings.cert_file, settings.key_file)
        client.will_set(self._topic("status"), OFFLINE, QOS, retain=True)
        client.max_queued_messages_set(settings.most_unsent)
        client.reconnect_delay_set(settings.seconds_apart, settings.most_seconds_apart)
        client.on_connect, client.on_disconnect = self._connected, self._disconnected
        client.on_message = self._received
        client.on_connect_fail = lambda *_: logger.warning("the broker %s:%d is away", settings.host, settings.port)
        return client

    def __enter__(self) -> MqttService:
        properties = None
        if not self.settings.old:
            properties = Properties(PacketTypes.CONNECT)
            properties.MaximumPacketSize = self.settings.most_bytes
        self._worker.start()
        self._client.connect_async(
            self.settings.host, self.settings.port, self.settings.keepalive, properties=properties
        )
        self._client.loop_start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """What is being understood is answered; what waits is not."""
        self._ending = True
        with suppress(queue.Empty):
            while True:
                self._requests.get_nowait()
        self._requests.put(None)
        self._worker.join(timeout=5)
        if self._client.is_connected():
            goodbye = self._client.publish(self._topic("status"), OFFLINE, QOS, retain=True)
            with suppress(RuntimeError):  # the connection ended meanwhile: the broker publishes the will
                goodbye.wait_for_publish(2)
        self._client.disconnect()
        self._client.loop_stop()

    def _topic(self, name: str) -> str:
        return f"{self.settings.topic}/{name}"

    # In paho's thread

    def _connected(
        self, client: Client, data: Any, flags: ConnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:
            logger.warning("the broker does not let us in: %s", reason)
            return
        topic = self._topic("command")
        if self.settings.old:
            client.subscribe(topic, QOS)
        else:
            client.subscribe(topic, options=SubscribeOptions(qos=QOS, retainHandling=NO_RETAINED))
        client.publish(self._topic("status"), ONLINE, QOS, retain=True)
        logger.info("connected to %s:%d, listening on %s", self.settings.host, self.settings.port, topic)

    def _disconnected(
        self, client: Client, data: Any, flags: DisconnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:
            logger.warning("lost the broker: %s", reason)

    def _received(self, client: Client, data: Any, message: MQTTMessage) -> None:
        if message.retain or self._ending:  # said some time ago, and not again now
            return
        try:
            if len(message.payload) > self.settings.most_bytes:
                raise BadMessage(f"a message has at most {self.settings.most_bytes} bytes")
            request = parse(message.payload, self.settings.most_text)
        except BadMessage as error:
            self._tell({"error": "bad-message", "message": str(error)})
            return
        try:
            self._requests.put_nowait(request)
        except queue.Full:
            self._tell({"error": "busy", "message": "too many sentences wait for their turn"}, request)

    # In the worker's thread

    def _work(self) -> None:
        while (request := self._requests.get()) is not None:
            try:
                commands = self._understand(request.text, self._conversations.get(request.conversation, []))
                remember(self._conversations, request.conversation, commands)
                self._tell({"text": request.text, "commands": commands}, request)
            except SmallThinkerError as error:
                self._tell({"error": "failed", "message": str(error)}, request)
            except Exception:
                logger.exception("a sentence failed")
                self._tell({"error": "failed", "message": "the service failed; its log says why"}, request)

    # In either

    def _tell(self, result: dict[str, Any], request: Request | None = None) -> None:
        key = {} if request is None or request.key is None else {"id": request.key}
        info = self._client.publish(self._topic("result"), json.dumps({**key, **result}), QOS)
        if info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            logger.warning("a result was dropped: the broker does not take them")
