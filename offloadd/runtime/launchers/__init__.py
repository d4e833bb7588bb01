"""How a process is started and ended; one launcher for this machine so far."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Protocol

from offloadd.state.launch import ExitStatus, Launch


class Process(Protocol):
    """One started process tree."""

    pid: int
    exited: asyncio.Future[ExitStatus]
    """Done when the leader has ended; the rest of its group is killed before that."""

    def terminate(self) -> None:
        """Ask the leader to end (SIGTERM)."""
        ...

    def kill(self) -> None:
        """End the whole tree now (SIGKILL)."""
        ...


class Launcher(Protocol):
    """Starts processes."""

    def spawn(self, launch: Launch, *, mark: str, log_path: Path) -> Process:
        """Start it with `mark` in its environment and all its output appended to `log_path`; OSError when that fails."""
        ...

    def sweep(self, mark: str) -> int:
        """Kill what left the tree with the mark on; the number killed. Blocks."""
        ...
