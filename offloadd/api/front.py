"""The first to see a client's bytes. A plain call for inference is served from here; any other connection is given to aiohttp.

What the HTTP library spends on each request (a queue, a stream for its body, two tasks, the search for its route) is of no use to
a small POST that is here as a whole. Such a one becomes an ordinary `web.Request`, and goes through the same middleware and handler
as any other. At the first request that is anything but plain, the connection goes to aiohttp with all the bytes of that request,
for good: what is unusual is judged in one place only.
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

from offloadd.api.operations import OPERATIONS
from offloadd.api.patience import FIRST_REQUEST, IDLE, STALL, Known, Patience
from offloadd.events import EventKind, about
from offloadd.state.access import Scope

log = logging.getLogger(__name__)

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

    def __init__(self, app: web.Application, patience: Patience, max_body: int, **options: Any) -> None:
        super().__init__(app, **options)
        self._patience = patience
        self._max_body = max_body
        self.fronts: Fronts | None = None
        app.on_shutdown.append(self._close_fronts)

    @property
    def server(self) -> web.Server | None:
        """What makes a protocol for each connection, as a site asks for it."""
        return cast("web.Server | None", self.fronts)

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        self._patience.guard(server)
        self.fronts = Fronts(self.app, server, self._patience, self._max_body)
        return server

    async def _close_fronts(self, _: web.Application) -> None:
        if self.fronts is not None:
            await self.fronts.close(self._shutdown_timeout)


class Fronts:
    """All connections that are at a `Front` still, and what those share."""

    def __init__(self, app: web.Application, server: web.Server, patience: Patience, max_body: int) -> None:
        self.server = server
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
        running = [front.task for front in self.open if front.task is not None]
        if running:
            _, late = await asyncio.wait(running, timeout=timeout)
            for task in late:
                task.cancel()
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
        "_early",
        "_early_size",
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
        self.task: asyncio.Task[None] | None = None
        self.peername = self.sockname = self.ssl_context = None  # as `web.Request` wants to know them
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
        self._let_go()
        super().connection_lost(exc)
        if self.task is not None:
            self.task.cancel()

    def hang_up(self) -> None:
        """Close it."""
        if self.transport is not None:
            self.transport.close()

    def _let_go(self) -> None:
        self._all.open.discard(self)
        self._reader = None  # it holds our methods: a ring that would wait for the collector

    def data_received(self, data: bytes) -> None:
        """Bytes of a request; those of the next one wait until this one is over."""
        if self.task is None:
            self._read(data)
            return
        self._early.append(data)
        self._early_size += len(data)
        if self.transport is not None and self._early_size > MAX_EARLY:
            self.transport.pause_reading()

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
            self.task = self._loop.create_task(self._serve(self._place))
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

    async def _serve(self, place: _Place) -> None:
        keep = False
        try:
            request = self._request(place)
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
            self._over(keep=keep)

    def _request(self, place: _Place) -> web.Request:
        """The request as handlers know it, its body read."""
        parser = self._reader
        fields, body = tuple(self._fields), b"".join(self._body)
        headers = CIMultiDict([(name.decode(*_AS_TEXT), value.decode(*_AS_TEXT)) for name, value in fields])
        message = RawRequestMessage(
            "POST",
            place.url.raw_path,
            HttpVersion11,
            CIMultiDictProxy(headers),
            fields,
            parser is None or not parser.should_keep_alive(),
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
        self._raw, self._fields, self._body = [], [], []  # nobody needs them while a long answer is under way
        return request

    def _over(self, *, keep: bool) -> None:
        self.task = None
        transport, known = self.transport, self._known
        if transport is None or known is None:
            return
        if not keep or self._all.closed:
            transport.close()
            return
        known.wait(IDLE, self._all.patience.now())
        self._reset()
        if self._early:
            early, self._early, self._early_size = b"".join(self._early), [], 0
            if len(early) > MAX_EARLY:
                transport.resume_reading()
            self._read(early)

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
