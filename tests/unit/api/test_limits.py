"""What a key may use in a minute, and at once."""

from __future__ import annotations

import contextlib

import pytest

from offloadd.api.limits import SMALL, STEERING, Bodies, KeyMeter
from offloadd.errors import RequestError
from offloadd.state.access import Caller, KeyLimits
from offloadd.units import Instant


class Hand:
    """A clock that is turned by hand."""

    def __init__(self) -> None:
        self.at = 100.0

    def now(self) -> Instant:
        return Instant(self.at)

    def wall(self) -> float:
        return self.at


@pytest.fixture
def clock() -> Hand:
    return Hand()


@pytest.fixture
def meter(clock: Hand) -> KeyMeter:
    return KeyMeter(clock)


def limited(name: str = "k", **limits: int) -> Caller:
    return Caller(name=name, limits=KeyLimits(**limits))


def test_requests_in_a_minute(meter: KeyMeter, clock: Hand) -> None:
    key = limited(requests_per_minute=3)
    for _ in range(3):
        with meter.admitted(key):
            pass
    with pytest.raises(RequestError, match="the key k has used their 3 requests a minute") as refusal, meter.admitted(key):
        pass
    assert (refusal.value.status, refusal.value.code) == (429, "key_requests_limit")
    assert refusal.value.retry_after == pytest.approx(20)
    clock.at += 20
    with meter.admitted(key):
        pass
    with pytest.raises(RequestError), meter.admitted(key):
        pass


def test_flapping_has_an_end(meter: KeyMeter, clock: Hand) -> None:
    """Nobody means to load and unload ten times a second, without a key neither."""
    for _ in range(STEERING):
        meter.steer(Caller())
    with pytest.raises(RequestError, match="callers without a key have used") as refusal:
        meter.steer(Caller())
    assert refusal.value.status == 429
    meter.steer(Caller(name="ops"))
    clock.at += 1
    meter.steer(Caller())


def test_another_key_is_not_touched(meter: KeyMeter) -> None:
    one = limited("one", requests_per_minute=1)
    with meter.admitted(one), meter.admitted(limited("other", requests_per_minute=1)):
        pass


def test_at_once(meter: KeyMeter) -> None:
    key = limited(parallel=2)
    with contextlib.ExitStack() as stack:
        stack.enter_context(meter.admitted(key))
        stack.enter_context(meter.admitted(key))
        with pytest.raises(RequestError, match="2 requests under way") as refusal, meter.admitted(key):
            pass
        assert refusal.value.status == 429
    with meter.admitted(key):
        pass


def test_a_request_that_fails_is_over_too(meter: KeyMeter) -> None:
    key = limited(parallel=1)
    with pytest.raises(ZeroDivisionError), meter.admitted(key):
        1 / 0  # noqa: B018
    with meter.admitted(key):
        pass


def test_tokens_are_paid_afterwards(meter: KeyMeter, clock: Hand) -> None:
    key = limited(tokens_per_minute=600)
    with meter.admitted(key):
        pass
    meter.spend(key, 1200)
    with pytest.raises(RequestError, match="used their 600 tokens a minute") as refusal, meter.admitted(key):
        pass
    assert refusal.value.retry_after == pytest.approx(60.1)
    clock.at += 61
    with meter.admitted(key):
        pass


def test_changed_limits_count_from_now_on(meter: KeyMeter) -> None:
    with meter.admitted(limited(requests_per_minute=1)):
        pass
    with meter.admitted(limited(requests_per_minute=2)):
        pass
    with meter.admitted(limited()):
        pass


async def whole(body: bytes = b"x" * 300_000) -> bytes:
    return body


async def test_large_bodies_are_held_up_to_a_limit() -> None:
    bodies = Bodies(most=1_000_000)
    assert await bodies.room(SMALL, 500_000, whole) == 0
    taken = await bodies.room(700_000, 500_000, whole)
    with pytest.raises(RequestError, match="take 684 KiB, and 977 KiB is the limit") as refusal:
        await bodies.room(400_000, 500_000, whole)
    assert (refusal.value.status, refusal.value.code) == (503, "too_many_bytes")
    assert bodies.held == 700_000
    bodies.give_back(taken)
    assert bodies.held == 0


async def test_one_that_does_not_say_its_size_counts_as_the_largest_until_it_is_here() -> None:
    bodies = Bodies(most=1_000_000)
    seen: list[int] = []

    async def read() -> bytes:
        seen.append(bodies.held)
        return await whole()

    assert await bodies.room(None, 500_000, read) == 300_000
    assert (seen, bodies.held) == ([500_000], 300_000)


async def test_one_that_breaks_off_is_not_held() -> None:
    bodies = Bodies(most=1_000_000)

    async def read() -> bytes:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await bodies.room(None, 500_000, read)
    assert bodies.held == 0


async def test_a_body_larger_than_all_room_is_taken_when_it_is_alone() -> None:
    assert await Bodies(most=1000).room(200_000, 500_000, whole) == 200_000
