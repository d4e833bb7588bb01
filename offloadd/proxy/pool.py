"""Connections to instances that are kept for the next request, as long as that is safe."""

from __future__ import annotations

import asyncio
import functools
import ssl
import time

from offloadd.proxy.answer_heads import AnswerHeads
from offloadd.proxy.lease import Host, place_of
from offloadd.proxy.upstream import Connection
from offloadd.state.launch import Endpoint
from offloadd.turn import Turn

CONNECT_TIMEOUT = 5.0
IDLE_LIMIT = 4.0
"""llama-server and uvicorn close a connection that has been idle for 5 s, and say nothing."""
USES = 100
"""llama-server closes a connection after so many requests."""
MAX_IDLE = 256
"""Connections kept for one instance."""
SIGN_EVERY = 1.0
"""How often instances that have sent bytes are said to be alive."""


class Pool:
    """Kept connections, by instance."""

    def __init__(self) -> None:
        self.heads = AnswerHeads()
        self.turn = Turn()
        self._idle: dict[str, list[Connection]] = {}
        self._open: set[Connection] = set()
        self._counts: dict[str, int] = {}
        """How many of them by instance."""
        self._coming: dict[str, asyncio.Task[None]] = {}
        """Spare connections that are being made."""
        self._sweep: asyncio.TimerHandle | None = None
        self._signing: asyncio.TimerHandle | None = None

    def idle(self, host: Host) -> Connection | None:
        """A kept connection to an instance that may still be open, the one used last."""
        kept = self._idle.get(host.kept)
        oldest = time.monotonic() - IDLE_LIMIT
        while kept:
            connection = kept.pop()
            if not connection.closed and connection.since > oldest:
                return connection
            connection.abort()
        return None

    async def connect(self, host: Host) -> Connection:
        """A new connection; OSError or TimeoutError when there is none to be had."""
        loop = asyncio.get_running_loop()
        endpoint = host.endpoint
        connection = Connection(self, host.kept)
        async with asyncio.timeout(CONNECT_TIMEOUT):
            if endpoint.host.startswith("/"):
                await loop.create_unix_connection(lambda: connection, endpoint.host)
            else:
                secure = _certified() if endpoint.tls else None
                await loop.create_connection(lambda: connection, endpoint.host, endpoint.port, ssl=secure)
        self._open.add(connection)
        self._counts[connection.key] = self._counts.get(connection.key, 0) + 1
        if self._signing is None:
            self._signing = loop.call_later(SIGN_EVERY, self._sign)
        return connection

    def spare(self, host: Host) -> None:
        """A stream comes from there, whose connection is not kept after it: have one ready for the next, if it does not mind.

        Not beyond what the instance has slots for: llama-server has a thread for each connection, and few more threads than slots.
        """
        key = host.kept
        if not host.api.spare or self._idle.get(key) or key in self._coming:
            return
        if self._counts.get(key, 0) < host.slots:
            self._coming[key] = asyncio.get_running_loop().create_task(self._make_spare(host))

    async def _make_spare(self, host: Host) -> None:
        try:
            connection = await self.connect(host)
        except (OSError, TimeoutError):
            return  # whoever needs one will see why
        finally:
            if self._coming.get(host.kept) is asyncio.current_task():
                del self._coming[host.kept]
        connection.waited = True
        self.give_back(connection, keep=True)

    def give_back(self, connection: Connection, *, keep: bool) -> None:
        """Its answer is whole: keep it for the next request, or close it."""
        kept = self._idle.get(connection.key)
        if kept is None:
            kept = self._idle[connection.key] = []
        if not keep or connection.uses >= USES or connection.closed or len(kept) >= MAX_IDLE:
            connection.abort()
            return
        connection.since = time.monotonic()
        kept.append(connection)
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(IDLE_LIMIT, self._close_old)

    def discard(self, connection: Connection) -> None:
        """It is closed."""
        if connection in self._open:
            self._open.remove(connection)
            self._count_down(connection.key)
        kept = self._idle.get(connection.key)
        if kept and connection in kept:
            kept.remove(connection)

    def _count_down(self, key: str) -> None:
        count = self._counts[key] - 1
        if count:
            self._counts[key] = count
        else:
            del self._counts[key]

    def forget(self, endpoint: Endpoint) -> None:
        """Close what is kept for an instance that is to end: some servers wait for their clients to leave."""
        key = place_of(endpoint)
        if key in self._coming:
            self._coming.pop(key).cancel()
        leaving = [connection for connection in self._open if connection.leaving and connection.key == key]
        for connection in [*self._idle.pop(key, []), *leaving]:
            connection.abort()

    def close(self) -> None:
        """Close every connection."""
        for timer in (self._sweep, self._signing):
            if timer is not None:
                timer.cancel()
        self._idle.clear()
        for task in self._coming.values():
            task.cancel()
        for connection in list(self._open):
            connection.abort()

    def _sign(self) -> None:
        self._signing = None
        for connection in self._open:
            connection.sign()
        if self._open:
            self._signing = asyncio.get_running_loop().call_later(SIGN_EVERY, self._sign)

    @property
    def size(self) -> int:
        """Connections that are open."""
        return len(self._open)

    @property
    def busy(self) -> int:
        """Those of them that a request is on."""
        return len(self._open) - sum(map(len, self._idle.values()))

    def _close_old(self) -> None:
        self._sweep = None
        oldest = time.monotonic() - IDLE_LIMIT
        for key, kept in list(self._idle.items()):
            fresh = [connection for connection in kept if connection.since > oldest]
            for connection in kept:
                if connection.since <= oldest:
                    connection.abort()
            self._idle[key] = fresh
            if not fresh:
                del self._idle[key]
        if self._idle:
            self._sweep = asyncio.get_running_loop().call_later(IDLE_LIMIT, self._close_old)


def authority(endpoint: Endpoint) -> str:
    """What the `Host` header calls an instance."""
    return "localhost" if endpoint.host.startswith("/") else endpoint.authority


@functools.cache
def _certified() -> ssl.SSLContext:
    """What this machine trusts."""
    return ssl.create_default_context()
