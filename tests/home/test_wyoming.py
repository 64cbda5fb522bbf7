"""The Wyoming service with the package's own client, and with clients that drop, flood, stall and send garbage."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import wave
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("wyoming")
from wyoming.asr import Transcript
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncTcpClient, AsyncUnixClient
from wyoming.error import Error
from wyoming.event import Event, async_read_event, async_write_event
from wyoming.handle import Handled, HandledChunk, HandledStart, HandledStop
from wyoming.info import Describe, Info, SelectProgram
from wyoming.intent import Intent, IntentsStart, IntentsStop, NotRecognized, Recognize
from wyoming.ping import Ping, Pong
from wyoming.tts import Synthesize

from smallthinker_edge import SmallThinker
from smallthinker_edge.home.conversations import MOST, SECONDS, Conversations
from smallthinker_edge.home.names import Device, Home
from smallthinker_edge.home.schema import Command
from smallthinker_edge.home.wyoming import (
    HANDLE_PROGRAM,
    INTENT_PROGRAM,
    SERVICE_TYPE,
    BadEvent,
    Settings,
    WyomingService,
    read_event,
    run,
)

VOICE = Path(__file__).resolve().parents[2] / "examples" / "home" / "voice.py"
HOME = Home(areas=("Kitchen",), devices=(Device("Desk Lamp", "Office", "light"),))
ON: Command = {"action": "on", "device": "lights", "area": "Kitchen"}
SENTENCES: dict[str, list[Command]] = {
    "lights": [ON],
    "both": [ON, {"action": "off", "device": "desk lamp"}],
    "coffee": [{"action": "coffee"}],
    "nothing": [{"action": "nevermind"}],
}


class Fake:
    """Understands SENTENCES. previous: what it was given with each call; gate: calls wait for it."""

    def __init__(self) -> None:
        self.previous: list[Sequence[Command]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def understand(self, text: str, previous: Sequence[Command] = ()) -> list[Command]:
        assert self.gate.wait(30)
        self.previous.append(previous)
        if self.error is not None:
            raise self.error
        if text == "and the office too":
            return [{**command, "area": "Office"} for command in previous]
        return SENTENCES.get(text, [{"action": "unknown"}])


class Served:
    """A service that listens on a port of this machine."""

    def __init__(self, service: WyomingService, fake: Fake, port: int) -> None:
        self.service, self.fake, self.port = service, fake, port

    @asynccontextmanager
    async def client(self) -> AsyncIterator[AsyncTcpClient]:
        async with AsyncTcpClient("127.0.0.1", self.port) as client:
            yield client

    async def ask(self, text: str, conversation: str | None = None) -> list[Event]:
        async with self.client() as client:
            return await ask(client, text, conversation)

    async def pending(self, number: int) -> None:
        """Waits until so many requests are pending; whoever never sees it fails."""
        while self.service._pending != number:
            await asyncio.sleep(0.02)

    async def raw(self, *data: bytes, read: bool = True) -> bytes:
        """What comes back for bytes, until the service hangs up."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        for piece in data:
            writer.write(piece)
            with suppress(OSError):
                await writer.drain()
        with suppress(OSError):
            answer = await asyncio.wait_for(reader.read(), 10) if read else b""
        writer.close()
        return answer


async def answers(client: AsyncTcpClient | AsyncUnixClient) -> list[Event]:
    """The events of one answer."""
    last = {"intents-stop", "handled-stop", "not-recognized", "error", "not-handled", "info"}
    events: list[Event] = []
    while True:
        event = await asyncio.wait_for(client.read_event(), 20)
        assert event is not None, events
        events.append(event)
        if event.type in last or [e.type for e in events] == ["intent"]:
            return events


async def ask(client: AsyncTcpClient | AsyncUnixClient, text: str, conversation: str | None = None) -> list[Event]:
    context = None if conversation is None else {"conversation_id": conversation}
    await client.write_event(Transcript(text, context=context, language="en").event())
    return await answers(client)


def serving(
    test: Callable[[Served], Coroutine[Any, Any, None]], model: SmallThinker | None = None, **settings: Any
) -> None:
    """Runs a test against a service with a fake model."""

    async def main() -> None:
        fake = Fake()
        service = WyomingService(fake.understand, HOME, model, Settings(**settings))
        server = await asyncio.start_server(service.serve, "127.0.0.1", 0, limit=service.settings.most_bytes)
        try:
            await asyncio.wait_for(test(Served(service, fake, server.sockets[0].getsockname()[1])), 120)
        finally:
            fake.gate.set()
            server.close()
            await service.end()

    asyncio.run(main())


def test_describe_tells_of_the_program() -> None:
    async def test(served: Served) -> None:
        async with served.client() as client:
            await client.write_event(Describe().event())
            (event,) = await answers(client)
            info = Info.from_event(event)
            assert [(p.name, p.installed, p.models[0].languages) for p in info.intent] == [
                (INTENT_PROGRAM, True, ["en"])
            ]
            assert not info.handle
            await client.write_event(Ping("hello").event())
            pong = await client.read_event()
            assert pong is not None
            assert Pong.from_event(pong).text == "hello"

    serving(test)


def test_one_command_is_an_intent_and_several_are_a_list() -> None:
    async def test(served: Served) -> None:
        (event,) = await served.ask("lights", "c1")
        intent = Intent.from_event(event)
        assert intent.name == "HassTurnOn"
        assert {e.name: e.value for e in intent.entities} == {"domain": ["light"], "area": "Kitchen"}
        assert intent.text
        assert intent.context == {"conversation_id": "c1"}
        start, first, second, stop = await served.ask("both")
        assert IntentsStart.is_type(start.type)
        assert IntentsStop.is_type(stop.type)
        assert [Intent.from_event(one).name for one in (first, second)] == ["HassTurnOn", "HassTurnOff"]

    serving(test)


def test_what_has_no_intent_is_not_recognized_and_says_why() -> None:
    async def test(served: Served) -> None:
        for text, part in (("coffee", "coffee"), ("the moon is blue", "understand")):
            (event,) = await served.ask(text)
            assert part in (NotRecognized.from_event(event).text or "")
        async with served.client() as client:
            await client.write_event(Recognize("lights").event())
            (event,) = await answers(client)
            assert Intent.is_type(event.type)

    serving(test)


def test_a_conversation_is_remembered_across_connections() -> None:
    async def test(served: Served) -> None:
        await served.ask("lights", "one")
        (event,) = await served.ask("and the office too", "one")
        assert {e.name: e.value for e in Intent.from_event(event).entities}["area"] == "Office"
        await served.ask("gibberish", "one")
        await served.ask("lights", "two")
        await served.ask("lights", "one")
        await served.ask("nothing", "one")
        await served.ask("lights", "one")
        office = {**ON, "area": "Office"}
        assert served.fake.previous == [[], [ON], [office], [], [office], [ON], []]
        async with served.client() as client:
            await ask(client, "lights")
            await ask(client, "lights")
        await served.ask("lights")
        assert served.fake.previous[-3:] == [[], [ON], []]

    serving(test)


def test_conversations_are_forgotten() -> None:
    now = [0.0]
    kept: Conversations[int] = Conversations(lambda: now[0])
    for number in range(MOST + 1):
        kept.put(f"c{number}", number)
    assert kept.get("c0", -1) == -1
    assert kept.get("c1", -1) == 1
    kept.put("", 1)
    kept.put("x" * 10_000, 1)
    assert kept.get("", -1) == kept.get("x" * 10_000, -1) == -1
    now[0] = SECONDS
    assert kept.get("c1", -1) == -1


def test_twenty_clients_at_once_are_all_answered() -> None:
    async def client(served: Served, number: int) -> int:
        async with served.client() as client:
            for _ in range(5):
                (event,) = await ask(client, "lights", f"c{number}")
                assert Intent.from_event(event).context == {"conversation_id": f"c{number}"}
        return 5

    async def test(served: Served) -> None:
        assert sum(await asyncio.gather(*(client(served, n) for n in range(20)))) == 100

    serving(test)


GARBAGE = {
    "no json": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "empty line": b"\n",
    "binary": bytes(range(256)) * 4 + b"\n",
    "number": b"42\n",
    "list": b"[1]\n",
    "no type": b'{"data": {}}\n',
    "type of another kind": b'{"type": 7}\n',
    "data of another kind": b'{"type": "transcript", "data": [1]}\n',
    "text of another kind": b'{"type": "transcript", "data": {"text": {"a": 1}}}\n',
    "no text": b'{"type": "transcript"}\n',
    "context of another kind": b'{"type": "transcript", "data": {"text": "lights", "context": "x"}}\n',
    "negative length": b'{"type": "transcript", "data_length": -5}\n',
    "length of another kind": b'{"type": "transcript", "data_length": "9"}\n',
    "huge data": b'{"type": "transcript", "data_length": 99999999999}\n',
    "huge payload": b'{"type": "audio-chunk", "payload_length": 99999999999}\n',
    "data that is no object": b'{"type": "transcript", "data_length": 3}\n[1]',
    "half a surrogate": b'{"type": "transcript", "data": {"text": "lights \\ud800"}}\n',
    "deep": b'{"type": "transcript", "data": ' + b"[" * 30_000 + b"\n",
    "long line": b'{"type": "' + b"x" * 100_000 + b'"}\n',
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_gets_an_error_and_others_their_answers(name: str) -> None:
    async def test(served: Served) -> None:
        async with served.client() as client:
            answer = await served.raw(GARBAGE[name])
            assert not answer or json.loads(answer.split(b"\n")[0])["type"] == "error"
            assert Intent.is_type((await ask(client, "lights"))[0].type)

    serving(test)


@given(st.one_of(
    st.binary(max_size=200),
    st.recursive(st.none() | st.integers() | st.text() | st.floats(), lambda inner: st.lists(inner) | st.dictionaries(
        st.sampled_from(["type", "data", "data_length", "payload_length", "text"]), inner)).map(
            lambda value: json.dumps(value).encode() + b"\n{}"),
))  # fmt: skip
@settings(deadline=None)
def test_any_bytes_are_an_event_or_refused(data: bytes) -> None:
    async def main() -> None:
        reader = asyncio.StreamReader(Settings().most_bytes)
        reader.feed_data(data)
        reader.feed_eof()
        with suppress(BadEvent, EOFError):
            while (event := await read_event(reader, Settings())) is not None:
                assert isinstance(event.type, str)
                assert isinstance(event.data, dict)

    asyncio.run(main())


def test_clients_that_leave_in_the_middle_harm_nobody() -> None:
    async def test(served: Served) -> None:
        line = json.dumps({"type": "transcript", "data": {"text": "lights"}}).encode() + b"\n"
        for cut in range(0, len(line) + 1, 7):
            await served.raw(line[:cut], read=False)
        served.fake.gate.clear()  # these leave while they are computed
        for _ in range(10):
            await served.raw(line, read=False)
        served.fake.gate.set()
        assert Intent.is_type((await served.ask("lights"))[0].type)

    serving(test)


def test_who_stalls_in_an_event_is_sent_away() -> None:
    async def test(served: Served) -> None:
        assert await served.raw(b'{"type": "transcri') == b""
        assert await served.raw(b'{"type": "transcript", "data_length": 100}\n{') == b""

    serving(test, event_seconds=0.3)


def test_a_flood_that_is_never_read_ends_and_holds_up_nobody() -> None:
    async def test(served: Served) -> None:
        flood = b'{"type": "describe"}\n' * 3200  # 64 times: answers of 100 MB
        task = asyncio.create_task(served.raw(*[flood] * 64, read=False))
        for _ in range(20):
            assert Intent.is_type((await served.ask("lights"))[0].type)
            await asyncio.sleep(0.05)
        await asyncio.wait_for(task, 30)

    before = psutil.Process().memory_info().rss
    serving(test, event_seconds=3.0)
    assert psutil.Process().memory_info().rss - before < 64 << 20


def test_a_slow_answer_is_refused_and_the_next_one_is_not() -> None:
    async def test(served: Served) -> None:
        served.fake.gate.clear()
        (event,) = await served.ask("lights")
        assert Error.from_event(event).code == "timeout"
        async with served.client() as client:  # others are described meanwhile
            await client.write_event(Describe().event())
            assert Info.is_type((await answers(client))[0].type)
        served.fake.gate.set()
        assert Intent.is_type((await served.ask("lights"))[0].type)

    serving(test, answer_seconds=2.0)


def test_too_many_requests_are_refused() -> None:
    async def test(served: Served) -> None:
        served.fake.gate.clear()
        waiting = [asyncio.create_task(served.ask("lights")) for _ in range(3)]
        await served.pending(3)
        (event,) = await served.ask("lights")
        assert Error.from_event(event).code == "busy"
        (event,) = await served.ask("x" * 2000)
        assert Error.from_event(event).code == "too-long"
        served.fake.gate.set()
        for answer in await asyncio.gather(*waiting):
            assert Intent.is_type(answer[0].type)

    serving(test, most_pending=3)


def test_the_idlest_client_makes_room() -> None:
    async def test(served: Served) -> None:
        async with served.client() as old, served.client() as newer:
            await ask(old, "lights")
            await ask(newer, "lights")
            assert Intent.is_type((await served.ask("lights"))[0].type)
            assert await old.read_event() is None
            assert Intent.is_type((await ask(newer, "lights"))[0].type)
            served.fake.gate.clear()
            busy = [asyncio.create_task(served.ask("lights")), asyncio.create_task(ask(newer, "lights"))]
            await served.pending(2)
            async with served.client() as third:
                (event,) = await answers(third)
                assert Error.from_event(event).code == "busy"
            served.fake.gate.set()
            await asyncio.gather(*busy)

    serving(test, most_clients=2)


def test_who_is_being_answered_at_the_end_gets_the_answer() -> None:
    async def test(served: Served) -> None:
        async with served.client() as idle, served.client() as busy:
            await ask(idle, "lights")
            served.fake.gate.clear()
            answer = asyncio.create_task(ask(busy, "lights"))
            await served.pending(1)
            end = asyncio.create_task(served.service.end())
            with suppress(OSError):
                assert await idle.read_event() is None
            served.fake.gate.set()
            assert Intent.is_type((await answer)[0].type)
            await asyncio.wait_for(end, 20)  # long before the grace is over

    serving(test, grace_seconds=600.0)


def test_a_failure_of_ours_is_told_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def test(served: Served) -> None:
        served.fake.error = ZeroDivisionError("ours")
        (event,) = await served.ask("lights")
        assert Error.from_event(event).code == "failed"
        served.fake.error = None
        assert Intent.is_type((await served.ask("lights"))[0].type)

    serving(test)
    assert "ZeroDivisionError" in caplog.text


def test_the_large_model_answers_what_is_no_command(tiny_model: Path) -> None:
    async def test(served: Served) -> None:
        async with served.client() as client:
            await client.write_event(Describe().event())
            info = Info.from_event((await answers(client))[0])
            assert [(p.name, p.supports_handled_streaming) for p in info.handle] == [(HANDLE_PROGRAM, True)]
            events = await ask(client, "why is the sky blue", "c")
            assert HandledStart.is_type(events[0].type)
            assert HandledStop.is_type(events[-1].type)
            chunks = [HandledChunk.from_event(e).text for e in events if HandledChunk.is_type(e.type)]
            (whole,) = [Handled.from_event(e) for e in events if Handled.is_type(e.type)]
            assert "".join(chunks) == whole.text
            assert whole.context == {"conversation_id": "c"}
            assert Intent.is_type((await ask(client, "lights"))[0].type)
            await client.write_event(SelectProgram(INTENT_PROGRAM).event())
            assert NotRecognized.is_type((await ask(client, "why is the sky blue"))[0].type)
            await client.write_event(SelectProgram(HANDLE_PROGRAM).event())
            assert HandledStart.is_type((await ask(client, "lights"))[0].type)

    with SmallThinker(tiny_model, threads=1) as model:
        serving(test, model, most_tokens=8)


def test_who_leaves_ends_the_answer_of_the_large_model(tiny_model: Path) -> None:
    async def test(served: Served) -> None:
        async with served.client() as client:
            await client.write_event(Transcript("tell me a story").event())
            assert await client.read_event() is not None
        await served.pending(0)

    with SmallThinker(tiny_model, threads=1) as model:
        serving(test, model, most_tokens=100_000)


# As a process


@contextmanager
def process(*options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`smallthinker-edge wyoming`, and where it listens; ended with SIGTERM, which it must obey."""
    command = [sys.executable, "-m", "smallthinker_edge", "wyoming", *options]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stderr is not None
        uri = ""
        if "stdio://" not in options:
            line = child.stderr.readline().decode()
            found = re.search(r"listening on (\S+)", line)
            assert found, line + child.stderr.read().decode()
            uri = found[1]
        yield child, uri
        child.terminate()
        assert child.wait(20) == 0, child.stderr.read().decode()
    finally:
        child.kill()
        child.communicate()


def test_a_real_process_turns_sentences_into_intents_and_ends_on_sigterm(demo_model: Path, tmp_path: Path) -> None:
    home = tmp_path / "home.json"
    home.write_text(json.dumps({"areas": ["Kitchen"], "devices": [{"name": "Desk Lamp", "domain": "light"}]}))

    async def test(port: int) -> None:
        async with AsyncTcpClient("127.0.0.1", port) as client:
            (event,) = await ask(client, "turn on the kitchen light")
            assert Intent.from_event(event).name == "HassTurnOn"

    with process("--model", str(demo_model), "--home", str(home), "--uri", "tcp://127.0.0.1:0") as (child, uri):
        port = int(uri.rpartition(":")[2])
        asyncio.run(test(port))
        idle = socket.create_connection(("127.0.0.1", port))  # holds up no end
        limit = 80 if find_spec("llguidance") else 70  # which takes 10 MiB
        assert psutil.Process(child.pid).memory_info().rss < limit << 20
    idle.close()


class Neighbour:
    """Stands in for whisper (hears what it is told it heard) or piper (answers with a little noise)."""

    def __init__(self, hears: str = "") -> None:
        self.hears, self.audio, self.texts = hears, b"", list[str]()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (event := await async_read_event(reader)) is not None:
            if AudioChunk.is_type(event.type):
                self.audio += AudioChunk.from_event(event).audio
            elif AudioStop.is_type(event.type):
                await async_write_event(Transcript(self.hears).event(), writer)
            elif Synthesize.is_type(event.type):
                self.texts.append(Synthesize.from_event(event).text)
                for answer in (AudioStart(22050, 2, 1), AudioChunk(22050, 2, 1, bytes(200)), AudioStop()):
                    await async_write_event(answer.event(), writer)
        writer.close()


def test_the_example_goes_from_a_recording_to_a_spoken_answer(tmp_path: Path) -> None:
    def listening(server: asyncio.Server) -> str:
        return f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def test(served: Served) -> None:
        whisper, piper = Neighbour("both"), Neighbour()
        with wave.open(str(tmp_path / "in.wav"), "wb") as recording:
            recording.setparams((1, 2, 16000, 0, "NONE", ""))
            recording.writeframes(bytes(range(250)) * 40)
        async with (
            await asyncio.start_server(whisper.serve, "127.0.0.1", 0) as first,
            await asyncio.start_server(piper.serve, "127.0.0.1", 0) as last,
        ):
            child = await asyncio.create_subprocess_exec(
                sys.executable, str(VOICE), str(tmp_path / "in.wav"), str(tmp_path / "out.wav"),
                "--whisper", listening(first), "--smallthinker", f"tcp://127.0.0.1:{served.port}",
                "--piper", listening(last), stdout=subprocess.PIPE,
            )  # fmt: skip
            output, _ = await child.communicate()
        assert child.returncode == 0
        assert b"HassTurnOn" in output
        assert b"HassTurnOff" in output
        assert whisper.audio == bytes(range(250)) * 40
        assert piper.texts == ["Turned on. Turned off"]
        with wave.open(str(tmp_path / "out.wav")) as answer:
            assert (answer.getframerate(), answer.readframes(1000)) == (22050, bytes(200))

    serving(test)


def test_a_real_process_holds_two_models(demo_model: Path, tiny_model: Path) -> None:
    async def test(port: int) -> None:
        async with AsyncTcpClient("127.0.0.1", port) as client:
            await client.write_event(SelectProgram(HANDLE_PROGRAM).event())
            assert HandledStop.is_type((await ask(client, "why is the sky blue"))[-1].type)
            await client.write_event(SelectProgram(INTENT_PROGRAM).event())
            assert Intent.is_type((await ask(client, "turn on the kitchen light"))[0].type)

    options = ("-m", str(tiny_model), "--memory", "1GiB", "--max-tokens", "8", "--answer-threads", "1")
    with process("--model", str(demo_model), "--uri", "tcp://127.0.0.1:0", *options) as (_, uri):
        asyncio.run(test(int(uri.rpartition(":")[2])))


def test_a_unix_socket_is_served_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "home.sock"

    async def test() -> None:
        async with AsyncUnixClient(path) as client:
            await client.write_event(Describe().event())
            assert Info.is_type((await answers(client))[0].type)

    with process("--uri", f"unix://{path}"):
        asyncio.run(test())
    assert not path.exists()


def test_standard_streams_are_served_until_they_end() -> None:
    with process("--uri", "stdio://") as (child, _):
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b'{"type": "describe"}\n')
        child.stdin.flush()
        assert json.loads(child.stdout.readline())["type"] == "info"
        child.stdin.close()
        child.stdin = None
        assert child.wait(20) == 0


def test_an_address_that_makes_no_sense_is_one_line(tmp_path: Path) -> None:
    for uri, code in (("http://x", 2), ("tcp://127.0.0.1", 2), ("tcp://192.0.2.1:1", 1)):
        command = [sys.executable, "-m", "smallthinker_edge", "wyoming", "--uri", uri]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr


def test_zeroconf_tells_where_it_is() -> None:
    zeroconf = pytest.importorskip("zeroconf.asyncio")

    async def find(port: int) -> None:
        async with zeroconf.AsyncZeroconf(interfaces=["127.0.0.1"]) as network:
            info = await network.async_get_service_info(SERVICE_TYPE, f"parlour.{SERVICE_TYPE}", 10_000)
            if info is None:
                pytest.skip("this machine passes no multicast on to itself")
            assert (info.port, info.parsed_addresses()) == (port, ["127.0.0.1"])

    with process("--uri", "tcp://127.0.0.1:0", "--zeroconf", "parlour") as (_, uri):
        asyncio.run(find(int(uri.rpartition(":")[2])))


def test_run_ends_on_a_signal() -> None:
    async def main() -> None:
        service = WyomingService(Fake().understand, HOME)
        asyncio.get_running_loop().call_later(0.2, os.kill, os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(run(service, "tcp://127.0.0.1:0"), 10)

    asyncio.run(main())
