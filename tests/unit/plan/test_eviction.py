"""Who makes room."""

from __future__ import annotations

from offloadd.plan.eviction import Evictable, choose_victims
from offloadd.plan.placement import NoRoom
from offloadd.state.ids import HOST_RAM
from offloadd.units import Instant
from tests.unit.plan.build import gib, names, view


def could_leave(name: str, size: float, *, busy: bool = False, priority: int = 50, used: float = 900.0) -> Evictable:
    return Evictable(view=view(name, size), busy=busy, priority=priority, last_used=Instant(used))


def chosen(short_by: float, *candidates: Evictable) -> list[str]:
    short = NoRoom(need=gib(short_by), device=HOST_RAM, room=gib(0), limit=gib(12))
    return names(victim.view for victim in choose_victims(short, candidates))


def test_the_longest_unused_goes_first() -> None:
    assert chosen(4, could_leave("a-1", 4, used=950), could_leave("b-1", 4, used=910)) == ["b-1"]


def test_lower_priority_goes_before_longer_unused() -> None:
    assert chosen(4, could_leave("a-1", 4, priority=10, used=990), could_leave("b-1", 4, used=1)) == ["a-1"]


def test_idle_goes_before_busy_whatever_the_priority() -> None:
    assert chosen(4, could_leave("a-1", 4, busy=True, priority=10), could_leave("b-1", 4, priority=50)) == ["b-1"]


def test_nobody_goes_when_all_together_are_not_enough() -> None:
    assert chosen(9, could_leave("a-1", 4), could_leave("b-1", 4)) == []


def test_those_whose_memory_is_not_needed_after_all_stay() -> None:
    assert chosen(6, could_leave("a-1", 2, used=1), could_leave("b-1", 7, used=2)) == ["b-1"]


def test_what_can_never_fit_evicts_nobody() -> None:
    short = NoRoom(need=gib(13), device=HOST_RAM, room=gib(0), limit=gib(12))
    assert choose_victims(short, [could_leave("a-1", 12)]) == ()


def test_without_a_reading_nobody_goes() -> None:
    assert choose_victims(NoRoom(need=gib(1)), [could_leave("a-1", 4)]) == ()
