"""The plan while it is being made: what was given, what has been decided, and the ledger that claims are taken from."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

from offloadd.plan.accounting import Ledger, open_accounts, pool
from offloadd.plan.eviction import freed
from offloadd.plan.placement import Room, Site
from offloadd.state.actions import (
    Action,
    AdoptInstance,
    Decision,
    DrainInstance,
    ForgetInstance,
    GrantLoan,
    Plan,
    RestInstance,
    SleepInstance,
    StartInstance,
    StopInstance,
    StopReason,
    WakeInstance,
    Warm,
)
from offloadd.state.demand import Demand
from offloadd.state.desired import BackendKind, DesiredState, ModelSpec
from offloadd.state.ids import LOCAL, BackendName, DeviceId, DeviceKind, InstanceId, ModelName
from offloadd.state.launch import Placement
from offloadd.state.observed import SETTLING, TURNING, DeviceView, InstanceState, InstanceView, ObservedState
from offloadd.units import Bytes, Instant, Seconds, counted

FRESH = Seconds(1)
"""Memory of a GPU is given on a reading that is no older than this."""


NAMED_STAY = Seconds(60)
"""So long an instance that was started for a request's word stays at least, beside those that are wanted anyway."""


def requests_run(number: int) -> str:
    """How many requests an instance holds, in words."""
    return counted(number, "request runs", "requests run")


class Draft:
    """Collects actions, at most one per instance, and the earliest time at which the answer could change by itself."""

    def __init__(self, desired: DesiredState, observed: ObservedState, demand: Demand, now: Instant) -> None:
        self.desired = desired
        self.observed = observed
        self.demand = demand
        self.now = now
        books = open_accounts(observed.devices, observed.instances.values(), demand.loans.values(), desired.budget)
        self.ledger = Ledger(books, observed.devices)
        self.site = Site(devices=observed.devices, accounts=self.ledger.accounts, blind=observed.blind)
        self.decisions: dict[ModelName, Decision] = {}
        self.loans: dict[str, str] = {}
        self.hopeless: set[str] = set()
        self._grants: list[GrantLoan] = []
        self._actions: dict[InstanceId, Action] = {}
        self._sent_away: dict[DeviceId, int] = {}
        self._wake_at: Instant | None = None
        self.read_now = False
        self.warm: Warm | None = None
        self._by_model: dict[ModelName, list[InstanceView]] = {}
        for view in sorted(observed.instances.values(), key=lambda v: v.id):
            self._by_model.setdefault(view.model, []).append(view)

    def instances(self, model: ModelName) -> Sequence[InstanceView]:
        """Every instance of the model that is on the books, by number."""
        return self._by_model.get(model, ())

    def spec_of(self, view: InstanceView) -> ModelSpec:
        """The config's present word on the instance's model; what it was launched from when the model is gone."""
        return self.desired.models.get(view.model, view.spec)

    def leases(self, view: InstanceView) -> int:
        """Requests that the instance holds."""
        return self.demand.leases.get(view.id, 0)

    def elsewhere(self, view: InstanceView) -> bool:
        """Whether it is a server that we do not run."""
        engine = self.desired.engines.get(view.backend)
        return engine is not None and engine.kind is BackendKind.EXTERNAL

    def named(self, spec: ModelSpec) -> frozenset[BackendName]:
        """Engines that requests have asked for by name not long ago: an instance of each stays as long as it would when idle."""
        kept = max(NAMED_STAY, spec.idle_timeout)
        asked = self.demand.named.get(spec.name, {})
        return frozenset(name for name, last in asked.items() if self.now - last < kept)

    def acted_on(self, view: InstanceView) -> bool:
        """Whether this plan already has an action for the instance."""
        return view.id in self._actions

    def leaves(self, view: InstanceView) -> bool:
        """Whether this plan has an action for the instance that takes it away."""
        return self.acted_on(view) and not isinstance(self.action(view), SleepInstance | RestInstance | WakeInstance)

    def action(self, view: InstanceView) -> Action | None:
        """This plan's action for the instance."""
        return self._actions.get(view.id)

    def leaving(self, device: DeviceId) -> Bytes:
        """Bytes that come back by themselves: of instances on their way out, those that this plan sends away included."""
        return Bytes(self.ledger.accounts[device].releasing + self._sent_away.get(device, 0))

    def room_after(self, views: Iterable[InstanceView], asleep: Container[InstanceId] = ()) -> Room:
        """The room when these have left too, or have fallen `asleep`, beside all that is on its way out."""
        coming = {device: Bytes(room + self.leaving(device)) for device, room in self.ledger.room.items()}
        return freed(coming, views, self.observed.devices, asleep)

    def room_when_all_is_back(self, views: Iterable[InstanceView]) -> Room:
        """The room when these have left, by the promises alone: as if nobody used memory to whom it was not promised."""
        books = self.ledger.accounts
        claimed = {device: books[device].room - room for device, room in self.ledger.room.items()}
        room = {device: Bytes(a.limit - a.reserved - claimed[device] + self.leaving(device)) for device, a in books.items()}
        return freed(room, views, self.observed.devices)

    @property
    def last_exit(self) -> Instant:
        """When an instance last ended."""
        return max((records[-1].at for records in self.observed.exits.values() if records), default=Instant(float("-inf")))

    def last_used(self, view: InstanceView) -> Instant:
        """When the instance's model was last wanted by a request; our first sight of it when that was never."""
        return max(self.demand.last_used.get(view.model, view.begun_at), view.begun_at)

    def wake(self, at: Instant) -> None:
        """Plan again at `at`, if nothing happens before."""
        if self._wake_at is None or at < self._wake_at:
            self._wake_at = at

    @property
    def starts(self) -> bool:
        """Whether this plan launches or wakes anything."""
        return any(isinstance(action, StartInstance | WakeInstance) for action in self._actions.values())

    def decide(self, decision: Decision) -> None:
        """Record a model's verdict."""
        self.decisions[decision.model] = decision

    def start(self, action: StartInstance) -> None:
        """Launch an instance, and take its memory out of the room."""
        self._actions[action.instance] = action
        self.ledger.claim(action.placement.reserved)

    def adopt(self, view: InstanceView, why: str) -> None:
        """Take over an orphan; its memory is on the books already."""
        self._actions[view.id] = AdoptInstance(instance=view.id, why=why)

    def loads_there(self, placement: Placement, *, sizes_itself: bool | None = None) -> InstanceId | None:
        """Who loads, falls asleep or wakes on one of these GPUs, where that one or the one to be placed measures them meanwhile.

        Only who loads measures; whoever `sizes_itself` does, as an elastic placement says unless it is told otherwise.
        """
        measures = placement.elastic if sizes_itself is None else sizes_itself
        moving = [(view.id, view.placement, view.state in SETTLING) for view in self._moving()]
        moving += [(key, action.placement, True) for key, action in self._actions.items() if isinstance(action, StartInstance)]
        for instance, other, loads in sorted(moving, key=lambda each: each[0]):
            if (measures or (loads and other.elastic)) and set(placement.gpus) & set(other.gpus):
                return instance
        return None

    def _moving(self) -> Iterable[InstanceView]:
        """Instances whose memory comes or goes, by what was seen and by this plan."""
        for view in self.observed.instances.values():
            turns = isinstance(self._actions.get(view.id), SleepInstance | WakeInstance)
            if view.state in SETTLING or view.state in TURNING or turns:
                yield view

    def grant(self, action: GrantLoan) -> None:
        """Lend memory, and take it out of the room."""
        self._grants.append(action)
        self.ledger.claim(action.reserved)

    def may_give(self, reserved: Mapping[DeviceId, Bytes]) -> bool:
        """Whether the GPUs among these were read a moment ago, as they must be before memory is given on them.

        Else they are to be read at once, and the memory is held until then: a program may have come in between.
        """
        stale = [view for view in map(self.observed.devices.get, reserved) if view and self._is_stale(view)]
        if stale:
            self.read_now = True
            self.ledger.claim(reserved)
        return not stale

    def _is_stale(self, view: DeviceView) -> bool:
        return view.kind is not DeviceKind.HOST and view.read_at is not None and self.now - view.read_at > FRESH

    def next_id(self, model: ModelName) -> InstanceId:
        """The number after the highest that the model ever had, this plan's starts counted."""
        numbers = [view.id.number for view in self.instances(model)]
        numbers += [key.number for key in self._actions if key.model == model]
        return InstanceId(LOCAL, model, max([self.observed.launches.get(model, 0), *numbers]) + 1)

    def retire(self, view: InstanceView, reason: StopReason, why: str) -> None:
        """Bring an instance to its end in good order: at once when nothing is lost, else drain it first.

        Stopping without a drain is safe where no lease is held, because leases are granted from the same snapshot's state.
        """
        if self.acted_on(view) or view.state in (InstanceState.STOPPING, InstanceState.EXITED):
            return
        held = self.leases(view)
        if not held:
            self.stop(view, reason, why)
        elif view.state is not InstanceState.DRAINING:
            deadline = Instant(self.now + self.spec_of(view).drain_timeout)
            self._send_away(view, DrainInstance(instance=view.id, deadline=deadline, why=f"{why}; {requests_run(held)}"))
            self.wake(deadline)

    def stop(self, view: InstanceView, reason: StopReason, why: str) -> None:
        """End an instance now, whatever it holds."""
        if not self.acted_on(view) and view.state not in (InstanceState.STOPPING, InstanceState.EXITED):
            self._send_away(view, StopInstance(instance=view.id, reason=reason, why=why, limit=self.spec_of(view).stop_timeout))

    def put_to_sleep(self, view: InstanceView, why: str) -> None:
        """Have it fall asleep."""
        free = {gpu: self.observed.devices[gpu].free for gpu in view.placement.asleep if gpu in self.observed.devices}
        self._actions[view.id] = SleepInstance(instance=view.id, free=free, why=why)
        self._coming_back(view.placement.freed_asleep)

    def rest(self, view: InstanceView, keeps: Mapping[DeviceId, Bytes], why: str) -> None:
        """Promise it no more than this any more. What that frees is given by the next plan."""
        self._actions[view.id] = RestInstance(instance=view.id, keeps=keeps, why=why)

    def rouse(self, view: InstanceView, why: str) -> None:
        """Wake it, and take what it needs for that out of the room."""
        self._actions[view.id] = WakeInstance(instance=view.id, why=why)
        awake, now = view.awake or view.placement, view.placement.reserved
        self.ledger.claim({device: Bytes(max(0, size - now.get(device, 0))) for device, size in awake.reserved.items()})

    def _send_away(self, view: InstanceView, action: DrainInstance | StopInstance) -> None:
        self._actions[view.id] = action
        # Some of it the books may count as leaving already.
        returning = view.returning
        self._coming_back({device: Bytes(size - returning.get(device, 0)) for device, size in view.placement.reserved.items()})

    def _coming_back(self, sizes: Mapping[DeviceId, Bytes]) -> None:
        for device, size in sizes.items():
            for each in pool(device, self.observed.devices):
                self._sent_away[each] = self._sent_away.get(each, 0) + size

    def forget(self, view: InstanceView) -> None:
        """Drop an exited instance from the books."""
        self._actions[view.id] = ForgetInstance(instance=view.id)

    def finish(self) -> Plan:
        """The plan, in an order that depends on nothing but its content."""
        return Plan(
            actions=(*(self._actions[key] for key in sorted(self._actions)), *self._grants),
            loans=dict(sorted(self.loans.items())),
            hopeless=frozenset(self.hopeless),
            decisions={name: self.decisions[name] for name in sorted(self.decisions)},
            accounts=dict(self.ledger.accounts),
            wake_at=self._wake_at,
            warm=self.warm,
            read_now=self.read_now,
        )
