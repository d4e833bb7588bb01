"""Which event loop runs us: uvloop where it is installed, else asyncio's own."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Callable, Coroutine
from contextlib import suppress
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


def on_signal(number: signal.Signals, call: Callable[[], object]) -> None:
    """Have it called on the running loop at each such signal, until `ignore`.

    Not by the loop's own handlers: a loop that gives one back lets the signal do what it does to any program, and that is death,
    for a moment before anybody could ignore it, or from the loop's end to that of the process.
    """
    loop = asyncio.get_running_loop()

    def tell(*_: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is there to be told
            loop.call_soon_threadsafe(call)

    # asyncio's own loop is woken by signals only while it handles one: this one does nothing to anybody by itself.
    loop.add_signal_handler(signal.SIGURG, lambda: None)
    signal.signal(number, tell)
    signal.siginterrupt(number, False)


def ignore(number: signal.Signals) -> None:
    """From now on to the end of the process it does nothing, with no moment in between in which it would end us."""
    signal.signal(number, signal.SIG_IGN)


def settle() -> None:
    """What has been made up to the start stays for good: the collector of cycles need not look at it again and again.

    It is called less often too: a full look takes tens of milliseconds, in which no token moves.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)
