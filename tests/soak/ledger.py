"""Every request has one end, and the daemon's word for it is held to what the client saw."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any

from tests.conformance.servers import until
from tests.integration.daemon import Daemon

TOLD_WITHIN_S = 60.0
"""From the client's last byte until the daemon has closed the account."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a client saw of the end of its request."""

    status: int
    left: bool = False
    """It went away after the answer's first bytes."""
    error: bool = False
    """An error was told within an answer that had begun."""
    cut: bool = False
    """The connection broke before the answer was whole."""

    def __str__(self) -> str:
        how = [word for word in ("left", "error", "cut") if getattr(self, word)]
        return " ".join([str(self.status), *how])

    def allows(self, fate: str, status: int) -> bool:
        """Whether it is what a client sees of a request that ended so. Who leaves may do so just before or after the end."""
        if self.left:
            return fate == "cancelled" or status == self.status
        if self.error or self.cut:
            return fate in ("failed", "refused") and not self.cut
        if fate == "answered":
            return self.status == status < 500
        return fate in ("refused", "failed") and self.status == status >= 400


class Ledger:
    """Accounts of all requests, from many threads."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._lock = threading.Lock()
        self.sent = 0
        self.ends: Counter[tuple[str, str]] = Counter()
        """By what the client saw, and the daemon's word for it."""
        self.killed: set[str] = set()
        """Instances that were killed, by the soak and nobody else."""

    @property
    def fates(self) -> dict[str, int]:
        """Requests by fate, each as the daemon told of it by the request's own id."""
        with self._lock:
            found: Counter[str] = Counter()
            for (_, fate), count in self.ends.items():
                found[fate] += count
        return dict(sorted(found.items()))

    def open(self) -> str:
        """A request is about to be sent; its id."""
        with self._lock:
            self.sent += 1
            return f"soak-{self.sent}"

    def close(self, name: str, seen: Seen) -> None:
        """It is over for its client: AssertionError unless the daemon says the same, once."""
        entries = until(lambda: self._ended(name), f"the end of {name} is told, which its client saw as {seen}", TOLD_WITHIN_S)
        assert len(entries) == 1, entries
        (entry,) = entries
        fate, status = entry["data"]["fate"], entry["data"]["status"]
        assert seen.allows(fate, status), (str(seen), entry)
        if fate == "failed":
            assert entry["instance"] in self.killed, ("failed, and its engine was not killed", entry)
        with self._lock:
            self.ends[str(seen), fate] += 1

    def _ended(self, name: str) -> list[Any]:
        reply = self._daemon.request("GET", f"/explain?request={name}")
        history = reply.json()["history"] if reply.status == 200 else []
        return [entry for entry in history if entry["kind"] == "request-ended"]
