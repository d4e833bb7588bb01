"""What stays is kept from the collector of cycles, and nothing else with it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from offloadd import lasting


class Ring:
    """As a request with its error and traceback is: only the collector can free it."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture
def freezes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts of objects kept, one for each time that some were."""
    found: list[int] = []
    freeze = gc.freeze

    def counted() -> None:
        freeze()
        found.append(gc.get_freeze_count())

    monkeypatch.setattr(gc, "freeze", counted)
    yield found
    gc.unfreeze()


def test_what_is_dead_at_that_moment_is_not_kept(freezes: list[int]) -> None:
    made = lasting._Lasting().made
    gc.disable()
    try:
        ring = weakref.ref(Ring())
        assert ring() is not None
        made(lasting.OFTEN)
    finally:
        gc.enable()
    assert len(freezes) == 1
    assert ring() is None


def test_a_config_that_is_read_again_for_years_brings_few_such_moments(freezes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", lambda: 0)
    made = lasting._Lasting().made
    for _ in range(60 * 24 * 365):
        made(10)
    assert 50 < len(freezes) < 110


def test_of_many_models_made_at_once_all_but_a_part_are_kept(freezes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", lambda: 0)
    lasts = lasting._Lasting()
    for number in range(1, 20_001):
        lasts.made()
        assert lasts._waiting <= max(lasting.OFTEN, number // lasting.PART)
    assert len(freezes) < 60
