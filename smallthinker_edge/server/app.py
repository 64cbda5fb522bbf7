"""The server's routes over one model. Everything that computes goes through the model's asynchronous calls."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from smallthinker_edge.completions.arguments import CHAT_ARGUMENTS, TEXT_ARGUMENTS
from smallthinker_edge.model import SmallThinker
from smallthinker_edge.server.body import BodyReader, known_arguments
from smallthinker_edge.server.errors import RequestError, error_response, http_exception, status_of
from smallthinker_edge.server.events import EventStream, while_connected
from smallthinker_edge.server.guard import Guard
from smallthinker_edge.server.metrics import Metrics
from smallthinker_edge.server.settings import Settings

logger = logging.getLogger(__name__)
CLIENT_GONE = 499  # as nginx logs it; nobody is there to read it


def make_app(model: SmallThinker, settings: Settings | None = None) -> Starlette:
    """An ASGI application that serves a model, which stays the caller's to close."""
    server = Server(model, settings or Settings())
    return Starlette(
        routes=[
            Route("/", server.page),
            Route("/healthz", server.health),
            Route("/metrics", server.show_metrics),
            Route("/v1/models", server.models),
            Route("/v1/models/{name:path}", server.one_model),
            Route("/v1/completions", server.counted(server.completion), methods=["POST"]),
            Route("/v1/chat/completions", server.counted(server.chat_completion), methods=["POST"]),
        ],
        middleware=[Middleware(Guard, server.settings)],
        exception_handlers={HTTPException: http_exception},
    )


class Server:
    """What the routes share."""

    def __init__(self, model: SmallThinker, settings: Settings) -> None:
        self.settings = settings
        self._model, self._metrics = model, Metrics()
        self._started = int(time.time())
        self._bodies = BodyReader(settings)
        self._pending = 0
        self._ends: deque[float] = deque(maxlen=8)  # when the newest answers were done
        page = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        self._page, self._page_headers = page, {"Content-Security-Policy": content_policy(page), **PAGE_HEADERS}

    def counted(self, route: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """The route, with what it raises answered and every answer counted."""

        async def answer(request: Request) -> Response:
            try:
                response = await route(request)
            except ClientDisconnect:
                logger.info("a client left; its answer is not computed any further")
                response = Response(status_code=CLIENT_GONE)
            except RequestError as error:
                response = error_response(error)
            except Exception as error:
                if status_of(error) >= 500:
                    logger.exception("a request failed")
                response = error_response(error)
            self._metrics.requests[request.url.path, response.status_code] += 1
            return response

        return answer

    async def chat_completion(self, request: Request) -> Response:
        body = await self._bodies.read_object(request)
        own = frozenset({"messages", "stream"})
        arguments = known_arguments(body, CHAT_ARGUMENTS, own, self.settings, self._model.context)
        return await self._answer(request, body, self._model.acreate_chat_completion, body.get("messages"), arguments)

    async def completion(self, request: Request) -> Response:
        body = await self._bodies.read_object(request)
        own = frozenset({"prompt", "stream"})
        arguments = known_arguments(body, TEXT_ARGUMENTS, own, self.settings, self._model.context)
        return await self._answer(request, body, self._model.acreate_completion, body.get("prompt"), arguments)

    async def _answer(
        self, request: Request, body: dict[str, Any], call: Callable[..., Any], subject: Any, arguments: dict[str, Any]
    ) -> Response:
        stream = body.get("stream") or False
        if not isinstance(stream, bool):
            raise RequestError(400, "stream must be true or false")
        if self._pending >= self.settings.most_pending:
            raise RequestError(429, "too many requests wait for their turn", {"Retry-After": str(self._retry_after())})
        progress = "waiting"

        def tell(done: int, total: int) -> None:
            nonlocal progress
            progress = f"prompt {done}/{total}"

        self._pending += 1
        try:
            work = call(subject, stream=stream, on_prompt=tell, **arguments)
            answer = await while_connected(request.receive, work)
        except BaseException:
            self._done()
            raise
        if not stream:
            self._done()
            return JSONResponse(answer)
        answer.when_computed(self._done)
        return EventStream(answer, lambda: progress, self.settings)

    def _done(self) -> None:
        self._pending -= 1
        self._ends.append(time.monotonic())

    def _retry_after(self) -> int:
        """Whole seconds until the next answer will probably be done, by the time between the newest ones."""
        apart = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1) if len(self._ends) > 1 else 0.0
        return max(1, min(60, round(apart)))

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def one_model(self, request: Request) -> Response:
        if request.path_params["name"] != self._model.name:
            raise HTTPException(404, f"there is one model here, {self._model.name!r}")
        return JSONResponse(self._described())

    def _described(self) -> dict[str, Any]:
        return {
            "id": self._model.name,
            "object": "model",
            "created": self._started,
            "owned_by": "local",
            "context_length": self._model.context,
        }

    async def health(self, request: Request) -> Response:
        """200 while the model can be asked, 503 when it is closed."""
        usable = self._model.is_open
        return JSONResponse({"status": "ok" if usable else "closed"}, 200 if usable else 503)

    async def show_metrics(self, request: Request) -> Response:
        stats = await asyncio.to_thread(self._model.stats)  # a board's temperature may take a moment
        text = self._metrics.text(stats, self._model.plan.limit, self._pending, self.settings.most_pending)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def page(self, request: Request) -> Response:
        return HTMLResponse(self._page, headers=self._page_headers)


PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def content_policy(page: str) -> str:
    """A Content-Security-Policy that lets run what stands in the page, and nothing else."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
