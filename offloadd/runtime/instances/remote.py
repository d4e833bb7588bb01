"""An instance that runs elsewhere: it is asked whether it is there, and requests are given its address. It has no process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress

from offloadd.backends.base import Backend
from offloadd.backends.external import endpoint_of
from offloadd.events import EventKind, about
from offloadd.runtime.instances import Tools, checks
from offloadd.state.actions import StartInstance, StopReason
from offloadd.state.desired import Engine
from offloadd.state.ids import DeviceId
from offloadd.state.launch import ExitCause, ExitKind, ExitStatus, Health, Probe, ProbeReply
from offloadd.state.observed import ExitRecord, InstanceState, InstanceView
from offloadd.units import Bytes, Instant, Seconds, format_seconds

log = logging.getLogger(__name__)

MISSES = 3
"""Checks in a row without an answer after which it is taken to be gone."""


class RemoteInstance:
    """One model's use of an external engine, from the first check to the last."""

    def __init__(self, action: StartInstance, backend: Backend, engine: Engine, tools: Tools) -> None:
        self.id = action.instance
        self.backend = backend
        self._action = action
        self._tools = tools
        self._endpoint = endpoint_of(engine)
        self._state = InstanceState.LOADING
        self._started_at = self._since = tools.clock.now()
        self._ready_at: Instant | None = None
        self._last_sign: Instant | None = None
        self._drain_deadline: Instant | None = None
        self._stop_reason: StopReason | None = None
        self._stop_why = ""
        self._stopping = asyncio.Event()

    def view(self) -> InstanceView:
        """The instance as it is now."""
        candidate = self._action.candidate
        return InstanceView(
            id=self.id,
            spec=self._action.spec,
            backend=candidate.backend,
            fingerprint=candidate.fingerprint,
            placement=self._action.placement,
            state=self._state,
            since=self._since,
            started_at=self._started_at,
            ready_at=self._ready_at,
            drain_deadline=self._drain_deadline,
            last_sign=self._last_sign,
            endpoint=self._endpoint,
        )

    @property
    def source_size(self) -> None:
        """Nobody here knows."""
        return None

    def sign(self) -> None:
        """Bytes came from it."""
        self._last_sign = self._tools.clock.now()

    def adopt(self) -> None:
        """There is nothing to take over: whoever comes after this daemon asks it anew."""

    def let_go(self) -> None:
        """It runs on by itself."""

    def fall_asleep(self, free: Mapping[DeviceId, Bytes]) -> None:
        """It holds no memory here that it could give back."""

    def rest(self, keeps: Mapping[DeviceId, Bytes]) -> None:
        """As before."""

    def wake_up(self) -> None:
        """It never sleeps."""

    def drain(self, deadline: Instant) -> None:
        """Give it no new request."""
        if self._state in (InstanceState.LOADING, InstanceState.READY):
            self._drain_deadline = deadline
            self._enter(InstanceState.DRAINING)

    def stop(self, reason: StopReason, why: str, limit: Seconds | None = None) -> None:
        """Use it no more. Only the first reason counts."""
        if self._stop_reason is None and self._state is not InstanceState.EXITED:
            self._stop_reason, self._stop_why = reason, why
            self._enter(InstanceState.STOPPING)
            self._stopping.set()

    async def run(self) -> ExitRecord:
        """Check it until it is given up or no longer wanted."""
        checking = asyncio.create_task(self._check())
        stopped = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({checking, stopped}, return_when=asyncio.FIRST_COMPLETED)
            cause = ExitCause(kind=ExitKind.STOPPED, message=self._stop_why) if self._stop_reason else await checking
        finally:
            for task in (checking, stopped):
                task.cancel()
            await asyncio.gather(checking, stopped, return_exceptions=True)
        self._enter(InstanceState.STOPPING)
        self._tools.hang_up(self.id, cause.message, False)
        return self.record(ExitStatus(), cause)

    def record(self, status: ExitStatus, cause: ExitCause, tail: tuple[str, ...] = ()) -> ExitRecord:
        """Mark it exited, and sum its time up."""
        now = self._tools.clock.now()
        self._state, self._since = InstanceState.EXITED, now
        return ExitRecord(
            instance=self.id,
            backend=self._action.candidate.backend,
            fingerprint=self._action.candidate.fingerprint,
            identity=self._action.candidate.facts.identity,
            at=now,
            status=status,
            cause=cause,
            expected=self._stop_reason is not None and self._stop_reason is not StopReason.HUNG,
            ready_for=None if self._ready_at is None else Seconds(now - self._ready_at),
            tail=tail,
        )

    async def _check(self) -> ExitCause:
        """Until it misses several checks in a row; what it said last is the cause."""
        probes = self.backend.probes(self._action.spec)
        for probe in probes.readiness:
            if lost := await self._answered(probe, checks.PROBE_FIRST):
                return lost
        self._ready_at = self._last_sign = self._tools.clock.now()
        if self._state is InstanceState.LOADING:
            took = Seconds(self._ready_at - self._started_at)
            said = about(EventKind.INSTANCE_READY, model=self.id.model, instance=self.id, backend=self._action.candidate.backend)
            log.info("%s: %s answers, after %s", self.id, self._endpoint.url, format_seconds(took), extra=said)
            self._enter(InstanceState.READY)
        while True:
            await asyncio.sleep(checks.LIVENESS_EVERY)
            quiet = self._tools.clock.now() - (self._last_sign or self._since)
            if quiet >= checks.LIVENESS_EVERY and (lost := await self._answered(probes.liveness, checks.PROBE_SLOWEST)):
                return lost

    async def _answered(self, probe: Probe, pause: Seconds) -> ExitCause | None:
        """Ask a few times; None as soon as it answers well."""
        reply = ProbeReply(status=None)
        for _ in range(MISSES):
            reply = await self._tools.probe(self._endpoint, probe)
            if self.backend.read_probe(self._action.spec, probe.path, reply) is Health.READY:
                self.sign()
                return None
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stopping.wait()
        return self._lost(reply)

    def _lost(self, reply: ProbeReply) -> ExitCause:
        where = self._endpoint.url
        if reply.status in (401, 403):
            hint = f"check backends.{self._action.candidate.backend}.key"
            return ExitCause(kind=ExitKind.BAD_OPTION, message=f"{where} refuses our key (status {reply.status})", hint=hint)
        found = reply.error or f"status {reply.status}"
        return ExitCause(kind=ExitKind.CRASHED, message=f"{where} does not answer: {found}", hint="it is not ours to start")

    def _enter(self, state: InstanceState) -> None:
        self._state = state
        self._since = self._tools.clock.now()
        self._tools.changed(self.id)
