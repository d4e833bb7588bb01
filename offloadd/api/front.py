"""The first to see a client's bytes. A plain call for inference is served from here; any other connection is given to aiohttp.

What the HTTP library spends on each request (a queue, a stream for its body, two tasks, the search for its route) is of no use to
a small POST that is here as a whole. Such a one becomes an ordinary `web.Request`, and goes through the same middleware and handler
as any other; one whose head is known from an earlier one does not even become that (`express.py`). At the first request that is
anything but plain, the connection goes to aiohttp with all the bytes of that request, for good: what is unusual is judged in one
place only.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import httptools
from aiohttp import EMPTY_PAYLOAD, HttpVersion11, web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_parser import RawRequestMessage
from aiohttp.http_writer import StreamWriter
from aiohttp.web_urldispatcher import PlainResource, UrlMappingMatchInfo
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from offloadd.api.app import call_it
from offloadd.api.express import ADMITTED, Errand, Lane
from offloadd.api.operations import OPERATIONS
from offloadd.api.patience import FIRST_REQUEST, IDLE, STALL, Known, Patience
from offloadd.events import EventKind, about
from offloadd.state.access import Scope
from offloadd.state.judged import Judged

log = logging.getLogger(__name__)

Fields = tuple[tuple[bytes, bytes], ...]

MAX_PLAIN = 64 * 1024
"""Bytes of a plain request's body. A larger one is better taken as it comes."""
MAX_HEAD = 8190
"""Bytes of its head: no more than the library takes for one header."""
MAX_FIELDS = 100
MAX_EARLY = 64 * 1024
"""Bytes of further requests that are kept while one is under way."""
_AS_TEXT = ("utf-8", "surrogateescape")
"""How the library reads a header."""
_NOT_PLAIN = frozenset({b"transfer-encoding", b"content-encoding", b"expect", b"upgrade"})
"""Headers that ask for more than to read a body of a known length."""


@dataclass(frozen=True, slots=True)
class _Place:
    """One path that serves inference."""

    url: URL
    match: UrlMappingMatchInfo
    handle: Callable[[web.Request], Awaitable[web.StreamResponse]]


class Runner(web.AppRunner):
    """An app whose connections begin at a `Front`."""

    def __init__(self, app: web.Application, patience: Patience, max_body: int, lane: Lane, **options: Any) -> None:
        super().__init__(app, **options)
        self._patience = patience
        self._max_body = max_body
        self._lane = lane
        self.fronts: Fronts | None = None
        app.on_shutdown.append(self._close_fronts)

    @property
    def server(self) -> web.Server | None:
        """What makes a protocol for each connection, as a site asks for it."""
        return cast("web.Server | None", self.fronts)

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        self._patience.guard(server)
        self.fronts = Fronts(self.app, server, self._patience, self._max_body, self._lane)
        return server

    async def _close_fronts(self, _: web.Application) -> None:
        if self.fronts is not None:
            await self.fronts.close(self._shutdown_timeout)


class Fronts:
    """All connections that are at a `Front` still, and what those share."""

    def __init__(self, app: web.Application, server: web.Server, patience: Patience, max_body: int, lane: Lane) -> None:
        self.server = server
        self.lane = lane
        self.turn = lane.turn
        self.patience = patience
        self.max_body = max_body
        self.most = min(MAX_PLAIN, max_body)
        """Bytes of a body that is waited for here."""
        self.places = _places(app)
        self.open: set[Front] = set()
        self.closed = False
        self.loop = asyncio.get_running_loop()

    def __call__(self) -> Front:
        """The protocol of a new connection."""
        return Front(self)

    async def close(self, timeout: float) -> None:
        """Take no more; what is under way may go on for so many seconds."""
        self.closed = True
        running = [work for front in self.open if (work := front.work()) is not None]
        if running:
            _, late = await asyncio.wait(running, timeout=timeout)
            for each in late:
                each.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        for front in list(self.open):
            front.hang_up()


def _places(app: web.Application) -> Mapping[bytes, _Place]:
    """The paths of POSTs that serve inference, as they are written in a request."""
    (around,) = app.middlewares
    found: dict[bytes, _Place] = {}
    for route in app.router.routes():
        operation = OPERATIONS.get((route.method, route.resource.canonical)) if isinstance(route.resource, PlainResource) else None
        if operation is not None and operation.method == "POST" and operation.scope is Scope.INFERENCE:
            match = UrlMappingMatchInfo({}, route)
            match.add_app(app)
            match.freeze()
            handle = partial(cast(Any, around), handler=route.handler)
            found[operation.path.encode()] = _Place(URL(operation.path, encoded=True), match, handle)
    return found


class Front(BaseProtocol):
    """One client's connection, as long as it asks for what is plain."""

    __slots__ = (
        "_all",
        "_asked",
        "_body",
        "_come",
        "_early",
        "_early_size",
        "_ending",
        "_errand",
        "_fields",
        "_known",
        "_length",
        "_place",
        "_plain",
        "_raw",
        "_reader",
        "_size",
        "_url",
        "_whole",
        "peername",
        "sockname",
        "ssl_context",
        "task",
    )

    def __init__(self, fronts: Fronts) -> None:
        super().__init__(fronts.loop)
        self._all = fronts
        self._known: Known | None = None
        self._reader: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        self._early: list[bytes] = []
        self._early_size = 0
        self._come = b""
        """What has come and waits for its turn."""
        self.task: asyncio.Task[None] | None = None
        self._errand: Errand | None = None
        """What is under way without a task."""
        self._ending: asyncio.Future[None] | None = None
        self.peername: Any = None  # these three are as `web.Request` wants to know them
        self.sockname: Any = None
        self.ssl_context: Any = None
        self._reset()

    def _reset(self) -> None:
        self._url = b""
        self._fields: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._raw: list[bytes] = []
        self._size = self._length = 0
        self._place: _Place | None = None
        self._asked = self._whole = False
        self._plain = True

    # --- the connection ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        super().connection_made(transport)
        assert self.transport is not None  # noqa: S101
        self.peername = transport.get_extra_info("peername")
        self.sockname = transport.get_extra_info("sockname")
        self._known = self._all.patience.enter(self.transport)
        if self._known is None or self._all.closed:
            self.transport.close()
            return
        if (sock := transport.get_extra_info("socket")) is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a client whose machine is gone is found out by the kernel
        self._all.open.add(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        """The client has left, which ends what is under way for it."""
        self._all.patience.leave(self.transport)
        self._come = b""
        self._let_go()
        super().connection_lost(exc)
        if self.task is not None:
            self.task.cancel()
        self._leave()

    def _leave(self) -> None:
        errand, self._errand = self._errand, None
        if errand is not None:
            errand.gone()

    def hang_up(self) -> None:
        """Close it."""
        self._leave()
        if self.transport is not None:
            self.transport.close()

    async def drained(self) -> None:
        """Wait until the client has taken the most of what was written."""
        await self._drain_helper()

    def work(self) -> asyncio.Future[None] | None:
        """Done when what is under way for the client is over; None when nothing is."""
        if self._errand is not None and self._ending is None:
            self._ending = self._loop.create_future()
        return self._ending if self._errand is not None else self.task

    def _let_go(self) -> None:
        self._all.open.discard(self)
        self._reader = None  # it holds our methods: a ring that would wait for the collector

    def data_received(self, data: bytes) -> None:
        """Bytes of a request; those of the next one wait until this one is over."""
        if self.task is None and self._errand is None:
            if self._raw:
                self._read(data)
            elif self._come:
                self._come += data
            else:
                self._come = data
                if self._known is not None:
                    self._known.limit = None  # it is we who let the client wait
                self._all.turn.request(self)
            return
        self._early.append(data)
        self._early_size += len(data)
        if self.transport is not None and self._early_size > MAX_EARLY:
            self.transport.pause_reading()

    def received(self) -> None:
        """Its turn has come."""
        data, self._come = self._come, b""
        if data and not self._begin(data):
            self._read(data)

    def broken(self, error: Exception) -> None:
        """Close it: that failed."""
        if self.transport is not None:
            self.transport.abort()

    def _begin(self, data: bytes) -> bool:
        """Whether a whole request could begin at once, without a task."""
        known = self._known
        if not self.peername or known is None or self._all.closed:
            return False
        self._errand = self._all.lane.start(data, self)
        if self._errand is None:
            return False
        known.limit = None
        return True

    def _read(self, data: bytes) -> None:
        parser, known = self._reader, self._known
        if parser is None or known is None:
            return
        self._raw.append(data)
        self._size += len(data)
        try:
            parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._plain = False
        if not self._plain or self._size > MAX_HEAD + self._length:
            self._hand_over(known)
        elif self._whole:
            assert self._place is not None  # noqa: S101  (it would not be plain)
            whole = b"".join(self._raw)
            if len(self._raw) == 1 or not self._begin(whole):
                self.task = self._loop.create_task(self._serve(self._place, whole))
        elif self._place is not None:
            known.wait(STALL, self._all.patience.now())  # a body has only to come steadily
        elif len(self._raw) == 1:
            known.wait(FIRST_REQUEST, self._all.patience.now())  # a head has to be whole in time

    def _hand_over(self, known: Known) -> None:
        """To aiohttp, which sees the request from its first byte on."""
        transport = self.transport
        assert transport is not None  # noqa: S101
        data = b"".join(self._raw)
        self._let_go()
        self._reset()
        self.transport = None
        known.wait(FIRST_REQUEST, self._all.patience.now())
        handler = self._all.server()
        transport.set_protocol(handler)
        handler.connection_made(transport)
        if self._paused:
            handler.pause_writing()
        handler.data_received(data)

    async def _serve(self, place: _Place, whole: bytes) -> None:
        parser, lane = self._reader, self._all.lane
        fields, body, rules = tuple(self._fields), b"".join(self._body), lane.rules
        keep_alive = parser is not None and parser.should_keep_alive()
        request = self._request(place, fields, body, keep_alive=keep_alive)
        self._raw, self._fields, self._body = [], [], []  # nobody needs them while a long answer is under way
        mark = lane.mark(whole) if self.peername else b""
        del whole, body
        await self._handle(place, request)
        caller = request.get(ADMITTED)
        if caller is not None and lane.holds(rules):
            lane.learn(mark, place.url.raw_path, fields, caller, keep_alive=keep_alive)

    async def _handle(self, place: _Place, request: web.Request) -> None:
        keep = False
        try:
            response = await place.handle(request)
            if type(response) is web.Response:  # refusals, for one; other answers are written by those who made them
                request._payload_writer = StreamWriter(self, self._loop)
                await response.prepare(request)
            await response.write_eof()
            keep = bool(response.keep_alive)
        except ConnectionError:
            pass  # there is nobody to answer
        except Exception:
            log.exception("an answer could not be sent", extra=about(EventKind.INTERNAL_ERROR))
        finally:
            self.ended(keep=keep)

    def _request(self, place: _Place, fields: Fields, body: bytes, *, keep_alive: bool) -> web.Request:
        """The request as handlers know it, its body read."""
        headers = CIMultiDict([(name.decode(*_AS_TEXT), value.decode(*_AS_TEXT)) for name, value in fields])
        message = RawRequestMessage(
            "POST",
            place.url.raw_path,
            HttpVersion11,
            CIMultiDictProxy(headers),
            fields,
            not keep_alive,
            None,
            False,
            False,
            place.url,
        )
        nobody = cast(Any, None)  # no task of the library's own, and no writer: answers are written by us
        request = web.Request(
            message, EMPTY_PAYLOAD, cast(Any, self), nobody, nobody, self._loop, client_max_size=self._all.max_body
        )
        request._match_info = place.match
        request._read_bytes = body
        return request

    def goes_on(self, errand: Errand) -> None:
        """What is under way is this now."""
        self._errand = errand

    def resort(self, judged: Judged, body: bytes, number: str, prepare: Callable[[web.Request], None]) -> asyncio.Task[None]:
        """What began without a task came to nothing: what remains to be done is an ordinary request's, of the same number."""
        self._errand = None
        place = self._all.places[judged.path.encode()]
        fields: Fields = (*judged.fields, (b"Content-Length", b"%d" % len(body)))
        request = self._request(place, fields, body, keep_alive=judged.keep_alive)
        call_it(request, number)
        prepare(request)
        self.task = self._loop.create_task(self._handle(place, request))
        return self.task

    def ended(self, *, keep: bool) -> None:
        """What was under way is over. `keep`: another request may follow on the connection."""
        self.task = self._errand = None
        if self._ending is not None:
            if not self._ending.done():
                self._ending.set_result(None)
            self._ending = None
        transport, known = self.transport, self._known
        if transport is None or known is None:
            return
        if not keep or self._all.closed:
            self._all.turn.flush()  # its answer may be among what is written at the end
            transport.close()
            return
        known.wait(IDLE, self._all.patience.now())
        if self._asked:  # else nothing of it was read
            self._reset()
        if self._early:
            early, self._early, self._early_size = b"".join(self._early), [], 0
            if len(early) > MAX_EARLY:
                transport.resume_reading()
            self.data_received(early)

    # --- what the parser finds ---

    def on_message_begin(self) -> None:
        """A request; one right behind another is not plain."""
        self._plain = self._plain and not self._asked
        self._asked = True

    def on_url(self, url: bytes) -> None:
        """Its target, or a part of it."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self._fields.append((name, value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        """The head is whole: now it shows whether the request is plain."""
        parser, fields = self._reader, {name.lower(): value for name, value in self._fields}
        self._place = self._all.places.get(self._url)
        self._plain = (
            self._plain
            and self._place is not None
            and parser is not None
            and parser.get_method() == b"POST"
            and parser.get_http_version() == "1.1"
            and len(fields) == len(self._fields) <= MAX_FIELDS  # none is there twice
            and b"host" in fields
            and _NOT_PLAIN.isdisjoint(fields)
        )
        self._length = int(fields.get(b"content-length", b"0"))
        self._plain = self._plain and self._length <= self._all.most

    def on_body(self, piece: bytes) -> None:
        """A piece of the body."""
        self._body.append(piece)

    def on_message_complete(self) -> None:
        """All of it is here."""
        self._whole = True
