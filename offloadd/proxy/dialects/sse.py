"""Server-sent events as OpenAI's API uses them: `data:` lines, a blank line after each, `[DONE]` at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

DONE = b"data: [DONE]\n\n"
_MAX_EVENT = 8 * 2**20


class BrokenStreamError(Exception):
    """What an engine sent is not a stream of JSON events."""


class CutStreamError(BrokenStreamError):
    """A stream that ended, by itself and in good order, before its answer did."""

    def __init__(self) -> None:
        super().__init__("the stream ended before the answer did")


@contextmanager
def understanding() -> Iterator[None]:
    """Within it an engine's events are read: parts of other kinds than they should be are a BrokenStreamError."""
    try:
        yield
    except (AttributeError, TypeError, LookupError, ValueError, OverflowError, RecursionError) as error:
        raise BrokenStreamError(f"an event is not as expected: {type(error).__name__}: {error}") from None


def event(payload: object, name: str = "") -> bytes:
    """One event with a JSON payload, and a name where the dialect gives them one."""
    head = b"event: " + name.encode() + b"\n" if name else b""
    return head + b"data: " + msgspec.json.encode(payload) + b"\n\n"


def decode(payload: bytes) -> dict[str, Any]:
    """The object that an event carries; BrokenStreamError when it is none."""
    try:
        return msgspec.json.decode(payload, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BrokenStreamError(f"an event is not a JSON object: {error}") from None


class EventReader:
    """Splits a byte stream into the payloads of its events, whatever the borders of its chunks."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Payloads of the events that `chunk` completes, `[DONE]` and comments left out; BrokenStreamError when one has no end."""
        lines = (self._rest + chunk).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > _MAX_EVENT:
            raise BrokenStreamError(f"an event of more than {_MAX_EVENT} bytes")
        for line in lines:
            field, _, value = line.rstrip(b"\r").partition(b":")
            payload = value.strip()
            if field == b"data" and payload and payload != b"[DONE]":
                yield payload
