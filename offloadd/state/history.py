"""What has happened to a model: launches, ends, requests and tokens by day. Kept in the registry, with bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from offloadd.state.ids import BackendName, ModelName
from offloadd.units import Bytes, Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One launch that became ready. `at` is in Unix seconds."""

    model: ModelName
    backend: BackendName
    at: float
    seconds: Seconds
    size: Bytes | None = None
    """Of the files that were read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The end of one instance. `at` is in Unix seconds."""

    model: ModelName
    backend: BackendName
    instance: str
    at: float
    kind: str
    message: str
    expected: bool
    ready_for: Seconds | None = None
    peak: Bytes | None = None
    """The most memory that it was seen to hold, over all devices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Requests by how they ended, tokens, and seconds of service."""

    answered: int = 0
    refused: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    def plus(self, other: Usage) -> Usage:
        """Both together."""
        return Usage(**{name: getattr(self, name) + getattr(other, name) for name in self.__slots__})


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What the registry remembers of one model, newest first."""

    loads: tuple[Load, ...] = ()
    ends: tuple[End, ...] = ()
    days: Mapping[str, Usage] = field(default_factory=dict)
    """By UTC day, as `2026-11-25`."""
