"""One instance: its process from spawn to end. The only writer of that instance's state."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass

from offloadd.backends.base import Backend
from offloadd.clock import Clock
from offloadd.events import About, EventKind, about
from offloadd.runtime.launchers import Launcher, Process
from offloadd.runtime.logs import LogFolder
from offloadd.state.actions import StartInstance, StopReason
from offloadd.state.desired import Engine
from offloadd.state.ids import InstanceId
from offloadd.state.launch import Endpoint, ExitCause, ExitKind, ExitStatus, Health, Probe, ProbeReply
from offloadd.state.observed import ExitRecord, InstanceState, InstanceView
from offloadd.units import Bytes, Instant, Seconds, format_seconds

log = logging.getLogger(__name__)

PROBE_FIRST = Seconds(0.05)
PROBE_SLOWEST = Seconds(1)
LIVENESS_EVERY = Seconds(5)
TERM_AGAIN = Seconds(3)
"""A second SIGTERM after this long, or after half of stop_timeout: llama-server then stops waiting for anybody."""
LOOPBACK = "127.0.0.1"

_AT_FAULT = {StopReason.HUNG: ExitKind.HUNG, StopReason.START_TIMEOUT: ExitKind.START_TIMEOUT}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What instances share, joined in `daemon.py`."""

    clock: Clock
    launcher: Launcher
    logs: LogFolder
    probe: Callable[[Endpoint, Probe], Awaitable[ProbeReply]]
    holds_port: Callable[[int, int], bool]
    """Given a pid and a TCP port: whether that tree listens on it. Blocks."""
    changed: Callable[[InstanceId], None]
    """Called after every change of state."""
    hang_up: Callable[[InstanceId, str], None]
    """Close every connection that we hold to the instance, because of what the text says."""


class Instance:
    """Runs one StartInstance to its end."""

    def __init__(self, action: StartInstance, backend: Backend, engine: Engine, tools: Tools) -> None:
        self.id = action.instance
        self.backend = backend
        self._action = action
        self._engine = engine
        self._tools = tools
        self._state = InstanceState.STARTING
        self._started_at = self._since = tools.clock.now()
        self._adopted_at: Instant | None = None
        self._ready_at: Instant | None = None
        self._last_sign: Instant | None = None
        self._drain_deadline: Instant | None = None
        self._stop_reason: StopReason | None = None
        self._stop_why = ""
        self._stop_limit: Seconds | None = None
        self._stopping = asyncio.Event()
        self._process: Process | None = None
        self._endpoint: Endpoint | None = None

    def view(self) -> InstanceView:
        """The instance as it is now."""
        return InstanceView(
            id=self.id,
            spec=self._action.spec,
            backend=self._action.candidate.backend,
            fingerprint=self._action.candidate.fingerprint,
            footprint_key=self._action.candidate.footprint_key,
            placement=self._action.placement,
            state=self._state,
            since=self._since,
            started_at=self._started_at,
            adopted_at=self._adopted_at,
            ready_at=self._ready_at,
            drain_deadline=self._drain_deadline,
            last_sign=self._last_sign,
            pid=self._process.pid if self._process else None,
            endpoint=self._endpoint,
        )

    @property
    def source_size(self) -> Bytes | None:
        """Of the model's files, as they were at its start."""
        return self._action.candidate.facts.size

    def sign(self) -> None:
        """It did some work just now: bytes came from it, or a probe of its working loop was answered."""
        self._last_sign = self._tools.clock.now()

    def adopt(self) -> None:
        """Take over what an earlier daemon left running."""
        if self._state is InstanceState.ORPHANED:
            self._adopted_at = self._tools.clock.now()
            self._enter(InstanceState.STARTING)

    def drain(self, deadline: Instant) -> None:
        """Take no new request; the planner stops it when the last has ended, or at the deadline."""
        if self._state in (InstanceState.STARTING, InstanceState.LOADING, InstanceState.READY):
            self._drain_deadline = deadline
            self._enter(InstanceState.DRAINING)

    def stop(self, reason: StopReason, why: str, limit: Seconds | None = None) -> None:
        """Begin to end it, and kill it after `limit`, or after the stop_timeout of its launch. Only the first reason counts."""
        if self._stop_reason is None and self._state is not InstanceState.EXITED:
            self._stop_reason, self._stop_why, self._stop_limit = reason, why, limit
            self._enter(InstanceState.STOPPING)
            self._stopping.set()

    async def run(self) -> ExitRecord:
        """Spawn, watch, stop when told; returns when nothing of it is left."""
        await asyncio.to_thread(self._tools.logs.discard_old, self.id)
        if self._stopping.is_set():
            return self.record(ExitStatus(), ExitCause(kind=ExitKind.STOPPED, message=self._stop_why))
        try:
            process = self._spawn()
        except OSError as error:
            return self.record(ExitStatus(), self._not_started(error))
        helpers = [self._helper(self._watch(process)), self._helper(self._stop_when_told(process))]
        try:
            status = await asyncio.shield(process.exited)
        finally:
            for helper in helpers:
                helper.cancel()
            process.kill()
            await asyncio.gather(*helpers, return_exceptions=True)
        # First: whoever waits for a slot must not be given one of the dead.
        self._enter(InstanceState.STOPPING)
        self._tools.hang_up(self.id, f"the backend ended ({status})")
        swept = await asyncio.to_thread(self._tools.launcher.sweep, self._mark)
        if swept:
            log.warning(
                "%s left %d processes outside its group; killed", self.id, swept, extra=self._about(EventKind.INSTANCE_KILLED)
            )
        tail = await asyncio.to_thread(self._tools.logs.tail, self.id)
        return self.record(status, self._cause(status, tail), tail)

    def _helper(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """A task beside the process. One that fails must not leave the process unwatched, so it ends it."""
        task = asyncio.create_task(work)
        task.add_done_callback(self._helper_ended)
        return task

    def _helper_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            log.error("%s: watching it failed; killing it", self.id, exc_info=error, extra=self._about(EventKind.INTERNAL_ERROR))
            if self._process is not None:
                self._process.kill()

    def _about(self, kind: EventKind, **data: object) -> dict[str, About]:
        return about(kind, model=self.id.model, instance=self.id, backend=self._action.candidate.backend, **data)

    @property
    def _mark(self) -> str:
        return f"{self.id}@{self._started_at}"

    def _enter(self, state: InstanceState) -> None:
        self._state = state
        self._since = self._tools.clock.now()
        self._tools.changed(self.id)

    def _spawn(self) -> Process:
        action = self._action
        more = tuple(_free_port() for _ in range(self.backend.more_ports))
        endpoint = Endpoint(host=LOOPBACK, port=_free_port(), more=more, key=secrets.token_hex(32))
        launch = self.backend.launch(self._engine, action.spec, action.candidate.facts, action.placement, endpoint)
        process = self._tools.launcher.spawn(launch, mark=self._mark, log_path=self._tools.logs.path(self.id))
        self._process, self._endpoint = process, endpoint
        said = self._about(EventKind.INSTANCE_SPAWNED, pid=process.pid, port=endpoint.port)
        log.info("%s: pid %d on port %d: %s", self.id, process.pid, endpoint.port, action.why, extra=said)
        return process

    async def _watch(self, process: Process) -> None:
        """From the first listening socket to the last sign of life."""
        assert self._endpoint is not None  # noqa: S101  (set by _spawn)
        await self._until(lambda: asyncio.to_thread(self._tools.holds_port, process.pid, self._endpoint_port))
        if self._state is InstanceState.STARTING:
            self._enter(InstanceState.LOADING)
        for probe in self.backend.probes(self._action.spec).readiness:
            await self._until(lambda probe=probe: self._ask(probe))  # type: ignore[misc]
        self._ready_at = self._last_sign = self._tools.clock.now()
        if self._state is InstanceState.LOADING:
            took = Seconds(self._ready_at - self._started_at)
            log.info("%s: ready after %s", self.id, format_seconds(took), extra=self._about(EventKind.INSTANCE_READY, load_s=took))
            self._enter(InstanceState.READY)
        await self._watch_life()

    @property
    def _endpoint_port(self) -> int:
        return self._endpoint.port if self._endpoint else 0

    async def _until(self, ask: Callable[[], Awaitable[bool]]) -> None:
        """Ask again, ever more slowly, until it says yes. start_timeout is the planner's to keep."""
        pause = PROBE_FIRST
        while not await ask():
            await asyncio.sleep(pause)
            pause = min(PROBE_SLOWEST, Seconds(pause * 1.3))

    async def _watch_life(self) -> None:
        """Probe the working loop while no request shows that it turns. What silence means is the planner's to judge."""
        probe = self.backend.probes(self._action.spec).liveness
        while True:
            await asyncio.sleep(LIVENESS_EVERY)
            quiet = self._tools.clock.now() - (self._last_sign or self._since)
            if quiet >= LIVENESS_EVERY and await self._ask(probe):
                self.sign()

    async def _ask(self, probe: Probe) -> bool:
        assert self._endpoint is not None  # noqa: S101  (set by _spawn)
        reply = await self._tools.probe(self._endpoint, probe)
        return self.backend.read_probe(self._action.spec, probe.path, reply) is Health.READY

    async def _stop_when_told(self, process: Process) -> None:
        """Hang up, TERM, TERM again, KILL the tree at stop_timeout.

        llama-server ends on the first TERM only when no client's connection is left, and on none while it computes a prompt.
        """
        await self._stopping.wait()
        self._tools.hang_up(self.id, self._stop_why)
        limit = self._action.spec.stop_timeout if self._stop_limit is None else self._stop_limit
        first = min(TERM_AGAIN, Seconds(limit / 2))
        process.terminate()
        if await _ends_within(process, first):
            return
        process.terminate()
        if await _ends_within(process, Seconds(limit - first)):
            return
        said = self._about(EventKind.INSTANCE_KILLED)
        log.warning("%s did not end within %g s of SIGTERM (stop_timeout); killing its process group", self.id, limit, extra=said)
        process.kill()

    def _not_started(self, error: OSError) -> ExitCause:
        program = self._engine.command[0]
        hint = f"check backends.{self._engine.name}.command"
        return ExitCause(kind=ExitKind.NOT_STARTED, message=f"cannot run {program}: {error.strerror or error}", hint=hint)

    def _cause(self, status: ExitStatus, tail: tuple[str, ...]) -> ExitCause:
        if self._stop_reason is None:
            return self.backend.explain_exit(status, tail, was_ready=self._ready_at is not None)
        kind = _AT_FAULT.get(self._stop_reason, ExitKind.STOPPED)
        return ExitCause(kind=kind, message=self._stop_why)

    def record(self, status: ExitStatus, cause: ExitCause, tail: tuple[str, ...] = ()) -> ExitRecord:
        """Mark it exited, and sum its life up."""
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
            expected=self._stop_reason is not None and self._stop_reason not in _AT_FAULT,
            ready_for=None if self._ready_at is None else Seconds(now - self._ready_at),
            tail=tail,
        )


async def _ends_within(process: Process, limit: Seconds) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(limit):
            await asyncio.shield(process.exited)
    return process.exited.done()


def _free_port() -> int:
    """A port that nobody holds now. Another may take it before the engine does: that ends the start with PORT_TAKEN."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
