"""A daemon with nothing to do does nothing, cycle after cycle, and keeps nothing of it."""

from __future__ import annotations

import gc
import tracemalloc

import pytest

from bench.idle_cycles import Still


@pytest.fixture
def still() -> Still:
    return Still(models=8)


def test_cycles_without_anything_to_do_keep_no_memory(still: Still) -> None:
    still.cycles(100)
    tracemalloc.start()
    try:
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        still.cycles(800)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 8 * 1024  # ten bytes a cycle would be as much
    assert still.actions == 0
