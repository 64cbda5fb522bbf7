"""A small local HTTP server that streams answers as server-sent events and stops when the reader goes away.

    python examples/streaming_server.py [--port 8080] [--model MODEL.gguf]
    curl -N -d '{"messages": [{"role": "user", "content": "turn on the kitchen light"}]}' localhost:8080/chat

Standard library only. It listens on this machine alone and has no authentication: an example, not a product.
"""

from __future__ import annotations

import argparse
import json
import select
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import smallthinker_edge
from smallthinker_edge import SmallThinker, SmallThinkerError

MAX_BODY = 1 << 20
MAX_TOKENS = 512


def cancel_when_gone(connection: socket.socket, cancel: threading.Event, done: threading.Event) -> None:
    """Sets `cancel` when the client closes its side, which also stops a long prompt before its first token."""
    while not done.is_set():
        readable, _, _ = select.select([connection], [], [], 0.2)
        try:
            if readable and not connection.recv(1, socket.MSG_PEEK):
                cancel.set()
        except OSError:
            cancel.set()
        if readable:
            return


class Handler(BaseHTTPRequestHandler):
    """POST /chat with {"messages": [...], "max_tokens": N}; requests of several clients take turns computing."""

    model: SmallThinker

    def do_POST(self) -> None:
        if self.path != "/chat":
            self.send_error(404)
            return
        cancel, done = threading.Event(), threading.Event()
        try:
            messages, max_tokens = self.read_request()
            pieces = self.model.stream_chat(messages, max_tokens=max_tokens, cancel=cancel)
        except (SmallThinkerError, ValueError) as error:
            self.send_error(400, explain=str(error))
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        threading.Thread(target=cancel_when_gone, args=(self.connection, cancel, done), daemon=True).start()
        try:
            for piece in pieces:
                self.send_event({"text": piece})
            self.send_event({"done": True})
        except (BrokenPipeError, ConnectionResetError):
            cancel.set()
        finally:
            done.set()
        if cancel.is_set():
            self.log_message("the reader went away; stopped")

    def read_request(self) -> tuple[list[dict[str, str]], int]:
        """(messages, most tokens). Raises ValueError for a body that is not such a request."""
        length = int(self.headers.get("Content-Length", 0))
        if not 0 < length <= MAX_BODY:
            raise ValueError(f"a body of 1 to {MAX_BODY} bytes is needed")
        body = json.loads(self.rfile.read(length))
        if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
            raise ValueError('the body must be {"messages": [...]}')
        max_tokens = body.get("max_tokens", MAX_TOKENS)
        if not isinstance(max_tokens, int):
            raise ValueError("max_tokens must be a whole number")
        return body["messages"], max_tokens

    def send_event(self, event: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    demo = Path(smallthinker_edge.__file__).with_name("data") / "demo.gguf"
    parser.add_argument("--model", default=demo, help="GGUF file (default: the embedded demo model)")
    parser.add_argument("--port", type=int, default=8080)
    arguments = parser.parse_args()
    with SmallThinker(arguments.model) as model:
        Handler.model = model
        server = ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler)
        print(f"Listening on http://127.0.0.1:{server.server_port}/chat; Ctrl-C ends.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            server.server_close()


if __name__ == "__main__":
    main()
