"""`serve`: an HTTP server with OpenAI's API over one model."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
from importlib.util import find_spec
from pathlib import Path

from smallthinker_edge.cli.arguments import (
    OK,
    Command,
    UsageError,
    add_model_arguments,
    memory_size,
    need_package,
    open_model,
    positive_int,
    show_log,
)
from smallthinker_edge.cli.generate import add_sampling_arguments, sampling_options

KEY_VARIABLE = "SMALLTHINKER_API_KEY"
MORE_CONNECTIONS = 256  # beyond which a client is sent away with 503 before its request is looked at
GRACE_SECONDS = 5  # that answers under way have when the server is told to end


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default: this machine)"
    )
    parser.add_argument("--port", type=int, default=8080, metavar="N", help="port (default: 8080; 0: any free one)")
    parser.add_argument(
        "--api-key-file",
        metavar="FILE",
        help=f"clients must send this file's text as bearer token (or set {KEY_VARIABLE})",
    )
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="answer to this name too; * is any"
    )
    parser.add_argument(
        "--queue", type=positive_int, default=16, metavar="N", help="most requests at once (default: 16)"
    )
    parser.add_argument(
        "--max-body", type=memory_size, default=1 << 20, metavar="SIZE", help="of a request (default: 1MiB)"
    )
    parser.add_argument("--limit-tokens", type=positive_int, metavar="N", help="clip answers to this length")
    parser.add_argument(
        "--keep-sessions", type=positive_int, default=4, metavar="N", help="conversations kept in memory (default: 4)"
    )
    parser.add_argument(
        "--prefix-folder", metavar="FOLDER", help="save long system prompts, computed, and find them after a restart"
    )
    parser.add_argument(
        "--prefix-size",
        type=memory_size,
        default=1 << 30,
        metavar="SIZE",
        help="of that folder at most (default: 1GiB)",
    )
    parser.add_argument(
        "--comment-seconds", type=float, default=5.0, metavar="S", help="say something in silent streams (default: 5)"
    )
    add_sampling_arguments(parser)


def api_key(arguments: argparse.Namespace) -> str | None:
    """The key of the file or of the environment. UsageError for an empty one."""
    if arguments.api_key_file is None:
        return os.environ.get(KEY_VARIABLE) or None
    key = Path(arguments.api_key_file).read_text(encoding="utf-8").strip()
    if not key:
        raise UsageError(f"{arguments.api_key_file} is empty")
    return key


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(arguments: argparse.Namespace) -> int:
    for package in ("starlette", "uvicorn"):
        need_package("serve", package, "server")
    import uvicorn

    from smallthinker_edge.server.app import make_app
    from smallthinker_edge.server.settings import Settings

    show_log()
    key = api_key(arguments)
    local = is_loopback(arguments.host)
    if not local and key is None:
        logging.warning("anybody who reaches %s may use this server; --api-key-file asks for a key", arguments.host)
    known = Settings.hosts if local else ("*",)
    settings = Settings(
        api_key=key,
        hosts=(*known, *arguments.allow_host),
        most_body=arguments.max_body,
        most_tokens=arguments.limit_tokens,
        most_pending=arguments.queue,
        comment_seconds=arguments.comment_seconds,
        defaults=sampling_options(arguments),
    )
    with open_model(
        arguments,
        keep_sessions=arguments.keep_sessions,
        prefix_folder=arguments.prefix_folder,
        prefix_bytes=arguments.prefix_size,
        structured=find_spec("llguidance") is not None,
    ) as model:
        uvicorn.run(
            make_app(model, settings),
            host=arguments.host,
            port=arguments.port,
            server_header=False,
            ws="none",
            lifespan="off",
            timeout_graceful_shutdown=GRACE_SECONDS,
            limit_concurrency=8 * arguments.queue + MORE_CONNECTIONS,
            log_config=None,
        )
    return OK


COMMANDS = (Command("serve", "answer HTTP requests with OpenAI's API", serve_arguments, serve),)
