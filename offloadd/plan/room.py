"""Make room for a model that does not fit now: wait for what is on its way back, send its own old instances, evict others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offloadd.plan.draft import Draft
from offloadd.plan.eviction import Evictable, choose_victims, freed
from offloadd.plan.placement import NoRoom, Room, place
from offloadd.plan.wants import Want
from offloadd.state.actions import StopReason
from offloadd.state.desired import ModelSpec, RunMode
from offloadd.state.launch import Placement, VramEstimate
from offloadd.state.observed import LEAVING, SETTLING, InstanceView
from offloadd.units import Instant, Seconds

FAIR_WAIT = Seconds(10)
"""A request that has waited this long may have busy instances drained for it; before, only idle ones leave."""
SHORTEST_STAY = Seconds(1)
LONGEST_STAY = Seconds(15)
"""Bounds of the time that an instance stays after it is ready, however idle: as long as its load took."""


@dataclass(frozen=True, slots=True)
class Short:
    """A candidate's need that found no place now."""

    need: VramEstimate
    answer: NoRoom


@dataclass(frozen=True, slots=True)
class Making:
    """What is done about a shortage."""

    short: Short
    victims: tuple[Evictable, ...] = ()
    own_leave: bool = False
    """The model's own old instances must go before a new one fits."""
    coming: bool = False
    """It fits as soon as memory that is on its way back has arrived."""


def make_room(draft: Draft, want: Want, shortages: Sequence[Short], own: Sequence[InstanceView]) -> Making:
    """Do what can be done for the first of the shortages that can be met at all, and hold the memory for it.

    Nobody is evicted for a need that would not be met even then.
    """
    rivals = _rivals(draft, want)
    for short in shortages:
        attempt = _Attempt(draft, want.spec, short.need)
        if attempt.fits(freed(draft.coming_room(), [*rivals, *own])):
            return _meet(draft, want, short, attempt, rivals, own)
    return Making(shortages[0])


@dataclass(frozen=True, slots=True)
class _Attempt:
    draft: Draft
    spec: ModelSpec
    need: VramEstimate

    def __call__(self, room: Room) -> Placement | NoRoom:
        return place(self.need, self.spec, room, self.draft.site)

    def fits(self, room: Room) -> Placement | None:
        found = self(room)
        return found if isinstance(found, Placement) else None


def _meet(
    draft: Draft, want: Want, short: Short, attempt: _Attempt, rivals: Sequence[InstanceView], own: Sequence[InstanceView]
) -> Making:
    coming = draft.coming_room()
    if placement := attempt.fits(coming):
        draft.ledger.claim(placement)
        return Making(short, coming=True)
    if placement := attempt.fits(freed(coming, own)):
        draft.ledger.claim(placement)
        return Making(short, own_leave=True)
    relief = choose_victims(attempt, freed(coming, own), _evictable(draft, want, rivals))
    if relief is not None:
        for victim in relief.victims:
            draft.retire(victim.view, StopReason.EVICTED, f"to make room for {want.spec.name} ({want.why})")
        draft.ledger.claim(relief.placement)
        return Making(short, relief.victims, own_leave=bool(own))
    # Held even while nobody can leave yet, so that smaller models that come later don't eat the room as it appears.
    everything = attempt.fits(freed(coming, [*rivals, *own]))
    if everything:
        draft.ledger.claim(everything)
    return Making(short)


def _rivals(draft: Draft, want: Want) -> list[InstanceView]:
    """Instances that may leave for `want` sooner or later."""
    if not want.urgent:
        return []
    return [
        view
        for view in draft.observed.instances.values()
        if view.state not in LEAVING and not draft.acted_on(view) and _may_leave(draft, draft.spec_of(view), want)
    ]


def _evictable(draft: Draft, want: Want, rivals: Sequence[InstanceView]) -> list[Evictable]:
    """The rivals that may leave now: the idle ones, and after a fair wait the busy ones; never one that is still loading."""
    patient = want.since > draft.now - FAIR_WAIT
    if patient:
        draft.wake(Instant(want.since + FAIR_WAIT))
    return [
        Evictable(
            view=view,
            busy=bool(draft.leases(view)),
            priority=draft.spec_of(view).priority,
            last_used=draft.last_used(view),
            idle=Seconds(draft.now - draft.last_used(view)),
        )
        for view in rivals
        if view.state not in SETTLING and not (patient and draft.leases(view)) and _has_stayed(draft, view)
    ]


def _has_stayed(draft: Draft, view: InstanceView) -> bool:
    """Whether it has been of use for as long as its load took: else two models in turn would do nothing but load."""
    if view.ready_at is None:
        return True
    stay = min(LONGEST_STAY, max(SHORTEST_STAY, view.ready_at - view.started_at))
    until = Instant(view.ready_at + stay)
    if draft.now < until:
        draft.wake(until)
    return draft.now >= until


def _may_leave(draft: Draft, spec: ModelSpec, want: Want) -> bool:
    """Unpinned, of no higher priority, and not itself waited for longer."""
    if spec.name == want.spec.name or spec.pinned or spec.priority > want.spec.priority:
        return False
    if spec.run is RunMode.ALWAYS:
        return spec.priority < want.spec.priority
    rival = draft.demand.waiting.get(spec.name)
    return rival is None or spec.priority < want.spec.priority or rival.oldest > want.since
