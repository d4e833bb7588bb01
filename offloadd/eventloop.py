"""Which event loop runs us: uvloop where it is installed, else asyncio's own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from importlib.metadata import version
from typing import Any

try:
    import uvloop
except ImportError:
    _factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    NAME = "asyncio's event loop"
else:
    _factory = uvloop.new_event_loop
    NAME = f"uvloop {version('uvloop')}"


def run(main: Coroutine[Any, Any, None]) -> None:
    """As `asyncio.run`, on the fastest loop that there is."""
    with asyncio.Runner(loop_factory=_factory) as runner:
        runner.run(main)
