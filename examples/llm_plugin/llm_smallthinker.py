"""SmallThinker models for `llm` (https://llm.datasette.io): each model file is a model, with all options.

    llm install ./examples/llm_plugin        # or pip install, beside llm
    ln -s /path/to/model.stpk "$(dirname "$(llm logs path)")/smallthinker/"
    llm -m smallthinker/model "Why is the sky blue?" -o temperature 0.7
    llm -m smallthinker/model --schema "name, age int" "Invent a person"

Files lie in the folder `smallthinker` of llm's own (SMALLTHINKER_MODELS names another one); SMALLTHINKER_MEMORY is the
budget. A model is opened when it is first asked, and stays until the process ends.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import llm
from llm.parts import TextPart
from pydantic import Field, create_model

from smallthinker_edge import SmallThinker
from smallthinker_edge.options import OPTIONS

SUFFIXES = (".gguf", ".stpk")
TYPES: dict[str, Any] = {"int": int, "float": float, "choice": str, "texts": str | list[str], "bias": dict[int, float]}
# Those of the command line; None leaves the default to the library, which checks the values too.
Options: Any = create_model(
    "Options",
    __base__=llm.Options,
    **{
        name: (TYPES[option.kind] | None, Field(default=None, description=option.help))
        for name, option in OPTIONS.items()
        if option.help
    },
)


class ModelFile:
    """A file that is opened once, whether it is asked with or without coroutines."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        self._model: SmallThinker | None = None

    @property
    def name(self) -> str:
        return f"smallthinker/{self.path.stem}"

    def open(self) -> SmallThinker:
        with self._lock:
            if self._model is None:
                memory = os.environ.get("SMALLTHINKER_MEMORY")
                self._model = SmallThinker(self.path, memory, structured=memory is not None)
            return self._model


class Conversations:
    """What the models have in common: how llm's prompts become ours, and our chunks its answers."""

    needs_key = None
    can_stream = True
    supports_schema = True
    Options = Options

    def __init__(self, file: ModelFile) -> None:
        self.model_id, self.file = file.name, file

    def request(self, prompt: llm.Prompt) -> dict[str, Any]:
        """The arguments of create_chat_completion()."""
        messages = [
            {
                "role": message.role,
                "content": "".join(part.text for part in message.parts if isinstance(part, TextPart)),
            }
            for message in prompt.messages
        ]
        request = {"messages": messages, **prompt.options.model_dump(exclude_none=True)}
        if prompt.schema:
            request["response_format"] = {"type": "json_schema", "json_schema": {"schema": prompt.schema}}
        return request | {"stream_options": {"include_usage": True}}

    def piece(self, chunk: Any, response: Any) -> str:
        """The text of a chunk; notes what the last one tells."""
        if usage := chunk.get("usage"):
            response.set_usage(input=usage["prompt_tokens"], output=usage["completion_tokens"])
        for choice in chunk["choices"]:
            return choice["delta"].get("content", "")
        return ""


class SmallThinkerChat(Conversations, llm.Model):
    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Iterator[str]:
        for chunk in self.file.open().create_chat_completion(stream=True, **self.request(prompt)):
            yield self.piece(chunk, response)


class AsyncSmallThinkerChat(Conversations, llm.AsyncModel):
    async def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> AsyncGenerator[str, None]:
        chunks = await self.file.open().acreate_chat_completion(stream=True, **self.request(prompt))
        try:
            async for chunk in chunks:
                yield self.piece(chunk, response)
        finally:
            await chunks.aclose()


@llm.hookimpl
def register_models(register: Any) -> None:
    folder = Path(os.environ.get("SMALLTHINKER_MODELS") or llm.user_dir() / "smallthinker")
    for path in sorted(folder.glob("*")):
        if path.suffix in SUFFIXES:
            file = ModelFile(path)
            register(SmallThinkerChat(file), AsyncSmallThinkerChat(file))
