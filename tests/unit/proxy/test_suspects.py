"""Requests that kill engines are told apart from those that were there by chance."""

from __future__ import annotations

import pytest

from offloadd.errors import RequestError
from offloadd.proxy.suspects import MOST, STRIKES, WINDOW, Suspects
from offloadd.state.ids import ModelName
from offloadd.units import Instant

A, B = ModelName("a"), ModelName("b")


class Hand:
    """A clock that is turned by hand."""

    at = 100.0

    def now(self) -> Instant:
        return Instant(self.at)

    def wall(self) -> float:
        return self.at


@pytest.fixture
def clock() -> Hand:
    return Hand()


@pytest.fixture
def suspects(clock: Hand) -> Suspects:
    return Suspects(clock)


def test_the_one_that_was_always_there(suspects: Suspects, clock: Hand) -> None:
    for number in range(STRIKES):
        suspects.check(A, b"poison")
        suspects.died(A, b"poison")
        suspects.died(A, b"bystander %d" % number)
        clock.at += 1
    with pytest.raises(RequestError, match="died 3 times") as refusal:
        suspects.check(A, b"poison")
    assert (refusal.value.status, refusal.value.code) == (429, "request_kills_backend")
    assert refusal.value.retry_after == pytest.approx(WINDOW - STRIKES)
    suspects.check(A, b"bystander 0")
    suspects.check(B, b"poison")


def test_it_is_given_another_try_later(suspects: Suspects, clock: Hand) -> None:
    for _ in range(STRIKES):
        suspects.died(A, b"poison")
    clock.at += WINDOW
    suspects.check(A, b"poison")


def test_deaths_far_apart_prove_nothing(suspects: Suspects, clock: Hand) -> None:
    for _ in range(5):
        suspects.died(A, b"long")
        clock.at += WINDOW / 2
        suspects.check(A, b"long")


def test_memory_is_bounded(suspects: Suspects) -> None:
    for number in range(3 * MOST):
        suspects.died(A, b"%d" % number)
    assert len(suspects._deaths) == MOST
