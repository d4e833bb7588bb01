"""What an earlier daemon left running: what of it we can vouch for, and the end of everything else."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from offloadd.events import EventKind, about
from offloadd.runtime.instance import Lives
from offloadd.runtime.launchers import Launcher, Process
from offloadd.state.life import Life, ProcessId

log = logging.getLogger(__name__)


async def take_up(
    written: Iterable[Life],
    *,
    lives: Lives,
    launcher: Launcher,
    holds_port: Callable[[Life, int], bool],
    startable: Callable[[Life], bool],
) -> list[tuple[Life, Process]]:
    """Processes of earlier instances that are surely what was written down, each with that; all others are killed.

    Sure means the same pid with the same start in the same boot, the instance's mark where it can be read, the port in its own
    hands if it was ever ready (`holds_port`), and an engine that we can speak to (`startable`).
    """
    found: list[tuple[Life, ProcessId]] = []
    for life in written:
        process = await asyncio.to_thread(_vouch, life, launcher, holds_port) if startable(life) else None
        if process is None:
            await asyncio.to_thread(lives.drop, life.mark)
        else:
            found.append((life, process))
    killed = await asyncio.to_thread(launcher.sweep_home, frozenset(life.mark for life, _ in found))
    if killed:
        said = about(EventKind.INSTANCE_KILLED, strays=killed)
        log.warning("killed %d processes of an earlier daemon that nobody can vouch for", killed, extra=said)
    adopted: list[tuple[Life, Process]] = []
    for life, known in found:
        watched = launcher.adopt(known, mark=life.mark)
        if watched is None:
            await asyncio.to_thread(lives.drop, life.mark)
            continue
        log.info("%s: still runs as pid %d", life.instance, watched.pid)
        adopted.append((life, watched))
    return adopted


def _vouch(life: Life, launcher: Launcher, holds_port: Callable[[Life, int], bool]) -> ProcessId | None:
    process = launcher.find(life)
    if process is not None and life.ready_at is not None and not holds_port(life, process.pid):
        log.warning("%s: pid %d does not hold port %d any more", life.instance, process.pid, life.endpoint.port)
        return None
    return process
