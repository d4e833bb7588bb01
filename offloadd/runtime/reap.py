"""End what daemons that will not come back have left running. No config is read: it may be what keeps a daemon from starting."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from offloadd.errors import PermanentError
from offloadd.runtime.launchers import shared
from offloadd.runtime.launchers.folders import Folders
from offloadd.runtime.launchers.identity import Stat, all_pids, boot_id, environment, stat
from offloadd.runtime.launchers.local import HOME_MARK, take_away
from offloadd.runtime.lock import locked, was_kept
from offloadd.runtime.stop_command import STOP_WITHIN, run_stop_command
from offloadd.state.desired import Engine
from offloadd.state.life import Life
from offloadd.units import counted

_MARKS = frozenset({HOME_MARK})
_GONE_WITHIN_S = 10.0
STATE = "state.db"


class Book(Protocol):
    """What the daemons of the folder have written of the instances that they began. Everything blocks."""

    def lives(self) -> list[Life]:
        """Every one that is not known to have ended."""
        ...

    def drop(self, mark: str) -> None:
        """It has ended."""
        ...

    def close(self) -> None:
        """Close it."""
        ...


def reap(home: Path, *, kept: bool, book: Callable[[Path], Book]) -> str:
    """Tell what was done about a data folder's servers. Left alone are a living daemon's, and, but for `kept`, those kept.

    `book` opens what is written of them, which is done only while the folder is held.
    """
    servers = _marked(home)
    what = f"{home}: {counted(len(servers), 'process', 'processes')}"
    if not servers and not (home / STATE).exists():
        return f"{home}: nothing is left running"
    if not kept and was_kept(home):
        return f"{what} left alone: the last daemon left them on purpose (server.on_stop: keep)"
    try:
        with locked(home):
            said = _end_all(home, servers, book)
    except PermanentError as held:
        return f"{what} left alone: {held.message}"
    if not servers:
        what = f"{home}: nothing is left running" if not said else f"{home}: no process"
    return "; ".join([f"{what} ended" if servers else what, *said])


def _end_all(home: Path, servers: Sequence[Stat], book: Callable[[Path], Book]) -> list[str]:
    """End them, and take away what they have left; sentences about those whose server none of these processes is."""
    try:
        opened = book(home / STATE) if (home / STATE).exists() else None
    except PermanentError as unreadable:
        opened, trouble = None, [f"stop commands are not known: {unreadable.message}"]
    else:
        trouble = []
    lives = opened.lives() if opened else []
    boot = boot_id()
    said = asyncio.run(_run_stop_commands([life for life in lives if life.stop_command and boot and life.boot == boot]))
    pieces = shared.mapped(server.pid for server in servers)
    _end(servers)
    folders = Folders(home)
    folders.sweep(frozenset())
    take_away(folders, lives, pieces, boot)
    folders.close()
    if opened:
        for life in lives:
            opened.drop(life.mark)
        opened.close()
    return trouble + said


async def _run_stop_commands(lives: Sequence[Life]) -> list[str]:
    """All at once, so that the slowest says how long it takes: signals do not reach what these end, with or without a client."""
    return list(await asyncio.gather(*(_stop(life) for life in lives)))


async def _stop(life: Life) -> str:
    engine = Engine(name=life.backend, adapter="", user=life.user, group=life.group)
    problem = await run_stop_command(life.stop_command, engine, min(life.spec.stop_timeout, STOP_WITHIN))
    return f"{life.instance}: its stop_command failed: {problem}" if problem else f"{life.instance} ended by its stop_command"


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
