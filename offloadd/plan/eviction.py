"""Who makes room: nobody, unless what those chosen leave behind is proven to be enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from offloadd.plan.accounting import pool
from offloadd.plan.placement import NoRoom, Room
from offloadd.state.ids import DeviceId, InstanceId
from offloadd.state.launch import Placement
from offloadd.state.observed import DeviceView, InstanceView
from offloadd.units import Bytes, Instant, Seconds

FORGETTING = Seconds(600)
"""After this long without a request, the chance that the next one comes soon has fallen to a third."""
UNKNOWN_RELOAD = Seconds(30)

Devices = Mapping[DeviceId, DeviceView]
Try = Callable[[Room], Placement | NoRoom]
"""Places the one who waits in a given room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evictable:
    """An instance that may be asked to leave."""

    view: InstanceView
    busy: bool
    priority: int
    last_used: Instant
    idle: Seconds
    sleeps: bool = False
    """Whether it can be put to sleep instead."""

    @property
    def cost(self) -> tuple[bool, int, float, float, InstanceId]:
        """Idle before busy, lower priority first, then the least time that its next user is likely to wait for a reload."""
        view = self.view
        reload = UNKNOWN_RELOAD if view.ready_at is None else view.ready_at - view.started_at
        return (self.busy, self.priority, round(reload * math.exp(-self.idle / FORGETTING), 1), self.last_used, view.id)


@dataclass(frozen=True, slots=True)
class Relief:
    """Victims, and where the one who waits goes when they have left."""

    victims: tuple[Evictable, ...]
    placement: Placement
    asleep: frozenset[InstanceId] = frozenset()
    """Those of them that need not leave: it is enough when they sleep."""


def choose_victims(attempt: Try, room: Room, candidates: Sequence[Evictable], devices: Devices) -> Relief | None:
    """The cheapest first until `attempt` finds a place, less those that turn out not to be needed; None when all are too few."""
    chosen: list[Evictable] = []
    for candidate in sorted(candidates, key=lambda c: c.cost):
        chosen.append(candidate)
        found = attempt(freed(room, (c.view for c in chosen), devices))
        if isinstance(found, Placement):
            return _without_spare(attempt, room, chosen, found, devices)
    return None


def freed(room: Room, views: Iterable[InstanceView], devices: Devices, asleep: Container[InstanceId] = ()) -> Room:
    """The room when these have left, or have fallen asleep; what of theirs is on its way back already does not count again."""
    result = dict(room)
    for view in views:
        sizes = view.placement.freed_asleep if view.id in asleep else view.placement.reserved
        for device, size in sizes.items():
            for each in pool(device, devices):
                if each in result:
                    result[each] = Bytes(result[each] + size - view.returning.get(device, 0))
    return result


def _without_spare(attempt: Try, room: Room, chosen: Sequence[Evictable], found: Placement, devices: Devices) -> Relief:
    """Let go again, dearest first, those without whom it works too."""
    kept = list(chosen)
    placement = found
    for candidate in reversed(chosen):
        fewer = [c for c in kept if c is not candidate]
        answer = attempt(freed(room, (c.view for c in fewer), devices))
        if isinstance(answer, Placement):
            kept, placement = fewer, answer
    return _resting(attempt, room, kept, placement, devices)


def _resting(attempt: Try, room: Room, victims: Sequence[Evictable], found: Placement, devices: Devices) -> Relief:
    """Let those sleep whose sleep is enough, dearest first: they are back much sooner than those that are stopped."""
    views = [victim.view for victim in victims]
    asleep: frozenset[InstanceId] = frozenset()
    placement = found
    for victim in reversed(victims):
        if victim.sleeps:
            more = asleep | {victim.view.id}
            answer = attempt(freed(room, views, devices, more))
            if isinstance(answer, Placement):
                asleep, placement = more, answer
    return Relief(tuple(victims), placement, asleep)
