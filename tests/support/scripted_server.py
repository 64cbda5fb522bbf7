"""A server in a thread whose model says what a test wants: all is computed, but its tokens are chosen for it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from smallthinker_edge import SmallThinker
from smallthinker_edge.options import OPTIONS
from smallthinker_edge.server.app import make_app
from smallthinker_edge.server.settings import Settings

Script = Callable[[Sequence[Any], list[str]], str]


def call_text(tool: str, **arguments: Any) -> str:
    """A call of a tool as the grammar of calls wants it."""
    written = json.dumps(arguments, separators=(",", ":"))
    return f'<tool_call>\n{{"name": {json.dumps(tool)}, "arguments": {written}}}\n</tool_call>'


class _Speller:
    """Chooses the tokens of an ASCII text, then the end."""

    def __init__(self, model: SmallThinker, text: str) -> None:
        self._model, self._text = model, text
        self._prompt: int | None = None

    def sample(self, logits: np.ndarray, history: Sequence[int]) -> int:
        tokenizer = self._model.tokenizer
        if self._prompt is None:
            self._prompt = len(history)
        rest = self._text[len(tokenizer.decode(history[self._prompt :])) :]
        return tokenizer.encode(rest, add_bos=False, parse_special=False)[0] if rest else min(tokenizer.eos_ids)


class ScriptedModel(SmallThinker):
    """Answers a chat with script(its messages, its tools' names). asked: the arguments of every chat so far."""

    def __init__(self, path: Path, script: Script, **options: Any) -> None:
        super().__init__(path, **options)
        self._script, self.asked = script, list[dict[str, Any]]()

    async def acreate_chat_completion(self, messages: Any, **arguments: Any) -> Any:
        self.asked.append({"messages": messages, **arguments})
        kept = {name: value for name, value in arguments.items() if name not in OPTIONS or not OPTIONS[name].sampling}
        text = self._script(messages, [tool["function"]["name"] for tool in arguments.get("tools", [])])
        return await super().acreate_chat_completion(messages, sampler=_Speller(self, text), **kept)


@contextmanager
def serving_script(path: Path, script: Script, **options: Any) -> Iterator[tuple[str, ScriptedModel]]:
    """A server's URL and its model."""
    with ScriptedModel(path, script, threads=1, **options) as model:
        config = uvicorn.Config(make_app(model, Settings()), port=0, ws="none", lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        socket = config.bind_socket()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{socket.getsockname()[1]}", model
        finally:
            server.should_exit = True
            thread.join()
            socket.close()
