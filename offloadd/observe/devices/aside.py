"""A blocking reading in a thread that nobody has to wait for, not even the end of the program."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")
_Job = tuple[Callable[[], None], str]

KEPT = 8
"""Threads that wait for the next reading: making them anew, several every few seconds, was most of what an idle daemon cost."""
_idle: list[SimpleQueue[_Job]] = []


async def aside(read: Callable[[], T], *, name: str = "reading") -> T:
    """Call `read` in a thread that does nothing else meanwhile; return or raise what it does.

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

    _begin((work, name))
    return await answer


def _begin(job: _Job) -> None:
    """Give it to a thread that has nothing to do, else to a new one: one that hangs holds up nobody but itself."""
    try:
        jobs = _idle.pop()
    except IndexError:
        jobs = SimpleQueue()
        threading.Thread(target=_work, args=(jobs,), name=job[1], daemon=True).start()
    jobs.put(job)


def _work(jobs: SimpleQueue[_Job]) -> None:
    own = threading.current_thread()
    while True:
        work, own.name = jobs.get()
        work()
        del work  # nothing that it holds is kept until the next
        if len(_idle) >= KEPT:
            return
        own.name = "idle"
        _idle.append(jobs)


def _hand_over(loop: asyncio.AbstractEventLoop, answer: asyncio.Future[T], settle: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(lambda: None if answer.done() else settle())
    except RuntimeError:
        pass  # the loop is closed: it came too late for anybody
