"""What each key uses: requests and tokens in the last minute, and requests at once; and the memory that all bodies take."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from offloadd.clock import Clock
from offloadd.errors import RequestError
from offloadd.state.access import Caller
from offloadd.units import Bytes, Instant, Seconds, format_bytes

STEERING = 600
"""Calls in a minute that load, unload, reload or borrow, by one caller: each may start or stop servers."""
SMALL = 64 * 1024
"""Bytes of a body that is not counted: connections are bounded, and so is what all such bodies take."""
BODIES = 1 << 30
"""Bytes of larger bodies that are held at once."""
_MINUTE = Seconds(60)


@dataclass(slots=True)
class _Bucket:
    """Fills evenly up to `size` within a minute; what is taken may leave it in debt, when the price is known only afterwards."""

    size: int
    level: float
    at: Instant

    def wait(self, now: Instant) -> Seconds:
        """Until one may be taken; 0 when that is now."""
        self.level = min(self.size, self.level + (now - self.at) * self.size / _MINUTE)
        self.at = now
        return Seconds(max(0.0, (1 - self.level) * _MINUTE / self.size))


class _Admission:
    """One request, while it is counted."""

    __slots__ = ("_caller", "_meter")

    def __init__(self, meter: KeyMeter, caller: Caller) -> None:
        self._meter = meter
        self._caller = caller

    def __enter__(self) -> None:
        self._meter.enter(self._caller)

    def __exit__(self, *_: object) -> None:
        self._meter.leave(self._caller)


class KeyMeter:
    """Counts by the key's name. A key whose limits were changed begins anew."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], _Bucket] = {}
        self._running: dict[str, int] = {}

    def admitted(self, caller: Caller) -> _Admission:
        """Count a request while a block runs; RequestError 429, with the time to wait, when the key has used what it has."""
        return _Admission(self, caller)

    def enter(self, caller: Caller) -> None:
        """A request of this caller begins; RequestError as from `admitted`."""
        limits = caller.limits
        running = self._running.get(caller.name, 0)
        if limits.parallel is not None and running >= limits.parallel:
            message = f"the key {caller.name} has {running} requests under way, which is its limit"
            raise RequestError(429, "key_parallel_limit", message, retry_after=Seconds(1))
        if self._buckets or not (limits.tokens_per_minute is None and limits.requests_per_minute is None):
            self._check(caller, "tokens", limits.tokens_per_minute)
            self._check(caller, "requests", limits.requests_per_minute)
            self._take(caller, "requests", limits.requests_per_minute, 1)
        self._running[caller.name] = running + 1

    def leave(self, caller: Caller) -> None:
        """It is over."""
        self._running[caller.name] -= 1
        if not self._running[caller.name]:
            del self._running[caller.name]

    def steer(self, caller: Caller) -> None:
        """Count a call that changes something; RequestError 429 when there are more than anybody can mean."""
        self._check(caller, "steering calls", STEERING)
        self._take(caller, "steering calls", STEERING, 1)

    def spend(self, caller: Caller, tokens: int) -> None:
        """Tokens that a request has taken, known at its end."""
        if caller.limits.tokens_per_minute is not None:
            self._take(caller, "tokens", caller.limits.tokens_per_minute, tokens)

    def _check(self, caller: Caller, what: str, size: int | None) -> None:
        bucket = self._bucket(caller, what, size)
        wait = bucket.wait(self._clock.now()) if bucket else Seconds(0)
        if wait:
            who = f"the key {caller.name} has" if caller.name else "callers without a key have"
            code = f"key_{what.replace(' ', '_')}_limit"
            raise RequestError(429, code, f"{who} used their {size} {what} a minute", retry_after=wait)

    def _take(self, caller: Caller, what: str, size: int | None, count: int) -> None:
        bucket = self._bucket(caller, what, size)
        if bucket:
            bucket.wait(self._clock.now())
            bucket.level -= count

    def _bucket(self, caller: Caller, what: str, size: int | None) -> _Bucket | None:
        if size is None:
            self._buckets.pop((caller.name, what), None)
            return None
        known = self._buckets.get((caller.name, what))
        if known is None or known.size != size:
            known = self._buckets[caller.name, what] = _Bucket(size, size, self._clock.now())
        return known


class Bodies:
    """Bytes of the bodies that are held for the requests under way."""

    def __init__(self, most: int = BODIES) -> None:
        self._most = most
        self.held = 0

    async def room(self, size: int | None, largest: int, read: Callable[[], Awaitable[bytes]]) -> int:
        """Take the bytes of one body, to be given back; RequestError 503 when there is no room for it now.

        One that does not say its size may become the `largest`, until it is read.
        """
        if size is None:
            size = largest
            self._take(size)
            try:
                size = len(await read())
            finally:
                self.held -= largest
        elif size <= SMALL:
            return 0
        self._take(size)
        return size

    def give_back(self, size: int) -> None:
        """The request is over."""
        self.held -= size

    def _take(self, size: int) -> None:
        if self.held and self.held + size > self._most:
            held, most = format_bytes(Bytes(self.held)), format_bytes(Bytes(self._most))
            message = f"the bodies of requests under way take {held}, and {most} is the limit"
            raise RequestError(503, "too_many_bytes", message, retry_after=Seconds(1))
        self.held += size
