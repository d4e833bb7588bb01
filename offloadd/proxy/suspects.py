"""Requests that kill engines. One that was running each time that an engine died is not sent to the next one."""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque

from offloadd.clock import Clock
from offloadd.errors import RequestError
from offloadd.state.ids import ModelName
from offloadd.units import Instant, Seconds

STRIKES = 3
"""So many deaths with the same request are no accident: what else ran at those times was not the same each time."""
WINDOW = Seconds(600)
MOST = 256
"""Requests remembered; the one that was not seen for longest is forgotten first."""


class Suspects:
    """Remembers, by digest, the bodies that were on instances which died by themselves."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._latest: Instant | None = None
        self._deaths: OrderedDict[bytes, deque[Instant]] = OrderedDict()

    def __bool__(self) -> bool:
        """Whether any died lately."""
        return self._latest is not None and self._clock.now() < self._latest + WINDOW

    def died(self, model: ModelName, body: bytes) -> None:
        """An instance of the model died while this request was on it."""
        digest = _digest(model, body)
        deaths = self._deaths.setdefault(digest, deque(maxlen=STRIKES))
        self._latest = self._clock.now()
        deaths.append(self._latest)
        self._deaths.move_to_end(digest)
        if len(self._deaths) > MOST:
            self._deaths.popitem(last=False)

    def check(self, model: ModelName, body: bytes) -> None:
        """RequestError 429 for a request that has seen too many of them die."""
        if not self:
            return  # as it nearly always is: then no body is digested
        deaths = self._deaths.get(_digest(model, body))
        if deaths is None or len(deaths) < STRIKES:
            return
        wait = Seconds(deaths[0] + WINDOW - self._clock.now())
        if wait > 0:
            message = f"{model}'s backend died {STRIKES} times while it worked on this very request, so it is not given to it again"
            raise RequestError(429, "request_kills_backend", message, retry_after=wait)


def _digest(model: ModelName, body: bytes) -> bytes:
    return hashlib.sha256(model.encode() + b"\0" + body).digest()
