"""One answer of an engine, event by event, in a client's words: the part that all translated dialects share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import msgspec

from offloadd.errors import RequestError
from offloadd.proxy.dialects import sse
from offloadd.proxy.dialects.base import Change, Gathering
from offloadd.proxy.dialects.refusals import event_error

Object = dict[str, Any]


class Turn(Protocol):
    """Translates one answer. It sees the engine's events in order and gives the client's."""

    @property
    def complete(self) -> bool:
        """Whether the engine has said how the answer finished."""
        ...

    def add(self, event: Object) -> list[Object]:
        """What one event of the engine becomes."""
        ...

    def finish(self) -> list[Object]:
        """What closes a complete answer."""
        ...

    def refuse(self, error: RequestError) -> list[Object]:
        """What tells a client in mid-answer that there will be no more."""
        ...


class Merge(Protocol):
    """Makes the whole answer of the client's events."""

    def add(self, event: Object) -> None:
        """Take one event in."""
        ...

    def answer(self) -> Object:
        """The whole."""
        ...


Encode = Callable[[Iterable[Object]], bytes]


class TurnStream(Change):
    """The answer for a client that wants a stream."""

    def __init__(self, turn: Turn, encode: Encode, media_type: str, closing: bytes = b"") -> None:
        self.media_type = media_type
        self._closing = closing
        self._turn = turn
        self._encode = encode
        self._reader = sse.EventReader()
        self._failed = False

    def feed(self, chunk: bytes) -> bytes:
        """The client's events for those of the engine that the chunk completes; nothing after an error."""
        return b"".join(self._encode(self._told(sse.decode(payload))) for payload in self._reader.feed(chunk))

    def end(self) -> bytes:
        """The closing events; CutStreamError when the engine's stream ended before its answer did."""
        if self._failed:
            return b""
        if not self._turn.complete:
            raise sse.CutStreamError
        return self._encode(self._turn.finish()) + self._closing

    def fail(self, error: RequestError) -> bytes:
        """The error in the dialect's own shape, once."""
        if self._failed:
            return b""
        self._failed = True
        return self._encode(self._turn.refuse(error))

    def _told(self, event: Object) -> list[Object]:
        if self._failed:
            return []
        if is_error(event):
            self._failed = True
            return self._turn.refuse(event_error(event))
        return self._turn.add(event)


class TurnGathering(Gathering):
    """The answer for a client that wants it whole."""

    def __init__(self, turn: Turn, merge: Merge) -> None:
        self._turn = turn
        self._merge = merge
        self.error: Object | None = None

    @property
    def complete(self) -> bool:
        """Whether the engine has said how the answer finished."""
        return self._turn.complete

    def add(self, chunk: Object) -> None:
        """Take one of the engine's events in."""
        if is_error(chunk):
            self.error = self.error or chunk
            return
        for event in self._turn.add(chunk):
            self._merge.add(event)

    def answer(self) -> Object:
        """The whole answer."""
        for event in self._turn.finish():
            self._merge.add(event)
        return self._merge.answer()


def is_error(event: Object) -> bool:
    """Whether an event says that the engine failed. A `null` error is none: some events carry the field always."""
    return bool(event.get("error")) and "choices" not in event and "response" not in event


def as_named_events(events: Iterable[Object]) -> bytes:
    """Server-sent events that bear the name of their `type`."""
    return b"".join(sse.event(event, str(event.get("type", ""))) for event in events)


def as_events(events: Iterable[Object]) -> bytes:
    """Server-sent events without a name."""
    return b"".join(map(sse.event, events))


def as_lines(events: Iterable[Object]) -> bytes:
    """One JSON object a line."""
    return b"".join(msgspec.json.encode(event) + b"\n" for event in events)


def deltas(chunk: Object) -> tuple[Object, Object]:
    """The first choice of one of OpenAI's chunks, and what it adds; both empty where it has none."""
    choice = next(iter(chunk.get("choices") or ()), None) or {}
    return choice, choice.get("delta") or {}


def thought(delta: Object) -> str:
    """Reasoning text of a delta or message, by either of its names."""
    found = delta.get("reasoning_content") or delta.get("reasoning") or ""
    return found if isinstance(found, str) else ""
