"""Time as an argument: whoever needs it is given a Clock, so that tests can hold it still."""

from __future__ import annotations

import time
from typing import Protocol

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

    def now(self) -> Instant:
        """CLOCK_MONOTONIC, in seconds."""
        return Instant(time.monotonic())

    def wall(self) -> float:
        """CLOCK_REALTIME, in seconds since the epoch."""
        return time.time()
