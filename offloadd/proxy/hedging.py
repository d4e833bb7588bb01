"""A hedge: where an instance is slow to begin, another is asked the same, and the first to begin is the answer.

At most one for a request, never once a byte of an answer is here, and only where another instance has a free slot: the config's
`queue.hedge_after`. A loser's connection is left at once, and its slot counts until its instance has stopped working on it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from offloadd.proxy.account import Account
from offloadd.proxy.answer_heads import Head
from offloadd.proxy.headers import Fields
from offloadd.proxy.lease import Host, Lease
from offloadd.proxy.leases import LeaseBook
from offloadd.proxy.pool import Pool
from offloadd.proxy.taker import Taker
from offloadd.proxy.upstream import Connection
from offloadd.state.launch import Endpoint
from offloadd.units import Seconds, format_seconds


class Race(Taker, Protocol):
    """Who takes the answer, and had asked the first instance."""

    def follow(self, connection: Connection) -> asyncio.Future[None] | None:
        """From now on this is the connection that the answer comes on. Leaves the other; done when the work there is over."""
        ...


class Hedge(Taker):
    """The second of two: silent until it is ahead, and then the first one's equal."""

    def __init__(
        self,
        pool: Pool,
        book: LeaseBook,
        lease: Lease,
        account: Account,
        race: Race,
        message: Callable[[Endpoint], tuple[bytes, bytes | None]],
        after: Seconds,
    ) -> None:
        """`message` gives head and body for an instance's endpoint; it is asked `after` so long."""
        self._pool = pool
        self._book = book
        self._lease = lease
        self._account = account
        self._race = race
        self._message = message
        self._after = after
        self._timer = asyncio.get_running_loop().call_later(after, self._ask)
        self._spare: Lease | None = None
        self._sending: asyncio.Task[None] | None = None
        self._connection: Connection | None = None
        self._held = False
        self.ahead = False
        """Whether the answer is this one's."""

    # --- what the race does ---

    def settle(self) -> None:
        """The first has begun: this one is not needed."""
        if self._spare is not None and not self.ahead:
            self._lease.why += f"; {self._second} was asked too after {format_seconds(self._after)} and was slower"
        self.close()

    def wait(self) -> None:
        """The first is lost. Whether this one may go on in its place is yet to be judged, so nothing is read of it until then."""
        self._timer.cancel()
        self._held = True
        if self._connection is not None and not self.ahead:
            self._connection.pause()

    def take_over(self, why: str) -> bool:
        """Be the answer, the first being lost; False when this one has not been asked, or is lost as well."""
        if self._spare is None or self.ahead:
            return False
        self._swap(f"{self._second}, which had been asked too, took over from {self._lease.host.instance}: {why}")
        return True

    def resume(self) -> None:
        """Read on."""
        self._held = False
        if self._connection is not None:
            self._connection.resume()

    def close(self) -> None:
        """End what still runs for this one: what the instance does counts until it has stopped."""
        self._timer.cancel()
        if self._sending is not None:
            self._sending.cancel()
        connection, self._connection = self._connection, None
        if not self.ahead:
            self._give_back(connection.leave() if connection is not None else None)

    # --- what happens to it ---

    @property
    def _second(self) -> str:
        return str(self._spare.host.instance) if self._spare is not None else ""

    def _ask(self) -> None:
        self._spare = self._book.hedge(self._lease)
        if self._spare is not None:
            self._account.hedged = "lost"
            self._sending = asyncio.create_task(self._send(self._spare.host))

    async def _send(self, host: Host) -> None:
        try:
            connection = await self._pool.connect(host)
        except (OSError, TimeoutError) as error:
            self.lost(error)
            return
        self._connection = connection
        if self.ahead:
            self._race.follow(connection)
        elif self._held:
            connection.pause()
        head, body = self._message(host.endpoint)
        connection.send(self, head, body, bodiless=False)

    def _swap(self, why: str) -> None:
        """The request's lease is of this instance now, and the spare one of the other, where it ends."""
        spare = self._spare
        assert spare is not None  # noqa: S101  (asked of one that runs only)
        self.ahead, self._account.hedged = True, "won"
        self._book.swap(self._lease, spare, why)
        self._give_back(self._race.follow(self._connection) if self._connection is not None else None)

    def _give_back(self, over: asyncio.Future[None] | None) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.over = over
            self._book.release(spare)

    # --- what its connection tells ---

    takes_whole = False

    def whole(self, head: Head, body: bytes) -> None:
        """It comes in pieces."""
        raise NotImplementedError

    def begin(self, head: Head) -> None:
        """It is the first to begin, unless it refuses: the other may do better."""
        if not self.ahead:
            if head.status >= 400:
                self.close()
                return
            first, after = self._lease.host.instance, format_seconds(self._after)
            self._swap(f"{self._second} began first: it was asked too when {first} had not begun within {after}")
        self._race.begin(head)

    def feed(self, piece: bytes) -> None:
        """A piece of the answer."""
        self._race.feed(piece)

    def finish(self, trailer: Fields) -> None:
        """It is whole."""
        self._connection = None
        self._race.finish(trailer)

    def lost(self, error: Exception) -> None:
        """It will not be."""
        self._connection = None
        if self.ahead:
            self._race.lost(error)
        else:
            self._give_back(None)

    def sign(self) -> None:
        """Its instance is alive."""
        host = self._lease.host if self.ahead else self._spare.host if self._spare is not None else None
        if host is not None:
            host.sign()

    def hold(self) -> None:
        """Its body waits in the socket's buffer."""

    def go_on(self) -> None:
        """And goes on by itself."""
