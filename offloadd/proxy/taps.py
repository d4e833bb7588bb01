"""What an engine's answer tells about itself as it passes: when it began, how many events it has, and its own count of tokens.

The bytes are looked at, never decoded on their way: only the first and the last of them are kept, and read when all is over.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import msgspec

from offloadd.clock import Clock
from offloadd.units import Instant

_PIECES = 4
"""The event with the count comes last, or before `[DONE]`; one more may lie between."""
_KEPT = 4096
"""Of each such piece, and of the first: an answer that is no stream may begin with its usage."""
_CHUNK_LINE = re.compile(rb"\r\n[0-9a-fA-F]{1,7}\r\n")
"""Pieces may come with the framing of their chunks."""
_DECODER = json.JSONDecoder()
_GIVEN_UP = re.compile(rb'"finish_reason":\s*"abort"')
"""How vLLM ends what it works on when somebody else ends it: with 200, as though it were whole. Text has its quotes escaped."""


class Tokens(msgspec.Struct, frozen=True, gc=False):  # made once a request
    """An engine's own count. None where it does not say."""

    prompt: int | None = None
    cached: int | None = None
    completion: int | None = None
    per_second: float | None = None
    """Of generation."""


_UNKNOWN = Tokens()


class _Whole(msgspec.Struct):
    """The members of a whole answer that are looked at."""

    usage: dict[str, Any] | None = None
    timings: dict[str, Any] | None = None


_Count = Annotated[int, msgspec.Meta(ge=0)]


class _Details(msgspec.Struct, gc=False):
    cached_tokens: _Count | None = None


class _Usage(msgspec.Struct, gc=False):
    """What most engines say, as they say it. One that says `null`, or what is no count, is looked at more closely."""

    prompt_tokens: _Count
    completion_tokens: _Count
    prompt_tokens_details: _Details | None = None
    input_tokens_details: msgspec.UnsetType = msgspec.UNSET
    cache_read_input_tokens: msgspec.UnsetType = msgspec.UNSET


class _Timings(msgspec.Struct, gc=False):
    """llama-server's beside it."""

    cache_n: _Count | None = None
    predicted_per_second: float | None = None


class _Usual(msgspec.Struct, gc=False):
    usage: _Usage
    timings: _Timings | None = None


_WHOLE = msgspec.json.Decoder(_Whole)
_USUAL = msgspec.json.Decoder(_Usual)


def given_up(data: bytes) -> bool:
    """Whether the engine says here that it gave the request up."""
    return b'"abort"' in data and _GIVEN_UP.search(data) is not None


class Tap:
    """Sees every piece of one answer's body, as the engine sent it."""

    __slots__ = ("_clock", "_head", "_tail", "_write", "began", "events", "size")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._head = b""
        self._tail: deque[bytes] | None = None
        self.began: Instant | None = None
        """When its first byte came."""
        self.events = 0
        self.size = 0

    def feed(self, piece: bytes) -> None:
        """One more piece."""
        tail = self._tail
        if tail is None:
            tail = self._tail = deque(maxlen=_PIECES)
            self.began = self._clock.now()
            self._head = piece[:_KEPT]
        self.size += len(piece)
        # A line break within JSON is escaped, so two of them in a row end an event.
        self.events += piece.count(b"\n\n")
        tail.append(piece if len(piece) <= _KEPT else piece[-_KEPT:])

    def into(self, write: Callable[[bytes], None]) -> Callable[[bytes], None]:
        """What sees a piece and hands it to `write`: one call for both, since a token costs little else."""
        self._write = write
        return self._pass

    def _pass(self, piece: bytes) -> None:
        tail = self._tail
        if tail is None:
            self.feed(piece)
        else:
            self.size += len(piece)
            self.events += piece.count(b"\n\n")
            tail.append(piece if len(piece) <= _KEPT else piece[-_KEPT:])
        self._write(piece)

    def whole(self, body: bytes) -> None:
        """All of it at once."""
        if len(body) > _KEPT:
            self.feed(body)
            return
        self.began = self._clock.now()
        self._head, self.size = body, len(body)

    @property
    def given_up(self) -> bool:
        """Whether the last that came says so."""
        return given_up(b"".join(self._tail or ()))

    def tokens(self) -> Tokens:
        """What the first and last bytes say."""
        if self.size == len(self._head):  # all of it is there
            return tokens_in(self._head)
        tail = self._tail or ()
        seen = [self._head, b"".join(tail)]
        if self.size <= _KEPT and 0 < len(tail) < _PIECES:
            del seen[0]  # all of it is in the other
        return _found(seen)


def tokens_in(body: bytes) -> Tokens:
    """What a whole answer says."""
    if len(body) > _KEPT:
        return _found((body[:_KEPT], body[-_KEPT:]))
    said = _said(body)
    return _found((body,)) if said is None else said


def _found(seen: Sequence[bytes]) -> Tokens:
    """What is found in pieces of an answer, the later over the earlier."""
    usage: dict[str, Any] = {}
    timings: dict[str, Any] = {}
    for data in seen:
        for name, found in ((b'"usage":', usage), (b'"timings":', timings)):
            if name in data:
                text = _CHUNK_LINE.sub(b"", data) if b"\r\n" in data else data
                found.update(_members(text.decode(errors="replace"), name.decode()))
    return _tokens(usage, timings)


def _said(body: bytes) -> Tokens | None:
    """What a whole answer says as JSON; None where it is no sound JSON, and has to be searched."""
    try:
        usual = _USUAL.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    else:
        usage, timings, details = usual.usage, usual.timings, usual.usage.prompt_tokens_details
        cached = None if details is None else details.cached_tokens
        if timings is None:
            return Tokens(usage.prompt_tokens, cached, usage.completion_tokens)
        if cached is None:
            cached = timings.cache_n
        return Tokens(usage.prompt_tokens, cached, usage.completion_tokens, timings.predicted_per_second)
    try:
        said = _WHOLE.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return _tokens(said.usage or {}, said.timings or {})


def _tokens(usage: Mapping[str, Any], timings: Mapping[str, Any]) -> Tokens:
    """OpenAI's and Anthropic's names, and llama-server's own."""
    if not usage and not timings:
        return _UNKNOWN
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    cached = _count(details, "cached_tokens") if isinstance(details, dict) else None
    prompt, completion = _count(usage, "prompt_tokens", "input_tokens"), _count(usage, "completion_tokens", "output_tokens")
    if cached is None and "cache_read_input_tokens" in usage:
        cached = _count(usage, "cache_read_input_tokens")
    if not timings:
        return Tokens(prompt, cached, completion)
    read, reused = _count(timings, "prompt_n"), _count(timings, "cache_n")
    if prompt is None and read is not None:
        prompt = read + (reused or 0)
    speed = timings.get("predicted_per_second")
    return Tokens(
        prompt,
        reused if cached is None else cached,
        _count(timings, "predicted_n") if completion is None else completion,
        float(speed) if isinstance(speed, int | float) and not isinstance(speed, bool) else None,
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


def _count(fields: Mapping[str, Any], *names: str) -> int | None:
    """The first of the members that is a count."""
    for name in names:
        value = fields.get(name)
        if type(value) is int and value >= 0:
            return value
    return None
