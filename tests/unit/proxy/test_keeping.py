"""Wishes for how long a model stays: they count for the instances that are there, and end with them."""

from __future__ import annotations

import math

import pytest

from offloadd.proxy.keeping import KeepBook
from offloadd.state.desired import DesiredState, ModelSpec
from offloadd.state.ids import LOCAL, BackendName, InstanceId, ModelName
from offloadd.units import Seconds

A = ModelName("a")
FIRST, SECOND = InstanceId(LOCAL, A, 1), InstanceId(LOCAL, A, 2)
DESIRED = DesiredState(models={A: ModelSpec(name=A, source="", backends=(BackendName("llamacpp"),), idle_timeout=Seconds(600))})


def idle(book: KeepBook, *live: InstanceId) -> float:
    return book.applied_to(DESIRED, live).models[A].idle_timeout


@pytest.mark.parametrize(("stay", "timeout"), [(300, 300), (math.inf, 0), (0, 0.001)])
def test_a_wish_is_another_idle_timeout(stay: float, timeout: float) -> None:
    book = KeepBook()
    book.wish(A, Seconds(stay), [FIRST])
    assert idle(book, FIRST) == timeout


def test_without_a_wish_the_config_is_the_same_object() -> None:
    book = KeepBook()
    assert book.applied_to(DESIRED, ()) is DESIRED
    book.wish(A, Seconds(5), ())
    assert book.applied_to(DESIRED, ()) is DESIRED


def test_the_latest_wish_counts() -> None:
    book = KeepBook()
    book.wish(A, Seconds(5), [FIRST])
    book.wish(A, Seconds(9), [FIRST])
    assert idle(book, FIRST) == 9


def test_it_ends_with_its_instances() -> None:
    book = KeepBook()
    book.wish(A, Seconds(0), [FIRST])
    assert idle(book, FIRST, SECOND) == 0.001
    assert idle(book, SECOND) == 600
    assert idle(book, FIRST) == 600  # an instance's number is never used again
