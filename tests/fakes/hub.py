"""A local server that speaks as much of the hub's API as a download needs, and misbehaves when told to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(slots=True)
class Hub:
    """What it has, and how it behaves."""

    repositories: Mapping[str, Mapping[str, bytes]]
    url: str = ""
    cut_after: int | None = None
    """Close the connection after so many bytes of a large file."""
    lies_about: str = ""
    """Send other bytes than announced for this file."""
    gate: threading.Event | None = None
    """A large file's last bytes wait for it."""
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and Range of each request."""


@contextlib.contextmanager
def serving(repositories: Mapping[str, Mapping[str, bytes]]) -> Iterator[Hub]:
    hub = Hub(repositories)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        if hub.gate is not None:
            hub.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()


def is_large(path: str) -> bool:
    return path.endswith((".gguf", ".safetensors"))


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, self.headers.get("Range", "")))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._api("/".join(parts[2:4]), parts[4:])
        elif len(parts) > 4 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), "/".join(parts[4:]), with_body=with_body)
        else:
            self._json(404, {"error": "not found"})

    def _api(self, name: str, rest: list[str]) -> None:
        files = self.hub.repositories.get(name)
        if files is None:
            self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif rest[:1] == ["tree"]:
            self._json(200, [_entry(path, data) for path, data in files.items()])
        else:
            self._json(200, {"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]})

    def _file(self, name: str, path: str, *, with_body: bool) -> None:
        data = self.hub.repositories.get(name, {}).get(path)
        if data is None:
            self._json(404, {"error": "no"}, {"X-Error-Code": "EntryNotFound"})
            return
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        mark = hashlib.sha256(data).hexdigest() if is_large(path) else _blob(data)
        if self.hub.lies_about == path:
            data = bytes(len(data))
        body = data[begin:]
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(body)))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{mark}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if is_large(path):
            self.send_header("X-Linked-Size", str(len(data)))
            self.send_header("X-Linked-Etag", f'"{mark}"')
        self.end_headers()
        if with_body:
            self._send(path, body)

    def _send(self, path: str, body: bytes) -> None:
        if not is_large(path):
            self.wfile.write(body)
            return
        if self.hub.cut_after is not None and len(body) > self.hub.cut_after:
            self.wfile.write(body[: self.hub.cut_after])
            self.close_connection = True
            return
        with contextlib.suppress(OSError):
            if self.hub.gate is None:
                self.wfile.write(body)
                return
            half = len(body) // 2
            self.wfile.write(body[:half])
            self.wfile.flush()
            self.hub.gate.wait(60)
            self.wfile.write(body[half:])

    def _json(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _blob(data)}
    if is_large(path):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def _blob(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
