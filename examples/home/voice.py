"""A spoken command without Home Assistant: a recording goes to whisper, its text to `smallthinker-edge wyoming`, what
there is to say to piper, each a Wyoming service of its own.

    arecord -f S16_LE -r 16000 -c 1 -d 4 command.wav
    python examples/home/voice.py command.wav answer.wav && aplay answer.wav

A real application does what the intents ask for where this prints them.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import wave

from wyoming.asr import Transcribe, Transcript
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncClient
from wyoming.error import Error
from wyoming.event import Event
from wyoming.handle import Handled, NotHandled
from wyoming.intent import Intent, IntentsStart, IntentsStop, NotRecognized
from wyoming.tts import Synthesize

SAMPLES = 1024  # in a chunk


async def next_event(client: AsyncClient) -> Event:
    """Raises ConnectionError where the service hangs up or tells of an error."""
    event = await client.read_event()
    if event is None or Error.is_type(event.type):
        raise ConnectionError("the service hung up" if event is None else Error.from_event(event).text)
    return event


async def transcribe(uri: str, path: str) -> str:
    async with AsyncClient.from_uri(uri) as client:
        with wave.open(path) as recording:
            rate, width, channels = recording.getframerate(), recording.getsampwidth(), recording.getnchannels()
            await client.write_event(Transcribe(language="en").event())
            await client.write_event(AudioStart(rate, width, channels).event())
            while audio := recording.readframes(SAMPLES):
                await client.write_event(AudioChunk(rate, width, channels, audio).event())
            await client.write_event(AudioStop().event())
        while not Transcript.is_type((event := await next_event(client)).type):
            pass
        return Transcript.from_event(event).text


async def understand(uri: str, text: str) -> tuple[list[Intent], str]:
    """The intents of a sentence, and what to say."""
    intents: list[Intent] = []
    several = False
    async with AsyncClient.from_uri(uri) as client:
        await client.write_event(Transcript(text).event())
        while True:
            event = await next_event(client)
            if Intent.is_type(event.type):
                intents.append(Intent.from_event(event))
            several = several or IntentsStart.is_type(event.type)
            if IntentsStop.is_type(event.type) or (intents and not several):
                # A text with braces is a template over states, which Home Assistant has and we have not.
                says = [intent.text for intent in intents if intent.text and "{" not in intent.text]
                return intents, ". ".join(says)
            for kind in (NotRecognized, NotHandled, Handled):
                if kind.is_type(event.type):
                    return [], kind.from_event(event).text or ""


async def speak(uri: str, text: str, path: str) -> None:
    async with AsyncClient.from_uri(uri) as client:
        await client.write_event(Synthesize(text).event())
        with wave.open(path, "wb") as answer:
            while not AudioStop.is_type((event := await next_event(client)).type):
                if AudioStart.is_type(event.type):
                    start = AudioStart.from_event(event)
                    answer.setparams((start.channels, start.width, start.rate, 0, "NONE", ""))
                elif AudioChunk.is_type(event.type):
                    answer.writeframes(AudioChunk.from_event(event).audio)


async def main(arguments: argparse.Namespace) -> None:
    text = await transcribe(arguments.whisper, arguments.recording)
    print(f"heard: {text.strip()}")
    intents, says = await understand(arguments.smallthinker, text)
    for intent in intents:
        print(intent.name, {entity.name: entity.value for entity in intent.entities})
    print(f"says: {says}")
    if says:
        await speak(arguments.piper, says, arguments.answer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A spoken command through three Wyoming services.")
    parser.add_argument("recording", help="WAV file of the command")
    parser.add_argument("answer", help="WAV file to write what is said")
    parser.add_argument("--whisper", default="tcp://127.0.0.1:10300", metavar="URI")
    parser.add_argument("--smallthinker", default="tcp://127.0.0.1:10400", metavar="URI")
    parser.add_argument("--piper", default="tcp://127.0.0.1:10200", metavar="URI")
    try:
        asyncio.run(main(parser.parse_args()))
    except (OSError, wave.Error) as error:
        sys.exit(f"error: {error}")
