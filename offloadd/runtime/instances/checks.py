"""How one instance's engine is asked whether it works: until it is ready, while it lives, and for a token. The planner judges."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from offloadd.backends.base import Backend
from offloadd.events import EventKind
from offloadd.runtime.instances import Tools
from offloadd.runtime.instances.diary import Diary
from offloadd.runtime.instances.evidence import machine_oom_kills
from offloadd.runtime.instances.standing import Standing
from offloadd.runtime.launchers import Process
from offloadd.state.launch import Health, Probe
from offloadd.state.observed import InstanceState
from offloadd.units import Seconds

log = logging.getLogger(__name__)

PROBE_FIRST = Seconds(0.05)
PROBE_SLOWEST = Seconds(1)
LIVENESS_EVERY = Seconds(5)
IDLE_ANSWER = Seconds(3)
"""How long an idle instance's working loop may take to answer before the silence is noted."""
DOUBT_EVERY = Seconds(1)
"""Pause between probes of an instance that has just missed one."""


class Checks:
    """Asks one engine, and notes in the standing what it answers."""

    def __init__(self, standing: Standing, diary: Diary, backend: Backend, tools: Tools) -> None:
        self._standing = standing
        self._diary = diary
        self._backend = backend
        self._tools = tools

    async def until_listening(self, process: Process) -> None:
        """Until the port is in its own tree's hands."""
        await until(lambda: asyncio.to_thread(self._tools.holds_port, process.pid, self._diary.life.endpoint.port))

    async def until_ready(self) -> None:
        """Until every readiness probe was answered well, one after the other."""
        for probe in self._backend.probes(self._standing.action.spec).readiness:
            await until(lambda probe=probe: self._ask(probe))  # type: ignore[misc]

    async def watch(self) -> None:
        """Probe the working loop while no request shows that it turns. What silence means is the planner's to judge.

        Until it is told to fall asleep: no probe may then be under way.
        """
        standing = self._standing
        probes = self._backend.probes(standing.action.spec)
        while True:
            await standing.told(min(DOUBT_EVERY, LIVENESS_EVERY) if standing.misses else LIVENESS_EVERY)
            if standing.state is InstanceState.FALLING_ASLEEP:
                return
            standing.oom_kills = machine_oom_kills()
            quiet = standing.now() - (standing.last_sign or standing.since)
            if quiet >= LIVENESS_EVERY:
                if await self._ask(self._patiently(probes.liveness)):
                    standing.hear()
                else:
                    standing.misses += 1
                    standing.changed()
            if probes.canary is not None:
                await self._try_canary(probes.canary)

    def _patiently(self, probe: Probe) -> Probe:
        """One that works may be deaf for as long as a prompt takes; the silence of one that nobody uses is noted soon, once."""
        if self._standing.misses or self._tools.held(self._standing.id):
            return probe
        return replace(probe, timeout=min(probe.timeout, IDLE_ANSWER))

    async def _try_canary(self, canary: Probe) -> None:
        """Ask for one token when nobody else has for a while. It must fail twice in a row: the first may have met a long prompt."""
        standing, held = self._standing, self._tools.held
        health = self._tools.health(standing.id)
        since = standing.worked_at or standing.ready_at or standing.since
        if not health.canary or standing.fault or held(standing.id) or standing.now() - since < health.canary:
            return
        for _ in range(2):
            reply = await self._tools.probe(self._diary.life.endpoint, replace(canary, timeout=health.canary_timeout))
            if reply.status is not None and reply.status < 500:  # what is refused was read and judged, so it lives
                standing.worked_at = standing.now()
                return
            if held(standing.id):
                return
        found = reply.error or f"status {reply.status}"
        standing.fault = f"it answers its health checks and gives no token: {found} (health.canary)"
        log.warning("%s: %s", standing.id, standing.fault, extra=standing.about(EventKind.INSTANCE_SICK))
        standing.changed()

    async def _ask(self, probe: Probe) -> bool:
        reply = await self._tools.probe(self._diary.life.endpoint, probe)
        return self._backend.read_probe(self._standing.action.spec, probe.path, reply) is Health.READY


async def until(ask: Callable[[], Awaitable[bool]]) -> None:
    """Ask again, ever more slowly, until it says yes. start_timeout is the planner's to keep."""
    pause = PROBE_FIRST
    while not await ask():
        await asyncio.sleep(pause)
        pause = min(PROBE_SLOWEST, Seconds(pause * 1.3))
