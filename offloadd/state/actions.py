"""The planner's answer: effects, each safe alone and in any order, and a sentence per model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from offloadd.state.demand import Wish
from offloadd.state.desired import ModelSpec
from offloadd.state.ids import BackendName, DeviceId, InstanceId, ModelName
from offloadd.state.launch import Candidate, Placement
from offloadd.units import Bytes, Instant, Seconds


class StopReason(StrEnum):
    """Why an instance is stopped. The last two are its own fault and count as failures."""

    UNWANTED = "unwanted"
    REPLACED = "replaced"
    IDLE = "idle"
    EVICTED = "evicted"
    SHUTDOWN = "shutdown"
    BY_HAND = "by-hand"
    SLEEPLESS = "sleepless"
    """It was to sleep, and did not, or gave nothing back."""
    START_TIMEOUT = "start-timeout"
    HUNG = "hung"


@dataclass(frozen=True, slots=True, kw_only=True)
class StartInstance:
    """Launch `instance` of `spec` with the engine and the memory given."""

    instance: InstanceId
    spec: ModelSpec
    candidate: Candidate
    placement: Placement
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptInstance:
    """Take over the living process of an earlier daemon as it is: watch it, and serve with it once it answers."""

    instance: InstanceId
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SleepInstance:
    """Have it give its GPU memory back and live on. Planned only when it is ready and holds no lease."""

    instance: InstanceId
    free: Mapping[DeviceId, Bytes]
    """What is free on its GPUs before, where they can be read."""
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RestInstance:
    """Its memory was seen to be free: from now on it is promised only what it `keeps` of each GPU."""

    instance: InstanceId
    keeps: Mapping[DeviceId, Bytes]
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WakeInstance:
    """Promise it all of its memory again, and have it take it."""

    instance: InstanceId
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainInstance:
    """Give it no new request; what runs may end until `deadline`."""

    instance: InstanceId
    deadline: Instant
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StopInstance:
    """End its process tree. Planned only when it holds no lease, or its drain deadline has passed, or it is at fault."""

    instance: InstanceId
    reason: StopReason
    why: str
    limit: Seconds = Seconds(30)
    """After so long it is killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetInstance:
    """Drop an exited instance, and with it its claim on memory."""

    instance: InstanceId


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantLoan:
    """Give a borrower the memory that it waits for."""

    loan: str
    reserved: Mapping[DeviceId, Bytes]


Action = (
    StartInstance
    | AdoptInstance
    | SleepInstance
    | RestInstance
    | WakeInstance
    | DrainInstance
    | StopInstance
    | ForgetInstance
    | GrantLoan
)


class ModelState(StrEnum):
    """One word for a model, over all its instances."""

    OFF = "off"
    WAITING = "waiting"
    """Wanted, and there is no room for it yet."""
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    SLEEPING = "sleeping"
    """Its server lives with little memory, and is woken when a request wants it."""
    WAKING = "waking"
    DRAINING = "draining"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One model's verdict of this cycle, explained in a sentence with numbers."""

    model: ModelName
    state: ModelState
    sentence: str
    hint: str = ""
    retry_at: Instant | None = None
    """When a start will next be tried, if time alone decides."""
    ready_in: Seconds | None = None
    """How long until it is ready, by how long its last load took; None when that is not known or nothing is under way."""
    wish: Wish | None = None
    """What an operator asked for by hand."""
    engines: Mapping[BackendName, str] = field(default_factory=dict)
    """Engines that cannot serve the model now, each with the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Warm:
    """A model that may be wanted next, whose files are to be in the page cache by then."""

    model: ModelName
    paths: tuple[str, ...]
    """Of the model itself, a file, a shard or a folder, and of what is loaded beside it."""
    identity: str
    """Another one means other files."""
    size: Bytes
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceAccount:
    """One device's books, in bytes: room is the lesser of what the limit and what the reading leaves."""

    device: DeviceId
    limit: Bytes
    reserved: Bytes
    untaken: Bytes
    """Promised and not yet allocated by the instances that hold the promise."""
    releasing: Bytes
    """Part of `reserved` that belongs to instances on their way out."""
    lent: Bytes = Bytes(0)
    """Part of `reserved` that people have borrowed."""
    free: Bytes
    room: Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do now, why, and when time alone could change the answer."""

    actions: tuple[Action, ...] = ()
    decisions: Mapping[ModelName, Decision] = field(default_factory=dict)
    loans: Mapping[str, str] = field(default_factory=dict)
    """A sentence for each loan that is asked for or granted."""
    hopeless: frozenset[str] = frozenset()
    """Loans among them that an empty machine could not give either."""
    accounts: Mapping[DeviceId, DeviceAccount] = field(default_factory=dict)
    wake_at: Instant | None = None
    warm: Warm | None = None
    """What to read ahead until the next plan; nothing else hangs on it."""
    read_now: bool = False
    """Memory is about to be given on a reading that is too old: devices are to be read at once."""
