"""How the daemon ends: all is wound down, the servers are left to the next daemon, or another program takes our place."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from offloadd import eventloop
from offloadd.api.listen import Listeners
from offloadd.api.service import Service
from offloadd.clock import Clock
from offloadd.events import EventKind, about
from offloadd.proxy.leases import LeaseBook
from offloadd.registry.lives import LifeBook
from offloadd.runtime.executor import Executor
from offloadd.runtime.lock import leave_kept
from offloadd.succession import Heirloom, rehearse
from offloadd.units import Seconds

log = logging.getLogger(__name__)

GRACE = Seconds(30)
"""On SIGTERM, requests that run may go on for so long; a second signal ends the wait."""
LAST_CALL = Seconds(0.25)
"""Who was let in just before we accept no more gets so long to send a request."""
HAND_OVER = Seconds(5)
"""What began just before another program takes our place may go on for so long."""
STOP_MARGIN = Seconds(15)
"""Beyond the grace and the slowest server's stop_timeout: killing, reaping, closing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estate:
    """What there is to bring to an end."""

    config: Path
    data_dir: Path
    book: LeaseBook
    executor: Executor
    lives: LifeBook
    service: Service
    listeners: Callable[[], Listeners]
    keeps: Callable[[], bool]
    """Whether the servers outlive us."""
    wake: Callable[[], None]


class Ending:
    """Told to end by a signal, once; a second one hurries it."""

    def __init__(self, clock: Clock, estate: Estate) -> None:
        self._clock = clock
        self._estate = estate
        self._leaving = asyncio.Event()
        self._hurry = asyncio.Event()
        self._replacing = False
        self._succeeded = False
        self.closing = False
        """Whether nothing is to be served any more."""
        self.heirlooms: Sequence[Heirloom] | None = None
        """Sockets for the program that is to take our place once we have ended; None when none is."""

    @property
    def told_to_end(self) -> bool:
        """Whether SIGTERM came while another program was to take our place."""
        return self._hurry.is_set()

    def begin(self) -> None:
        """As SIGTERM does. Called again, it stops waiting for requests."""
        if self._leaving.is_set():
            self._hurry.set()
        self._leaving.set()

    async def replace(self) -> None:
        """SIGUSR2: let the program that is installed now take our place, if it can start and takes the config."""
        if self._replacing or self._leaving.is_set():
            return
        self._replacing = True
        try:
            problem = await rehearse(self._estate.config)
        except Exception as error:
            log.exception("trying out the program that is installed now failed", extra=about(EventKind.INTERNAL_ERROR))
            problem = str(error) or type(error).__name__
        if problem or self._leaving.is_set():
            self._replacing = False
            said = about(EventKind.DAEMON_REPLACED, problem=problem)
            log.error("not replaced: the program that is installed now would not do: %s", problem or "we end", extra=said)
            return
        log.info("a new start of the program takes our place", extra=about(EventKind.DAEMON_REPLACED))
        self._succeeded = True
        self._leaving.set()

    async def run(self) -> None:
        """Wait until told to end, and end."""
        await self._leaving.wait()
        await (self._hand_over() if self._succeeded else self._wind_down())
        self._end_signals()

    async def _wind_down(self) -> None:
        """An empty config drains and stops everything by the ordinary rules; after the grace, all that is left is stopped.

        With `on_stop: keep`, only the requests end: the servers run on.
        """
        estate, executor = self._estate, self._estate.executor
        limits = [view.spec.stop_timeout for view in executor.views().values()]
        estate.service.stopping(Seconds(GRACE + max(limits, default=0) + STOP_MARGIN))
        await self._last_call()
        self.closing = True
        said = about(EventKind.DAEMON_STOPPING)
        log.info("stopping: no new requests; those that run may go on for %g s", GRACE, extra=said)
        estate.book.close("offloadd is shutting down")
        estate.wake()
        await self._wait_until(lambda: not self._in_use(), GRACE)
        if estate.keeps():
            kept = len(executor.alive())
            await executor.let_go()
            leave_kept(estate.data_dir)
            log.info("stopped: %d instances run on (server.on_stop: keep)", kept, extra=about(EventKind.DAEMON_STOPPED, kept=kept))
            return
        executor.stop_all("offloadd is shutting down")
        await executor.wait_all()
        await asyncio.to_thread(estate.lives.forget_exits)
        log.info("stopped: no process is left", extra=about(EventKind.DAEMON_STOPPED))

    async def _hand_over(self) -> None:
        """Let what runs now end, serving on meanwhile; then accept no more, give the rest a moment, and leave all as it is.

        Who connects from then on waits in the socket for the new program.
        """
        book, listeners = self._estate.book, self._estate.listeners()
        begun = book.running()
        await self._wait_until(lambda: not begun & book.running(), GRACE)
        self.heirlooms = listeners.heirlooms()
        await listeners.hold_back(everywhere=True)
        await self._wait_until(lambda: False, LAST_CALL)
        await self._wait_until(lambda: not book.running() and not book.demand().waiting, HAND_OVER)
        if self._hurry.is_set():
            # Told to end meanwhile, which counts for more.
            for heirloom in self.heirlooms:
                os.close(heirloom.fd)
            self.heirlooms = None
            await self._wind_down()
            return
        book.close("offloadd is being replaced by a newer one")
        await self._estate.executor.let_go()

    async def _last_call(self) -> None:
        """Where the next daemon gets the sockets, who comes now waits for it; those already let in may still say what they want."""
        if await self._estate.listeners().hold_back():
            await self._wait_until(lambda: False, LAST_CALL)

    def _in_use(self) -> bool:
        """Whether an end now would cut something that may still end by itself."""
        return bool(self._estate.book.demand().leases) if self._estate.keeps() else bool(self._estate.executor.alive())

    async def _wait_until(self, done: Callable[[], bool], limit: Seconds) -> None:
        """Until it is done, the time is over, or a signal hurries us."""
        deadline = self._clock.now() + limit
        while not done() and self._clock.now() < deadline and not self._hurry.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(min(0.05, limit)):
                    await self._hurry.wait()

    def _end_signals(self) -> None:
        """No signal has anything to ask of us any more, but for SIGTERM where a program takes our place: that is told of it.

        One more of them, in the moment until the process is gone, must not make its end look like a death.
        """
        ends = (signal.SIGTERM, signal.SIGINT) if self.heirlooms is None else ()
        for number in (signal.SIGHUP, signal.SIGUSR2, *ends):
            eventloop.ignore(number)
