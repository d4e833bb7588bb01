"""Reads recordings of a real server, asks the same of another one, and reduces both answers to what can be compared."""

from __future__ import annotations

import json
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_SECTIONS = re.compile(rb"### REQUEST\n(.*?)\n### RESPONSE\n(.*?)\n?### META\n(.*)", re.DOTALL)
_FREE_HEADERS = {"content-length", "date", "process-start-time-unix"}
"""Headers whose values may differ."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer on the wire."""

    status: str
    headers: dict[str, str]
    body: bytes
    framing: str
    kept_open: bool


@dataclass(frozen=True, slots=True)
class Capture:
    """One recorded exchange; `head` and `body` are what the client sent."""

    head: str
    body: bytes
    answer: Answer

    @property
    def method(self) -> str:
        return self.head.split(" ", 1)[0]

    def request(self, port: int) -> bytes:
        """The same request for a server on another port."""
        lines = [line for line in self.head.split("\n") if not line.lower().startswith("host:")]
        return "\r\n".join([lines[0], f"Host: 127.0.0.1:{port}", *lines[1:], "", ""]).encode() + self.body


def load(path: Path) -> Capture:
    """Read a capture file."""
    found = _SECTIONS.fullmatch(path.read_bytes())
    assert found, f"{path.name} is not a capture"
    head, _, rest = found[1].partition(b"\n\n")
    sent = re.search(rb"^content-length: (\d+)", head, re.IGNORECASE | re.MULTILINE)
    length = int(sent[1]) if sent else 0
    assert len(rest) >= length, f"{path.name} has a shortened body: it cannot be sent again"
    meta = dict(line.split(": ", 1) for line in found[3].decode().splitlines() if ": " in line)
    status, headers, body = _parse_response(found[2])
    kept_open = meta["connection_kept_open_by_server"] == "True"
    return Capture(head.decode().rstrip("\n"), rest[:length], Answer(status, headers, body, meta["framing"], kept_open))


def _parse_response(text: bytes) -> tuple[str, dict[str, str], bytes]:
    head, _, body = text.partition(b"\n\n")
    status, *lines = head.decode().split("\n")
    return status, _headers(lines), body


def _headers(lines: list[str]) -> dict[str, str]:
    return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}


def replay(capture: Capture, port: int) -> Answer:
    """Send the recorded request and read the answer as bytes on the wire; then see whether the connection serves another one."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection, connection.makefile("rb") as wire:
        connection.sendall(capture.request(port))
        status, headers = _read_head(wire)
        framing, body = _read_body(wire, headers, capture.method)
        return Answer(status, headers, body, framing, _serves_another(connection, wire))


def _read_head(wire: BinaryIO) -> tuple[str, dict[str, str]]:
    lines = []
    while line := wire.readline().decode().rstrip("\r\n"):
        lines.append(line)
    return lines[0], _headers(lines[1:])


def _read_body(wire: BinaryIO, headers: dict[str, str], method: str) -> tuple[str, bytes]:
    if method == "HEAD":
        return "no-body", b""
    if headers.get("transfer-encoding") != "chunked":
        return "content-length", wire.read(int(headers["content-length"]))
    body = b""
    while size := int(wire.readline(), 16):
        body += wire.read(size)
        wire.readline()
    wire.readline()
    return "chunked", body


def _serves_another(connection: socket.socket, wire: BinaryIO) -> bool:
    try:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        return wire.readline().startswith(b"HTTP/1.1 ")
    except ConnectionError:
        return False


def comparable(answer: Answer) -> dict[str, Any]:
    """What must be the same in two answers: status, framing, headers, connection handling, and the body's shape."""
    return {
        "status": answer.status,
        "framing": answer.framing,
        "kept open": answer.kept_open,
        "headers": {name: "any" if name in _FREE_HEADERS else value for name, value in sorted(answer.headers.items())},
        "body": _comparable_body(answer),
    }


def _comparable_body(answer: Answer) -> Any:
    kind = answer.headers.get("content-type", "")
    if not answer.body:
        return None
    if kind.startswith("text/event-stream"):
        return _event_shapes(answer.body.decode())
    if not kind.startswith("application/json"):
        return re.sub(r"(?m)^([^#\s]\S*) [-+.\de]+$", r"\1 N", answer.body.decode().rstrip("\n"))
    found = json.loads(answer.body)
    if not isinstance(found, dict) or not isinstance(found.get("error"), dict):
        return shape(found)
    # Errors are compared word for word, save what the JSON parser says.
    text = re.sub(r"(\[json\.exception\.parse_error\S+) .*", r"\1", found["error"]["message"], flags=re.DOTALL)
    return {"error": {**found["error"], "message": text}}


def _event_shapes(stream: str) -> list[Any]:
    """The shapes of a stream's events in order, with runs of equal ones told once."""
    found: list[Any] = []
    for line in stream.splitlines():
        if line.startswith("data: "):
            text = line.removeprefix("data: ")
            one = text if text == "[DONE]" else shape(json.loads(text))
            if not found or found[-1] != one:
                found.append(one)
    return found


def shape(value: Any) -> Any:
    """A JSON value with its types instead of its contents; a list becomes its distinct shapes."""
    match value:
        case dict():
            return {key: shape(item) for key, item in sorted(value.items())}
        case list():
            return [json.loads(text) for text in sorted({json.dumps(shape(item)) for item in value})]
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case None:
            return "null"
    return "string"
