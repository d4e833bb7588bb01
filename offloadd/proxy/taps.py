"""What an engine's answer tells about itself as it passes: when it began, how many events it has, and its own count of tokens.

The bytes are looked at, never decoded on their way: only the first and the last of them are kept, and read when all is over.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offloadd.clock import Clock
from offloadd.units import Instant

_PIECES = 4
"""The event with the count comes last, or before `[DONE]`; one more may lie between."""
_KEPT = 4096
"""Of each such piece, and of the first: an answer that is no stream may begin with its usage."""
_CHUNK_LINE = re.compile(rb"\r\n[0-9a-fA-F]{1,7}\r\n")
"""Pieces may come with the framing of their chunks."""
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Tokens:
    """An engine's own count. None where it does not say."""

    prompt: int | None = None
    cached: int | None = None
    completion: int | None = None
    per_second: float | None = None
    """Of generation."""


class Tap:
    """Sees every piece of one answer's body, as the engine sent it."""

    __slots__ = ("_clock", "_head", "_tail", "began", "events", "size")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._head = b""
        self._tail: deque[bytes] = deque(maxlen=_PIECES)
        self.began: Instant | None = None
        """When its first byte came."""
        self.events = 0
        self.size = 0

    def feed(self, piece: bytes) -> None:
        """One more piece."""
        if self.began is None:
            self.began = self._clock.now()
            self._head = piece[:_KEPT]
        self.size += len(piece)
        # A line break within JSON is escaped, so two of them in a row end an event.
        self.events += piece.count(b"\n\n")
        self._tail.append(piece if len(piece) <= _KEPT else piece[-_KEPT:])

    def tokens(self) -> Tokens:
        """What the first and last bytes say."""
        seen = [self._head, b"".join(self._tail)]
        if self.size <= _KEPT and len(self._tail) < _PIECES:
            del seen[0]  # all of it is in the other
        usage: dict[str, Any] = {}
        timings: dict[str, Any] = {}
        for data in seen:
            if b'"usage":' in data or b'"timings":' in data:
                text = _CHUNK_LINE.sub(b"", data).decode(errors="replace")
                usage.update(_members(text, '"usage":'))
                timings.update(_members(text, '"timings":'))
        return _tokens(usage, timings) if usage or timings else Tokens()


def _tokens(usage: Mapping[str, Any], timings: Mapping[str, Any]) -> Tokens:
    """OpenAI's and Anthropic's names, and llama-server's own."""
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    cached = _count(details, "cached_tokens") if isinstance(details, dict) else None
    read, reused = _count(timings, "prompt_n"), _count(timings, "cache_n")
    prompt = None if read is None else read + (reused or 0)
    speed = timings.get("predicted_per_second")
    return Tokens(
        prompt=_first(_count(usage, "prompt_tokens"), _count(usage, "input_tokens"), prompt),
        cached=_first(cached, _count(usage, "cache_read_input_tokens"), reused),
        completion=_first(_count(usage, "completion_tokens"), _count(usage, "output_tokens"), _count(timings, "predicted_n")),
        per_second=float(speed) if isinstance(speed, int | float) and not isinstance(speed, bool) else None,
    )


def _members(text: str, name: str) -> dict[str, Any]:
    """The objects behind such members, the later over the earlier. Text of the answer is none: quotes within it are escaped."""
    joined: dict[str, Any] = {}
    place = text.rfind(name)
    for _ in range(_PIECES):
        if place < 0:
            break
        found = _object_at(text, place + len(name))
        joined = {**found, **joined}
        place = text.rfind(name, 0, place)
    return joined


def _object_at(text: str, start: int) -> dict[str, Any]:
    while text[start : start + 1].isspace():
        start += 1
    try:
        found, _ = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _count(fields: Mapping[str, Any], name: str) -> int | None:
    value = fields.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)
