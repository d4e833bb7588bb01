"""What of a message's head crosses the proxy, and how a head is written."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from email.utils import formatdate
from http import HTTPStatus

Fields = Sequence[tuple[bytes, bytes]]

_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"content-length",
        b"expect",
    }
)
"""Headers that belong to one connection. Lengths are ours to say, because we frame the body anew."""
_NOT_TO_BACKENDS = _HOP_BY_HOP | {
    b"host",
    b"authorization",
    b"cookie",
    b"x-api-key",
    b"accept-encoding",
    b"origin",
    b"forwarded",
    b"content-encoding",
    b"x-request-id",
}
"""Credentials are for offloadd; a backend that saw Origin would answer for itself who may read it; a body arrives here unpacked."""
_NOT_WITH_JSON = _NOT_TO_BACKENDS | {b"content-type"}
_JSON = b"Content-Type: application/json\r\n"
_NOT_TO_CLIENTS = _HOP_BY_HOP | {
    b"server",
    b"date",
    b"access-control-allow-origin",
    b"access-control-allow-credentials",
    b"x-request-id",
}
_NOT_IN_TRAILERS = _NOT_TO_CLIENTS | {
    b"content-type",
    b"content-encoding",
    b"content-range",
    b"set-cookie",
    b"authorization",
    b"host",
}
"""What a trailer must not say, because it decides how a message is read."""
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


class BrokenAnswerError(Exception):
    """What a backend sent is not an HTTP answer, or not one that may be passed on."""


def request_head(method: str, target: str, authority: str, fields: Fields, own: bytes, *, as_json: bool = False) -> bytes:
    """The head of a request to a backend, without its framing and its last empty line.

    `as_json`: the body is JSON, whatever `fields` say of its type.
    """
    return request_start(method, target, authority) + onward(fields, as_json=as_json) + own


def request_start(method: str, target: str, authority: str) -> bytes:
    """How such a head begins."""
    # What comes is read and put together here, and a token is too short to compress.
    start = b"%b %b HTTP/1.1\r\nHost: %b\r\nAccept-Encoding: identity\r\n"
    return start % (method.encode("ascii"), target.encode("ascii"), authority.encode("ascii"))


def onward(fields: Fields, *, as_json: bool) -> bytes:
    """The client's header fields that a backend gets, as lines."""
    return _kept(fields, _NOT_WITH_JSON) + _JSON if as_json else _kept(fields, _NOT_TO_BACKENDS)


def response_head(status: int, fields: Fields, own: bytes) -> bytes:
    """The head of an answer to a client, without its framing and its last empty line."""
    return response_start(status, to_client(fields), own)


def response_start(status: int, lines: bytes, own: bytes) -> bytes:
    """The same of fields that are lines already."""
    return b"%b%bDate: %b\r\n%b" % (_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status, lines, _date(), own)


def to_client(fields: Fields) -> bytes:
    """An answer's header fields that a client gets, as lines."""
    return _kept(fields, _NOT_TO_CLIENTS)


def trailer_lines(fields: Fields) -> bytes:
    """What of an answer's trailer a client may see."""
    return _kept(fields, _NOT_IN_TRAILERS)


def lines(fields: Iterable[tuple[str, str]]) -> bytes:
    """Headers of our own as lines. Line breaks in a value become spaces; what is not Latin-1 becomes a question mark."""
    text = ""
    for name, value in fields:
        if not value.isprintable():
            value = " ".join(value.split())
        text += f"{name}: {value}\r\n"
    return text.encode("latin-1", "replace")


def field(fields: Fields, name: bytes) -> bytes:
    """The value of the first such header, or nothing."""
    return next((value for key, value in fields if key.lower() == name), b"")


def _kept(fields: Fields, dropped: frozenset[bytes]) -> bytes:
    kept = []
    for name, value in fields:
        key = name.lower()
        if key in dropped:
            if key == b"connection" and b"," in value + b"," and value.lower() not in (b"close", b"keep-alive"):
                return _kept([pair for pair in fields if pair[0].lower() != b"connection"], dropped | _named(fields))
            continue
        kept.append(b"%b: %b\r\n" % (name, value))
    lines = b"".join(kept)
    if not lines.count(b"\n") == lines.count(b"\r") == len(kept) or b"\0" in lines:
        raise BrokenAnswerError("a header holds a line break")
    return lines


def _named(fields: Fields) -> frozenset[bytes]:
    """Headers that `Connection` names as belonging to this connection only."""
    values = [value for name, value in fields if name.lower() == b"connection"]
    return frozenset(token.strip().lower() for value in values for token in value.split(b","))


class _Dated:
    """Now, as HTTP writes it; written anew once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._text = b""

    def __call__(self) -> bytes:
        second = int(time.time())
        if second != self._second:
            self._second, self._text = second, formatdate(second, usegmt=True).encode()
        return self._text


_date = _Dated()
