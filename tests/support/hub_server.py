"""A server on this machine that speaks as much of the Hugging Face Hub's API as its client needs, and can misbehave.

Used by tests/files/test_hub.py, in the test's process. Large files are redirected to a second host (another name of
this machine), as the Hub does to its storage; each request is kept in `requests`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

LARGE = 4096  # bytes from which a file is kept as LFS


@dataclass
class Hub:
    """What there is, and what goes wrong.

    Attributes:
        files: "ORG/NAME" -> name -> content; every repository has one commit. private: repositories that want `token`.
        gated: those that no token opens. drop_after: how many bytes of a file are sent before the connection drops;
        drops: how often. damage: names whose content comes with a wrong byte; no_ranges: HTTP ranges are ignored.
        xet: large files are offered by XET too, where nobody listens.
        status: an answer to everything instead.
    """

    files: dict[str, dict[str, bytes]]
    token: str = "hf_secret"
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    drop_after: int = 0
    drops: int = 0
    damage: set[str] = field(default_factory=set)
    no_ranges: bool = False
    xet: bool = False
    status: int = 0
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range
    tokens_to_storage: list[str] = field(default_factory=list)  # which must stay empty
    sent: int = 0  # bytes of files
    url: str = ""

    def commit(self, repo: str) -> str:
        names = "".join(f"{name}{len(data)}" for name, data in sorted(self.files[repo].items()))
        return hashlib.sha1((repo + names).encode()).hexdigest()


def etag(data: bytes) -> str:
    """SHA-256 of large files, git's own hash of others."""
    if len(data) >= LARGE:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        if self.hub.status:
            return self.refuse(self.hub.status)
        if match := re.fullmatch(r"/storage/([^/]+/[^/]+)/(.+)", path):
            if "Authorization" in self.headers:
                self.hub.tokens_to_storage.append(self.headers["Authorization"])
            return self.send_file(match[2], self.hub.files[match[1]][match[2]], {"ETag": '"storage"'})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            return self.send_info(match[1], match[2] or "main")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(*match.groups())
        return self.refuse(404)

    def allowed(self, repo: str) -> bool:
        """Answers by itself where not."""
        known = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if repo not in self.hub.files or (repo in self.hub.private and not known):
            self.refuse(401, "RepoNotFound")
        elif repo in self.hub.gated:
            self.refuse(403, "GatedRepo")
        else:
            return True
        return False

    def send_info(self, repo: str, revision: str) -> None:
        if not self.allowed(repo):
            return None
        if revision not in ("main", self.hub.commit(repo)):
            return self.refuse(404, "RevisionNotFound")
        siblings = []
        for name, data in self.hub.files[repo].items():
            entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": "0" * 40}
            if len(data) >= LARGE:
                entry["lfs"] = {"sha256": etag(data), "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        body = json.dumps({"id": repo, "sha": self.hub.commit(repo), "siblings": siblings}).encode()
        self.send_body(200, body, {"Content-Type": "application/json"})

    def resolve(self, repo: str, revision: str, name: str) -> None:
        if not self.allowed(repo):
            return None
        if revision not in ("main", self.hub.commit(repo)):
            return self.refuse(404, "RevisionNotFound")
        if name not in self.hub.files[repo]:
            return self.refuse(404, "EntryNotFound")
        data = self.hub.files[repo][name]
        headers = {"X-Repo-Commit": self.hub.commit(repo), "ETag": f'"{etag(data)}"'}
        if len(data) < LARGE:
            return self.send_file(name, data, headers)
        headers |= {"X-Linked-Etag": f'"{etag(data)}"', "X-Linked-Size": str(len(data))}
        if self.hub.xet:
            headers |= {"X-Xet-Hash": "0" * 64, "X-Xet-Refresh-Route": f"{self.hub.url}/api/xet-read-token"}
        headers["Location"] = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/storage/{repo}/{name}"
        return self.send_body(302, b"", headers)

    def send_file(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        if name in self.hub.damage:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start, stop, code = 0, len(data), 200
        if (match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) and not self.hub.no_ranges:
            start, code = int(match[1]), 206
            stop = min(int(match[2]) + 1, len(data)) if match[2] else len(data)
            if start >= len(data):
                return self.refuse(416)
            headers = headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        return self.send_body(code, data[start:stop], headers | {"Accept-Ranges": "bytes"}, name)

    def send_body(self, code: int, body: bytes, headers: dict[str, str], name: str = "") -> None:
        self.send_response(code)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if name and self.hub.drops and len(body) > self.hub.drop_after:
            self.hub.drops -= 1
            body = body[: self.hub.drop_after]
            self.close_connection = True
        if name:
            self.hub.sent += len(body)
        try:
            self.wfile.write(body)
        except OSError:
            self.close_connection = True  # the client had enough

    def refuse(self, code: int, reason: str = "") -> None:
        self.send_body(code, b"{}", {"X-Error-Code": reason} if reason else {})


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub under hub.url while the block runs."""
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
