"""The choice among ready instances: least load first, a conversation back to its cache, the ailing aside and slowly back."""

from __future__ import annotations

from offloadd.plan.balance import (
    EJECTED,
    FAILURES,
    HEARD,
    RAMP,
    WELL,
    Seat,
    Standing,
    after_failure,
    after_success,
    pick,
    slots_open,
)
from offloadd.state.ids import LOCAL, BackendName, InstanceId, ModelName
from offloadd.state.observed import Signal
from offloadd.units import Instant

NOW = Instant(1000.0)


def key(number: int) -> InstanceId:
    return InstanceId(LOCAL, ModelName("m"), number)


def seat(number: int, leases: int, slots: int = 8, standing: Standing = WELL) -> Seat:
    return Seat(instance=key(number), backend=BackendName("x"), leases=leases, slots=slots, standing=standing)


def picked(*seats: Seat, known: int | None = None, now: float = NOW) -> int | None:
    found = pick(seats, now=Instant(now), known=None if known is None else key(known))
    return None if found is None else found.instance.number


def ejected(times: int = 1) -> Standing:
    standing = WELL
    for _ in range(FAILURES + times - 1):
        standing = after_failure(Standing(ejections=standing.ejections, failures=standing.failures), now=NOW)
    return standing


def test_the_emptiest_in_proportion() -> None:
    assert picked(seat(1, 3), seat(2, 2), seat(3, 5)) == 2
    assert picked(seat(1, 3, slots=16), seat(2, 2, slots=4)) == 1
    assert picked(seat(1, 8), seat(2, 8)) is None
    assert picked() is None


def test_a_conversation_returns_unless_its_place_is_much_fuller() -> None:
    assert picked(seat(1, 0), seat(2, 2), known=2) == 2
    assert picked(seat(1, 0), seat(2, 3), known=2) == 1
    assert picked(seat(1, 6), seat(2, 8), known=2) == 1
    assert picked(seat(1, 0), seat(2, 0), known=7) == 1


def test_failures_in_a_row_put_an_instance_aside() -> None:
    standing = WELL
    for _ in range(FAILURES - 1):
        standing = after_failure(standing, now=NOW)
    assert slots_open(seat(1, 0, standing=standing), now=NOW) == 8
    assert after_success(standing, now=NOW) == WELL
    standing = after_failure(standing, now=NOW)
    assert picked(seat(1, 0, standing=standing), seat(2, 7)) == 2
    assert picked(seat(1, 0, standing=standing), seat(2, 8)) is None
    assert picked(seat(1, 0, standing=standing)) == 1  # better than none


def test_it_comes_back_slowly() -> None:
    standing = ejected()
    back = NOW + EJECTED
    assert slots_open(seat(1, 0, standing=standing), now=Instant(back - 0.1)) == 0
    assert slots_open(seat(1, 0, standing=standing), now=Instant(back)) == 1
    standing = after_success(standing, now=Instant(back))
    assert slots_open(seat(1, 0, standing=standing), now=Instant(back)) == 1
    assert slots_open(seat(1, 0, standing=standing), now=Instant(back + RAMP / 2)) == 4
    assert after_success(standing, now=Instant(back + RAMP)) == WELL


def test_one_that_fails_again_stays_away_longer() -> None:
    standing = ejected()
    assert standing.until == NOW + EJECTED
    again = after_failure(standing, now=Instant(NOW + EJECTED))
    assert again.until == NOW + EJECTED + 2 * EJECTED
    # What was under way when it was put aside says nothing new.
    assert after_failure(standing, now=NOW) == after_success(standing, now=NOW) == standing


def hearing(number: int, leases: int, others: int, cache: float | None = None, ago: float = 1.0) -> Seat:
    return seat(number, leases)._replace(signal=Signal(beyond=others, cache=cache, at=Instant(NOW - ago)))


def test_requests_that_are_none_of_ours_count_while_the_word_is_fresh() -> None:
    assert picked(hearing(1, 1, others=4), seat(2, 3)) == 2
    assert picked(hearing(1, 1, others=4, ago=HEARD + 1), seat(2, 3)) == 1
    assert picked(hearing(1, 1, others=4), seat(2, 3), known=1) == 1  # within what a known conversation is worth
    assert picked(hearing(1, 1, others=6), seat(2, 3), known=1) == 2


def test_of_equals_the_one_with_more_room_in_its_cache() -> None:
    assert picked(hearing(1, 2, others=0, cache=0.9), hearing(2, 2, others=0, cache=0.3)) == 2
    assert picked(hearing(1, 2, others=0, cache=0.92), hearing(2, 2, others=0, cache=0.93)) == 1
    assert picked(hearing(1, 1, others=0, cache=0.9), hearing(2, 2, others=0, cache=0.3)) == 1


def test_an_engines_word_takes_no_slot() -> None:
    assert picked(hearing(1, 7, others=100)) == 1
    assert picked(hearing(1, 8, others=0)) is None
