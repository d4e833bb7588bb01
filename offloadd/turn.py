"""One turn of the event loop: what it has brought is read first, then worked through, then what that gives is written.

Reading, working and writing for one request after another would cost half as much again: a system call empties the caches of the
code that runs between two of them, which is the most of what a request costs. The first in a turn is not kept waiting, since it may
be the only one.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from offloadd.events import EventKind, about

log = logging.getLogger(__name__)

MOST = 128
"""Connections whose bytes are kept for later in one turn."""
SMALL = 64 * 1024
"""Bytes that may be written later; more are not worth keeping."""


class Receiver(Protocol):
    """A connection that keeps what came on it until it is told to work."""

    def received(self) -> None:
        """Work through it."""
        ...

    def broken(self, error: Exception) -> None:
        """Close it: that failed."""
        ...


class Turn:
    """Whose turn it is. Outside of `_work` nothing is kept that is to be written."""

    def __init__(self) -> None:
        self.number = 0
        """Of the present piece of work, during which nothing else happens: what is looked up holds to its end. 0 between two."""
        self._worked = 0
        self._under_way = False
        """Whether something of this turn has been worked through already."""
        self._answers: list[Receiver] = []
        self._requests: list[Receiver] = []
        self._late: list[tuple[asyncio.Transport, bytes]] | None = None

    def request(self, receiver: Receiver) -> None:
        """A client's connection has received something."""
        self._take(self._requests, receiver)

    def answer(self, receiver: Receiver) -> None:
        """An engine's has. They come first: an answer makes room for a request."""
        self._take(self._answers, receiver)

    def _take(self, kind: list[Receiver], receiver: Receiver) -> None:
        if not self._under_way:
            self._under_way = True
            asyncio.get_running_loop().call_soon(self._end)
            self._first(receiver)
            return
        kind.append(receiver)
        if len(kind) >= MOST:
            self._work()

    def _first(self, receiver: Receiver) -> None:
        before = self.number
        self._worked += 1
        self.number = self._worked
        try:
            receiver.received()
        finally:
            self.number = before

    def write(self, transport: asyncio.Transport, data: bytes) -> None:
        """Write this, now or at the end of the turn; whoever closes the transport for writing must `flush` before."""
        if self._late is None or len(data) > SMALL:
            transport.write(data)
        else:
            self._late.append((transport, data))

    def flush(self) -> None:
        """Write what is kept."""
        late = self._late
        if late:
            self._late = []
            for transport, data in late:
                _write(transport, data)

    def _end(self) -> None:
        self._under_way = False
        if self._answers or self._requests:
            self._work()

    def _work(self) -> None:
        if self._late is not None:
            return  # we are at it
        answers, self._answers = self._answers, []
        requests, self._requests = self._requests, []
        self._late = []
        self._worked += 1
        self.number = self._worked
        try:
            for receiver in answers:
                _let_work(receiver)
            for receiver in requests:
                _let_work(receiver)
        finally:
            self.number = 0
            try:
                self.flush()
            finally:
                self._late = None


def _write(transport: asyncio.Transport, data: bytes) -> None:
    try:
        if not transport.is_closing():
            transport.write(data)
    except Exception:
        log.exception("an answer or a request could not be written", extra=about(EventKind.INTERNAL_ERROR))
        transport.abort()


def _let_work(receiver: Receiver) -> None:
    try:
        receiver.received()
    except Exception as error:
        log.exception("what came on a connection could not be worked through", extra=about(EventKind.INTERNAL_ERROR))
        receiver.broken(error)
