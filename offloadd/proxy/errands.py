"""A request that is served without a task: from its lease to its last byte, as long as nothing unusual comes up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import msgspec
from aiohttp import HttpVersion11, web

from offloadd.errors import RequestError
from offloadd.events import EventKind, about
from offloadd.proxy import calls, exchange, headers, relay
from offloadd.proxy.account import ACCOUNT, Accounts
from offloadd.proxy.dialects import openai
from offloadd.proxy.downstream import JSON_LINE, Stream, connection_line, whole_head
from offloadd.proxy.gateway import FAILED
from offloadd.proxy.lease import Host, Lease
from offloadd.proxy.leases import LeaseBook
from offloadd.proxy.pool import Pool, authority
from offloadd.proxy.upstream import Connection
from offloadd.state.judged import Judged
from offloadd.state.launch import Endpoint
from offloadd.units import Instant

log = logging.getLogger(__name__)


class Client(Protocol):
    """The connection that a request came on."""

    @property
    def transport(self) -> asyncio.Transport | None:
        """None when the client has left."""
        ...

    @property
    def writing_paused(self) -> bool:
        """Whether the client takes no more for now."""
        ...

    async def drained(self) -> None:
        """Wait until the client has taken the most of what was written."""
        ...

    def ended(self, *, keep: bool) -> None:
        """Its request is over. `keep`: another may follow."""
        ...

    def goes_on(self, errand: Errand) -> None:
        """What is under way for it is this now."""
        ...

    def resort(self, judged: Judged, body: bytes, number: str, prepare: Callable[[web.Request], None]) -> asyncio.Task[None]:
        """Go on as an ordinary request, by this task."""
        ...


@dataclass(frozen=True, slots=True)
class Means:
    """What errands are done with."""

    book: LeaseBook
    pool: Pool
    accounts: Accounts


class Order(msgspec.Struct):  # made once a request
    """One request, with all that it takes to send it."""

    judged: Judged
    body: bytes
    """As it came."""
    sent: bytes
    """As the engine gets it."""
    client: Client
    lease: Lease
    number: str
    """Its id, as in `X-Request-Id`."""
    arrived: Instant

    @property
    def own(self) -> bytes:
        """Header lines of ours on its answer."""
        host = self.lease.host
        return b"X-Request-Id: %b\r\n%b" % (self.number.encode(), _origin(host.instance, host.backend, self.lease.why))

    def failed(self, error: Exception) -> None:
        """Say that we are at fault."""
        extra = about(EventKind.INTERNAL_ERROR, request=self.number)
        log.error("request %s failed", self.number, exc_info=error, extra=extra)


@dataclass(slots=True, kw_only=True)
class _Call(calls.Call):
    """One whose head is nearly written."""

    host: Host
    onward: bytes

    def head(self, endpoint: Endpoint) -> bytes:
        if endpoint is not self.host.endpoint or self.body is None:  # it has moved
            return calls.Call.head(self, endpoint)
        start = self.host.starts.get(self.path) or start_at(self.host, self.path)
        return b"%b%b%bContent-Length: %d\r\n\r\n" % (start, self.onward, self.own, len(self.body))


def start_at(host: Host, path: str) -> bytes:
    """How the head of a request to an instance begins; kept with it."""
    endpoint = host.endpoint
    start = headers.request_start("POST", endpoint.at(path), authority(endpoint)) + headers.lines(endpoint.headers.items())
    host.starts[path] = start
    return start


class Errand:
    """One such request, from its lease to its last byte. To the answer's side it is what was asked."""

    __slots__ = (
        "_account",
        "_closed",
        "_means",
        "_order",
        "_stream",
        "_task",
        "exchange",
    )

    method = "POST"
    version = HttpVersion11

    def __init__(self, means: Means, order: Order) -> None:
        self._means = means
        self._order = order
        self._account = means.accounts.begin(order.judged.path, order.arrived)
        self.exchange: exchange.Exchange
        self._stream: Stream | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    # --- what was asked ---

    @property
    def path(self) -> str:
        """The request's."""
        return self._order.judged.path

    @property
    def keep_alive(self) -> bool:
        """Whether the client wants the connection to be kept."""
        return self._order.judged.keep_alive

    @property
    def raw_headers(self) -> headers.Fields:
        """The request's, save for the length of its body."""
        return self._order.judged.fields

    @property
    def transport(self) -> asyncio.Transport | None:
        """The client's."""
        return self._order.client.transport

    @property
    def protocol(self) -> Client:
        """Whose connection it is."""
        return self._order.client

    # --- its way ---

    def begin(self, collector: openai.Collector | None, *, stream: bool) -> None:
        """Send it: now, or as soon as there is a connection."""
        pool, book, lease, call = self._means.pool, self._means.book, self._order.lease, self._call()
        if stream:
            self._stream = Stream(self, self._own)
            self.exchange = relay.Passing(pool, book, lease, call, self._stream)
        elif collector is not None:
            self.exchange = relay.Collecting(pool, book, lease, call, collector)
        else:
            self.exchange = relay.Reading(pool, book, lease, call)
        if not self.exchange.start(self._over):
            self._run(None)

    def adopt(self, connection: Connection | None) -> None:
        """It has been sent on this connection already, and its answer is to be read; None where that has been given back."""
        self.exchange = relay.Reading(self._means.pool, self._means.book, self._order.lease, self._call())
        self.exchange.adopt(connection, self._over)

    def _call(self) -> _Call:
        order = self._order
        self._account.grant(order.lease, len(order.sent))
        return _Call(
            method="POST",
            path=order.judged.path,
            fields=order.judged.fields,
            own=b"X-Request-Id: %b\r\n" % order.number.encode(),
            account=self._account,
            body=order.sent,
            as_json=True,
            host=order.lease.host,
            onward=order.judged.onward or b"",
        )

    def gone(self) -> None:
        """The client has left, which ends the work for it."""
        if self._task is not None:
            self._task.cancel()
        else:
            self.exchange.cancel()
            self._left()

    def _run(self, lost: Exception | None) -> None:
        self._task = asyncio.get_running_loop().create_task(self._rest(lost))
        self._task.add_done_callback(self._never_begun)

    def _never_begun(self, task: asyncio.Task[None]) -> None:
        """A task that is cancelled ahead of its first step, as when engine and client leave at once, does nothing of its own."""
        if task.cancelled() and not self._closed:
            self.exchange.cancel()
            self._left()

    def _over(self, lost: Exception | None) -> None:
        if lost is not None:
            self._run(lost)
            return
        try:
            self.exchange.close()
            self._answer()
        except Exception as error:  # noqa: BLE001  (it is told, and nobody else would hear of it)
            self._order.failed(error)
            if self._order.client.transport is not None:
                self._order.client.transport.abort()  # which ends the rest

    async def _rest(self, lost: Exception | None) -> None:
        """What takes a connection, or another instance."""
        try:
            await self.exchange.run(lost)
        except asyncio.CancelledError:
            self._left()
            raise
        except Exception as error:  # noqa: BLE001  (the ordinary way says it, or the log)
            self._failed(error)
        else:
            self._task = None
            self._answer()

    def _answer(self) -> None:
        stream, done = self._stream, self.exchange
        if stream is not None:
            self._end(stream.status, keep=stream.keep_alive)
            return
        if isinstance(done, relay.Reading):
            status, lines, body = done.answer.status, done.lines, done.answer.body
        else:
            assert isinstance(done, relay.Collecting)  # noqa: S101  (there is no third)
            status, lines, body = 200, JSON_LINE, msgspec.json.encode(done.answer)
        keep, transport = self._order.judged.keep_alive, self._order.client.transport
        if transport is not None and not transport.is_closing():
            end = b"\r\n" if keep else connection_line(self, keep_alive=False)
            whole = whole_head(status, lines, self._own(), len(body), end) + body
            if keep:
                self._means.pool.turn.write(transport, whole)
            else:
                transport.write(whole)  # it is closed at once
        self._end(status, keep=keep)

    def _failed(self, error: Exception) -> None:
        stream = self._stream
        if stream is None or not stream.status:
            self._means.book.release(self._order.lease)
            order, accounts, account = self._order, self._means.accounts, self._account

            def ended(task: asyncio.Task[None]) -> None:
                if task.cancelled() and not account.closed:  # ahead of its first step: its client has left
                    accounts.settle(account, order.number, None, order.judged.caller.name)

            order.client.resort(order.judged, order.body, order.number, self._hand_on(error)).add_done_callback(ended)
            self._part()
            return
        self._account.broken, self._account.reason = True, str(error)
        if isinstance(error, RequestError):
            stream.fail(error)
        else:
            self._order.failed(error)
            stream.abort()
        self._task = None
        self._end(stream.status, keep=stream.keep_alive)

    def _hand_on(self, error: Exception) -> Callable[[web.Request], None]:
        def prepare(request: web.Request) -> None:
            request[ACCOUNT], request[FAILED] = self._account, error

        return prepare

    def _end(self, status: int, *, keep: bool) -> None:
        self._close(status)
        if self._order.client.writing_paused or not (self._stream is None or self._stream.drained):
            self._task = asyncio.get_running_loop().create_task(self._drain(keep=keep))
            return
        if self._stream is not None:
            self._stream.let_go()
        self._part()
        self._order.client.ended(keep=keep)

    def _part(self) -> None:
        """Nothing of its answer is needed any more: they know one another, a ring that would keep them and the request's body."""
        self._stream = self._task = None
        del self.exchange

    async def _drain(self, *, keep: bool) -> None:
        """A slow client is waited for before its next request is looked at."""
        try:
            if self._stream is not None:
                await self._stream.release().write_eof()
            else:
                await self._order.client.drained()
        except ConnectionError:
            keep = False
        finally:
            self._part()
        self._order.client.ended(keep=keep)

    def _left(self) -> None:
        self._close(None)
        self._part()

    def _close(self, status: int | None) -> None:
        if self._closed:
            return
        self._closed = True
        self._means.book.release(self._order.lease)
        self._means.accounts.settle(self._account, self._order.number, status, self._order.judged.caller.name)

    def _own(self) -> bytes:
        """Header lines of ours, as on every answer."""
        return self._order.own


@lru_cache(maxsize=1024)
def _origin(*whose: Any) -> bytes:
    instance, backend, why = whose
    return headers.lines(calls.origin_of(instance, backend, why).items())
