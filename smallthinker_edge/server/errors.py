"""Errors as OpenAI's API tells them, and which exception is which. Used by all of the server's routes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from smallthinker_edge.errors import (
    ContextFull,
    ExpertReadError,
    MemoryBudgetError,
    MissingExtra,
    OutOfMemoryError,
    SmallThinkerError,
)

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
CODES = {401: "invalid_api_key", 429: "queue_full"}


class RequestError(Exception):
    """A request that is refused: HTTP status, a message for its sender, headers beside."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


def error_body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """{"error": ...} in OpenAI's shape."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code or CODES.get(status)}}


def status_of(error: BaseException) -> int:
    """Whose fault an exception of the library is: 400 the request's, 500 and above ours."""
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, MissingExtra):
        return 501
    if isinstance(error, ExpertReadError | MemoryBudgetError | OutOfMemoryError):
        return 503
    return 400 if isinstance(error, SmallThinkerError | TypeError | ValueError) else 500


def describe(error: BaseException) -> dict[str, Any]:
    """The body for an exception; what nobody foresaw is not told to strangers."""
    status = status_of(error)
    code = "context_length_exceeded" if isinstance(error, ContextFull) else None
    return error_body(status, str(error) if status != 500 else "the server failed; its log says why", code)


def error_response(error: BaseException) -> Response:
    headers = error.headers if isinstance(error, RequestError) else None
    return JSONResponse(describe(error), status_of(error), headers)


async def http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals (404, 405) in the same shape."""
    assert isinstance(error, HTTPException)
    return JSONResponse(error_body(error.status_code, error.detail), error.status_code, error.headers)


async def library_exception(request: Request, error: Exception) -> Response:
    return error_response(error)
