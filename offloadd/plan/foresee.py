"""Where a config leads: plan after plan, carried out on a machine on which everything goes well and at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from offloadd.plan.accounting import pool
from offloadd.plan.planner import plan
from offloadd.plan.room import FAIR_WAIT, LONGEST_STAY
from offloadd.state.actions import (
    Action,
    AdoptInstance,
    DeviceAccount,
    DrainInstance,
    ForgetInstance,
    GrantLoan,
    ModelState,
    Plan,
    RestInstance,
    SleepInstance,
    StartInstance,
    StopInstance,
    WakeInstance,
)
from offloadd.state.demand import Demand
from offloadd.state.desired import DesiredState
from offloadd.state.ids import DeviceId, InstanceId
from offloadd.state.observed import SETTLING, InstanceState, InstanceView, ObservedState
from offloadd.units import Bytes, Instant, Seconds

MAX_PLANS = 200
HORIZON = Seconds(FAIR_WAIT + LONGEST_STAY + 10)
"""How far the time is followed for those who wait. Later things, such as idle timeouts, are not what a config changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Foresight:
    """What will be done, in order, and how things stand when it is done."""

    actions: tuple[Action, ...]
    before: Mapping[DeviceId, DeviceAccount]
    last: Plan
    settled: bool
    """Whether there is an end to it within what is looked at."""


def foresee(desired: DesiredState, observed: ObservedState, demand: Demand, *, now: Instant) -> Foresight:
    """Follow the plans from this picture until nothing is left to do. Requests neither come nor end, save by a drain."""
    world = _World(observed, demand, now)
    before = plan(desired, world.observed, demand, now=now).accounts
    done: list[Action] = []
    for _ in range(MAX_PLANS):
        made = plan(desired, world.observed, world.demand, now=world.now)
        if made.actions:
            world.carry_out(made.actions)
            done += [action for action in made.actions if not isinstance(action, ForgetInstance)]
        elif not world.wait(made, until=Instant(now + HORIZON)):
            return Foresight(actions=tuple(done), before=before, last=made, settled=True)
    return Foresight(actions=tuple(done), before=before, last=made, settled=False)


class _World:
    """The picture as it will be."""

    def __init__(self, observed: ObservedState, demand: Demand, now: Instant) -> None:
        self.now = now
        self.demand = demand
        devices = {device: replace(view, read_at=None) for device, view in observed.devices.items()}
        self.observed = replace(observed, devices=devices)
        views = dict(observed.instances)
        for view in observed.instances.values():
            if view.state in SETTLING:
                self._grow(view)
                views[view.id] = self._ready(view)
            elif view.state is InstanceState.WAKING:
                self._grow(view)
                views[view.id] = self._awake(view)
            elif view.state is InstanceState.FALLING_ASLEEP:
                views[view.id] = self._asleep(view)
        self._set(views)

    def carry_out(self, actions: Iterable[Action]) -> None:
        """Do all of it: what starts is ready, what leaves is gone and its memory free."""
        views = dict(self.observed.instances)
        for action in actions:
            match action:
                case StartInstance():
                    view = _started(action, self.now)
                    self._take(view.placement.reserved, -1)
                    views[view.id] = view
                    self._count(view.id)
                case AdoptInstance():
                    views[action.instance] = self._ready(views[action.instance])
                case SleepInstance() | RestInstance():
                    views[action.instance] = self._asleep(views[action.instance])
                case WakeInstance():
                    view = self._awake(views[action.instance])
                    self._grow(view)
                    views[action.instance] = replace(view, measured=view.placement.reserved)
                case DrainInstance() | StopInstance() | ForgetInstance():
                    self._end(views.pop(action.instance))
                case GrantLoan():
                    self._take(action.reserved, -1)
                    loan = replace(self.demand.loans[action.loan], granted=action.reserved, measured=action.reserved)
                    self.demand = replace(self.demand, loans={**self.demand.loans, loan.id: loan})
        self._set(views)

    def wait(self, made: Plan, *, until: Instant) -> bool:
        """Let the time pass that somebody waits for; False when nobody does, or when it takes too long."""
        waits = any(decision.state in (ModelState.WAITING, ModelState.STOPPING) for decision in made.decisions.values())
        if not waits or made.wake_at is None or made.wake_at > until:
            return False
        self.now = max(made.wake_at, Instant(self.now + 0.001))
        self._set(self.observed.instances)
        return True

    def _set(self, views: Mapping[InstanceId, InstanceView]) -> None:
        """Take these for what there is. All of them are well."""
        alive = {key: replace(view, last_sign=self.now) for key, view in views.items()}
        self.observed = replace(self.observed, instances=alive)

    def _count(self, key: InstanceId) -> None:
        self.observed = replace(self.observed, launches={**self.observed.launches, key.model: key.number})

    def _ready(self, view: InstanceView) -> InstanceView:
        ready_at = self.now if view.ready_at is None else view.ready_at
        return replace(view, state=InstanceState.READY, ready_at=ready_at, since=self.now, adopted_at=self.now)

    def _asleep(self, view: InstanceView) -> InstanceView:
        """It has given back what it will not hold asleep."""
        reserved = {**view.placement.reserved, **view.placement.asleep}
        rest = {device: Bytes(max(0, view.measured.get(device, 0) - reserved[device])) for device in view.placement.asleep}
        self._take(rest, +1)
        held = {device: Bytes(view.measured.get(device, 0) - rest.get(device, 0)) for device in view.measured}
        asleep = replace(view.placement, reserved=reserved)
        return replace(
            view, state=InstanceState.SLEEPING, since=self.now, placement=asleep, awake=view.awake or view.placement, measured=held
        )

    def _awake(self, view: InstanceView) -> InstanceView:
        placement = view.awake or view.placement
        return replace(view, state=InstanceState.READY, since=self.now, placement=placement, awake=None)

    def _grow(self, view: InstanceView) -> None:
        """It takes what it was promised and has not taken yet."""
        rest = {device: Bytes(max(0, size - view.measured.get(device, 0))) for device, size in view.placement.reserved.items()}
        self._take(rest, -1)

    def _end(self, view: InstanceView) -> None:
        if view.state is not InstanceState.EXITED:
            self._take({device: Bytes(view.measured.get(device, 0)) for device in view.placement.reserved}, +1)
        else:
            self._take(view.unreleased, +1)
        leases = {key: count for key, count in self.demand.leases.items() if key != view.id}
        self.demand = replace(self.demand, leases=leases)

    def _take(self, sizes: Mapping[DeviceId, Bytes], sign: int) -> None:
        devices = dict(self.observed.devices)
        for device, size in sizes.items():
            for each in pool(device, devices):
                if each in devices:
                    view = devices[each]
                    devices[each] = replace(view, free=Bytes(min(view.total, max(0, view.free + sign * size))))
        self.observed = replace(self.observed, devices=devices)


def _started(action: StartInstance, now: Instant) -> InstanceView:
    return InstanceView(
        id=action.instance,
        spec=action.spec,
        backend=action.candidate.backend,
        fingerprint=action.candidate.fingerprint,
        footprint_key=action.candidate.footprint_key,
        placement=action.placement,
        state=InstanceState.READY,
        since=now,
        started_at=now,
        ready_at=now,
        measured=action.placement.reserved,
    )
