"""One planner cycle as the properties see it, and what they raise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from offloadd.plan.accounting import pool
from offloadd.plan.placement import Site, place
from offloadd.plan.planner import plan
from offloadd.plan.restart import taught
from offloadd.state.actions import (
    Action,
    AdoptInstance,
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
)
from offloadd.state.demand import Demand, Loan
from offloadd.state.desired import DesiredState, ModelSpec
from offloadd.state.ids import DeviceId, InstanceId, ModelName
from offloadd.state.launch import Candidate, Placement, VramEstimate
from offloadd.state.observed import LEAVING, ExitRecord, InstanceView, ObservedState
from offloadd.units import Bytes, Instant
from tests.sim.world import World

InstanceAction = (
    StartInstance | AdoptInstance | SleepInstance | RestInstance | WakeInstance | StopInstance | DrainInstance | ForgetInstance
)


class Broken(AssertionError):
    """A property that did not hold."""

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(f"{name.replace('_', ' ')}: NOT SO: {detail}")
        self.name = name


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One planner cycle: what went in, and what came out."""

    world: World
    desired: DesiredState
    observed: ObservedState
    demand: Demand
    now: float
    plan: Plan

    def starts(self) -> list[StartInstance]:
        return [action for action in self.plan.actions if isinstance(action, StartInstance)]

    def stops(self) -> list[StopInstance]:
        return [action for action in self.plan.actions if isinstance(action, StopInstance)]

    def ends(self) -> list[StopInstance | DrainInstance]:
        return [action for action in self.plan.actions if isinstance(action, StopInstance | DrainInstance)]

    def grants(self) -> list[GrantLoan]:
        return [action for action in self.plan.actions if isinstance(action, GrantLoan)]

    def sleeps(self) -> list[SleepInstance]:
        return [action for action in self.plan.actions if isinstance(action, SleepInstance)]

    def rests(self) -> list[RestInstance]:
        return [action for action in self.plan.actions if isinstance(action, RestInstance)]

    def wakes(self) -> list[WakeInstance]:
        return [action for action in self.plan.actions if isinstance(action, WakeInstance)]

    def taken_to_wake(self, action: WakeInstance) -> dict[DeviceId, Bytes]:
        """What it is promised more from now on."""
        return self.missing_awake(self.observed.instances[action.instance])

    def missing_awake(self, view: InstanceView) -> dict[DeviceId, Bytes]:
        """What one that sleeps is promised less than it needs awake."""
        assert view.awake is not None
        now = view.placement.reserved
        return {each: Bytes(size - now.get(each, 0)) for each, size in view.awake.reserved.items() if size > now.get(each, 0)}

    def promises(self) -> list[tuple[ModelName, Mapping[DeviceId, Bytes]]]:
        """What this plan promises to instances."""
        found = [(action.instance.model, action.placement.reserved) for action in self.starts()]
        return [*found, *((action.instance.model, self.taken_to_wake(action)) for action in self.wakes())]

    def on_instances(self) -> list[InstanceAction]:
        return [action for action in self.plan.actions if not isinstance(action, GrantLoan)]

    def evictions(self) -> list[StopInstance | DrainInstance | SleepInstance]:
        return [action for action in [*self.ends(), *self.sleeps()] if is_eviction(action)]

    def view(self, action: InstanceAction) -> InstanceView:
        return self.observed.instances[action.instance]

    def leases(self, key: InstanceId) -> int:
        return self.demand.leases.get(key, 0)

    def spec(self, model: ModelName) -> ModelSpec | None:
        return self.desired.models.get(model)

    def needs(self, model: ModelName) -> list[VramEstimate]:
        """What each engine would need for it."""
        offers = [offer for offer in self.observed.candidates[model] if offer.estimate is not None]
        return [taught(offer.estimate, self.exits(model, offer)) for offer in offers if offer.estimate is not None]

    def exits(self, model: ModelName, offer: Candidate) -> list[ExitRecord]:
        """Ends of launches of this offer that nobody has forgiven."""
        return [
            record
            for record in self.world.exits.get(model, [])
            if (record.fingerprint, record.identity) == (offer.fingerprint, offer.facts.identity)
            and record.at > self.demand.forgiven.get(model, float("-inf"))
        ]

    # Memory

    def pool(self, device: DeviceId) -> tuple[DeviceId, ...]:
        return pool(device, self.observed.devices)

    def on_pool(self, reserved: Mapping[DeviceId, int], device: DeviceId) -> int:
        """How much of these bytes lies in the memory that `device` is."""
        return sum(size for each, size in reserved.items() if each in self.pool(device))

    def new_on(self, device: DeviceId) -> int:
        """Bytes that this plan promises there."""
        promises = [reserved for _, reserved in self.promises()] + [action.reserved for action in self.grants()]
        return sum(self.on_pool(reserved, device) for reserved in promises)

    def held_on(self, device: DeviceId) -> int:
        """Bytes promised there before this plan, to instances on the books and to borrowers."""
        promises = [view.placement.reserved for view in self.observed.instances.values()]
        promises += [loan.granted or {} for loan in self.demand.loans.values()]
        return sum(self.on_pool(reserved, device) for reserved in promises)

    def loans_wait(self) -> bool:
        granted = {action.loan for action in self.grants()}
        return any(loan.granted is None and loan.id not in granted for loan in self.demand.loans.values())

    def weight(self, loan: Loan) -> int:
        """A loan that nobody can measure counts twice once it is used: as used by somebody, and as not taken yet."""
        return 2 if loan.id in self.world.unnamed else 1

    def unified_is_unread(self) -> bool:
        """Whether a part of RAM's promises stands under a name of which nobody knows now that it is RAM."""
        return any(card.unified and card.id not in self.observed.devices for card in self.world.machine.gpus)

    def site(self) -> Site:
        return Site(devices=self.observed.devices, accounts=self.plan.accounts, blind=self.observed.blind)

    def fits(self, need: VramEstimate, spec: ModelSpec, room: Mapping[DeviceId, int]) -> bool:
        rooms = {device: Bytes(size) for device, size in room.items()}
        return isinstance(place(need, spec, rooms, self.site()), Placement)

    def coming_room(self) -> dict[DeviceId, int]:
        """Room before this plan's claims, with all that was on its way back before it."""
        return {device: account.room + account.releasing for device, account in self.plan.accounts.items()}

    def sent_away(self) -> list[InstanceView]:
        """Instances that leave by this plan."""
        return [view for view in map(self.view, self.ends()) if view.state not in LEAVING]

    def add(self, room: dict[DeviceId, int], reserved: Mapping[DeviceId, int], sign: int = 1) -> None:
        for device in room:
            room[device] += sign * self.on_pool(reserved, device)


def is_eviction(action: Action) -> bool:
    if isinstance(action, StopInstance):
        return action.reason is StopReason.EVICTED
    return isinstance(action, DrainInstance | SleepInstance) and action.why.startswith("to make room for")


def take_step(world: World) -> Step:
    """Plan the world as it is now; nothing is applied."""
    observed, demand = world.snapshot()
    made = plan(world.desired, observed, demand, now=Instant(world.now))
    return Step(world=world, desired=world.desired, observed=observed, demand=demand, now=world.now, plan=made)
