"""Which event loop runs us: uvloop where it is installed, else asyncio's own."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any

try:
    import uvloop
except ImportError:
    _factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    NAME = "asyncio's event loop"
else:
    _factory = uvloop.new_event_loop
    NAME = f"uvloop {uvloop.__version__}"  # type: ignore[attr-defined]


def run(main: Coroutine[Any, Any, None]) -> None:
    """As `asyncio.run`, on the fastest loop that there is."""
    with asyncio.Runner(loop_factory=_factory) as runner:
        runner.run(main)


def settle() -> None:
    """What has been made up to the start stays for good: the collector of cycles need not look at it again and again.

    It is called less often too: a full look takes tens of milliseconds, in which no token moves.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)
