"""The observed side: one ObservedState is what the machine looked like at one instant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from offloadd.state.desired import ModelSpec
from offloadd.state.ids import BackendName, DeviceId, DeviceKind, InstanceId, ModelName
from offloadd.state.launch import Candidate, Endpoint, ExitCause, ExitStatus, Placement
from offloadd.units import Bytes, Instant, Seconds


class InstanceState(StrEnum):
    """Life of one instance. DRAINING and STOPPING are entered on the planner's word, STOPPING also when it ends by itself."""

    STARTING = "starting"
    """Asked for; its process does not hold its port yet."""
    LOADING = "loading"
    """Its own process holds the port and the model is not usable yet."""
    READY = "ready"
    FALLING_ASLEEP = "falling-asleep"
    """Told to give most of its GPU memory back and to live on; that memory was not seen to be free yet."""
    SLEEPING = "sleeping"
    """It has given it back, and takes no request before it is woken."""
    WAKING = "waking"
    """Told to take its memory again; it does not answer yet."""
    DRAINING = "draining"
    STOPPING = "stopping"
    EXITED = "exited"
    ORPHANED = "orphaned"
    """An earlier daemon started it and it lives on; the planner has not said yet whether it is adopted."""


SETTLING = frozenset({InstanceState.STARTING, InstanceState.LOADING})
"""States on the way to READY."""
RESTING = frozenset({InstanceState.FALLING_ASLEEP, InstanceState.SLEEPING})
"""States in which it serves nobody and is nobody's next either, until it is woken."""
TURNING = frozenset({InstanceState.FALLING_ASLEEP, InstanceState.WAKING})
"""States in which its memory comes or goes."""
LEAVING = frozenset({InstanceState.DRAINING, InstanceState.STOPPING, InstanceState.EXITED})
"""States that take no new request and lead to the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceView:
    """One instance as seen. `spec` is what it was launched from, which may be older than the config."""

    id: InstanceId
    spec: ModelSpec
    backend: BackendName
    fingerprint: str
    placement: Placement
    """What it is promised now: less while it sleeps."""
    state: InstanceState
    since: Instant
    """When it entered `state`."""
    started_at: Instant
    ready_at: Instant | None = None
    adopted_at: Instant | None = None
    """When this daemon took it over from an earlier one; None for its own launches."""
    drain_deadline: Instant | None = None
    footprint_key: str = ""
    """Under which its measured peak is kept."""
    last_sign: Instant | None = None
    """When its working loop last answered, or last sent bytes to a client."""
    misses: int = 0
    """Probes of its working loop in a row that brought nothing."""
    fault: str = ""
    """What shows that it cannot do its work though its process lives, as a canary that got no answer; empty when nothing does."""
    awake: Placement | None = None
    """What it needs again to wake up; None while it is promised all of it."""
    slept_at: Instant | None = None
    """When the engine said that it had fallen asleep; None when it has not, or is awake."""
    free_before: Mapping[DeviceId, Bytes] = field(default_factory=dict)
    """What was free on its GPUs when it was told to sleep."""
    stuck: bool = False
    """SIGKILL did not end it: it holds what it holds until the kernel lets go of it."""
    exposed: tuple[str, ...] = ()
    """Addresses beyond loopback on which its processes listen, which nobody asked for."""
    pid: int | None = None
    endpoint: Endpoint | None = None
    measured: Mapping[DeviceId, Bytes] = field(default_factory=dict)
    """Memory that its processes really hold, by device; a device that is absent was not read."""
    unreleased: Mapping[DeviceId, Bytes] = field(default_factory=dict)
    """After its exit: what devices do not show as free again yet."""
    peak: Mapping[DeviceId, Bytes] = field(default_factory=dict)
    """The most that was ever measured of it."""

    @property
    def begun_at(self) -> Instant:
        """When this daemon began to answer for it: its launch, or its adoption, before which it is when it was found."""
        if self.state is InstanceState.ORPHANED:
            return self.since
        return self.started_at if self.adopted_at is None else self.adopted_at

    @property
    def returning(self) -> Mapping[DeviceId, Bytes]:
        """What of its promise is on its way back: all when it leaves, what it will not hold asleep when it falls asleep."""
        if self.state in LEAVING:
            return self.placement.reserved
        return self.placement.freed_asleep if self.state is InstanceState.FALLING_ASLEEP else {}

    @property
    def ejected(self) -> bool:
        """Whether it should be given no new request as long as another instance can take it. It costs nothing if it was a slip."""
        return bool(self.fault or self.misses)

    @property
    def model(self) -> ModelName:
        """The model it serves."""
        return self.id.model


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """What an instance's engine said of its own queue, at one instant."""

    beyond: int
    """Requests in it that are none of ours."""
    running: int = 0
    waiting: int = 0
    """All that it works on, and all that it has taken and not begun."""
    at: Instant
    cache: float | None = None
    """Share of its KV cache in use, 0..1; None where it does not tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitRecord:
    """The end of one instance. `ready_for` is None when it never became ready."""

    instance: InstanceId
    backend: BackendName
    fingerprint: str
    identity: str
    """The model file's identity at the start."""
    at: Instant
    status: ExitStatus
    cause: ExitCause
    expected: bool
    """Whether it ended because it was told to, for a reason that is not its own fault."""
    ready_for: Seconds | None = None
    tail: tuple[str, ...] = ()
    """Last lines of its log, control characters escaped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceView:
    """One device's memory as read; `free` is what a new allocation could get."""

    id: DeviceId
    kind: DeviceKind
    name: str
    total: Bytes
    free: Bytes
    index: int = 0
    utilization: float | None = None
    """0..1; None when not known."""
    temperature: float | None = None
    """Degrees Celsius; None when not known."""
    power_w: float | None = None
    """Watts drawn now; None when not known."""
    processes: Mapping[int, Bytes | None] | None = None
    """What each process on it holds, by pid; the size is None where the driver doesn't tell. None when they can't be listed."""
    unified: bool = False
    """Whether it has no memory of its own: then `total` and `free` are the machine's RAM, which `host` counts as well."""
    slice_of: str = ""
    """The card that this MIG slice is a part of, by UUID; a process can use only one slice."""
    read_at: Instant | None = None
    """When it was read; None where that is not told, and then it counts as just now."""
    problem: str = ""
    """What of it can't be read, and why; its memory is known all the same."""

    @property
    def used(self) -> Bytes:
        """Bytes that are not free."""
        return Bytes(self.total - self.free)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineView:
    """Whether an engine can be started here; `problem` says why not."""

    name: BackendName
    version: str = ""
    path: str = ""
    gpus: frozenset[DeviceKind] | None = None
    """Kinds of GPUs that it can use here, by its own word; None when it does not tell."""
    problem: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignProcess:
    """Somebody else's process on a device; its size is None where the driver does not tell."""

    pid: int
    name: str
    size: Bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedState:
    """One joined reading. What could not be read is absent, and absence never means "gone"."""

    instances: Mapping[InstanceId, InstanceView] = field(default_factory=dict)
    devices: Mapping[DeviceId, DeviceView] = field(default_factory=dict)
    engines: Mapping[BackendName, EngineView] = field(default_factory=dict)
    candidates: Mapping[ModelName, tuple[Candidate, ...]] = field(default_factory=dict)
    """Per model, in the order of its `backends`."""
    exits: Mapping[ModelName, tuple[ExitRecord, ...]] = field(default_factory=dict)
    """Ends of instances, oldest first, bounded."""
    launches: Mapping[ModelName, int] = field(default_factory=dict)
    """Highest instance number ever used, per model."""
    load_times: Mapping[ModelName, Seconds] = field(default_factory=dict)
    """From start to ready, of the latest instance of each model that became ready."""
    foreign: Mapping[DeviceId, tuple[ForeignProcess, ...]] = field(default_factory=dict)
    """Processes on GPUs that belong to no instance, largest first, bounded."""
    blind: str = ""
    """Why GPUs that are there cannot be read now; empty when all that are known were read."""
