"""What became of one request: the record that metrics, history, explanations and the access log are made from."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from offloadd.state.ids import BackendName, InstanceId, ModelName
from offloadd.units import Instant, Seconds


class Fate(StrEnum):
    """How a request ended. Every request has exactly one, so answered + refused + cancelled + failed = sent."""

    ANSWERED = "answered"
    REFUSED = "refused"
    """Ended by us before an engine had it: unknown model, queue full, no room, not allowed."""
    CANCELLED = "cancelled"
    """Its client left."""
    FAILED = "failed"
    """The engine or the way to it broke."""


class Served(msgspec.Struct, frozen=True, kw_only=True, gc=False):  # made once a request: a dataclass takes ten times as long
    """One request from its arrival to its last byte. Spans are seconds, None where that point was not reached."""

    request: str
    """Its id, as in `X-Request-Id`."""
    path: str
    """The route's pattern, such as `/v1/chat/completions`: never what the client wrote."""
    dialect: str
    fate: Fate
    status: int
    """HTTP status of the answer; 499 when the client left before it had one."""
    arrived: Instant
    duration: Seconds
    waited: Seconds | None = None
    """In the queue, until it was granted an instance."""
    first_byte: Seconds | None = None
    """From its grant to the first byte of the engine's answer body."""
    model: ModelName | None = None
    backend: BackendName | None = None
    instance: InstanceId | None = None
    key: str = ""
    """Name of the API key that it came with."""
    streamed: bool = False
    chunks: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    tokens_per_second: float | None = None
    """Of generation, as the engine says or as chunks tell."""
    hedged: str = ""
    """`won` or `lost`, where a second instance was asked too: by whether the answer is that one's."""
    reason: str = ""
    """Why it was sent there, or why it was refused."""
