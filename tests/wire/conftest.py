"""Both event loops, and both ways of a request: what holds on asyncio's own holds on uvloop, of the first of a kind as of all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
try:
    import uvloop
except ImportError:
    pass
else:
    LOOPS["uvloop"] = uvloop.new_event_loop

pytest.register_assert_rewrite("tests.wire.rig")


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Every test runs on each."""
    return LOOPS


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Known heads with uvloop only, which the daemon runs on: what they change has nothing to do with the loop."""
    here = Path(__file__).parent
    twice = [item for item in items if here in item.path.parents and "asyncio-known" in item.name and len(LOOPS) > 1]
    config.hook.pytest_deselected(items=twice)
    left_out = set(twice)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True, params=[False, True], ids=["first", "known"])
def _known(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test runs with requests whose heads are seen for the first time, and with such as are known."""
    from tests.wire.rig import known_heads

    before = known_heads.set(request.param)
    yield
    known_heads.reset(before)
