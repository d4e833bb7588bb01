"""Small builders: a machine with 16 GiB of RAM of which 80 % may be promised, and models on it. Sizes are GiB, `now` is 1000."""

from __future__ import annotations

from collections.abc import Iterable

from offloadd.plan.planner import plan
from offloadd.state.actions import Plan
from offloadd.state.demand import Demand, Waiting, Wish
from offloadd.state.desired import DesiredState, ModelSpec
from offloadd.state.ids import HOST_RAM, LOCAL, BackendName, DeviceKind, InstanceId, ModelName
from offloadd.state.launch import Candidate, ExitCause, ExitKind, ExitStatus, ModelFacts, Placement, VramEstimate
from offloadd.state.observed import DeviceView, ExitRecord, InstanceState, InstanceView, ObservedState
from offloadd.units import Bytes, Instant, Seconds

NOW = Instant(1000.0)
ALPHA, BETA = BackendName("alpha"), BackendName("beta")


def gib(number: float) -> Bytes:
    return Bytes(int(number * 2**30))


def key(text: str) -> InstanceId:
    """`qwen-2` as an id."""
    model, _, number = text.rpartition("-")
    return InstanceId(LOCAL, ModelName(model), int(number))


def spec(name: str, **fields: object) -> ModelSpec:
    return ModelSpec(**{"name": ModelName(name), "source": f"/models/{name}", "backends": (ALPHA,)} | fields)  # type: ignore[arg-type]


def ram(free: float = 16.0, total: float = 16.0) -> DeviceView:
    return DeviceView(id=HOST_RAM, kind=DeviceKind.HOST, name="RAM", total=gib(total), free=gib(free))


def offer(size: float, fingerprint: str = "now", backend: BackendName = ALPHA, **fields: object) -> Candidate:
    return Candidate(
        backend=backend,
        facts=ModelFacts(identity="file-1"),
        fingerprint=fingerprint,
        estimate=VramEstimate(total=gib(size), basis="given"),
        **fields,  # type: ignore[arg-type]
    )


def unknown(backend: BackendName = ALPHA) -> Candidate:
    """Nothing is known of the files yet."""
    return Candidate(backend=backend, facts=ModelFacts())


def view(name: str, size: float, state: InstanceState = InstanceState.READY, **fields: object) -> InstanceView:
    """An instance that has taken all of its memory, entered its state a minute ago, and just gave a sign of life."""
    plain: dict[str, object] = {
        "id": key(name),
        "spec": spec(key(name).model),
        "backend": ALPHA,
        "fingerprint": "now",
        "placement": Placement(reserved={HOST_RAM: gib(size)}),
        "state": state,
        "since": Instant(940.0),
        "started_at": Instant(940.0),
        "last_sign": NOW,
        "measured": {HOST_RAM: gib(size)},
    }
    return InstanceView(**plain | fields)  # type: ignore[arg-type]


def ended(name: str, ago: float, kind: ExitKind = ExitKind.CRASHED, **fields: object) -> ExitRecord:
    """An instance that crashed `ago` seconds before NOW without having been ready."""
    plain: dict[str, object] = {
        "instance": key(name),
        "backend": ALPHA,
        "fingerprint": "now",
        "identity": "file-1",
        "at": Instant(NOW - ago),
        "status": ExitStatus(code=1),
        "cause": ExitCause(kind=kind, message="exit code 1 before it was ready"),
        "expected": False,
    }
    return ExitRecord(**plain | fields)  # type: ignore[arg-type]


BAD_FILE = ExitCause(kind=ExitKind.BAD_MODEL, message="its file is damaged", hint="fetch it again", permanent=True)


def waits(count: int = 1, ago: float = 1.0) -> Waiting:
    return Waiting(count=count, oldest=Instant(NOW - ago))


class Scene:
    """What goes into one plan."""

    def __init__(self, *specs: ModelSpec, size: float = 4.0) -> None:
        self.models = {one.name: one for one in specs}
        self.candidates: dict[ModelName, tuple[Candidate, ...]] = {name: (offer(size),) for name in self.models}
        self.instances: dict[InstanceId, InstanceView] = {}
        self.exits: dict[ModelName, tuple[ExitRecord, ...]] = {}
        self.waiting: dict[ModelName, Waiting] = {}
        self.leases: dict[InstanceId, int] = {}
        self.last_used: dict[ModelName, Instant] = {}
        self.idle_since: dict[InstanceId, Instant] = {}
        self.wishes: dict[ModelName, Wish] = {}
        self.forgiven: dict[ModelName, Instant] = {}
        self.load_times: dict[ModelName, Seconds] = {}
        self.free: float | None = None
        self.blind = False

    def offers(self, name: str, *candidates: Candidate) -> Scene:
        self.candidates[ModelName(name)] = candidates
        return self

    def has(self, one: InstanceView, *, leases: int = 0, idle_for: float | None = None) -> Scene:
        self.instances[one.id] = one
        if leases:
            self.leases[one.id] = leases
        if idle_for is not None:
            self.last_used[one.model] = Instant(NOW - idle_for)
        return self

    def had(self, *records: ExitRecord) -> Scene:
        for record in records:
            name = record.instance.model
            self.exits[name] = (*self.exits.get(name, ()), record)
        return self

    def wait(self, name: str, count: int = 1, ago: float = 1.0) -> Scene:
        self.waiting[ModelName(name)] = waits(count, ago)
        return self

    def by_hand(self, name: str, *, load: bool, ago: float = 1.0) -> Scene:
        there = [one.id.number for one in self.instances.values() if one.model == name and one.started_at <= NOW - ago]
        self.wishes[ModelName(name)] = Wish(load=load, since=Instant(NOW - ago), newest=max(there, default=0))
        if load:
            self.forgiven[ModelName(name)] = Instant(NOW - ago)
        return self

    def plan(self, at: float = NOW) -> Plan:
        used = sum(sum(one.measured.values()) for one in self.instances.values()) / 2**30
        observed = ObservedState(
            instances=self.instances,
            devices={} if self.blind else {HOST_RAM: ram(16.0 - used if self.free is None else self.free)},
            candidates=self.candidates,
            exits=self.exits,
            load_times=self.load_times,
            launches={name: max((k.number for k in self.instances if k.model == name), default=0) for name in self.models},
        )
        demand = Demand(
            waiting=self.waiting,
            leases=self.leases,
            last_used=self.last_used,
            idle_since=self.idle_since,
            wishes=self.wishes,
            forgiven=self.forgiven,
        )
        return plan(DesiredState(models=self.models), observed, demand, now=Instant(at))

    def says(self, name: str) -> str:
        """The model's state and sentence."""
        decision = self.plan().decisions[ModelName(name)]
        return f"{decision.state}: {decision.sentence}"

    def does(self) -> list[str]:
        """The plan's actions, one line each."""
        return [f"{type(action).__name__.removesuffix('Instance').lower()} {action.instance}" for action in self.plan().actions]


def names(views: Iterable[InstanceView]) -> list[str]:
    return [str(one.id) for one in views]
