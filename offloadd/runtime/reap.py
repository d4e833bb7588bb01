"""End what daemons that will not come back have left running. No config is read: it may be what keeps a daemon from starting."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from offloadd.errors import PermanentError
from offloadd.runtime.launchers.identity import Stat, all_pids, environment, stat
from offloadd.runtime.launchers.local import HOME_MARK
from offloadd.runtime.lock import locked, was_kept
from offloadd.units import counted

_MARKS = frozenset({HOME_MARK})
_GONE_WITHIN_S = 10.0


def reap(home: Path, *, kept: bool) -> str:
    """Tell what was done about a data folder's servers. Left alone are a living daemon's, and, but for `kept`, those kept."""
    servers = _marked(home)
    what = f"{home}: {counted(len(servers), 'process', 'processes')}"
    if not servers:
        return f"{home}: nothing is left running"
    if not kept and was_kept(home):
        return f"{what} left alone: the last daemon left them on purpose (server.on_stop: keep)"
    try:
        with locked(home):
            _end(servers)
    except PermanentError as held:
        return f"{what} left alone: {held.message}"
    return f"{what} ended"


def _marked(home: Path) -> list[Stat]:
    """Everything that a daemon of this folder has started, as far as we may look."""
    found = (stat(pid) for pid in all_pids() if environment(pid, _MARKS).get(HOME_MARK) == str(home))
    return [process for process in found if process is not None]


def _end(servers: Sequence[Stat]) -> None:
    for server in servers:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(server.pid, signal.SIGKILL)
    deadline = time.monotonic() + _GONE_WITHIN_S
    while left := [server.pid for server in servers if (now := stat(server.pid)) is not None and now.id == server.id]:
        if time.monotonic() > deadline:
            raise PermanentError(f"{', '.join(map(str, left))} cannot be killed")
        time.sleep(0.02)
