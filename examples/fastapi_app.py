"""A FastAPI application with a model of its own: coroutines that never block the event loop, and end with their client.

    pip install 'smallthinker_edge' fastapi uvicorn
    SMALLTHINKER_MODEL=model.stpk uvicorn --app-dir examples fastapi_app:app
    curl -d '{"sentence": "turn on the kitchen light"}' -H 'content-type: application/json' localhost:8000/commands
    curl -Nd '{"sentence": "turn on the kitchen light"}' -H 'content-type: application/json' localhost:8000/stream

Without SMALLTHINKER_MODEL it uses the embedded demo model. One process (`--workers 1`, the default) holds one model.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from importlib.resources import as_file, files
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from smallthinker_edge import ContextFull, SmallThinker


class Order(BaseModel):
    sentence: str = Field(max_length=10_000)
    max_tokens: int = Field(200, ge=1, le=2000)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """The model is opened before the first request, and closed after the last one."""
    async with AsyncExitStack() as stack:
        path: Any = os.environ.get("SMALLTHINKER_MODEL")
        if not path:
            path = stack.enter_context(as_file(files("smallthinker_edge") / "data" / "demo.gguf"))
        app.state.model = stack.enter_context(SmallThinker(path, os.environ.get("SMALLTHINKER_MEMORY")))
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/commands")
async def commands(order: Order, request: Request) -> dict[str, Any]:
    """The commands in a sentence. Who leaves early ends the computation."""
    model: SmallThinker = request.app.state.model
    answer = asyncio.create_task(model.acreate_chat_completion(messages(order), max_tokens=order.max_tokens))
    gone = asyncio.create_task(disconnected(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise HTTPException(499)
        return {"commands": json.loads(answer.result()["choices"][0]["message"]["content"] or "")}
    except ContextFull as error:
        raise HTTPException(413, str(error)) from error
    except json.JSONDecodeError as error:
        raise HTTPException(502, "the model did not answer with JSON") from error
    finally:
        for task in (answer, gone):  # cancelling the one that waits for the answer ends its computation
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


@app.post("/stream")
async def stream(order: Order, request: Request) -> StreamingResponse:
    """The answer as server-sent events. What is wrong with the request shows before the stream begins."""
    model: SmallThinker = request.app.state.model
    try:
        chunks = await model.acreate_chat_completion(messages(order), max_tokens=order.max_tokens, stream=True)
    except ContextFull as error:
        raise HTTPException(413, str(error)) from error

    async def events() -> AsyncIterator[str]:
        try:
            async for chunk in chunks:
                yield f"data: {json.dumps(chunk)}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            await chunks.aclose()

    return StreamingResponse(events(), media_type="text/event-stream")


def messages(order: Order) -> list[dict[str, str]]:
    return [{"role": "user", "content": order.sentence}]


async def disconnected(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)
