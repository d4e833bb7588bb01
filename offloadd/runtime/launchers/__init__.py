"""How a process is started, found again and ended; one launcher for this machine so far."""

from __future__ import annotations

import asyncio
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from offloadd.accounts import Account
from offloadd.state.launch import ExitStatus, Launch
from offloadd.state.life import Life, ProcessId
from offloadd.units import Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Remains:
    """What an ended tree has left: processes that had to be killed, and what the kernel noted of its memory."""

    killed: int = 0
    oom_kills: int = 0
    """Of its own processes, by its own control group; surely of this tree."""
    peak: Bytes | None = None


class Process(Protocol):
    """One started process tree."""

    id: ProcessId
    exited: asyncio.Future[ExitStatus]
    """Done when the leader has ended; the rest of its group is killed before that."""

    @property
    def pid(self) -> int:
        """The leader's pid."""
        ...

    def terminate(self) -> None:
        """Ask the leader to end (SIGTERM)."""
        ...

    def kill(self) -> None:
        """End the whole tree now (SIGKILL)."""
        ...

    def let_go(self) -> None:
        """Stop watching it, and let it live."""
        ...


class Launcher(Protocol):
    """Starts processes."""

    def spawn(self, launch: Launch, *, mark: str, log_path: Path, account: Account | None = None) -> Process:
        """Start it with `mark` in its environment and all its output appended to `log_path`; OSError when that fails.

        It runs as `account`, or as ourselves for None; AccountError when that cannot be.
        """
        ...

    def find(self, life: Life) -> ProcessId | None:
        """The living process of an instance that an earlier daemon began, if it is surely that one. Blocks."""
        ...

    def adopt(self, process: ProcessId, *, mark: str) -> Process | None:
        """Watch such a process; None when it has ended meanwhile."""
        ...

    def sweep(self, mark: str, process: ProcessId) -> Remains:
        """Kill what is left of an ended instance's tree, also what left its group. Blocks."""
        ...

    def sweep_home(self, kept: AbstractSet[str]) -> int:
        """Kill whatever else an earlier daemon left running, those with these marks aside; the number killed. Blocks."""
        ...

    def close(self) -> None:
        """Take away what was set up for instances, as far as none is left."""
        ...
