"""Looks at something again and again in a thread, and wakes the event loop only with news.

A look at an unchanged file takes a tenth of what it costs to have a loop ask a thread for it and take the answer.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from offloadd.units import Seconds

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """Between the end of one look and the beginning of the next."""

    least: Seconds = Seconds(0)
    """However often somebody asks for a look."""
    most: Seconds
    """Beyond `least`, when nobody does."""


class Lookout(Generic[T]):
    """`look` blocks and returns None when there is nothing new; `pause` is asked after each look. One task asks for news.

    Both are called in the thread. It lives from a call of `news` to what that returns, and nobody has to wait for it: a look that
    hangs, as on a dead disk, holds up nobody but those who want its news.
    """

    def __init__(self, look: Callable[[], T | None], pause: Callable[[], Pause], *, name: str) -> None:
        self._look = look
        self._pause = pause
        self._name = name
        self._asked = threading.Event()
        self._begun: float | None = None
        self._ended: float | None = None

    def soon(self) -> None:
        """Look as soon as the pause's least is over."""
        self._asked.set()

    @property
    def lasts(self) -> Seconds:
        """How long the look that is under way has taken; 0 between two."""
        begun = self._begun
        return Seconds(0 if begun is None else time.monotonic() - begun)

    async def news(self) -> T:
        """What the next look that finds something finds; the first one begins at once. Raises what a look raises."""
        loop, left = asyncio.get_running_loop(), threading.Event()
        answer: asyncio.Future[T] = loop.create_future()

        def settle(found: T | None, error: Exception | None) -> None:
            if answer.done():
                return  # cancelled meanwhile: it came too late for anybody
            if error is not None:
                answer.set_exception(error)
            elif found is not None:
                answer.set_result(found)

        def work() -> None:
            found, error = None, None
            try:
                found = self._until_news(left)
            except Exception as raised:  # noqa: BLE001  (the caller's to judge)
                error = raised
            if not left.is_set():
                try:
                    loop.call_soon_threadsafe(settle, found, error)
                except RuntimeError:
                    pass  # the loop is closed

        threading.Thread(target=work, name=self._name, daemon=True).start()
        try:
            return await answer
        except asyncio.CancelledError:
            left.set()
            self._asked.set()  # so that the thread sees that it may go
            raise

    def _until_news(self, left: threading.Event) -> T | None:
        """News, or None when its taker has left."""
        while True:
            self._wait(left)
            if left.is_set():
                return None
            self._asked.clear()
            self._begun = time.monotonic()
            try:
                found = self._look()
            finally:
                self._begun, self._ended = None, time.monotonic()
            if found is not None:
                return found

    def _wait(self, left: threading.Event) -> None:
        if self._ended is None:
            return
        pause, ended = self._pause(), self._ended
        self._asked.wait(max(0.0, ended + pause.least + pause.most - time.monotonic()))
        left.wait(max(0.0, ended + pause.least - time.monotonic()))
