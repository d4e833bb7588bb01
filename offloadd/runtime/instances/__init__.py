"""One use of one model's server, from begin to end: a process on this machine (`instance.py`), or one elsewhere (`remote.py`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from offloadd.clock import Clock
from offloadd.runtime.launchers import Launcher
from offloadd.runtime.logs import LogFolder
from offloadd.state.desired import HealthPolicy
from offloadd.state.ids import InstanceId, ModelName
from offloadd.state.launch import Endpoint, Probe, ProbeReply
from offloadd.state.life import Life
from offloadd.state.observed import ExitRecord


class Lives(Protocol):
    """Where it is written down which instances have begun, for a daemon that comes after this one. Both block, neither raises."""

    def keep(self, life: Life) -> None:
        """Write it down, in place of what was written of it before."""
        ...

    def drop(self, mark: str) -> None:
        """It has ended, and nothing of it is left."""
        ...

    def keep_exits(self, boot: str, model: ModelName, records: Sequence[ExitRecord]) -> None:
        """Write down how a model's last instances ended; none takes away what was written."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What instances share, joined in `daemon.py`."""

    clock: Clock
    launcher: Launcher
    logs: LogFolder
    lives: Lives
    boot: str
    """The machine's boot, which processes and instants belong to."""
    probe: Callable[[Endpoint, Probe], Awaitable[ProbeReply]]
    holds_port: Callable[[int, int], bool]
    """Given a pid and a TCP port: whether that tree listens on it. Blocks."""
    changed: Callable[[InstanceId], None]
    """Called after every change of state."""
    held: Callable[[InstanceId], int]
    """Requests that the instance holds now."""
    health: Callable[[InstanceId], HealthPolicy]
    """How the config in force wants it checked."""
    open_ports: Callable[[int], tuple[str, ...]]
    """Given a pid: the addresses beyond loopback on which that tree listens. Blocks."""
    hang_up: Callable[[InstanceId, str, bool], None]
    """Close every connection that we hold to the instance, because of what the text says; whether it died by itself."""
