"""Time as an argument: whoever needs it is given a Clock, so that tests can hold it still."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, cast

from offloadd.units import Instant


class Clock(Protocol):
    """Two readings: one for spans, one for people."""

    def now(self) -> Instant:
        """Monotonic seconds; only differences mean anything."""
        ...

    def wall(self) -> float:
        """Seconds since the Unix epoch; may jump."""
        ...


class SystemClock:
    """The machine's own clocks."""

    # The functions themselves: a request asks for the time now and then, and each call would be two.
    now = staticmethod(cast(Callable[[], Instant], time.monotonic))
    """CLOCK_MONOTONIC, in seconds."""
    wall = staticmethod(time.time)
    """CLOCK_REALTIME, in seconds since the epoch."""
