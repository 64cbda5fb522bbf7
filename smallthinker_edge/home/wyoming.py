"""The Wyoming service: transcripts in, intents out; with a large model, answers too (extra `wyoming`).

cli/wyoming.py runs it. Events are the package wyoming's; what reads them is here, since that one trusts the lengths
that a client names. Nothing that a client does ends the service or holds up another client.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from wyoming.asr import Transcript
from wyoming.error import Error
from wyoming.event import Event, Eventable, async_write_event
from wyoming.handle import Handled, HandledChunk, HandledStart, HandledStop, NotHandled
from wyoming.info import (
    Attribution,
    Describe,
    HandleModel,
    HandleProgram,
    Info,
    IntentModel,
    IntentProgram,
    SelectProgram,
)
from wyoming.intent import Entity, Intent, IntentsStart, IntentsStop, NotRecognized, Recognize
from wyoming.ping import Ping, Pong

from smallthinker_edge.completions.compute import ComputeThread
from smallthinker_edge.errors import SmallThinkerError
from smallthinker_edge.home.conversations import Conversations, remember
from smallthinker_edge.home.hass import HassIntent, NoIntent, hass_intents
from smallthinker_edge.home.names import Home
from smallthinker_edge.home.schema import UNKNOWN, Command, Understand
from smallthinker_edge.model import SmallThinker

logger = logging.getLogger(__name__)

Message = dict[str, str]
INTENT_PROGRAM, HANDLE_PROGRAM = "smallthinker", "smallthinker-answers"
ATTRIBUTION = Attribution("smallthinker_edge", "https://pypi.org/project/smallthinker_edge/")
SERVICE_TYPE = "_wyoming._tcp.local."
MOST_MESSAGES = 8  # of a conversation with the large model that it is told again
SYSTEM = (
    "You are a voice assistant at home. What you say is spoken: answer in one or two short sentences of plain text."
)


@dataclass(frozen=True)
class Settings:
    """Bounds of the service.

    Attributes:
        most_clients: connected at once; the one idle longest makes room for another.
        most_pending: requests that wait or are computed; one more is refused.
        most_bytes: of an event's line, of its data and of its payload. most_text: characters of a transcript.
        answer_seconds: for a command; handle_seconds: for an answer of the large model, which ends there.
        event_seconds: from an event's first byte to its last, and for a client to take what it is sent.
        grace_seconds: for what is under way when the service is told to end.
        most_tokens: of an answer. system: what the large model is told first.
    """

    most_clients: int = 64
    most_pending: int = 64
    most_bytes: int = 1 << 16
    most_text: int = 1000
    answer_seconds: float = 10.0
    handle_seconds: float = 120.0
    event_seconds: float = 10.0
    grace_seconds: float = 5.0
    most_tokens: int = 256
    system: str = SYSTEM


class BadEvent(Exception):
    """What a client sent is no event, or a larger one than is taken."""


class Refused(Exception):
    """A request that is not answered; code and message go to the client."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


async def read_event(reader: asyncio.StreamReader, settings: Settings) -> Event | None:
    """The next event, None at the end of the stream.

    Waits for its first byte as long as the client likes. Raises BadEvent, TimeoutError of asyncio where the rest takes
    too long, IncompleteReadError where the client leaves in the middle.
    """
    first = await reader.read(1)
    if not first:
        return None
    return await asyncio.wait_for(_read_event(first, reader, settings.most_bytes), settings.event_seconds)


async def _read_event(first: bytes, reader: asyncio.StreamReader, most: int) -> Event:
    try:
        header = _parse(first if first == b"\n" else first + await reader.readuntil(b"\n"))
    except asyncio.LimitOverrunError:
        raise BadEvent(f"a line is longer than {most} bytes") from None
    kind, data = header.get("type"), header.get("data") or {}
    if not isinstance(kind, str) or not isinstance(data, dict):
        raise BadEvent("an event needs a type, and its data is an object")
    if length := _length(header, "data_length", most):
        data |= _parse(await reader.readexactly(length))
    if length := _length(header, "payload_length", most):
        await reader.readexactly(length)  # nothing that this service takes has one
    return Event(kind, data)


def _parse(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate could not be sent back
    except (ValueError, RecursionError):
        raise BadEvent("an event is JSON in UTF-8") from None
    if not isinstance(value, dict):
        raise BadEvent("an event is a JSON object")
    return value


def _length(header: dict[str, Any], name: str, most: int) -> int:
    length = header.get(name) or 0
    if not isinstance(length, int) or not 0 <= length <= most:
        raise BadEvent(f"{name} must be a number up to {most}")
    return length


class Client:
    """One connection. program: what it chose; busy: it is being answered; since: when it last sent or got something."""

    numbers = itertools.count()

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
        self.reader, self.writer = reader, writer
        self.program, self.busy, self.since = "", False, time.monotonic()
        self.name = f"connection {next(self.numbers)}"
        self._seconds = seconds

    async def send(self, *events: Eventable) -> None:
        """TimeoutError of asyncio or OSError where the client takes nothing or is gone."""
        for event in events:
            await asyncio.wait_for(async_write_event(event.event(), self.writer), self._seconds)
        self.since = time.monotonic()


class WyomingService:
    """Answers Wyoming clients. Must be made and used in one event loop.

    Args:
        understand: sentence and commands before it to commands; called in a thread of its own, one call at a time.
        home: whose names these are.
        model: a large model that answers what is no command, and clients that ask for its program; stays the caller's
            to close.
    """

    def __init__(
        self,
        understand: Understand,
        home: Home | None = None,
        model: SmallThinker | None = None,
        settings: Settings | None = None,
        version: str | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self._understand, self._home, self._model = understand, home or Home(), model
        self._thread, self._pending, self._ending = ComputeThread(), 0, False
        self._commands: Conversations[list[Command]] = Conversations()
        self._messages: Conversations[list[Message]] = Conversations()
        self._clients: dict[asyncio.Task[Any], Client] = {}
        self._info = _describe(version, model)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers one client until it leaves, sends what is no event, or is cancelled."""
        client, task = Client(reader, writer, self.settings.event_seconds), asyncio.current_task()
        assert task is not None
        try:
            if not self._make_room():
                await client.send(Error("too many clients", "busy"))
                return
            self._clients[task] = client
            while not self._ending and (event := await read_event(reader, self.settings)) is not None:
                client.busy = True
                await self._answer(client, event)
                client.busy = False
        except BadEvent as error:
            logger.info("a client was sent away: %s", error)
            with suppress(OSError, asyncio.TimeoutError):
                await client.send(Error(str(error), "bad-event"))
        except (OSError, EOFError, asyncio.TimeoutError, asyncio.CancelledError) as error:
            writer.transport.abort()  # close() would wait for what it does not take
            if isinstance(error, asyncio.CancelledError):
                raise
            logger.info("a client left in the middle, or stalled")
        except Exception:
            logger.exception("a request failed")
            with suppress(OSError, asyncio.TimeoutError):
                await client.send(Error("the service failed; its log says why", "failed"))
        finally:
            self._clients.pop(task, None)
            writer.close()

    async def end(self) -> None:
        """Sends the clients away: idle ones now, the others once they are answered or the grace is over."""
        self._ending = True
        for task, client in self._clients.items():
            if not client.busy:
                task.cancel()
        if left := list(self._clients):
            await asyncio.wait(left, timeout=self.settings.grace_seconds)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
        self._thread.close()

    def _make_room(self) -> bool:
        if len(self._clients) < self.settings.most_clients:
            return True
        idle = [(client.since, task) for task, client in self._clients.items() if not client.busy]
        if not idle:
            return False
        _, task = min(idle, key=lambda entry: entry[0])
        del self._clients[task]
        task.cancel()
        return True

    async def _answer(self, client: Client, event: Event) -> None:
        data = event.data
        if Describe.is_type(event.type):
            await client.send(self._info)
        elif Ping.is_type(event.type):
            text = data.get("text")
            await client.send(Pong(text if isinstance(text, str) else None))
        elif SelectProgram.is_type(event.type):
            client.program = str(data.get("name"))
        elif Transcript.is_type(event.type) or Recognize.is_type(event.type):
            text, context = data.get("text"), data.get("context")
            if not isinstance(text, str) or not isinstance(context, dict | None):
                raise BadEvent("a transcript has a text, and its context is an object")
            try:
                await self._transcript(client, text, context, Recognize.is_type(event.type))
            except Refused as error:
                await client.send(Error(str(error), error.code))

    async def _transcript(self, client: Client, text: str, context: dict[str, Any] | None, intents_only: bool) -> None:
        if len(text) > self.settings.most_text:
            raise Refused("too-long", f"a transcript has at most {self.settings.most_text} characters")
        name = (context or {}).get("conversation_id")
        conversation = name if isinstance(name, str) else client.name
        if self._model is not None and client.program == HANDLE_PROGRAM:
            await self._handle(self._model, client, text, context, conversation)
            return
        commands = await self._compute(text, self._commands.get(conversation, []))
        remember(self._commands, conversation, commands)
        try:
            intents = hass_intents(commands, self._home, text)
        except NoIntent as reason:
            unknown = all(command["action"] == UNKNOWN for command in commands)
            if self._model is not None and unknown and not intents_only and not client.program:
                await self._handle(self._model, client, text, context, conversation)
            else:
                await client.send(NotRecognized(str(reason), context))
            return
        if len(intents) == 1:
            await client.send(_intent(intents[0], context))
        else:
            await client.send(IntentsStart(context), *(_intent(one, context) for one in intents), IntentsStop(context))

    async def _compute(self, text: str, previous: Sequence[Command]) -> list[Command]:
        """What understand() returns. Raises Refused where too much is pending, it takes too long or fails."""
        self._begin()
        loop = asyncio.get_running_loop()

        def done(_: object) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._done)

        future = self._thread.submit(lambda: self._understand(text, previous))
        future.add_done_callback(done)  # a call that nobody waits for any more still holds the thread
        seconds = self.settings.answer_seconds
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), seconds)
        except asyncio.TimeoutError:
            raise Refused("timeout", f"no answer within {seconds:g} seconds") from None
        except SmallThinkerError as error:
            raise Refused("failed", str(error)) from error

    async def _handle(
        self, model: SmallThinker, client: Client, text: str, context: dict[str, Any] | None, conversation: str
    ) -> None:
        """The large model's answer, piece by piece and, as the protocol wants it for older clients, whole."""
        messages = [*self._messages.get(conversation, []), {"role": "user", "content": text}]
        spoken = ""
        self._begin()
        try:
            chunks = await model.acreate_chat_completion(
                [{"role": "system", "content": self.settings.system}, *messages],
                stream=True,
                max_tokens=self.settings.most_tokens,
                timeout=self.settings.handle_seconds,
                overflow="shift",
            )
            chunks.when_computed(self._done)
        except BaseException as error:
            self._done()
            if not isinstance(error, SmallThinkerError | ValueError):
                raise
            await client.send(NotHandled(str(error), context))
            return
        try:
            await client.send(HandledStart(context))
            async for chunk in chunks:
                piece = chunk["choices"][0]["delta"].get("content") if chunk["choices"] else None
                if piece:
                    spoken += piece
                    await client.send(HandledChunk(piece))
        except SmallThinkerError as error:
            await client.send(NotHandled(str(error), context), HandledStop())
            return
        finally:
            await chunks.aclose()
        self._messages.put(conversation, [*messages, {"role": "assistant", "content": spoken}][-MOST_MESSAGES:])
        await client.send(Handled(spoken, context), HandledStop())

    def _begin(self) -> None:
        if self._pending >= self.settings.most_pending:
            raise Refused("busy", "too many requests wait for their turn")
        self._pending += 1

    def _done(self) -> None:
        self._pending -= 1


def _intent(intent: HassIntent, context: dict[str, Any] | None) -> Intent:
    return Intent(intent.name, [Entity(name, value) for name, value in intent.slots.items()], intent.text, context)


def _describe(version: str | None, model: SmallThinker | None) -> Info:
    def common(name: str, description: str) -> dict[str, Any]:
        return {"name": name, "attribution": ATTRIBUTION, "installed": True, "description": description,
                "version": version}  # fmt: skip

    intents = IntentProgram(
        **common(INTENT_PROGRAM, "Commands of a home"),
        models=[IntentModel(**common("home", "Commands of a home, in English"), languages=["en"])],
    )
    if model is None:
        return Info(intent=[intents])
    handle = HandleProgram(
        **common(HANDLE_PROGRAM, "Answers in text"),
        models=[HandleModel(**common(model.name, "A SmallThinker model"), languages=["en"])],
        supports_handled_streaming=True,
    )
    return Info(intent=[intents], handle=[handle])


# Where it listens


async def run(service: WyomingService, uri: str, announce: str | None = None) -> None:
    """Serves until SIGTERM or SIGINT; stdio:// until stdin ends.

    Args:
        uri: tcp://HOST:PORT, unix://PATH or stdio://. announce: name to be found by in the local network, with
            zeroconf (tcp only).

    Raises ValueError for another uri, OSError where it cannot listen there.
    """
    target, stop = urlsplit(uri), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    limit = service.settings.most_bytes
    async with AsyncExitStack() as stack:
        stack.push_async_callback(service.end)
        if target.scheme == "stdio":
            reader, writer = await _standard_streams(limit)
            task = asyncio.create_task(service.serve(reader, writer))
            task.add_done_callback(lambda _: stop.set())
        elif target.scheme == "unix" and target.path:
            server = await asyncio.start_unix_server(service.serve, target.path, limit=limit)
            stack.callback(Path(target.path).unlink, missing_ok=True)
            stack.callback(server.close)
            logger.info("listening on %s", uri)
        elif target.scheme == "tcp" and target.hostname and target.port is not None:
            server = await asyncio.start_server(service.serve, target.hostname, target.port, limit=limit)
            stack.callback(server.close)
            host, port = server.sockets[0].getsockname()[:2]
            logger.info("listening on tcp://%s:%d", f"[{host}]" if ":" in host else host, port)
            if announce is not None:
                await stack.enter_async_context(_Announcement(announce, host, port))
        else:
            raise ValueError(f"{uri!r} is none of tcp://HOST:PORT, unix://PATH and stdio://")
        await stop.wait()


async def _standard_streams(limit: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit)
    # Copies, since the transports close what they are given.
    source, target = os.fdopen(os.dup(sys.stdin.fileno()), "rb"), os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), source)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, target)
    return reader, asyncio.StreamWriter(transport, protocol, None, loop)


class _Announcement:
    """The service as zeroconf tells the local network of it, which is how Home Assistant finds it."""

    def __init__(self, name: str, host: str, port: int) -> None:
        from zeroconf import InterfaceChoice
        from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

        anywhere = host in ("0.0.0.0", "::")
        self._info = AsyncServiceInfo(
            SERVICE_TYPE,
            f"{name}.{SERVICE_TYPE}",
            parsed_addresses=[own_address() if anywhere else host],
            port=port,
            server=f"{socket.gethostname().partition('.')[0]}.local.",
        )
        self._zeroconf = AsyncZeroconf(interfaces=InterfaceChoice.All if anywhere else [host])

    async def __aenter__(self) -> None:
        await self._zeroconf.async_register_service(self._info)

    async def __aexit__(self, *_: object) -> None:
        await self._zeroconf.async_unregister_all_services()
        await self._zeroconf.async_close()


def own_address() -> str:
    """This machine's address in its network; nothing is sent to find it out. OSError without a network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("224.0.0.251", 1))
        return str(probe.getsockname()[0])
