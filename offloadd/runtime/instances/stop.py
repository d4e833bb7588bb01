"""How one instance is brought to its end when it is told to."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from offloadd.events import EventKind
from offloadd.runtime.instances import Tools
from offloadd.runtime.instances.diary import Diary
from offloadd.runtime.instances.standing import Standing
from offloadd.runtime.launchers import Process
from offloadd.runtime.stop_command import run_stop_command
from offloadd.state.desired import Engine
from offloadd.units import Seconds

log = logging.getLogger(__name__)

TERM_AGAIN = Seconds(3)
"""A second SIGTERM after this long, or after half of stop_timeout: llama-server then stops waiting for anybody."""
STUCK_AFTER = Seconds(10)
"""A process that SIGKILL has not ended by then is held by the kernel, mostly in a driver."""


class Stop:
    """Ends one instance's process, by and by more harshly."""

    def __init__(self, standing: Standing, diary: Diary, engine: Engine, tools: Tools) -> None:
        self._standing = standing
        self._diary = diary
        self._engine = engine
        self._hang_up = tools.hang_up

    async def when_told(self, process: Process) -> None:
        """Hang up, TERM, TERM again, KILL the tree at stop_timeout.

        llama-server ends on the first TERM only when no client's connection is left, and on none while it computes a prompt.
        """
        standing = self._standing
        await standing.stopping.wait()
        self._hang_up(standing.id, standing.stop_why, False)
        await self._diary.note_shared(process)
        await self._diary.note(stopping=standing.stop_why or standing.stop_reason or "stopped")
        limit = standing.action.spec.stop_timeout if standing.stop_limit is None else standing.stop_limit
        first = min(TERM_AGAIN, Seconds(limit / 2))
        if await self.run_command(process, limit) and await _ends_within(process, first):
            return
        process.terminate()
        if await _ends_within(process, first):
            return
        process.terminate()
        if await _ends_within(process, Seconds(limit - first)):
            return
        said = standing.about(EventKind.INSTANCE_KILLED)
        log.warning(
            "%s did not end within %g s of SIGTERM (stop_timeout); killing its process tree", standing.id, limit, extra=said
        )
        process.kill()
        while not await _ends_within(process, STUCK_AFTER):
            if not standing.stuck:
                log.error("%s: SIGKILL does not end pid %d; its memory stays on the books", standing.id, process.pid, extra=said)
            standing.stuck = True
            standing.changed()
            process.kill()

    async def run_command(self, process: Process, limit: Seconds) -> bool:
        """What the config said at the start of an end that signals do not bring about; whether it said anything."""
        words = self._diary.life.stop_command
        if not words:
            return False
        problem = await run_stop_command(words, self._engine, limit)
        if problem and not process.exited.done():
            said = self._standing.about(EventKind.INSTANCE_STOPPING)
            log.warning("%s: stop_command: %s", self._standing.id, problem, extra=said)
        return True


async def _ends_within(process: Process, limit: Seconds) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(limit):
            await asyncio.shield(process.exited)
    return process.exited.done()
