"""Who makes room: nobody, unless those chosen are proven to free enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offloadd.plan.placement import NoRoom
from offloadd.state.ids import InstanceId
from offloadd.state.observed import InstanceView
from offloadd.units import Instant


@dataclass(frozen=True, slots=True, kw_only=True)
class Evictable:
    """An instance that may be asked to leave. The order of the fields after `view` is the order of reluctance."""

    view: InstanceView
    busy: bool
    priority: int
    last_used: Instant

    @property
    def cost(self) -> tuple[bool, int, float, InstanceId]:
        """Idle before busy, lower priority first, longest unused first."""
        return (self.busy, self.priority, self.last_used, self.view.id)


def choose_victims(short: NoRoom, candidates: Sequence[Evictable]) -> tuple[Evictable, ...]:
    """The cheapest set that frees enough of `short.device`; empty when no set does."""
    if short.device is None or short.never:
        return ()
    missing: int = short.missing
    chosen: list[Evictable] = []
    for candidate in sorted(candidates, key=lambda c: c.cost):
        if missing <= 0:
            break
        frees = candidate.view.placement.reserved.get(short.device, 0)
        if frees:
            chosen.append(candidate)
            missing -= frees
    return _without_spare(chosen, short, -missing) if missing <= 0 else ()


def _without_spare(chosen: Sequence[Evictable], short: NoRoom, spare: int) -> tuple[Evictable, ...]:
    """Let go again, dearest first, those whose memory turned out not to be needed."""
    kept = list(chosen)
    for candidate in reversed(chosen):
        frees = candidate.view.placement.reserved.get(short.device, 0) if short.device else 0
        if frees <= spare and len(kept) > 1:
            kept.remove(candidate)
            spare -= frees
    return tuple(kept)
