"""Which of a model's ready instances gets the next request: by load, by what is in its cache, and by how it has fared lately."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from offloadd.state.ids import BackendName, InstanceId
from offloadd.state.observed import Signal
from offloadd.units import Instant, Seconds

FAILURES = 3
"""So many in a row, and an instance gets no more requests for a while, as long as another one is there."""
EJECTED = Seconds(5)
"""How long the first time; doubled each time that it comes back no better."""
EJECTED_LONGEST = Seconds(120)
RAMP = Seconds(20)
"""One that has proved itself again has all its slots back after this time."""
HEARD = Seconds(8)
"""What an engine said of its queue is of use for so long."""
AHEAD = 0.25
"""An instance that knows a conversation may be this much fuller than the emptiest one and still get it, as a share of its slots."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How an instance has fared lately."""

    failures: int = 0
    """In a row."""
    ejections: int = 0
    """Since it last had all its slots."""
    until: Instant | None = None
    """Ejected until then."""
    back: Instant | None = None
    """When it answered well for the first time after that."""


WELL = Standing()


class Seat(NamedTuple):  # every request makes some, and a tuple is made at once
    """A ready instance with the requests that it holds and the number that it works on at once."""

    instance: InstanceId
    backend: BackendName
    leases: int
    slots: int
    standing: Standing = WELL
    signal: Signal | None = None
    """What its engine last said of its own queue."""


def pick(seats: Sequence[Seat], *, now: Instant, known: InstanceId | None = None) -> Seat | None:
    """The seat for the next request; None when all are taken. `known` has the conversation in its cache."""
    if len(seats) == 1 and seats[0].standing is WELL:  # as for most models nearly always
        return seats[0] if seats[0].leases < seats[0].slots else None
    free = [seat for seat in seats if seat.leases < slots_open(seat, now=now)]
    # When nobody is well, the ailing are better than none.
    free = free or [seat for seat in seats if seat.leases < seat.slots and _nobody_well(seats, now=now)]
    if not free:
        return None
    best = free[0] if len(free) == 1 else min(free, key=lambda seat: _load(seat, now))
    if known is not None and best.instance != known:
        familiar = next((seat for seat in free if seat.instance == known), None)
        if familiar is not None and _load(familiar, now)[0] <= _load(best, now)[0] + AHEAD:
            return familiar
    return best


def slots_open(seat: Seat, *, now: Instant) -> int:
    """How many requests an instance may hold now: none while it is ejected, then one, and all again by and by."""
    standing = seat.standing
    if standing.until is None:
        return seat.slots
    if now < standing.until:
        return 0
    if standing.back is None:
        return 1
    return max(1, min(seat.slots, int(seat.slots * (now - standing.back) / RAMP)))


def after_success(standing: Standing, *, now: Instant) -> Standing:
    """It answered well."""
    if standing.until is None:
        return WELL
    if now < standing.until:
        return standing  # a request from before
    back = standing.back if standing.back is not None else now
    return WELL if now - back >= RAMP else replace(standing, failures=0, back=back)


def after_failure(standing: Standing, *, now: Instant) -> Standing:
    """It broke off, answered as no engine should, or not at all."""
    if standing.until is not None and now < standing.until:
        return standing
    failures = standing.failures + 1
    if failures < FAILURES and standing.until is None:
        return replace(standing, failures=failures)
    wait = min(EJECTED_LONGEST, EJECTED * 2**standing.ejections)
    return Standing(ejections=standing.ejections + 1, until=Instant(now + wait))


def beyond(heard: Signal | None, *, now: Instant) -> int:
    """Requests on an instance that are none of ours, by its engine's word of a moment ago; 0 when nothing is known.

    They come from others who use the same engine, or from clients that have left. They only change the order: a seat that is free
    by our own count may be taken whatever an engine says, since its word may be old.
    """
    return 0 if heard is None or now - heard.at > HEARD else heard.beyond


def _load(seat: Seat, now: Instant) -> tuple[float, float, InstanceId]:
    """The requests on it by the number that it takes; of equals, the one whose cache has more room."""
    heard = seat.signal
    known = heard is not None and now - heard.at <= HEARD and heard.cache is not None
    cache = round(heard.cache, 1) if known and heard is not None and heard.cache is not None else 0.0
    return (seat.leases + beyond(heard, now=now)) / seat.slots, cache, seat.instance


def _nobody_well(seats: Sequence[Seat], *, now: Instant) -> bool:
    return not any(slots_open(seat, now=now) for seat in seats)
