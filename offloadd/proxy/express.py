"""Requests that can be sent to an engine at once: no waiting, no translation, nothing to look up. They are served without a task.

Whatever else comes up (no free slot, a rule of the config, a dialect that needs repair, an engine that is lost) is the ordinary
way's: a request either never begins here, or goes on there with all that is known of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import msgspec
from aiohttp import HttpVersion11, web

from offloadd.errors import RequestError
from offloadd.events import EventKind, about
from offloadd.proxy import bodies, calls, exchange, headers, relay, routing
from offloadd.proxy.account import ACCOUNT, Accounts
from offloadd.proxy.dialects import openai
from offloadd.proxy.dialects.multipart import is_form
from offloadd.proxy.downstream import JSON_LINE, Stream, connection_line, whole_head
from offloadd.proxy.gateway import FAILED, FORWARDED
from offloadd.proxy.lease import Host, Lease
from offloadd.proxy.leases import LeaseBook
from offloadd.proxy.media import may_point
from offloadd.proxy.pool import Pool, authority
from offloadd.state.desired import ModelSpec
from offloadd.state.ids import ModelName
from offloadd.state.judged import Judged
from offloadd.state.launch import Endpoint

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

    def resort(self, judged: Judged, body: bytes, number: str, prepare: Callable[[web.Request], None]) -> None:
        """Go on as an ordinary request."""
        ...


@dataclass(frozen=True, slots=True)
class _Fit:
    """Whether all instances of a model can be asked without more ado, as long as they are the same."""

    spec: ModelSpec
    hosts: Sequence[Host]
    paths: frozenset[str]
    """That all of them answer to the letter; empty when one of them needs help."""
    only_streams: bool
    """Whether one of them can be interrupted only while it streams."""


class Express:
    """Begins what can begin at once."""

    def __init__(
        self, names: Callable[[], routing.Names], book: LeaseBook, pool: Pool, accounts: Accounts, new_id: Callable[[], str]
    ) -> None:
        self._names = names
        self.book = book
        self.pool = pool
        self.accounts = accounts
        self._new_id = new_id
        self._fits: dict[ModelName, _Fit] = {}

    def take(self, judged: Judged, body: bytes, client: Client) -> Errand | None:
        """Send the request; None, with nothing done, when it has to go the ordinary way."""
        try:
            head = routing.read_head(body)
        except RequestError:
            return None
        names = self._names()
        spec = names.default if head.model is None else names.models.get(head.model)
        if spec is None or spec.request or head.backend is not None or spec.queue.hedge_after is not None:
            return None
        fit = self._fit(spec)
        onward = _onward(judged) if judged.onward is None else judged.onward
        exact = judged.path in fit.paths and ((head.n or 1) <= 1 or not head.stream)
        if not exact or not onward or may_point(body) or self.book.suspects or not judged.caller.may_use(spec.name, spec.aliases):
            return None
        collected = None
        if fit.only_streams and not head.stream:
            fields: dict[str, Any] = routing.read_object(body)
            if not openai.can_collect(judged.path, fields):
                return None
            collected = openai.Collector(judged.path, fields.get("n") or 1)
            sent = msgspec.json.encode(openai.as_stream(fields))
        lease = self.book.grant(spec, head.conversation(spec))
        if lease is None:
            return None
        try:
            if collected is None:
                sent = bodies.readdressed(body, head, lease.host.api)
            errand = Errand(self, judged, body, client, lease, self._new_id())
            errand.begin(onward, sent, collected, stream=bool(head.stream))
        except BaseException:
            self.book.release(lease)
            raise
        return errand

    def _fit(self, spec: ModelSpec) -> _Fit:
        hosts = self.book.hosts(spec.name)
        known = self._fits.get(spec.name)
        if known is None or known.hosts is not hosts or known.spec is not spec:
            if len(self._fits) > len(self._names().models):  # some are of models that are gone
                self._fits.clear()
            exact = all(host.api.exact and host.api.wire is None for host in hosts)
            paths = frozenset.intersection(*(host.api.paths for host in hosts)) if hosts and exact else frozenset[str]()
            known = self._fits[spec.name] = _Fit(spec, hosts, paths, any(host.cancels_only_streams for host in hosts))
        return known


def _onward(judged: Judged) -> bytes:
    """Empty where more than routing fields have to be looked at: a form, or any path that is not merely forwarded."""
    kind = headers.field(judged.fields, b"content-type").decode("latin-1")
    plain = judged.path in FORWARDED and not is_form(kind)
    judged.onward = headers.onward(judged.fields, as_json=True) if plain else b""
    return judged.onward


@dataclass(slots=True, kw_only=True)
class _Call(calls.Call):
    """One whose head is nearly written."""

    host: Host
    onward: bytes

    def head(self, endpoint: Endpoint) -> bytes:
        if endpoint is not self.host.endpoint or self.body is None:  # it has moved
            return calls.Call.head(self, endpoint)
        start = self.host.starts.get(self.path)
        if start is None:
            start = headers.request_start(self.method, endpoint.at(self.path), authority(endpoint))
            start = self.host.starts[self.path] = start + headers.lines(endpoint.headers.items())
        return b"%b%b%bContent-Length: %d\r\n\r\n" % (start, self.onward, self.own, len(self.body))


class Errand:
    """One such request, from its lease to its last byte. To the answer's side it is what was asked."""

    __slots__ = (
        "_account",
        "_all",
        "_body",
        "_client",
        "_closed",
        "_exchange",
        "_judged",
        "_lease",
        "_number",
        "_stream",
        "_task",
    )

    method = "POST"
    version = HttpVersion11

    def __init__(self, all_: Express, judged: Judged, body: bytes, client: Client, lease: Lease, number: str) -> None:
        self._all = all_
        self._judged = judged
        self._body = body
        self._client = client
        self._lease = lease
        self._number = number
        self._account = all_.accounts.begin(judged.path)
        self._exchange: exchange.Exchange
        self._stream: Stream | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    # --- what was asked ---

    @property
    def path(self) -> str:
        """The request's."""
        return self._judged.path

    @property
    def keep_alive(self) -> bool:
        """Whether the client wants the connection to be kept."""
        return self._judged.keep_alive

    @property
    def raw_headers(self) -> headers.Fields:
        """The request's, save for the length of its body."""
        return self._judged.fields

    @property
    def transport(self) -> asyncio.Transport | None:
        """The client's."""
        return self._client.transport

    @property
    def protocol(self) -> Client:
        """Whose connection it is."""
        return self._client

    # --- its way ---

    def begin(self, onward: bytes, sent: bytes, collector: openai.Collector | None, *, stream: bool) -> None:
        """Send it: now, or as soon as there is a connection."""
        all_, lease, account = self._all, self._lease, self._account
        account.grant(lease, len(sent))
        call = _Call(
            method="POST",
            path=self._judged.path,
            fields=self._judged.fields,
            own=b"X-Request-Id: %b\r\n" % self._number.encode(),
            account=account,
            body=sent,
            as_json=True,
            host=lease.host,
            onward=onward,
        )
        if stream:
            self._stream = Stream(self, self._own)
            self._exchange = relay.Passing(all_.pool, all_.book, lease, call, self._stream)
        elif collector is not None:
            self._exchange = relay.Collecting(all_.pool, all_.book, lease, call, collector)
        else:
            self._exchange = relay.Reading(all_.pool, all_.book, lease, call)
        if not self._exchange.start(self._over):
            self._run(None)

    def gone(self) -> None:
        """The client has left, which ends the work for it."""
        if self._task is not None:
            self._task.cancel()
        else:
            self._exchange.cancel()
            self._left()

    def _run(self, lost: Exception | None) -> None:
        self._task = asyncio.get_running_loop().create_task(self._rest(lost))

    def _over(self, lost: Exception | None) -> None:
        if lost is not None:
            self._run(lost)
            return
        try:
            self._exchange.close()
            self._answer()
        except Exception:
            log.exception("request %s failed", self._number, extra=about(EventKind.INTERNAL_ERROR, request=self._number))
            if self._client.transport is not None:
                self._client.transport.abort()  # which ends the rest

    async def _rest(self, lost: Exception | None) -> None:
        """What takes a connection, or another instance."""
        try:
            await self._exchange.run(lost)
        except asyncio.CancelledError:
            self._left()
            raise
        except Exception as error:  # noqa: BLE001  (the ordinary way says it, or the log)
            self._failed(error)
        else:
            self._task = None
            self._answer()

    def _answer(self) -> None:
        stream, done = self._stream, self._exchange
        if stream is not None:
            self._end(stream.status, keep=stream.keep_alive)
            return
        if isinstance(done, relay.Reading):
            status, lines, body = done.answer.status, done.lines, done.answer.body
        else:
            assert isinstance(done, relay.Collecting)  # noqa: S101  (there is no third)
            status, lines, body = 200, JSON_LINE, msgspec.json.encode(done.answer)
        keep, transport = self._judged.keep_alive, self._client.transport
        if transport is not None and not transport.is_closing():
            end = b"\r\n" if keep else connection_line(self, keep_alive=False)
            whole = whole_head(status, lines, self._own(), len(body), end) + body
            if keep:
                self._all.pool.turn.write(transport, whole)
            else:
                transport.write(whole)  # it is closed at once
        self._end(status, keep=keep)

    def _failed(self, error: Exception) -> None:
        stream = self._stream
        if stream is None or not stream.status:
            self._all.book.release(self._lease)
            self._client.resort(self._judged, self._body, self._number, self._hand_on(error))
            self._part()
            return
        self._account.broken, self._account.reason = True, str(error)
        if isinstance(error, RequestError):
            stream.fail(error)
        else:
            log.error(
                "request %s failed", self._number, exc_info=error, extra=about(EventKind.INTERNAL_ERROR, request=self._number)
            )
            stream.abort()
        self._task = None
        self._end(stream.status, keep=stream.keep_alive)

    def _hand_on(self, error: Exception) -> Callable[[web.Request], None]:
        def prepare(request: web.Request) -> None:
            request[ACCOUNT], request[FAILED] = self._account, error

        return prepare

    def _end(self, status: int, *, keep: bool) -> None:
        self._close(status)
        if self._client.writing_paused or not (self._stream is None or self._stream.drained):
            self._task = asyncio.get_running_loop().create_task(self._drain(keep=keep))
            return
        if self._stream is not None:
            self._stream.let_go()
        self._part()
        self._client.ended(keep=keep)

    def _part(self) -> None:
        """Nothing of its answer is needed any more: they know one another, a ring that would keep them and the request's body."""
        self._stream = self._task = None
        del self._exchange

    async def _drain(self, *, keep: bool) -> None:
        """A slow client is waited for before its next request is looked at."""
        try:
            if self._stream is not None:
                await self._stream.release().write_eof()
            else:
                await self._client.drained()
        except ConnectionError:
            keep = False
        finally:
            self._part()
        self._client.ended(keep=keep)

    def _left(self) -> None:
        self._close(None)
        self._part()

    def _close(self, status: int | None) -> None:
        if self._closed:
            return
        self._closed = True
        self._all.book.release(self._lease)
        self._all.accounts.settle(self._account, self._number, status, self._judged.caller.name)

    def _own(self) -> bytes:
        """Header lines of ours, as on every answer."""
        host = self._lease.host
        return b"X-Request-Id: %b\r\n%b" % (self._number.encode(), _origin(host.instance, host.backend, self._lease.why))


@lru_cache(maxsize=1024)
def _origin(*whose: Any) -> bytes:
    instance, backend, why = whose
    return headers.lines(calls.origin_of(instance, backend, why).items())
