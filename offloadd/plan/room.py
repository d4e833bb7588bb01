"""Make room for a model that does not fit now: wait for what is on its way back, send its own old instances, evict others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offloadd.plan.draft import Draft
from offloadd.plan.eviction import Evictable, Try, choose_victims
from offloadd.plan.placement import NoRoom, Room
from offloadd.plan.sleep import may_sleep
from offloadd.plan.upkeep import RELEASE_TIME
from offloadd.plan.wants import Want
from offloadd.state.actions import StopReason
from offloadd.state.desired import ModelSpec, RunMode
from offloadd.state.launch import Placement
from offloadd.state.observed import LEAVING, SETTLING, TURNING, InstanceView
from offloadd.units import Instant, Seconds

FAIR_WAIT = Seconds(10)
"""A request that has waited this long may have busy instances drained for it; before, only idle ones leave."""
SHORTEST_STAY = Seconds(1)
LONGEST_STAY = Seconds(15)
"""Bounds of the time that an instance stays after it is ready, however idle: as long as its load took."""


@dataclass(frozen=True, slots=True)
class Claimant:
    """Who wants memory: what evictions say of it, since when it waits, and whose instances may leave for it."""

    name: str
    why: str
    since: Instant
    beats: Callable[[ModelSpec], bool]


@dataclass(frozen=True, slots=True)
class Short:
    """A need that found no place now, and how to try again in another room."""

    answer: NoRoom
    attempt: Try

    def fits(self, room: Room) -> Placement | None:
        """Its place in this room, if there is one."""
        found = self.attempt(room)
        return found if isinstance(found, Placement) else None


@dataclass(frozen=True, slots=True)
class Making:
    """What is done about a shortage."""

    short: Short
    victims: tuple[Evictable, ...] = ()
    own_leave: bool = False
    """The model's own old instances must go before a new one fits."""
    coming: bool = False
    """It fits as soon as memory that is on its way back has arrived."""
    hopeless: bool = False
    """It would not fit even if all left that may be made to, sooner or later."""
    late: bool = False
    """Something ended a moment ago, and its memory may still show as used by nobody."""


def make_room(draft: Draft, claimant: Claimant, shortages: Sequence[Short], own: Sequence[InstanceView] = ()) -> Making:
    """Do what can be done for the first of the shortages that can be met at all, and hold the memory for it.

    Nobody is evicted for a need that would not be met even then. `own` are instances that leave for it without being victims.
    """
    rivals = [
        view
        for view in draft.observed.instances.values()
        if view.state not in LEAVING and not draft.acted_on(view) and claimant.beats(draft.spec_of(view))
    ]
    for short in shortages:
        if short.fits(draft.room_after([*rivals, *own])):
            return _meet(draft, claimant, short, rivals, own)
    return _await_late(draft, shortages, [*rivals, *own]) or Making(shortages[0], hopeless=True)


def for_model(draft: Draft, want: Want) -> Claimant:
    """A model's claim. Only one that requests wait for, or that is to run always, may have others leave."""
    return Claimant(want.spec.name, want.why, want.since, lambda spec: want.urgent and _may_leave(draft, spec, want))


def _meet(draft: Draft, claimant: Claimant, short: Short, rivals: Sequence[InstanceView], own: Sequence[InstanceView]) -> Making:
    for leaving, making in (([], Making(short, coming=True)), (own, Making(short, own_leave=True))):
        if placement := short.fits(draft.room_after(leaving)):
            draft.ledger.claim(placement.reserved)
            return making
    relief = choose_victims(short.attempt, draft.room_after(own), _evictable(draft, claimant, rivals), draft.observed.devices)
    if relief is not None:
        # The own ones may lie where they are in nobody's way: then they serve on beside.
        own_leave = not short.fits(draft.room_after([victim.view for victim in relief.victims], relief.asleep))
        for victim in relief.victims:
            why = f"to make room for {claimant.name} ({claimant.why})"
            if victim.view.id in relief.asleep:
                draft.put_to_sleep(victim.view, why)
            else:
                draft.retire(victim.view, StopReason.EVICTED, why)
        draft.ledger.claim(relief.placement.reserved)
        return Making(short, relief.victims, own_leave=own_leave)
    # Held even while nobody can leave yet, so that smaller models that come later don't eat the room as it appears.
    if placement := short.fits(draft.room_after([*rivals, *own])):
        draft.ledger.claim(placement.reserved)
    return Making(short)


def _await_late(draft: Draft, shortages: Sequence[Short], leaving: Sequence[InstanceView]) -> Making | None:
    """Hold a place for one that needs what has just ended and does not show as free yet.

    Without that, the small ones behind it would take the room each time that it was freed for the large one.
    """
    until = Instant(draft.last_exit + RELEASE_TIME)
    if draft.now >= until:
        return None
    for short in shortages:
        if placement := short.fits(draft.room_when_all_is_back(leaving)):
            draft.ledger.claim(placement.reserved)
            draft.wake(until)
            return Making(short, late=True)
    return None


def _evictable(draft: Draft, claimant: Claimant, rivals: Sequence[InstanceView]) -> list[Evictable]:
    """The rivals that may leave now: the idle ones, and after a fair wait the busy ones; never one that is still loading."""
    patient = claimant.since > draft.now - FAIR_WAIT
    if patient:
        draft.wake(Instant(claimant.since + FAIR_WAIT))
    return [
        Evictable(
            view=view,
            busy=bool(draft.leases(view)),
            priority=draft.spec_of(view).priority,
            last_used=draft.last_used(view),
            idle=Seconds(draft.now - draft.last_used(view)),
            sleeps=may_sleep(draft, view) and draft.loads_there(view.placement, sizes_itself=False) is None,
        )
        for view in rivals
        if view.state not in SETTLING
        and view.state not in TURNING
        and not (patient and draft.leases(view))
        and _has_stayed(draft, view)
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
