"""A blocking reading in a thread that nobody has to wait for, not even the end of the program."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVar

T = TypeVar("T")


async def aside(read: Callable[[], T], *, name: str = "reading") -> T:
    """Call `read` in a thread of its own; return or raise what it does.

    asyncio.to_thread won't do for a driver that hangs: its pool has few threads, and both asyncio.run and the interpreter wait for
    each of them at the end. The thread of a cancelled call runs on, and what it brings is dropped.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def work() -> None:
        try:
            result = read()
        except Exception as error:  # noqa: BLE001  (the caller's to judge)
            _hand_over(loop, answer, partial(answer.set_exception, error))
        else:
            _hand_over(loop, answer, partial(answer.set_result, result))

    threading.Thread(target=work, name=name, daemon=True).start()
    return await answer


def _hand_over(loop: asyncio.AbstractEventLoop, answer: asyncio.Future[T], settle: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(lambda: None if answer.done() else settle())
    except RuntimeError:
        pass  # the loop is closed: it came too late for anybody
