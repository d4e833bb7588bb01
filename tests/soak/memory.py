"""The daemon's memory while it works: sampled by the kernel's own account, and the slope of it over requests."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

MIB = 2**20
EVERY_S = 5.0
LONG_S = 1200.0
"""A shorter run says nothing of a slope: histories and the memory of conversations, 4 MiB in all, fill in the first ten minutes."""
MOST = 256 * 1024
"""Bytes by which the daemon may grow for 1,000 requests, in the last half of a long run; about fifty servers are killed for each,
and the config is read as often. 114 KiB were measured. A body of a hundred thousand bytes that stayed of each request that has one
would be 8 MiB for 1,000."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One look."""

    at: float
    """Seconds since the first."""
    requests: int
    """Sent until then."""
    anonymous: int
    """Bytes that no file backs: the heap, and the stacks of threads."""
    resident: int
    """Bytes, shared libraries included."""

    def __str__(self) -> str:
        size = f"{self.anonymous / MIB:6.1f} MiB ({self.resident / MIB:.1f} resident)"
        return f"{self.at:5.0f} s, {self.requests:6d} requests: {size}"


class Watch:
    """Samples in a thread while a block runs."""

    def __init__(self, pid: int, sent: Callable[[], int], every: float = EVERY_S) -> None:
        self._rollup = Path(f"/proc/{pid}/smaps_rollup")
        self._sent, self._every = sent, every
        self._began = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory")
        self.samples: list[Sample] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        self.look()

    def look(self) -> None:
        """Take one sample."""
        found = {name: int(size) * 1024 for name, size, _ in map(str.split, self._rollup.read_text().splitlines()[1:])}
        at = time.monotonic() - self._began
        self.samples.append(Sample(at, self._sent(), found["Anonymous:"], found["Rss:"]))

    def _run(self) -> None:
        while not self._over.is_set():
            self.look()
            self._over.wait(self._every)


def slope(samples: Sequence[Sample]) -> float | None:
    """Bytes by which it grows for 1,000 requests, over the last half of the samples; None where that cannot be told."""
    last = samples[len(samples) // 2 :]
    requests = [each.requests for each in last]
    if len(set(requests)) < 2:
        return None
    return statistics.linear_regression(requests, [each.anonymous for each in last]).slope * 1000


def told(samples: Sequence[Sample]) -> list[str]:
    """For people: the first, some between, and the last, and what that comes to."""
    if not samples:
        return []
    step = max(1, len(samples) // 10)
    shown = [*samples[::step], *([samples[-1]] if (len(samples) - 1) % step else [])]
    found = slope(samples)
    end = "" if found is None else f"memory in the last half: {found / 1024:+.1f} KiB for 1,000 requests"
    return [*(f"  {sample}" for sample in shown), end]
