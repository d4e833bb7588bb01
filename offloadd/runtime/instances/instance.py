"""One instance on this machine: its process from spawn to end. What it is told comes in here, and its parts are joined here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping

from offloadd.accounts import AccountError
from offloadd.backends.base import Backend
from offloadd.events import EventKind
from offloadd.runtime.instances import Tools
from offloadd.runtime.instances.checks import Checks
from offloadd.runtime.instances.diary import Diary
from offloadd.runtime.instances.end import cause_of, record_of
from offloadd.runtime.instances.naps import Sleep, sleeper_of
from offloadd.runtime.instances.spawn import intent, not_started, spawn
from offloadd.runtime.instances.standing import Standing
from offloadd.runtime.instances.stop import Stop
from offloadd.runtime.launchers import Process
from offloadd.state.actions import StartInstance, StopReason
from offloadd.state.desired import Engine
from offloadd.state.ids import DeviceId
from offloadd.state.launch import ExitCause, ExitKind, ExitStatus
from offloadd.state.life import Life
from offloadd.state.observed import ExitRecord, InstanceState, InstanceView
from offloadd.units import Bytes, Instant, Seconds, format_seconds

log = logging.getLogger(__name__)


class Instance:
    """Runs one StartInstance to its end, or what an earlier daemon has begun of one."""

    def __init__(
        self,
        action: StartInstance,
        backend: Backend,
        engine: Engine,
        tools: Tools,
        orphan: tuple[Life, Process] | None = None,
    ) -> None:
        self.id = action.instance
        self.backend = backend
        self._engine = engine
        self._tools = tools
        self._standing = Standing(action, tools)
        life = intent(self._standing, backend, engine, tools.boot) if orphan is None else orphan[0]
        self._diary = Diary(life, tools.lives, tools.launcher)
        self._checks = Checks(self._standing, self._diary, backend, tools)
        self._stop = Stop(self._standing, self._diary, engine, tools)
        self._process: Process | None = None
        self._wanted = asyncio.Event()
        self._released = False
        if orphan is None:
            self._wanted.set()
        else:
            self._take_up(*orphan)

    def view(self) -> InstanceView:
        """The instance as it is now."""
        if self._process is None:
            return self._standing.view(None, None)
        return self._standing.view(self._process.pid, self._diary.life.endpoint)

    @property
    def source_size(self) -> Bytes | None:
        """Of the model's files, as they were at its start."""
        return self._standing.action.candidate.facts.size

    def sign(self) -> None:
        """It did some work just now: bytes came from it."""
        standing = self._standing
        standing.worked_at = standing.now()
        standing.fault = ""
        standing.hear()

    def adopt(self) -> None:
        """Take over what an earlier daemon left running."""
        standing = self._standing
        if standing.state is InstanceState.ORPHANED:
            standing.adopted_at = standing.now()
            standing.enter(InstanceState.STARTING)
            self._wanted.set()

    def fall_asleep(self, free: Mapping[DeviceId, Bytes]) -> None:
        """Give its GPU memory back and live on; `free` is what is free there before."""
        standing = self._standing
        if standing.state is InstanceState.READY:
            standing.free_before, standing.slept_at, standing.keeps = free, None, None
            standing.enter(InstanceState.FALLING_ASLEEP)
            standing.turned.set()

    def rest(self, keeps: Mapping[DeviceId, Bytes]) -> None:
        """Its memory was seen to be free: be promised only so much as soon as that is written down."""
        standing = self._standing
        if standing.state is InstanceState.FALLING_ASLEEP and standing.slept_at is not None:
            standing.keeps = keeps
            standing.turned.set()

    def wake_up(self) -> None:
        """Be promised all of its memory again, and take it."""
        standing = self._standing
        if standing.state is InstanceState.SLEEPING:
            standing.placement = standing.action.placement
            standing.enter(InstanceState.WAKING)
            standing.turned.set()

    def drain(self, deadline: Instant) -> None:
        """Take no new request; the planner stops it when the last has ended, or at the deadline."""
        standing = self._standing
        if standing.state in (InstanceState.STARTING, InstanceState.LOADING, InstanceState.READY):
            standing.drain_deadline = deadline
            standing.enter(InstanceState.DRAINING)

    def stop(self, reason: StopReason, why: str, limit: Seconds | None = None) -> None:
        """Begin to end it, and kill it after `limit`, or after the stop_timeout of its launch. Only the first reason counts."""
        standing = self._standing
        if standing.stop_reason is None and standing.state is not InstanceState.EXITED:
            standing.stop_reason, standing.stop_why, standing.stop_limit = reason, why, limit
            standing.enter(InstanceState.STOPPING)
            standing.stopping.set()

    async def run(self) -> ExitRecord:
        """Spawn or take up, watch, stop when told; returns when nothing of it is left."""
        if self._process is None:
            begun = await self._begin()
            if isinstance(begun, ExitCause):
                return await self._never_lived(begun)
            self._process = begun
        return await self._live(self._process)

    def let_go(self) -> None:
        """Leave the process running for the daemon that comes after this one; whoever runs us is to be cancelled."""
        self._released = True
        if self._process is not None:
            self._process.let_go()

    def record(self, status: ExitStatus, cause: ExitCause, tail: tuple[str, ...] = ()) -> ExitRecord:
        """Mark it exited, and sum its life up."""
        return record_of(self._standing, status, cause, tail)

    def _take_up(self, life: Life, process: Process) -> None:
        """Go on where an earlier daemon left off, its last word on an end included."""
        self._process = process
        self._standing.take_up(life)
        if life.stopping:
            self.stop(StopReason.UNWANTED, life.stopping)

    async def _begin(self) -> Process | ExitCause:
        """Write the intent down and spawn; the cause when there is nothing to watch."""
        await asyncio.to_thread(self._tools.logs.discard_old, self.id)
        await self._diary.note()
        if self._standing.stopping.is_set():
            return ExitCause(kind=ExitKind.STOPPED, message=self._standing.stop_why)
        try:
            return await spawn(self._standing, self._diary, self.backend, self._engine, self._tools)
        except AccountError as error:
            return ExitCause(kind=ExitKind.NOT_STARTED, message=f"not started: {error.message}", hint=error.hint)
        except OSError as error:
            return not_started(self._engine, error)

    async def _never_lived(self, cause: ExitCause) -> ExitRecord:
        await asyncio.to_thread(self._tools.launcher.drop_folder, self._diary.life.mark)
        await self._diary.cross_out()
        return self.record(ExitStatus(), cause)

    async def _live(self, process: Process) -> ExitRecord:
        status = await self._until_ended(process)
        # First: whoever waits for a slot must not be given one of the dead.
        self._standing.enter(InstanceState.STOPPING)
        self._tools.hang_up(self.id, f"the backend ended ({status})", self._standing.stop_reason is None)
        await self._stop.run_command(process, self._standing.action.spec.stop_timeout)  # what it started may have outlived it
        remains = await asyncio.to_thread(self._tools.launcher.sweep, self._diary.life, process.id)
        if remains.killed:
            said = self._standing.about(EventKind.INSTANCE_KILLED)
            log.warning("%s left %d processes outside its group; killed", self.id, remains.killed, extra=said)
        if remains.shared:
            log.info("%s left %d pieces of shared memory; taken away", self.id, remains.shared)
        tail = await asyncio.to_thread(self._tools.logs.tail, self.id)
        await self._diary.cross_out()
        return self.record(status, cause_of(self._standing, self.backend, status, tail, remains), tail)

    async def _until_ended(self, process: Process) -> ExitStatus:
        """Everything that goes on beside its process. Whoever is cancelled meanwhile ends it, unless it was let go."""
        work = (self._watch(process), self._stop.when_told(process), self._diary.keep_shared(process))
        helpers = [self._helper(each, process) for each in work]
        try:
            await self._diary.note(process=process.id)
            return await asyncio.shield(process.exited)
        finally:
            for helper in helpers:
                helper.cancel()
            if not self._released:
                process.kill()
            await asyncio.gather(*helpers, return_exceptions=True)

    def _helper(self, work: Coroutine[None, None, None], process: Process) -> asyncio.Task[None]:
        """A task beside the process. One that fails must not leave the process unwatched, so it ends it."""

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()):
                said = self._standing.about(EventKind.INTERNAL_ERROR)
                log.error("%s: watching it failed; killing it", self.id, exc_info=error, extra=said)
                process.kill()

        task = asyncio.create_task(work)
        task.add_done_callback(ended)
        return task

    async def _watch(self, process: Process) -> None:
        """From the first listening socket to the last sign of life."""
        standing, checks = self._standing, self._checks
        await self._wanted.wait()
        # An orphan that was ready was vouched for by its port; with stop_command it listens where none of our processes is.
        if standing.ready_at is None and not self._diary.life.stop_command:
            await checks.until_listening(process)
        if standing.state is InstanceState.STARTING:
            standing.enter(InstanceState.LOADING)
        sleep = self._sleep()
        if sleep is not None and standing.ready_at is not None and await sleep.found_asleep():
            await sleep.nap()
        await checks.until_ready()
        standing.last_sign = standing.now()
        standing.ready_at = standing.ready_at or standing.last_sign
        if standing.state is InstanceState.LOADING:
            self._say_ready(standing.ready_at)
            standing.enter(InstanceState.READY)
        await self._diary.note(ready_at=standing.ready_at)
        await self._diary.note_shared(process)
        standing.exposed = await asyncio.to_thread(self._tools.open_ports, process.pid)
        while True:
            await checks.watch()
            if sleep is not None:
                await sleep.fall_asleep()
                await sleep.nap()

    def _sleep(self) -> Sleep | None:
        """Its way to sleep and back; None for one that cannot."""
        action, endpoint = self._standing.action, self._diary.life.endpoint
        sleeper = sleeper_of(self.backend, action.spec, action.placement, endpoint, self._tools.probe)
        return None if sleeper is None else Sleep(self._standing, self._diary, sleeper, self._checks.until_ready)

    def _say_ready(self, ready_at: Instant) -> None:
        standing = self._standing
        took = Seconds(ready_at - standing.started_at)
        said = standing.about(EventKind.INSTANCE_READY, load_s=took, adopted=standing.adopted_at is not None)
        if standing.adopted_at is None:
            log.info("%s: ready after %s", self.id, format_seconds(took), extra=said)
        else:
            waited = Seconds(standing.now() - standing.adopted_at)
            log.info("%s: serves on, %s after its adoption", self.id, format_seconds(waited), extra=said)
