"""How a process is started, found again and ended; one launcher for this machine so far."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from offloadd.accounts import Account
from offloadd.state.launch import ExitStatus, Launch
from offloadd.state.life import Life, ProcessId, SharedPiece
from offloadd.units import Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Remains:
    """What an ended tree has left: processes that had to be killed, and what the kernel noted of its memory."""

    killed: int = 0
    oom_kills: int = 0
    """Of its own processes, by its own control group; surely of this tree."""
    peak: Bytes | None = None
    shared: int = 0
    """Pieces of shared memory that were taken away."""


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

    def make_folder(self, mark: str, account: Account | None) -> str:
        """A folder for the launch with this mark, of that account; empty where none can be made. Blocks."""
        ...

    def drop_folder(self, mark: str) -> None:
        """Take it away with all that is in it: nothing runs that was given it. Blocks."""
        ...

    def shared(self, process: ProcessId, life: Life) -> tuple[SharedPiece, ...]:
        """What the process's tree has of the machine's shared memory, and what is left of what was written of that. Blocks."""
        ...

    def find(self, life: Life) -> ProcessId | None:
        """The living process of an instance that an earlier daemon began, if it is surely that one. Blocks."""
        ...

    def adopt(self, process: ProcessId, *, mark: str) -> Process | None:
        """Watch such a process; None when it has ended meanwhile."""
        ...

    def sweep(self, life: Life, process: ProcessId) -> Remains:
        """Kill what is left of an ended instance's tree, also what left its group; then take away what that left. Blocks."""
        ...

    def sweep_home(self, kept: AbstractSet[str], lost: Sequence[Life]) -> int:
        """Kill whatever else an earlier daemon left running, those with these marks aside; the number killed. Blocks.

        What they have left is taken away then, and what the `lost` have: instances that have ended.
        """
        ...

    def close(self) -> None:
        """Take away what was set up for instances, as far as none is left."""
        ...
