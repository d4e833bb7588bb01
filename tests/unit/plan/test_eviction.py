"""Who makes room."""

from __future__ import annotations

from offloadd.plan.eviction import Evictable, Relief, Room, choose_victims
from offloadd.plan.placement import NoRoom
from offloadd.state.ids import HOST_RAM
from offloadd.state.launch import Placement
from offloadd.units import Instant, Seconds
from tests.unit.plan.build import NOW, gib, names, view


def could_leave(
    name: str, size: float, *, busy: bool = False, priority: int = 50, used: float = 900.0, load: float = 10.0
) -> Evictable:
    one = view(name, size, ready_at=Instant(940.0 + load))
    return Evictable(view=one, busy=busy, priority=priority, last_used=Instant(used), idle=Seconds(NOW - used))


def relief(needed: float, *candidates: Evictable, room: float = 0.0) -> Relief | None:
    def attempt(there: Room) -> Placement | NoRoom:
        fits = there[HOST_RAM] >= gib(needed)
        return Placement(reserved={HOST_RAM: gib(needed)}) if fits else NoRoom(need=gib(needed))

    return choose_victims(attempt, {HOST_RAM: gib(room)}, candidates, {})


def chosen(needed: float, *candidates: Evictable) -> list[str]:
    answer = relief(needed, *candidates)
    return names(victim.view for victim in answer.victims) if answer else []


def test_the_longest_unused_goes_first() -> None:
    assert chosen(4, could_leave("a-1", 4, used=950), could_leave("b-1", 4, used=910)) == ["b-1"]


def test_what_loads_fast_goes_before_what_loads_slowly() -> None:
    assert chosen(4, could_leave("a-1", 4, load=50), could_leave("b-1", 4, load=2, used=990)) == ["b-1"]


def test_a_slow_load_long_forgotten_is_cheaper_than_a_fast_one_in_use() -> None:
    assert chosen(4, could_leave("a-1", 4, load=50, used=NOW - 7200), could_leave("b-1", 4, load=10, used=999)) == ["a-1"]


def test_lower_priority_goes_before_longer_unused() -> None:
    assert chosen(4, could_leave("a-1", 4, priority=10, used=990), could_leave("b-1", 4, used=1)) == ["a-1"]


def test_idle_goes_before_busy_whatever_the_priority() -> None:
    assert chosen(4, could_leave("a-1", 4, busy=True, priority=10), could_leave("b-1", 4, priority=50)) == ["b-1"]


def test_nobody_goes_when_all_together_are_not_enough() -> None:
    assert chosen(9, could_leave("a-1", 4), could_leave("b-1", 4)) == []


def test_those_whose_memory_is_not_needed_after_all_stay() -> None:
    assert chosen(6, could_leave("a-1", 2, used=1), could_leave("b-1", 7, used=2)) == ["b-1"]


def test_the_place_that_was_proven_comes_with_the_victims() -> None:
    answer = relief(5, could_leave("a-1", 4), room=1)
    assert answer is not None
    assert answer.placement == Placement(reserved={HOST_RAM: gib(5)})
