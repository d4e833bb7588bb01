"""How much patience a connection gets: so many of one peer and of all, so long until it asks, so long between two pieces of a body.

The HTTP library guards the framing and waits for ever; without this, a client that says nothing would hold its place for nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from offloadd.clock import Clock
from offloadd.units import Instant, Seconds

log = logging.getLogger(__name__)

PER_PEER = 512
"""Connections of one address. This machine's own are not counted: a proxy in front of us is one address for all its clients."""
FIRST_REQUEST = Seconds(15)
"""From the connection to the end of its first request's headers."""
STALL = Seconds(30)
"""Between two pieces of a body, while we are ready to take the next."""
IDLE = Seconds(75)
"""Between two requests on one connection."""
SWEEP = Seconds(2)
RESERVED_FILES = 256
"""Descriptors that clients never get: for engines, logs, databases, and an operator who wants to know what goes on."""
_HALF = "stopped sending in the middle of its request"
_HERE = nullcontext()
"""What watches a body that is here already."""
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@dataclass(slots=True)
class Known:
    """One connection: how long its client may be waited for, and from when on; without a limit while we work for it."""

    peer: str
    since: Instant
    limit: Seconds | None = FIRST_REQUEST

    def wait(self, limit: Seconds, now: Instant) -> None:
        """From now on the client has so long to send what it wants."""
        self.since, self.limit = now, limit


@dataclass(slots=True)
class _Body:
    request: web.Request
    size: int
    since: Instant


class Patience:
    """Watches the connections of one server. `files` is how many descriptors the process may have; a proxied request takes two."""

    def __init__(self, clock: Clock, files: int) -> None:
        self._clock = clock
        self._most = max(16, (files - RESERVED_FILES) // 2)
        self._connections: dict[asyncio.Transport, Known] = {}
        self._peers: Counter[str] = Counter()
        self._bodies: dict[int, _Body] = {}
        self._somebody = asyncio.Event()
        self.refused = 0

    def now(self) -> Instant:
        """By the clock that limits are measured with."""
        return self._clock.now()

    @property
    def size(self) -> int:
        """Connections that are open."""
        return len(self._connections)

    def guard(self, server: web.Server | None) -> None:
        """Be told of every connection that comes and goes."""
        assert server is not None  # noqa: S101  (the runner is set up)
        made, lost = server.connection_made, server.connection_lost

        def connection_made(handler: Any, transport: asyncio.Transport) -> None:
            made(handler, transport)
            if transport not in self._connections and self.enter(transport) is None:  # else it has come here by way of a `Front`
                transport.close()

        def connection_lost(handler: Any, exc: BaseException | None = None) -> None:
            self.leave(handler.transport)
            lost(handler, exc)

        # The library has no other place at which a connection, rather than a request, can be judged.
        server.connection_made = connection_made  # type: ignore[method-assign]
        server.connection_lost = connection_lost  # type: ignore[method-assign]

    def of(self, request: web.Request) -> AbstractContextManager[None]:
        """A request has come; its body is to come steadily, as long as a block runs."""
        transport = request.transport
        known = None if transport is None else self._connections.get(transport)
        if known is not None:
            known.limit = None
        return self._watched(request) if request.can_read_body else _HERE

    @contextmanager
    def _watched(self, request: web.Request) -> Iterator[None]:
        self._bodies[id(request)] = _Body(request, request.content.total_bytes, self._clock.now())
        try:
            yield
        finally:
            del self._bodies[id(request)]

    async def run(self) -> None:
        """Look around for ever."""
        while True:
            await self._somebody.wait()  # an idle daemon need not look around
            await asyncio.sleep(SWEEP)
            self.sweep()
            if not self._connections:
                self._somebody.clear()

    def sweep(self) -> None:
        """End what has waited for too long."""
        now = self._clock.now()
        for transport, known in list(self._connections.items()):
            if transport.is_closing():
                self.leave(transport)
            elif known.limit == IDLE and now - known.since > IDLE:
                transport.close()  # as clients expect: nothing is said of it
            elif known.limit is not None and now - known.since > known.limit:
                self._end(transport, known.peer, _HALF if known.limit == STALL else "sent no whole request")
        for body in list(self._bodies.values()):
            self._check_body(body, now)

    def _check_body(self, body: _Body, now: Instant) -> None:
        request, transport = body.request, body.request.transport
        moved = request.content.total_bytes != body.size
        # When the transport is not read, it is we who let the client wait.
        if moved or request.content.is_eof() or transport is None or not transport.is_reading():
            body.size, body.since = request.content.total_bytes, now
        elif now - body.since > STALL:
            self._end(transport, request.remote or "", _HALF)

    def enter(self, transport: asyncio.Transport) -> Known | None:
        """A connection has been made; None, and an answer that says so, when there are too many."""
        peer = _peer(transport)
        if len(self._connections) >= self._most or (peer and self._peers[peer] >= PER_PEER):
            self.refused += 1
            transport.write(_BUSY)
            return None
        known = self._connections[transport] = Known(peer, self._clock.now())
        self._somebody.set()
        if peer:
            self._peers[peer] += 1
        return known

    def leave(self, transport: asyncio.Transport | None) -> None:
        """It is gone."""
        known = self._connections.pop(transport, None) if transport else None
        if known is not None and known.peer:
            self._peers[known.peer] -= 1
            if not self._peers[known.peer]:
                del self._peers[known.peer]

    def _end(self, transport: asyncio.Transport, peer: str, why: str) -> None:
        log.info("closed the connection of %s: it %s", peer or "a local client", why)
        self.leave(transport)
        transport.abort()


def _peer(transport: asyncio.Transport) -> str:
    """The client's address; empty for this machine's own."""
    name = transport.get_extra_info("peername")
    if not isinstance(name, tuple):
        return ""
    try:
        address = ipaddress.ip_address(str(name[0]).partition("%")[0])
    except ValueError:
        return str(name[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return "" if (mapped or address).is_loopback else str(mapped or address)
