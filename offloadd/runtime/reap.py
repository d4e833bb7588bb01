"""End what daemons that will not come back have left running. No config is read: it may be what keeps a daemon from starting."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from offloadd.errors import PermanentError
from offloadd.runtime.launchers.identity import Stat, all_pids, environment, stat
from offloadd.runtime.launchers.local import HOME_MARK
from offloadd.runtime.lock import locked, was_kept
from offloadd.units import counted

_MARKS = frozenset({HOME_MARK})
_GONE_WITHIN_S = 10.0


def reap(*, kept: bool) -> Iterator[str]:
    """A sentence for each data folder with servers. A living daemon's are left alone, and without `kept` those kept on purpose."""
    for home, servers in sorted(_by_home().items()):
        what = f"{home}: {counted(len(servers), 'process', 'processes')}"
        if not kept and was_kept(home):
            yield f"{what} left alone: the last daemon left them on purpose (server.on_stop: keep)"
            continue
        try:
            with locked(home):
                _end(servers)
        except PermanentError as held:
            yield f"{what} left alone: {held.message}"
        else:
            yield f"{what} ended"


def _by_home() -> dict[Path, list[Stat]]:
    """Everything with our mark, as far as we may look, by the data folder of the daemon that started it."""
    found: dict[Path, list[Stat]] = {}
    for pid in all_pids():
        home = environment(pid, _MARKS).get(HOME_MARK)
        process = stat(pid)
        if home and process is not None:
            found.setdefault(Path(home), []).append(process)
    return found


def _end(servers: Sequence[Stat]) -> None:
    for server in servers:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(server.pid, signal.SIGKILL)
    deadline = time.monotonic() + _GONE_WITHIN_S
    while left := [server.pid for server in servers if (now := stat(server.pid)) is not None and now.id == server.id]:
        if time.monotonic() > deadline:
            raise PermanentError(f"{', '.join(map(str, left))} cannot be killed")
        time.sleep(0.02)
