"""The request that most are: its answer comes whole, on a connection that was there, and goes to its client at once.

What an `Errand` keeps for all that may happen is made only when it does.
"""

from __future__ import annotations

import asyncio

from offloadd.proxy import headers
from offloadd.proxy.account import Answered
from offloadd.proxy.answer_heads import Head
from offloadd.proxy.errands import Errand, Means, Order, start_at
from offloadd.proxy.exchange import Exchange
from offloadd.proxy.taker import Taker
from offloadd.proxy.taps import given_up
from offloadd.proxy.upstream import Connection


class PlainErrand(Taker):
    """Takes its answer itself. At anything but the usual an `Errand` takes its place, with all that has been done by then."""

    __slots__ = ("_connection", "_draining", "_exchange", "_means", "_order")
    takes_whole = True

    def __init__(self, means: Means, order: Order, connection: Connection) -> None:
        """`connection` is what it is to be sent on."""
        self._means = means
        self._order = order
        self._connection: Connection | None = connection
        self._exchange: Exchange | None = None
        """What takes the answer in its stead."""
        self._draining: asyncio.Task[None] | None = None

    def send(self, connection: Connection) -> None:
        """Send it, on its connection."""
        order = self._order
        judged, lease, sent = order.judged, order.lease, order.sent
        host, path = lease.host, judged.path
        lease.told = self._instead
        start = host.starts.get(path) or start_at(host, path)
        end = b"X-Request-Id: %b\r\nContent-Length: %d\r\n\r\n" % (order.number.encode(), len(sent))
        connection.send(self, b"%b%b%b" % (start, judged.onward or b"", end), sent, bodiless=False, lasting=host.api.lasting)

    def gone(self) -> None:
        """The client has left, which ends the work for it."""
        if self._draining is not None:
            self._draining.cancel()
        else:
            self._errand().gone()

    # --- what the connection tells ---

    def whole(self, head: Head, body: bytes) -> None:
        """All of the answer: it goes to the client, and that was it."""
        self._connection = None
        if self._exchange is not None or given_up(body):
            self._instead().whole(head, body)
            return
        order = self._order
        try:
            self._answer(order, head, body)
        except Exception as error:  # noqa: BLE001  (it is told, and nobody else would hear of it)
            order.failed(error)
            if order.client.transport is not None:
                order.client.transport.abort()  # which ends the rest

    def _answer(self, order: Order, head: Head, body: bytes) -> None:
        means, lease, client, judged = self._means, order.lease, order.client, order.judged
        instance, memory = lease.host.instance, means.book.memory
        lease.host.sign()
        if instance in memory.ailing:
            memory.well(instance)
        keep, transport = judged.keep_alive, client.transport
        if transport is not None and not transport.is_closing():
            start = headers.response_start(head.status, head.onward, order.own)
            if keep:
                means.pool.turn.write(transport, b"%bContent-Length: %d\r\n\r\n%b" % (start, len(body), body))
            else:  # it is closed at once
                transport.write(b"%bContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (start, len(body), body))
        lease.told = None
        means.book.release(lease)
        ended = Answered(
            order.number, judged.path, judged.caller.name, lease, order.arrived, means.accounts.now(), len(order.sent), body
        )
        means.accounts.answered(ended)
        if client.writing_paused:
            self._draining = asyncio.get_running_loop().create_task(self._drain(keep=keep))
        else:
            client.ended(keep=keep)

    async def _drain(self, *, keep: bool) -> None:
        """A slow client is waited for before its next request is looked at."""
        try:
            await self._order.client.drained()
        except ConnectionError:
            keep = False
        self._order.client.ended(keep=keep)

    def begin(self, head: Head) -> None:
        """Its head is here, of an answer that is not known or comes in pieces."""
        self._instead().begin(head)

    def feed(self, piece: bytes) -> None:
        """A piece of its body."""
        self._instead().feed(piece)

    def finish(self, trailer: headers.Fields) -> None:
        """It is whole."""
        self._instead().finish(trailer)

    def lost(self, error: Exception) -> None:
        """It will not be."""
        self._connection = None
        self._instead().lost(error)

    def sign(self) -> None:
        """Bytes came lately."""
        self._order.lease.host.sign()

    def hold(self) -> None:
        """The engine takes no more for now: all of the request is written."""

    def go_on(self) -> None:
        """It takes more again."""

    def _instead(self) -> Exchange:
        """What takes the answer from now on."""
        if self._exchange is None:
            errand = self._errand()
            self._order.client.goes_on(errand)
            self._exchange = errand.exchange
        return self._exchange

    def _errand(self) -> Errand:
        self._order.lease.told = None
        errand = Errand(self._means, self._order)
        errand.adopt(self._connection)
        return errand
