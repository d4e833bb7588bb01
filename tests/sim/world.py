"""A machine in virtual time: memory, processes that follow a script, requests, and a config that changes.

`snapshot()` says what a daemon would see of it, `apply()` does what a plan says, `advance()` lets time pass. The world decides
nothing by chance: whoever drives it draws from a seed or from hypothesis.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial

from offloadd.plan.admission import Granted, Queued, Refused, Seat, admit, hopeless
from offloadd.plan.planner import plan
from offloadd.state.actions import (
    Action,
    AdoptInstance,
    DrainInstance,
    ForgetInstance,
    GrantLoan,
    ModelState,
    Plan,
    RestInstance,
    SleepInstance,
    StartInstance,
    StopInstance,
    StopReason,
    WakeInstance,
)
from offloadd.state.demand import Demand, Loan, Waiting, Wish
from offloadd.state.desired import DesiredState, ModelSpec, QueueLimits, RunMode, StorageSpec
from offloadd.state.ids import BackendName, DeviceId, InstanceId, ModelName
from offloadd.state.launch import Candidate, ExitCause, ExitKind, ExitStatus, ModelFacts, Placement, VramEstimate
from offloadd.state.observed import ExitRecord, InstanceState, InstanceView, ObservedState
from offloadd.units import Bytes, Instant, Seconds
from tests.sim.machine import GIB, Card, Machine

ALPHA, BETA = BackendName("alpha"), BackendName("beta")
BETA_SHARE = 0.5
"""The second engine needs this part of the memory that the first one needs."""
AT_FAULT = {StopReason.HUNG: ExitKind.HUNG, StopReason.START_TIMEOUT: ExitKind.START_TIMEOUT}
KINDS = {**AT_FAULT, StopReason.SLEEPLESS: ExitKind.SLEEPLESS}
SLEEP_TAKES, WAKE_TAKES = 0.8, 1.5
EXITS_KEPT = 200
STOPPABLE = (
    InstanceState.STARTING,
    InstanceState.LOADING,
    InstanceState.READY,
    InstanceState.FALLING_ASLEEP,
    InstanceState.SLEEPING,
    InstanceState.WAKING,
    InstanceState.DRAINING,
    InstanceState.ORPHANED,
)


class Fate(StrEnum):
    """What becomes of a process that is started."""

    SERVES = "serves"
    CRASHES_AT_ONCE = "crashes at once"
    CRASHES_LOADING = "crashes while loading"
    NEVER_READY = "never ready"
    PORT_TAKEN = "port taken"


class Nap(StrEnum):
    """What becomes of one that is put to sleep."""

    WELL = "sleeps and wakes"
    KEEPS = "says that it sleeps, and keeps its memory"
    REFUSES = "cannot be put to sleep"
    SILENT = "never says that it sleeps"
    LOST = "sleeps, and cannot be woken"
    LATE = "sleeps, and never wakes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """How the next processes of a model behave. Spans are seconds."""

    fate: Fate = Fate.SERVES
    load: float = 5.0
    crash_after: float | None = None
    """Crash this long after becoming ready."""
    ignores_term: bool = False
    stop: float = 0.5
    """Time from TERM to the end, when TERM is heeded."""
    takes: float = 1.0
    """Part of its promise that it really allocates."""
    needs: float = 0.0
    """Multiple of the prediction below which it runs out of memory while it loads."""
    nap: Nap = Nap.WELL
    leaves: float = 0.0
    """A worker that it forked holds the memory for so long after its end."""


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One request: it waits, is granted, and ends in one of the ways below."""

    model: ModelName
    arrived: float
    runs_for: float
    silent: bool = False
    """A prompt so long that nothing is heard of the instance while it is worked on."""
    end: str = ""
    """Empty while it waits or runs; else done, broken, cancelled, timed out, or refused: CODE."""
    instance: InstanceId | None = None
    granted_at: float | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class Process:
    """One instance: what is told of it, and what it really is."""

    id: InstanceId
    spec: ModelSpec
    candidate: Candidate
    placement: Placement
    script: Script
    since: float
    started_at: float
    broken: bool = False
    state: InstanceState = InstanceState.STARTING
    ready_at: float | None = None
    deadline: float | None = None
    told: StopReason | None = None
    held: list[Request] = field(default_factory=list)
    hung_at: float | None = None
    last_sign: float | None = None
    silent_until: float = 0.0
    idle_since: float = 0.0
    """When its last request ended."""
    adopted_at: float | None = None
    awake: Placement | None = None
    """Its whole promise, while it is promised less."""
    dozes: bool = False
    """Whether it is really asleep."""
    slept_at: float | None = None
    free_before: Mapping[DeviceId, Bytes] = field(default_factory=dict)
    fault: str = ""

    @property
    def gone(self) -> bool:
        return self.state is InstanceState.EXITED

    @property
    def loading(self) -> bool:
        """Whether its model is being loaded, under the eyes of a daemon or not."""
        return self.ready_at is None and self.state in (InstanceState.LOADING, InstanceState.ORPHANED)

    def short_by(self, predicted: int) -> int:
        """How much more than it was given it really needs, where its script says that the prediction is wrong."""
        estimate = self.candidate.estimate
        return max(0, int(predicted * self.script.needs) - (estimate.total if estimate else 0))

    def mute(self, now: float) -> bool:
        """Whether its working loop answers nothing now: it hangs, or it is deep in a long prompt."""
        return self.hung_at is not None or now < self.silent_until or any(request.silent for request in self.held)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How a model's memory can be moved: in so many layers, with a part on every device that takes part and one in RAM, in GiB."""

    layers: int = 0
    fixed: float = 0.5
    host: float = 0.0
    output: float = 1.0
    """Size of the last layer, the others being 1."""
    asleep: float | None = None
    """What it is thought to hold of each GPU asleep, in GiB; it really holds three quarters of that."""

    def divide(self, total: int) -> VramEstimate:
        """The estimate whose parts sum to `total`."""
        host = Bytes(int(self.host * GIB))
        asleep = None if self.asleep is None else Bytes(int(self.asleep * GIB))
        if not self.layers:
            return VramEstimate(total=Bytes(total), basis="drawn", host=host, asleep=asleep)
        fixed = min(int(self.fixed * GIB), total // 2)
        each = int((total - fixed) / (self.layers - 1 + self.output))
        last = total - fixed - each * (self.layers - 1)
        sizes = (*(Bytes(each),) * (self.layers - 1), Bytes(last))
        on_host = Bytes(total - fixed + fixed // 2)
        return VramEstimate(
            total=Bytes(total), basis="drawn", layers=sizes, fixed=Bytes(fixed), host=host, on_host=on_host, asleep=asleep
        )


class Impossible(AssertionError):
    """An effect that no world allows, such as starting an instance whose number was used before."""


class World:
    """The machine, the requests and the config; `now` is virtual."""

    def __init__(
        self,
        desired: DesiredState,
        sizes: Mapping[ModelName, float],
        *,
        total: float = 16.0,
        gpus: Sequence[Card] = (),
        shapes: Mapping[ModelName, Shape] | None = None,
    ) -> None:
        self.now = 1000.0
        self.desired = desired
        self.sizes = dict(sizes)
        """GiB that the first engine needs for each model, at its smallest context."""
        self.shapes = dict(shapes or {})
        self.machine = Machine(int(total * GIB), gpus)
        self.lag = 0.3
        """How long the memory of ended processes still shows as used."""
        self.loans: dict[str, Loan] = {}
        """Those that are asked for or granted."""
        self.wishes: dict[ModelName, Wish] = {}
        self.forgiven: dict[ModelName, Instant] = {}
        self.load_times: dict[ModelName, Seconds] = {}
        self.unnamed: set[str] = set()
        """Loans whose holders' processes are not known, so that nobody can measure them."""
        self.processes: dict[InstanceId, Process] = {}
        self.scripts: dict[ModelName, Script] = {}
        self.files: dict[ModelName, int] = {}
        self.broken_files: set[tuple[ModelName, int]] = set()
        self.exits: dict[ModelName, list[ExitRecord]] = {}
        self.launches: dict[ModelName, int] = {}
        self.waiting: dict[ModelName, list[Request]] = {}
        self.requests: list[Request] = []
        """Those that have not ended."""
        self.ended: dict[str, int] = {}
        self.last_used: dict[ModelName, Instant] = {}
        self.blind_models: set[ModelName] = set()
        """Models whose facts cannot be read now."""
        self.last_plan = Plan()
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._offers: dict[tuple[ModelName, BackendName], tuple[object, Candidate]] = {}
        self._used: set[InstanceId] = set()

    # What a daemon sees

    def snapshot(self) -> tuple[ObservedState, Demand]:
        """The observed state and the demand, as of now. Requests are granted the moment that a slot is free, so before it."""
        self._serve()
        self.machine.read(self.processes)
        observed = ObservedState(
            instances={process.id: self._view(process) for process in self.processes.values()},
            devices=self.machine.views(),
            blind=self.machine.blind,
            candidates={name: self.candidates(spec) for name, spec in self.desired.models.items()},
            exits={name: tuple(records[-EXITS_KEPT:]) for name, records in self.exits.items()},
            launches=dict(self.launches),
            load_times=dict(self.load_times),
        )
        demand = Demand(
            waiting={
                name: Waiting(count=len(queue), oldest=Instant(queue[0].arrived)) for name, queue in self.waiting.items() if queue
            },
            leases={process.id: len(process.held) for process in self.processes.values() if process.held},
            last_used=dict(self.last_used),
            idle_since={
                process.id: Instant(process.idle_since)
                for process in self.processes.values()
                if process.idle_since and not process.held
            },
            wishes=dict(self.wishes),
            forgiven=dict(self.forgiven),
            loans={
                name: loan if name in self.unnamed else replace(loan, measured=self.machine.measured(name))
                for name, loan in self.loans.items()
            },
        )
        return observed, demand

    def due(self, device: DeviceId) -> int:
        """Bytes of this memory that are promised and not taken yet."""
        pool = {card.id for card in self.machine.pool(device)}
        promises: list[tuple[Hashable, Mapping[DeviceId, Bytes]]] = [
            (process.id, process.placement.reserved) for process in self.processes.values() if not process.gone
        ]
        promises += [(name, loan.granted or {}) for name, loan in self.loans.items()]
        sizes = [(owner, each, size) for owner, promise in promises for each, size in promise.items() if each in pool]
        return sum(max(0, size - self.machine.held_by(owner, each)) for owner, each, size in sizes)

    def candidates(self, spec: ModelSpec) -> tuple[Candidate, ...]:
        """What each engine would offer; nothing is known of a model whose facts cannot be read."""
        if spec.name in self.blind_models:
            return tuple(Candidate(backend=name, facts=ModelFacts()) for name in spec.backends)
        return tuple(self._candidate(spec, name) for name in spec.backends)

    def need(self, spec: ModelSpec, backend: BackendName) -> int:
        """Bytes that one instance is predicted to take."""
        share = BETA_SHARE if backend == BETA else 1.0
        return int((self.sizes[spec.name] + spec.context / 8192) * share * GIB)

    def _candidate(self, spec: ModelSpec, backend: BackendName) -> Candidate:
        basis = (spec, backend, self.files.get(spec.name, 0), self.sizes[spec.name])
        known = self._offers.get((spec.name, backend))
        if known is None or known[0] != basis:
            known = self._offers[spec.name, backend] = (basis, self._make_candidate(spec, backend))
        return known[1]

    def _make_candidate(self, spec: ModelSpec, backend: BackendName) -> Candidate:
        return Candidate(
            backend=backend,
            facts=ModelFacts(path=spec.source, identity=str(self.files.get(spec.name, 0)), size=Bytes(self.need(spec, backend))),
            fingerprint=f"{backend} {spec.source} {spec.context} {spec.args} {spec.devices} {spec.gpu_layers}",
            estimate=self.shapes.get(spec.name, Shape()).divide(self.need(spec, backend)),
        )

    def _view(self, process: Process) -> InstanceView:
        if process.last_sign is not None and not process.mute(self.now) and not process.gone:
            process.last_sign = self.now
        return InstanceView(
            id=process.id,
            spec=process.spec,
            backend=process.candidate.backend,
            fingerprint=process.candidate.fingerprint,
            placement=process.placement,
            awake=process.awake,
            slept_at=None if process.slept_at is None else Instant(process.slept_at),
            free_before=process.free_before,
            fault=process.fault,
            state=process.state,
            since=Instant(process.since),
            started_at=Instant(process.started_at),
            ready_at=None if process.ready_at is None else Instant(process.ready_at),
            adopted_at=None if process.adopted_at is None else Instant(process.adopted_at),
            drain_deadline=None if process.deadline is None else Instant(process.deadline),
            last_sign=None if process.last_sign is None else Instant(process.last_sign),
            measured=self.machine.measured(process.id),
            unreleased=self.machine.unreleased(process.id) if process.gone else {},
        )

    # Time

    def advance(self, limit: float) -> None:
        """Go to the next thing that happens by itself, at most `limit` seconds ahead."""
        until = self.now + limit
        if self._agenda and self._agenda[0][0] <= until:
            self.now = max(self.now, self._agenda[0][0])
            while self._agenda and self._agenda[0][0] <= self.now:
                heapq.heappop(self._agenda)[2]()
        else:
            self.now = until
        self._serve()

    def next_event(self) -> float | None:
        """When something will happen by itself."""
        return self._agenda[0][0] if self._agenda else None

    def _later(self, delay: float, what: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._agenda, (self.now + delay, self._count, what))

    # Planning

    def plan(self) -> Plan:
        """Ask the planner about the world as it is."""
        observed, demand = self.snapshot()
        return plan(self.desired, observed, demand, now=Instant(self.now))

    def apply(self, made: Plan, actions: Iterable[Action] | None = None) -> None:
        """Make the plan's verdicts known, and take all of its actions, or those given in the order given."""
        self.last_plan = made
        for action in made.actions if actions is None else actions:
            match action:
                case StartInstance():
                    self._start(action)
                case AdoptInstance():
                    self._adopt(action)
                case SleepInstance():
                    self._sleep(action)
                case RestInstance():
                    self._rest(action)
                case WakeInstance():
                    self._wake(action)
                case DrainInstance():
                    self._drain(action)
                case StopInstance():
                    self._stop(action)
                case ForgetInstance():
                    self._forget(action)
                case GrantLoan():
                    self._lend(action)
        self._serve()

    def _live(self, key: InstanceId, allowed: Sequence[InstanceState]) -> Process:
        process = self.processes.get(key)
        if process is None:
            raise Impossible(f"{key} does not exist")
        if process.state not in allowed:
            raise Impossible(f"{key} is {process.state} and cannot be acted on so")
        return process

    def _start(self, action: StartInstance) -> None:
        key, spec = action.instance, action.spec
        if key in self._used:
            raise Impossible(f"{key} was used before")
        if not action.candidate.fingerprint or action.candidate.estimate is None:
            raise Impossible(f"{key} is started although its facts are not known")
        self._used.add(key)
        self.launches[key.model] = max(key.number, self.launches.get(key.model, 0))
        identity = int(action.candidate.facts.identity)
        process = Process(
            id=key,
            spec=spec,
            candidate=action.candidate,
            placement=action.placement,
            script=self.scripts.get(key.model, Script()),
            broken=(key.model, identity) in self.broken_files,
            since=self.now,
            started_at=self.now,
        )
        self.processes[key] = process
        self._later(0.2, lambda: self._spawned(process))

    def _adopt(self, action: AdoptInstance) -> None:
        process = self._live(action.instance, (InstanceState.ORPHANED,))
        process.adopted_at = self.now
        self._enter(process, InstanceState.LOADING)
        if process.ready_at is not None:
            self._later(0.1, lambda: self._answers(process))

    def _answers(self, process: Process) -> None:
        """It was ready under an earlier daemon, and shows this one that it is, or that it sleeps."""
        if process.dozes and process.state is InstanceState.LOADING and process.hung_at is None:
            process.last_sign = self.now
            process.slept_at = self.now
            self._enter(process, InstanceState.FALLING_ASLEEP if process.awake is None else InstanceState.SLEEPING)
        elif process.state is InstanceState.LOADING and process.hung_at is None:
            self._enter(process, InstanceState.READY)
            process.last_sign = self.now

    def _sleep(self, action: SleepInstance) -> None:
        process = self._live(action.instance, (InstanceState.READY,))
        if process.held:
            raise Impossible(f"{process.id} is put to sleep with requests")
        process.slept_at, process.free_before = None, action.free
        self._enter(process, InstanceState.FALLING_ASLEEP)
        self._later(SLEEP_TAKES, lambda: self._fell_asleep(process))

    def _fell_asleep(self, process: Process) -> None:
        if process.state not in (InstanceState.FALLING_ASLEEP, InstanceState.ORPHANED, InstanceState.STOPPING) or process.hung_at:
            return
        nap = process.script.nap
        if nap is Nap.REFUSES:
            process.fault = "it cannot be put to sleep: status 500"
        elif nap is not Nap.SILENT:
            process.dozes, process.slept_at = True, self.now
            if nap is not Nap.KEEPS:
                freed = self.machine.shrink(process.id, {gpu: size * 3 // 4 for gpu, size in process.placement.asleep.items()})
                self._later(self.lag, lambda: self.machine.came_back(freed))

    def _rest(self, action: RestInstance) -> None:
        process = self._live(action.instance, (InstanceState.FALLING_ASLEEP,))
        process.awake = process.placement
        process.placement = replace(process.placement, reserved={**process.placement.reserved, **action.keeps})
        self._enter(process, InstanceState.SLEEPING)
        process.last_sign = self.now

    def _wake(self, action: WakeInstance) -> None:
        process = self._live(action.instance, (InstanceState.SLEEPING,))
        assert process.awake is not None
        process.placement, process.awake = process.awake, None
        self._enter(process, InstanceState.WAKING)
        self._later(WAKE_TAKES, lambda: self._woke(process))

    def _woke(self, process: Process) -> None:
        if process.state not in (InstanceState.WAKING, InstanceState.ORPHANED) or process.hung_at is not None:
            return
        if process.script.nap is Nap.LOST:
            process.fault = "it does not wake: status 500"
        elif process.script.nap is not Nap.LATE:
            process.dozes, process.slept_at = False, None
            self._take(process, 1.0)
            if process.state is InstanceState.WAKING:
                self._enter(process, InstanceState.READY)
                process.last_sign = self.now

    def _drain(self, action: DrainInstance) -> None:
        process = self._live(action.instance, (InstanceState.STARTING, InstanceState.LOADING, InstanceState.READY))
        process.deadline = action.deadline
        self._enter(process, InstanceState.DRAINING)

    def _stop(self, action: StopInstance) -> None:
        process = self._live(action.instance, STOPPABLE)
        process.told = action.reason
        self._enter(process, InstanceState.STOPPING)
        for request in list(process.held):
            self._end(request, "broken")
        deaf = process.script.ignores_term or process.hung_at is not None
        self._later(process.spec.stop_timeout if deaf else process.script.stop, lambda: self._stopped(process))

    def _forget(self, action: ForgetInstance) -> None:
        del self.processes[self._live(action.instance, (InstanceState.EXITED,)).id]

    # Processes

    def _enter(self, process: Process, state: InstanceState) -> None:
        process.state, process.since = state, self.now

    def _spawned(self, process: Process) -> None:
        if process.state is not InstanceState.STARTING:
            return
        fate = process.script.fate
        if fate is Fate.CRASHES_AT_ONCE:
            self.crash(process, "exit code 1 before it was ready")
        elif fate is Fate.PORT_TAKEN:
            self.exit(process, ExitCause(kind=ExitKind.PORT_TAKEN, message="its port was taken"), ExitStatus(code=1))
        else:
            self._enter(process, InstanceState.LOADING)
            self._take(process, 0.3)
            self._later(process.script.load / 2, lambda: self._half_loaded(process))

    def _half_loaded(self, process: Process) -> None:
        if not process.loading:
            return
        self._take(process, 0.7)
        if process.broken:
            cause = ExitCause(kind=ExitKind.BAD_MODEL, message="its file is damaged", hint="fetch it again", permanent=True)
            self.exit(process, cause, ExitStatus(code=1))
        elif process.short_by(self.need(process.spec, process.candidate.backend)):
            self.exit(process, ExitCause(kind=ExitKind.OUT_OF_MEMORY, message="out of memory"), ExitStatus(code=1))
        elif process.script.fate is Fate.CRASHES_LOADING:
            self.crash(process, "exit code 1 while loading")
        elif process.script.fate is not Fate.NEVER_READY:
            self._later(process.script.load / 2, lambda: self._loaded(process))

    def _loaded(self, process: Process) -> None:
        if not process.loading:
            return
        self._take(process, 1.0)
        process.ready_at = self.now
        self.load_times[process.id.model] = Seconds(self.now - process.started_at)
        if process.state is InstanceState.LOADING:
            self._enter(process, InstanceState.READY)
            process.last_sign = self.now
        if process.script.crash_after is not None:
            self._later(process.script.crash_after, lambda: self._crash_serving(process))

    def _crash_serving(self, process: Process) -> None:
        if process.script.crash_after is not None:
            self.crash(process, "killed by SIGSEGV while serving")

    def _stopped(self, process: Process) -> None:
        if process.gone or process.told is None:
            return
        kind = KINDS.get(process.told, ExitKind.STOPPED)
        self.exit(process, ExitCause(kind=kind, message=f"stopped: {process.told}"), ExitStatus(code=0))

    def _take(self, process: Process, share: float) -> None:
        part = share * process.script.takes
        self.machine.take(process.id, {device: int(size * part) for device, size in process.placement.reserved.items()})

    def crash(self, process: Process, message: str) -> None:
        """End it, whatever it does."""
        self.exit(process, ExitCause(kind=ExitKind.CRASHED, message=message), ExitStatus(code=1))

    def exit(self, process: Process, cause: ExitCause, status: ExitStatus) -> None:
        """It is gone; its memory comes back after a while."""
        if process.gone:
            return
        for request in list(process.held):
            self._end(request, "broken")
        record = ExitRecord(
            instance=process.id,
            backend=process.candidate.backend,
            fingerprint=process.candidate.fingerprint,
            identity=process.candidate.facts.identity,
            at=Instant(self.now),
            status=status,
            cause=cause,
            expected=process.told is not None and process.told not in AT_FAULT,
            ready_for=None if process.ready_at is None else Seconds(self.now - process.ready_at),
        )
        self.exits.setdefault(process.id.model, []).append(record)
        self._enter(process, InstanceState.EXITED)
        self._let_go(process.id, process.script.leaves)

    def leak(self, process: Process, share: float) -> None:
        """It takes more than it was promised, as far as there is any."""
        if process.ready_at is None or process.gone:
            return
        for device, size in process.placement.reserved.items():
            spare = self.machine.balance(device)
            more = max(0, min(int(size * share), spare))
            self.machine.take(process.id, {device: self.machine.held_by(process.id, device) + more})
            if self.machine.balance(device) < self.due(device):
                for card in self.machine.pool(device):
                    card.robbed = True

    def _let_go(self, owner: Hashable, later: float = 0.0) -> None:
        freed = self.machine.drop(owner)
        self._later(self.lag + later, lambda: self.machine.came_back(freed))

    def hang(self, process: Process) -> None:
        """It holds its port and its memory, and does nothing any more."""
        if process.ready_at is not None and process.state is not InstanceState.STOPPING and not process.gone:
            process.hung_at = self.now if process.hung_at is None else process.hung_at

    # The daemon itself

    def daemon_dies(self, *, forgets: bool) -> None:
        """It is killed and started again: every connection through it breaks, and what it knew in memory is gone.

        A stop that it had begun is on its books and goes on. A process that does not listen yet is not vouched for, and is killed.
        How instances have ended is on the books too, unless it `forgets`.
        """
        for request in list(self.requests):
            self._end(request, "broken")
        for name in list(self.loans):
            self.give_back(name)
        for process in list(self.processes.values()):
            if process.gone or process.state is InstanceState.STARTING:
                del self.processes[process.id]
                self._enter(process, InstanceState.EXITED)
                self._let_go(process.id)
            elif process.state is not InstanceState.STOPPING:
                process.adopted_at = process.deadline = process.last_sign = process.slept_at = None
                process.fault = ""
                self._enter(process, InstanceState.ORPHANED)
        if forgets:
            self.exits.clear()
        for memory in (self.last_used, self.wishes, self.forgiven, self.load_times):
            memory.clear()
        self.last_plan = Plan()

    # An operator's hand

    def wish(self, model: ModelName, *, load: bool) -> None:
        """Load or unload it now. To load it forgives what it did."""
        self.wishes[model] = Wish(load=load, since=Instant(self.now), newest=self.launches.get(model, 0))
        if load:
            self.forgiven[model] = Instant(self.now)

    # Loans

    def borrow(self, gib: float, device: str = "auto", *, named: bool = True) -> str:
        """Somebody asks for memory; the loan's id. Whose processes will use it is known when it is `named`."""
        self._count += 1
        name = f"loan-{self._count}"
        self.loans[name] = Loan(id=name, size=Bytes(int(gib * GIB)), device=device, since=Instant(self.now), why="training")
        if not named:
            self.unnamed.add(name)
        return name

    def give_back(self, name: str) -> None:
        """Its holder has ended, or has lost patience while waiting."""
        del self.loans[name]
        self._let_go(name)

    def _lend(self, action: GrantLoan) -> None:
        loan = self.loans.get(action.loan)
        if loan is None:
            return  # given up in the same moment
        if loan.granted is not None:
            raise Impossible(f"{loan.id} is granted twice")
        self.loans[loan.id] = replace(loan, granted=action.reserved)
        for delay, share in ((0.5, 0.3), (8.0, 1.0)):
            self._later(delay, partial(self._use_loan, loan.id, share))

    def _use_loan(self, name: str, share: float) -> None:
        if name in self.loans:
            granted = self.loans[name].granted or {}
            self.machine.take(name, {device: int(size * share) for device, size in granted.items()})

    # Requests

    def arrive(self, model: ModelName, *, runs_for: float = 2.0, silent: bool = False) -> Request:
        """A request for the model comes in: it is granted, queued or refused at once."""
        request = Request(model=model, arrived=self.now, runs_for=runs_for, silent=silent)
        self.last_used[model] = Instant(self.now)
        spec = self.desired.models[model]
        queue = self.waiting.setdefault(model, [])
        answer = admit(spec, self.last_plan.decisions.get(model), self._seats(spec), len(queue), now=Instant(self.now))
        self.requests.append(request)
        match answer:
            case Granted():
                self._grant(request, answer.instance)
            case Queued():
                queue.append(request)
                self._later(spec.queue.max_wait, lambda: self._time_out(request))
            case Refused():
                self._end(request, f"refused: {answer.code}")
        return request

    def cancel(self, request: Request) -> None:
        """Its client went away. An engine deep in a prompt notices only a while later."""
        if request.silent and request.instance is not None:
            process = self.processes[request.instance]
            process.silent_until = max(process.silent_until, self.now + 20.0)
        self._end(request, "cancelled")

    def _seats(self, spec: ModelSpec) -> list[Seat]:
        return [
            Seat(instance=process.id, backend=process.candidate.backend, leases=len(process.held), slots=process.spec.parallel)
            for process in self.processes.values()
            if process.id.model == spec.name and process.state is InstanceState.READY
        ]

    def _serve(self) -> None:
        """Grant what can be granted, in order of arrival; refuse all when waiting is in vain."""
        for model, queue in self.waiting.items():
            while queue:
                spec = self.desired.models[model]
                decision, seats = self.last_plan.decisions.get(model), self._seats(spec)
                answer = admit(spec, decision, seats, 0, now=Instant(self.now))
                if isinstance(answer, Granted):
                    self._grant(queue[0], answer.instance)
                    continue
                refusal = None if seats else hopeless(spec, decision, now=Instant(self.now))
                if refusal is None:
                    break
                self._end(queue[0], f"refused: {refusal.code}")

    def _grant(self, request: Request, key: InstanceId) -> None:
        process = self.processes[key]
        if process.state is not InstanceState.READY or len(process.held) >= process.spec.parallel:
            raise Impossible(f"{key} is granted a request that it cannot take")
        self._unqueue(request)
        request.instance, request.granted_at = key, self.now
        process.held.append(request)
        self._later(request.runs_for, lambda: self._done(request))

    def _done(self, request: Request) -> None:
        if request.end or request.instance is None or self.processes[request.instance].hung_at is not None:
            return
        self._end(request, "done")
        process = self.processes.get(request.instance)
        if process is not None and process.last_sign is not None:
            process.last_sign = self.now

    def _time_out(self, request: Request) -> None:
        if not request.end and request.instance is None:
            self._end(request, "timed out")

    def _unqueue(self, request: Request) -> None:
        queue = self.waiting.get(request.model, [])
        if request in queue:
            queue.remove(request)

    def _end(self, request: Request, how: str) -> None:
        if request.end:
            return
        request.end = how
        self.ended[how] = self.ended.get(how, 0) + 1
        self._unqueue(request)
        self.requests.remove(request)
        if request.instance is not None:
            process = self.processes[request.instance]
            process.held.remove(request)
            process.idle_since = self.now
        self.last_used[request.model] = Instant(self.now)

    # Config

    def reload(self, models: Iterable[ModelSpec]) -> None:
        """Swap the config. Requests for models that it no longer names are refused."""
        named = {spec.name: spec for spec in models}
        self.desired = replace(self.desired, models=named, generation=self.desired.generation + 1)
        for request in list(self.requests):
            if request.model not in named and request.instance is None:
                self._end(request, "refused: model_not_found")
        self.waiting = {name: queue for name, queue in self.waiting.items() if queue}
        self.wishes.clear()

    def edit(self, model: ModelName, **changes: object) -> None:
        """Change one model's entry in the config."""
        old = self.desired.models[model]
        self.reload([replace(spec, **changes) if spec is old else spec for spec in self.desired.models.values()])  # type: ignore[arg-type]


def spec(name: str, **fields: object) -> ModelSpec:
    """A model with short spans, so that a run of the world sees every one of them pass."""
    plain: dict[str, object] = {
        "name": ModelName(name),
        "source": f"/models/{name}",
        "backends": (ALPHA,),
        "parallel": 2,
        "idle_timeout": Seconds(90),
        "start_timeout": Seconds(60),
        "stop_timeout": Seconds(10),
        "drain_timeout": Seconds(40),
        "queue": QueueLimits(max_waiting=6, max_wait=Seconds(120)),
    }
    return ModelSpec(**(plain | fields))  # type: ignore[arg-type]


def small_world() -> World:
    """Six models of all sizes and kinds on a machine that holds only some of them: 12.8 GiB may be promised."""
    specs = (
        spec("tiny"),
        spec("small", backends=(ALPHA, BETA)),
        spec("twin", run=RunMode.ALWAYS, priority=40),
        spec("base", run=RunMode.ALWAYS, pinned=True, priority=60),
        spec("large"),
        spec("vast", backends=(ALPHA, BETA), priority=70),
    )
    sizes = {"tiny": 0.5, "small": 2.0, "twin": 1.5, "base": 1.0, "large": 7.0, "vast": 12.5}
    return World(
        DesiredState(models={one.name: one for one in specs}, storage=StorageSpec(warm_next=True), generation=1),
        {ModelName(name): size for name, size in sizes.items()},
    )


def held_on(world: World, device: DeviceId) -> int:
    """Bytes of `device` promised to instances that are on the books, those on their way out included."""
    return sum(process.placement.reserved.get(device, 0) for process in world.processes.values())


def states(world: World) -> dict[ModelName, ModelState]:
    """The last verdict on every model."""
    return {name: decision.state for name, decision in world.last_plan.decisions.items()}
