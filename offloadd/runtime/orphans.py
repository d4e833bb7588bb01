"""What an earlier daemon left running: what of it we can vouch for, and the end of everything else."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from offloadd.events import EventKind, about
from offloadd.runtime.instances import Lives
from offloadd.runtime.launchers import Launcher, Process
from offloadd.runtime.stop_command import STOP_WITHIN, run_stop_command
from offloadd.state.desired import Engine
from offloadd.state.life import Life, ProcessId

log = logging.getLogger(__name__)


async def take_up(
    written: Iterable[Life],
    *,
    lives: Lives,
    launcher: Launcher,
    holds_port: Callable[[Life, int], bool],
    startable: Callable[[Life], bool],
    boot: str,
    engine_of: Callable[[Life], Engine],
) -> list[tuple[Life, Process]]:
    """Processes of earlier instances that are surely what was written down, each with that; all others are killed.

    Sure means the same pid with the same start in the same boot, the instance's mark where it can be read, the port in its own
    hands if it was ever ready (`holds_port`), and an engine that we can speak to (`startable`). For the others their stop_command
    is run too, as the user and with the variables of `engine_of`: the server that it ends is none of our processes and may have
    outlived them.
    """
    found: list[tuple[Life, ProcessId]] = []
    lost: list[Life] = []
    for life in written:
        process = await asyncio.to_thread(_vouch, life, launcher, holds_port) if startable(life) else None
        if process is None:
            lost.append(life)
        else:
            found.append((life, process))
    await asyncio.gather(*(_stop(life, boot, engine_of(life)) for life in lost))
    killed = await asyncio.to_thread(launcher.sweep_home, frozenset(life.mark for life, _ in found), lost)
    for life in lost:
        await asyncio.to_thread(lives.drop, life.mark)
    if killed:
        said = about(EventKind.INSTANCE_KILLED, strays=killed)
        log.warning("killed %d processes of an earlier daemon that nobody can vouch for", killed, extra=said)
    adopted: list[tuple[Life, Process]] = []
    for life, known in found:
        watched = launcher.adopt(known, mark=life.mark)
        if watched is None:
            await _stop(life, boot, engine_of(life))
            await asyncio.to_thread(launcher.sweep, life, known)
            await asyncio.to_thread(lives.drop, life.mark)
            continue
        log.info("%s: still runs as pid %d", life.instance, watched.pid)
        adopted.append((life, watched))
    return adopted


async def _stop(life: Life, boot: str, engine: Engine) -> None:
    """Run its stop_command, if it has one and the machine has not been started anew since."""
    if life.stop_command and boot and life.boot == boot:
        limit = min(life.spec.stop_timeout, STOP_WITHIN)
        problem = await run_stop_command(life.stop_command, engine, limit)
        said = about(EventKind.INSTANCE_STOPPING, model=life.instance.model, instance=life.instance, backend=life.backend)
        if problem:
            log.warning("%s: of an earlier daemon; stop_command: %s", life.instance, problem, extra=said)
        else:
            log.info("%s: of an earlier daemon; ended by its stop_command", life.instance, extra=said)


def _vouch(life: Life, launcher: Launcher, holds_port: Callable[[Life, int], bool]) -> ProcessId | None:
    process = launcher.find(life)
    if process is not None and life.ready_at is not None and not holds_port(life, process.pid):
        log.warning("%s: pid %d does not hold port %d any more", life.instance, process.pid, life.endpoint.port)
        return None
    return process
