"""One instance: its process from spawn to end. The only writer of that instance's state."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NoReturn, Protocol

from offloadd.accounts import Account, AccountError, find_account
from offloadd.backends.base import Backend
from offloadd.backends.words import fill
from offloadd.clock import Clock
from offloadd.events import About, EventKind, about
from offloadd.runtime.evidence import Evidence, machine_oom_kills, weigh
from offloadd.runtime.launchers import Launcher, Process, Remains
from offloadd.runtime.logs import LogFolder
from offloadd.runtime.naps import Sleeper, sleeper_of
from offloadd.runtime.stop_command import run_stop_command
from offloadd.state.actions import StartInstance, StopReason
from offloadd.state.desired import Engine, HealthPolicy
from offloadd.state.ids import DeviceId, InstanceId, ModelName
from offloadd.state.launch import Endpoint, ExitCause, ExitKind, ExitStatus, Health, Launch, Placement, Probe, ProbeReply
from offloadd.state.life import Life
from offloadd.state.observed import ExitRecord, InstanceState, InstanceView
from offloadd.units import Bytes, Instant, Seconds, format_bytes, format_seconds

log = logging.getLogger(__name__)

PROBE_FIRST = Seconds(0.05)
PROBE_SLOWEST = Seconds(1)
LIVENESS_EVERY = Seconds(5)
IDLE_ANSWER = Seconds(3)
"""How long an idle instance's working loop may take to answer before the silence is noted."""
DOUBT_EVERY = Seconds(1)
"""Pause between probes of an instance that has just missed one."""
TERM_AGAIN = Seconds(3)
"""A second SIGTERM after this long, or after half of stop_timeout: llama-server then stops waiting for anybody."""
STUCK_AFTER = Seconds(10)
"""A process that SIGKILL has not ended by then is held by the kernel, mostly in a driver."""
SHARED_WHILE_LOADING = Seconds(2)
SHARED_EVERY = Seconds(60)
"""How often it is looked at what a server has of the machine's shared memory: nearly all of it is made while it loads."""
LOOPBACK = "127.0.0.1"

_AT_FAULT = {StopReason.HUNG: ExitKind.HUNG, StopReason.START_TIMEOUT: ExitKind.START_TIMEOUT}
_KINDS = {**_AT_FAULT, StopReason.SLEEPLESS: ExitKind.SLEEPLESS}
"""It would have been stopped if it could not sleep at all: that it did not is no failure, and is remembered."""
_SLEEPLESS_HINT = "it is not put to sleep again before its config changes or it is loaded by hand; vllm.asleep and its log may tell"


class Lives(Protocol):
    """Where it is written down which instances have begun, for a daemon that comes after this one. Both block, neither raises."""

    def keep(self, life: Life) -> None:
        """Write it down, in place of what was written of it before."""
        ...

    def drop(self, mark: str) -> None:
        """It has ended, and nothing of it is left."""
        ...

    def keep_exits(self, boot: str, model: ModelName, records: Sequence[ExitRecord]) -> None:
        """Write down how a model's last instances ended; none takes away what was written."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What instances share, joined in `daemon.py`."""

    clock: Clock
    launcher: Launcher
    logs: LogFolder
    lives: Lives
    boot: str
    """The machine's boot, which processes and instants belong to."""
    probe: Callable[[Endpoint, Probe], Awaitable[ProbeReply]]
    holds_port: Callable[[int, int], bool]
    """Given a pid and a TCP port: whether that tree listens on it. Blocks."""
    changed: Callable[[InstanceId], None]
    """Called after every change of state."""
    held: Callable[[InstanceId], int]
    """Requests that the instance holds now."""
    health: Callable[[InstanceId], HealthPolicy]
    """How the config in force wants it checked."""
    open_ports: Callable[[int], tuple[str, ...]]
    """Given a pid: the addresses beyond loopback on which that tree listens. Blocks."""
    hang_up: Callable[[InstanceId, str, bool], None]
    """Close every connection that we hold to the instance, because of what the text says; whether it died by itself."""


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
        self._action = action
        self._engine = engine
        self._tools = tools
        self._state = InstanceState.STARTING
        self._started_at = self._since = tools.clock.now()
        self._adopted_at: Instant | None = None
        self._ready_at: Instant | None = None
        self._last_sign: Instant | None = None
        self._worked_at: Instant | None = None
        self._misses = 0
        self._fault = ""
        self._placement = action.placement
        """What it is promised now."""
        self._slept_at: Instant | None = None
        self._keeps: Mapping[DeviceId, Bytes] | None = None
        self._free_before: Mapping[DeviceId, Bytes] = {}
        self._turned = asyncio.Event()
        """Told to fall asleep, that it may rest, or to wake."""
        self._stuck = False
        self._exposed: tuple[str, ...] = ()
        self._oom_kills = machine_oom_kills()
        self._drain_deadline: Instant | None = None
        self._stop_reason: StopReason | None = None
        self._stop_why = ""
        self._stop_limit: Seconds | None = None
        self._stopping = asyncio.Event()
        self._process: Process | None = None
        self._wanted = asyncio.Event()
        self._released = False
        self._over = False
        self._pen = asyncio.Lock()
        self._life = self._intent() if orphan is None else orphan[0]
        if orphan is None:
            self._wanted.set()
        else:
            self._take_up(*orphan)

    def view(self) -> InstanceView:
        """The instance as it is now."""
        return InstanceView(
            id=self.id,
            spec=self._action.spec,
            backend=self._action.candidate.backend,
            fingerprint=self._action.candidate.fingerprint,
            footprint_key=self._action.candidate.footprint_key,
            placement=self._placement,
            awake=None if self._placement is self._action.placement else self._action.placement,
            slept_at=self._slept_at,
            free_before=self._free_before,
            state=self._state,
            since=self._since,
            started_at=self._started_at,
            adopted_at=self._adopted_at,
            ready_at=self._ready_at,
            drain_deadline=self._drain_deadline,
            last_sign=self._last_sign,
            misses=self._misses,
            fault=self._fault,
            stuck=self._stuck,
            exposed=self._exposed,
            pid=self._process.pid if self._process else None,
            endpoint=self._life.endpoint if self._process else None,
        )

    @property
    def source_size(self) -> Bytes | None:
        """Of the model's files, as they were at its start."""
        return self._action.candidate.facts.size

    def sign(self) -> None:
        """It did some work just now: bytes came from it."""
        self._worked_at = self._tools.clock.now()
        self._fault = ""
        self._hear()

    def _hear(self) -> None:
        """Its working loop answered."""
        self._last_sign = self._tools.clock.now()
        self._misses = 0

    def adopt(self) -> None:
        """Take over what an earlier daemon left running."""
        if self._state is InstanceState.ORPHANED:
            self._adopted_at = self._tools.clock.now()
            self._enter(InstanceState.STARTING)
            self._wanted.set()

    def fall_asleep(self, free: Mapping[DeviceId, Bytes]) -> None:
        """Give its GPU memory back and live on; `free` is what is free there before."""
        if self._state is InstanceState.READY:
            self._free_before, self._slept_at, self._keeps = free, None, None
            self._enter(InstanceState.FALLING_ASLEEP)
            self._turned.set()

    def rest(self, keeps: Mapping[DeviceId, Bytes]) -> None:
        """Its memory was seen to be free: be promised only so much as soon as that is written down."""
        if self._state is InstanceState.FALLING_ASLEEP and self._slept_at is not None:
            self._keeps = keeps
            self._turned.set()

    def wake_up(self) -> None:
        """Be promised all of its memory again, and take it."""
        if self._state is InstanceState.SLEEPING:
            self._placement = self._action.placement
            self._enter(InstanceState.WAKING)
            self._turned.set()

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
        """Spawn or take up, watch, stop when told; returns when nothing of it is left."""
        if self._process is None:
            ended = await self._begin()
            if ended is not None:
                return ended
        return await self._live()

    def let_go(self) -> None:
        """Leave the process running for the daemon that comes after this one; whoever runs us is to be cancelled."""
        self._released = True
        if self._process is not None:
            self._process.let_go()

    async def _begin(self) -> ExitRecord | None:
        """Write the intent down, spawn, and write down what came of it; a record when there is nothing to watch."""
        await asyncio.to_thread(self._tools.logs.discard_old, self.id)
        await self._note()
        if self._stopping.is_set():
            return await self._never_lived(ExitCause(kind=ExitKind.STOPPED, message=self._stop_why))
        try:
            account = await asyncio.to_thread(find_account, self._engine.user, self._engine.group)
            await self._give_folder(account)
            self._spawn(account)
        except AccountError as error:
            cause = ExitCause(kind=ExitKind.NOT_STARTED, message=f"not started: {error.message}", hint=error.hint)
            return await self._never_lived(cause)
        except OSError as error:
            return await self._never_lived(self._not_started(error))
        return None

    async def _give_folder(self, account: Account | None) -> None:
        """One of its own for temporary files; without, they go where everybody's go. It is written down with the process."""
        folder = await asyncio.to_thread(self._tools.launcher.make_folder, self._life.mark, account)
        self._life = replace(self._life, endpoint=replace(self._life.endpoint, folder=folder))
        if not folder:
            said = self._about(EventKind.INSTANCE_SPAWNED)
            log.warning("%s: no folder can be made for its temporary files; what it leaves stays in /tmp", self.id, extra=said)

    async def _never_lived(self, cause: ExitCause) -> ExitRecord:
        await asyncio.to_thread(self._tools.launcher.drop_folder, self._life.mark)
        await self._cross_out()
        return self.record(ExitStatus(), cause)

    async def _live(self) -> ExitRecord:
        process = self._process
        assert process is not None  # noqa: S101  (spawned or taken up)
        work = (self._watch(process), self._stop_when_told(process), self._keep_shared(process))
        helpers = [self._helper(each) for each in work]
        try:
            await self._note(process=process.id)
            status = await asyncio.shield(process.exited)
        finally:
            for helper in helpers:
                helper.cancel()
            if not self._released:
                process.kill()
            await asyncio.gather(*helpers, return_exceptions=True)
        # First: whoever waits for a slot must not be given one of the dead.
        self._enter(InstanceState.STOPPING)
        self._tools.hang_up(self.id, f"the backend ended ({status})", self._stop_reason is None)
        await self._run_stop_command(self._action.spec.stop_timeout)  # what it has started may have outlived it
        remains = await asyncio.to_thread(self._tools.launcher.sweep, self._life, process.id)
        if remains.killed:
            said = self._about(EventKind.INSTANCE_KILLED)
            log.warning("%s left %d processes outside its group; killed", self.id, remains.killed, extra=said)
        if remains.shared:
            log.info("%s left %d pieces of shared memory; taken away", self.id, remains.shared)
        tail = await asyncio.to_thread(self._tools.logs.tail, self.id)
        await self._cross_out()
        return self.record(status, self._cause(status, tail, self._evidence(remains)), tail)

    def _evidence(self, remains: Remains) -> Evidence:
        before, now = self._oom_kills, machine_oom_kills()
        since = None if before is None or now is None else now - before
        return Evidence(oom_kills=remains.oom_kills, peak=remains.peak, machine_oom_kills=since)

    async def _note(self, **changes: object) -> None:
        """Write down what is new. Whoever is cancelled meanwhile leaves the writing to end by itself, and in its turn."""
        self._life = replace(self._life, **changes)  # type: ignore[arg-type]
        await asyncio.shield(asyncio.ensure_future(self._write()))

    async def _write(self) -> None:
        async with self._pen:
            if not self._over:
                await asyncio.to_thread(self._tools.lives.keep, self._life)

    async def _cross_out(self) -> None:
        """Nothing of it is left, and nothing more is to be written of it."""
        self._over = True
        async with self._pen:
            await asyncio.to_thread(self._tools.lives.drop, self._life.mark)

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

    def _intent(self) -> Life:
        """What is written down before anything is done."""
        action, spec = self._action, self._action.spec
        more = tuple(_free_port() for _ in range(self.backend.more_ports))
        endpoint = Endpoint(host=LOOPBACK, port=_free_port(), more=more, api=self._engine.api, key=secrets.token_hex(32))
        return Life(
            mark=f"{self.id}@{secrets.token_hex(8)}",
            instance=self.id,
            spec=spec,
            backend=action.candidate.backend,
            fingerprint=action.candidate.fingerprint,
            footprint_key=action.candidate.footprint_key,
            identity=action.candidate.facts.identity,
            placement=action.placement,
            endpoint=endpoint,
            stop_command=fill(self._engine.stop_command, spec, action.candidate.facts, endpoint),
            user=self._engine.user,
            group=self._engine.group,
            boot=self._tools.boot,
            started_at=self._started_at,
        )

    def _take_up(self, life: Life, process: Process) -> None:
        """Go on where an earlier daemon left off, its last word on an end included."""
        self._state = InstanceState.ORPHANED
        self._process = process
        self._started_at, self._ready_at = life.started_at, life.ready_at
        if life.asleep is not None:
            self._placement = _reduced(life.placement, life.asleep)
        if life.stopping:
            self.stop(StopReason.UNWANTED, life.stopping)

    def _enter(self, state: InstanceState) -> None:
        self._state = state
        self._since = self._tools.clock.now()
        self._tools.changed(self.id)

    def _spawn(self, account: Account | None) -> None:
        action, endpoint = self._action, self._life.endpoint
        launch = self.backend.launch(self._engine, action.spec, action.candidate.facts, action.placement, endpoint)
        if endpoint.folder:
            launch = Launch(argv=launch.argv, env={"TMPDIR": endpoint.folder, **launch.env})
        log_path = self._tools.logs.path(self.id)
        process = self._tools.launcher.spawn(launch, mark=self._life.mark, log_path=log_path, account=account)
        self._process = process
        said = self._about(EventKind.INSTANCE_SPAWNED, pid=process.pid, port=endpoint.port)
        log.info("%s: pid %d on port %d: %s", self.id, process.pid, endpoint.port, action.why, extra=said)

    async def _watch(self, process: Process) -> None:
        """From the first listening socket to the last sign of life."""
        await self._wanted.wait()
        # An orphan that was ready was vouched for by its port; with stop_command it listens where none of our processes is.
        if self._ready_at is None and not self._life.stop_command:
            await self._until(lambda: asyncio.to_thread(self._tools.holds_port, process.pid, self._life.endpoint.port))
        if self._state is InstanceState.STARTING:
            self._enter(InstanceState.LOADING)
        sleeper = sleeper_of(self.backend, self._action.spec, self._action.placement, self._life.endpoint, self._tools.probe)
        if sleeper is not None and self._ready_at is not None and await self._found_asleep(sleeper):
            await self._nap(sleeper)
        await self._until_ready()
        self._last_sign = self._tools.clock.now()
        self._ready_at = self._ready_at or self._last_sign
        if self._state is InstanceState.LOADING:
            self._say_ready(self._ready_at)
            self._enter(InstanceState.READY)
        await self._note(ready_at=self._ready_at)
        await self._look_at_shared(process)
        self._exposed = await asyncio.to_thread(self._tools.open_ports, process.pid)
        while True:
            await self._watch_life()
            if sleeper is not None:
                await self._fall_asleep(sleeper)
                await self._nap(sleeper)

    async def _until_ready(self) -> None:
        for probe in self.backend.probes(self._action.spec).readiness:
            await self._until(lambda probe=probe: self._ask(probe))  # type: ignore[misc]

    async def _found_asleep(self, sleeper: Sleeper) -> bool:
        """Whether what an earlier daemon left sleeps; it is then in the state that its memory's books are in."""
        asleep: bool | None = None

        async def told() -> bool:
            nonlocal asleep
            asleep = await sleeper.sleeps()
            return asleep is not None

        await self._until(told)
        if asleep and self._state is InstanceState.LOADING:
            now = self._tools.clock.now()
            self._hear()
            if self._life.asleep is None:  # it fell asleep, and nobody has seen its memory come free
                self._slept_at = now
            self._enter(InstanceState.FALLING_ASLEEP if self._life.asleep is None else InstanceState.SLEEPING)
        elif not asleep and self._life.asleep is not None:
            self._placement = self._action.placement  # somebody has woken it: what it holds must be on the books
            await self._note(asleep=None)
        return bool(asleep)

    async def _fall_asleep(self, sleeper: Sleeper) -> None:
        problem = await sleeper.fall_asleep()
        if problem:
            await self._be_sick(f"it cannot be put to sleep: {problem}")
        self._hear()
        self._slept_at = self._tools.clock.now()
        self._tools.changed(self.id)

    async def _nap(self, sleeper: Sleeper) -> None:
        """From its word that it sleeps to its next token. Whether the memory came back is the planner's to see."""
        while self._state is InstanceState.FALLING_ASLEEP and self._keeps is None:
            await self._told(PROBE_SLOWEST)
        if self._state is InstanceState.FALLING_ASLEEP and self._keeps is not None:
            await self._note(asleep=self._keeps)  # ahead of the books: a daemon that comes after us must not promise it more
            if self._state is InstanceState.FALLING_ASLEEP:
                self._placement = _reduced(self._action.placement, self._keeps)
                self._say(EventKind.INSTANCE_ASLEEP, f"sleeps (level {sleeper.level}) with {format_bytes(self._placement.total)}")
                self._enter(InstanceState.SLEEPING)
        while self._state is InstanceState.SLEEPING:
            if not await self._told(LIVENESS_EVERY):
                await self._look_at_sleep(sleeper)
        if self._state is InstanceState.WAKING:
            await self._wake(sleeper)

    async def _look_at_sleep(self, sleeper: Sleeper) -> None:
        asleep = await sleeper.sleeps()
        if asleep:
            self._hear()
        elif asleep is None:
            self._misses += 1
        else:
            self._fault = "it is awake though nobody here woke it, and holds memory that it is not promised"
            log.warning("%s: %s", self.id, self._fault, extra=self._about(EventKind.INSTANCE_SICK))
        if not asleep:
            self._tools.changed(self.id)

    async def _wake(self, sleeper: Sleeper) -> None:
        began = self._tools.clock.now()
        await self._note(asleep=None)
        problem = await sleeper.wake_up()
        if problem:
            await self._be_sick(f"it does not wake: {problem}")
        await self._until_ready()
        self._slept_at, self._keeps = None, None
        self._hear()
        if self._state is InstanceState.WAKING:
            took = Seconds(self._tools.clock.now() - began)
            self._say(EventKind.INSTANCE_AWAKE, f"awake after {format_seconds(took)}", wake_s=took)
            self._enter(InstanceState.READY)

    async def _be_sick(self, fault: str) -> NoReturn:
        """It cannot go on, and the planner ends it. Bytes that some client still gets do not make it well again."""
        log.warning("%s: %s", self.id, fault, extra=self._about(EventKind.INSTANCE_SICK))
        while True:
            self._fault = fault
            self._tools.changed(self.id)
            await asyncio.sleep(LIVENESS_EVERY)

    async def _told(self, limit: Seconds) -> bool:
        """Whether it was told to do something else, within that time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(limit):
                await self._turned.wait()
        told = self._turned.is_set()
        self._turned.clear()
        return told

    def _say(self, kind: EventKind, text: str, **data: object) -> None:
        log.info("%s: %s", self.id, text, extra=self._about(kind, **data))

    def _say_ready(self, ready_at: Instant) -> None:
        took = Seconds(ready_at - self._started_at)
        said = self._about(EventKind.INSTANCE_READY, load_s=took, adopted=self._adopted_at is not None)
        if self._adopted_at is None:
            log.info("%s: ready after %s", self.id, format_seconds(took), extra=said)
        else:
            waited = Seconds(self._tools.clock.now() - self._adopted_at)
            log.info("%s: serves on, %s after its adoption", self.id, format_seconds(waited), extra=said)

    async def _until(self, ask: Callable[[], Awaitable[bool]]) -> None:
        """Ask again, ever more slowly, until it says yes. start_timeout is the planner's to keep."""
        pause = PROBE_FIRST
        while not await ask():
            await asyncio.sleep(pause)
            pause = min(PROBE_SLOWEST, Seconds(pause * 1.3))

    async def _watch_life(self) -> None:
        """Probe the working loop while no request shows that it turns. What silence means is the planner's to judge.

        Until it is told to fall asleep: no probe may then be under way.
        """
        probes = self.backend.probes(self._action.spec)
        while True:
            await self._told(min(DOUBT_EVERY, LIVENESS_EVERY) if self._misses else LIVENESS_EVERY)
            if self._state is InstanceState.FALLING_ASLEEP:
                return
            self._oom_kills = machine_oom_kills()
            quiet = self._tools.clock.now() - (self._last_sign or self._since)
            if quiet >= LIVENESS_EVERY:
                if await self._ask(self._patiently(probes.liveness)):
                    self._hear()
                else:
                    self._misses += 1
                    self._tools.changed(self.id)
            if probes.canary is not None:
                await self._try_canary(probes.canary)

    def _patiently(self, probe: Probe) -> Probe:
        """One that works may be deaf for as long as a prompt takes; the silence of one that nobody uses is noted soon, once."""
        if self._misses or self._tools.held(self.id):
            return probe
        return replace(probe, timeout=min(probe.timeout, IDLE_ANSWER))

    async def _try_canary(self, canary: Probe) -> None:
        """Ask for one token when nobody else has for a while. It must fail twice in a row: the first may have met a long prompt."""
        health = self._tools.health(self.id)
        since = self._worked_at or self._ready_at or self._since
        if not health.canary or self._fault or self._tools.held(self.id) or self._tools.clock.now() - since < health.canary:
            return
        for _ in range(2):
            reply = await self._tools.probe(self._life.endpoint, replace(canary, timeout=health.canary_timeout))
            if reply.status is not None and reply.status < 500:  # what is refused was read and judged, so it lives
                self._worked_at = self._tools.clock.now()
                return
            if self._tools.held(self.id):
                return
        found = reply.error or f"status {reply.status}"
        self._fault = f"it answers its health checks and gives no token: {found} (health.canary)"
        log.warning("%s: %s", self.id, self._fault, extra=self._about(EventKind.INSTANCE_SICK))
        self._tools.changed(self.id)

    async def _ask(self, probe: Probe) -> bool:
        reply = await self._tools.probe(self._life.endpoint, probe)
        return self.backend.read_probe(self._action.spec, probe.path, reply) is Health.READY

    async def _stop_when_told(self, process: Process) -> None:
        """Hang up, TERM, TERM again, KILL the tree at stop_timeout.

        llama-server ends on the first TERM only when no client's connection is left, and on none while it computes a prompt.
        """
        await self._stopping.wait()
        self._tools.hang_up(self.id, self._stop_why, False)
        await self._look_at_shared(process)
        await self._note(stopping=self._stop_why or self._stop_reason or "stopped")
        limit = self._action.spec.stop_timeout if self._stop_limit is None else self._stop_limit
        first = min(TERM_AGAIN, Seconds(limit / 2))
        if await self._run_stop_command(limit) and await _ends_within(process, first):
            return
        process.terminate()
        if await _ends_within(process, first):
            return
        process.terminate()
        if await _ends_within(process, Seconds(limit - first)):
            return
        said = self._about(EventKind.INSTANCE_KILLED)
        log.warning("%s did not end within %g s of SIGTERM (stop_timeout); killing its process tree", self.id, limit, extra=said)
        process.kill()
        while not await _ends_within(process, STUCK_AFTER):
            if not self._stuck:
                log.error("%s: SIGKILL does not end pid %d; its memory stays on the books", self.id, process.pid, extra=said)
            self._stuck = True
            self._tools.changed(self.id)
            process.kill()

    async def _keep_shared(self, process: Process) -> None:
        """Know what it has of the machine's shared memory: when it is dead, nobody can tell any more whose that was."""
        while True:
            await self._look_at_shared(process)
            await asyncio.sleep(SHARED_WHILE_LOADING if self._ready_at is None else SHARED_EVERY)

    async def _look_at_shared(self, process: Process) -> None:
        pieces = await asyncio.to_thread(self._tools.launcher.shared, process.id, self._life)
        if not set(self._life.shared).issuperset(pieces):
            await self._note(shared=pieces)

    async def _run_stop_command(self, limit: Seconds) -> bool:
        """What the config said at the start of an end that signals do not bring about; whether it said anything."""
        if not self._life.stop_command:
            return False
        problem = await run_stop_command(self._life.stop_command, self._engine, limit)
        if problem and not self._ended:
            log.warning("%s: stop_command: %s", self.id, problem, extra=self._about(EventKind.INSTANCE_STOPPING))
        return True

    @property
    def _ended(self) -> bool:
        return self._process is not None and self._process.exited.done()

    def _not_started(self, error: OSError) -> ExitCause:
        program = self._engine.command[0]
        hint = f"check backends.{self._engine.name}.command"
        return ExitCause(kind=ExitKind.NOT_STARTED, message=f"cannot run {program}: {error.strerror or error}", hint=hint)

    def _cause(self, status: ExitStatus, tail: tuple[str, ...], seen: Evidence) -> ExitCause:
        if self._stop_reason is None:
            return weigh(self.backend.explain_exit(status, tail, was_ready=self._ready_at is not None), status, seen)
        kind = _KINDS.get(self._stop_reason, ExitKind.STOPPED)
        return ExitCause(kind=kind, message=self._stop_why, hint=_SLEEPLESS_HINT if kind is ExitKind.SLEEPLESS else "")

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


def _reduced(placement: Placement, keeps: Mapping[DeviceId, Bytes]) -> Placement:
    """What is promised to one that holds so much of its GPUs asleep."""
    return replace(placement, reserved={**placement.reserved, **keeps})


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
