"""What the byte path needs to know of a dialect: a translated request, and what becomes of its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from offloadd.errors import RequestError

Object = dict[str, Any]


class Change(Protocol):
    """An answer's bytes on their way to a client: chunks in, chunks out, wherever they were cut."""

    media_type: str
    """Of what comes out."""

    def feed(self, chunk: bytes) -> bytes:
        """What the chunk becomes; may be nothing yet. BrokenStreamError when it cannot be understood."""
        ...

    def end(self) -> bytes:
        """What closes the answer, now that the engine's is at its end; BrokenStreamError when that came too soon."""
        ...

    def fail(self, error: RequestError) -> bytes:
        """The error, told within an answer that has begun."""
        ...


class Gathering(Protocol):
    """Puts the events of one stream together, for a client that wants the whole answer at once."""

    error: Object | None
    """The error object of an error event, if one came."""

    @property
    def complete(self) -> bool:
        """Whether the stream has said how it finished."""
        ...

    def add(self, chunk: Object) -> None:
        """Take one event in."""
        ...

    def answer(self) -> Object:
        """The whole answer."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """One request in an engine's words, always asked for as a stream, and its answer in the client's."""

    path: str
    """The engine's path."""
    body: Object
    change: Callable[[], Change]
    """For a client that wants a stream."""
    gather: Callable[[], Gathering]
    """For one that does not."""
    whole: Callable[[Object], Object | list[Object]] = lambda answer: answer
    """The gathered answer in the client's words."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """To be added to the answer's."""
