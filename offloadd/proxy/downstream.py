"""The client's side of the byte path: an answer written straight to its connection, as fast as it reads.

aiohttp parses requests and owns the connection. While an answer is on its way, a `Stream` is its protocol instead, so
that no coroutine wakes for a piece of it; afterwards the connection is given back for the next request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
from aiohttp import HttpVersion, web

from offloadd.errors import RequestError
from offloadd.proxy import headers
from offloadd.proxy.dialects import sse
from offloadd.proxy.dialects.base import Change
from offloadd.proxy.dialects.refusals import shaped
from offloadd.proxy.headers import BrokenAnswerError, Fields

MAX_EARLY = 64 * 1024
"""Bytes of further requests that are kept while an answer is under way."""
STALLED = 300.0
"""A client that takes nothing for so long has left its answer behind."""
EVENTS = b"text/event-stream"
ANTHROPIC = "/v1/messages"
"""Whose clients know an event by its name."""
_JSON_TYPE = (b"Content-Type", b"application/json")
JSON_LINE = b"Content-Type: application/json\r\n"


class Source(Protocol):
    """Where the answer comes from."""

    def pause(self) -> None:
        """Give no more for now."""
        ...

    def resume(self) -> None:
        """Go on."""
        ...

    def abort(self) -> None:
        """Nobody wants it any more."""
        ...


class Asked(Protocol):
    """What an answer has to know of its request; aiohttp's own will do."""

    @property
    def method(self) -> str:
        """`POST`, for one."""
        ...

    @property
    def path(self) -> str:
        """Without its query."""
        ...

    @property
    def version(self) -> HttpVersion:
        """Of HTTP."""
        ...

    @property
    def keep_alive(self) -> bool:
        """Whether the client wants the connection to be kept."""
        ...

    @property
    def raw_headers(self) -> Fields:
        """As they came."""
        ...

    @property
    def transport(self) -> asyncio.Transport | None:
        """None when the client has left."""
        ...

    @property
    def protocol(self) -> Any:
        """Whose connection it is."""
        ...


class Sent(web.StreamResponse):
    """Tells aiohttp that the answer has been written by us."""

    def __init__(self, status: int, *, keep_alive: bool) -> None:
        super().__init__(status=status)
        self._keep_alive = keep_alive

    async def prepare(self, request: web.BaseRequest) -> None:
        """There is nothing left to say."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Nor to end."""


class Whole(Sent):
    """An answer that is here as a whole: one write of head and body."""

    def __init__(self, request: web.Request, status: int, fields: Fields, own: bytes, body: bytes) -> None:
        super().__init__(status, keep_alive=request.keep_alive)
        self._request = request
        self._head = whole_head(
            status, headers.to_client(fields), own, len(body), connection_line(request, keep_alive=request.keep_alive)
        )
        self._whole_body = body

    async def write_eof(self, data: bytes = b"") -> None:
        """Send it, and wait until the client has taken the most of it."""
        transport = self._request.transport
        if transport is None or transport.is_closing():
            return
        transport.write(self._head + self._whole_body)
        if self._request.protocol.writing_paused:
            await self._request.protocol._drain_helper()


class Stream(asyncio.Protocol):
    """One answer on its way to a client. `own` gives header lines of ours; a dialect may change the body.

    Once it has begun, a failure is told in the stream itself.
    """

    def __init__(self, request: Asked, own: Callable[[], bytes], change: Change | None = None) -> None:
        self._request = request
        self._own = own
        self._change = change
        self._owner = request.protocol
        self._transport = request.transport
        self._source: Source | None = None
        self._taken = False
        self._paused = self._owner.writing_paused
        self._flowing: asyncio.Future[None] | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._early: list[bytes] = []
        self._into: Callable[[bytes], None] | None = None
        self._chunked = False
        self._bodiless = request.method == "HEAD"
        self._keep_alive = request.keep_alive
        self._events = False
        self.status = 0
        """Of the answer; 0 until it has begun."""

    # --- the answer ---

    def begin(self, status: int, fields: Fields, length: int | None, source: Source) -> None:
        """Send the head. `length` is the body's, where it is known and not changed."""
        self._source = source
        if self.status == 0:
            self._begin(status, fields, length)
        elif self._change is None and not headers.field(fields, b"content-type").lower().startswith(EVENTS):
            raise BrokenAnswerError("it is no stream of events, though one was asked for")
        if self._paused:
            source.pause()

    def _begin(self, status: int, fields: Fields, length: int | None) -> None:
        self.status = status
        if self._change is not None:
            kept = [pair for pair in fields if pair[0].lower() != b"content-type"]
            fields, length = [*kept, (b"Content-Type", self._change.media_type.encode())], None
        self._events = headers.field(fields, b"content-type").lower().startswith(EVENTS)
        bodiless = self._bodiless or status in (204, 304)
        self._chunked = length is None and not bodiless and self._request.version >= (1, 1)
        self._keep_alive = self._keep_alive and (self._chunked or length is not None or bodiless)
        framing = (
            b"Transfer-Encoding: chunked\r\n" if self._chunked else b"" if length is None else b"Content-Length: %d\r\n" % length
        )
        end = connection_line(self._request, keep_alive=self._keep_alive)
        self._take()
        self._write(headers.response_head(status, fields, self._own()) + framing + end)

    @property
    def raw(self) -> Callable[[bytes], None] | None:
        """Takes whole chunks as they are; None where they would have to be changed."""
        if self._change is not None or not self._chunked or self._bodiless or self._transport is None:
            return None
        return self._transport.write

    def feed(self, piece: bytes) -> None:
        """Send a piece of the body; BrokenStreamError when the dialect cannot make sense of it."""
        if self._change is not None:
            with sse.understanding():
                piece = self._change.feed(piece)
        if piece:
            self._put(piece)

    def finish(self, trailer: Fields) -> None:
        """The body is whole."""
        if self._change is not None:
            with sse.understanding():
                last = self._change.end()
            if last:
                self._put(last)
        if self._chunked:
            wanted = trailer and b"trailers" in headers.field(self._request.raw_headers, b"te").lower()
            self._write(b"0\r\n%b\r\n" % (headers.trailer_lines(trailer) if wanted else b""))

    def fail(self, error: RequestError) -> None:
        """Say in the stream that it broke off: an `error` event, and no `[DONE]`. Of anything else, only a break tells."""
        if self._change is not None:
            self._put(self._change.fail(error))
        elif self._events and self._chunked:
            named = b"event: error\n" if self._request.path.startswith(ANTHROPIC) else b""
            self._put(b"\n\n%bdata: %b\n\n" % (named, msgspec.json.encode(shaped(self._request.path, error)[1])))
        else:
            self.abort()
            return
        if self._chunked:
            self._write(b"0\r\n\r\n")

    def open(self) -> None:
        """Begin a stream of events before there is an answer to pass on."""
        self._begin(200, ((b"Content-Type", EVENTS), (b"Cache-Control", b"no-cache")), None)

    def change_by(self, change: Change | None) -> None:
        """From now on the dialect changes the body."""
        self._change = change

    def comment(self, text: bytes) -> None:
        """Show that somebody is there, in words that no client reads."""
        self._put(b": %b\n\n" % text)

    def tunnel(self, fields: Fields, protocol: bytes, source: Source, into: Callable[[bytes], None]) -> None:
        """Change the protocol: from now on bytes go through untouched, in both directions."""
        self._source, self._into, self._keep_alive = source, into, False
        self.status = 101
        self._take()
        switch = b"Connection: Upgrade\r\nUpgrade: %b\r\n\r\n" % protocol
        self._write(headers.response_head(101, fields, self._own()) + switch)
        # What the client sent behind its request, which aiohttp has kept for the upgrade that it thought would be its own.
        if early := getattr(self._owner, "_message_tail", b""):
            into(early)
        if self._paused:
            source.pause()

    @property
    def keep_alive(self) -> bool:
        """Whether another request may follow on the connection."""
        return self._keep_alive

    @property
    def drained(self) -> bool:
        """Whether the client has taken the most of what was written, so that nothing has to be waited for."""
        return not self._paused

    def let_go(self) -> None:
        """Give the connection back, all being `drained`."""
        self._source = None
        self._give_back()

    def release(self) -> Sent:
        """What the handler returns: the connection goes back to aiohttp once the client has taken the most of what was written."""
        self._source = None
        return _Streamed(self, keep_alive=self._keep_alive)

    async def settle(self) -> None:
        """Wait for that, and give the connection back."""
        if self._paused and self._taken and self._transport is not None and not self._transport.is_closing():
            self._flowing = asyncio.get_running_loop().create_future()
            await self._flowing
        self._give_back()
        if not self._keep_alive and self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Break the connection: what was sent is not whole, and nothing else may follow it."""
        self._keep_alive = False
        self._source = None
        if self._transport is not None:
            self._transport.abort()

    # --- the connection ---

    def _take(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._taken = True
            self._transport.set_protocol(self)

    def _give_back(self) -> None:
        if not self._taken:
            return
        self._taken = False
        if self._transport is not None and not self._transport.is_closing():
            self._transport.set_protocol(self._owner)
            if sum(map(len, self._early)) > MAX_EARLY:
                self._transport.resume_reading()
            if self._early:
                self._owner.data_received(b"".join(self._early))

    def _put(self, piece: bytes) -> None:
        if self._transport is None or self._bodiless:
            return
        if self._chunked:
            self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        else:
            self._transport.write(piece)

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        """The client's next request, too early; or its side of a tunnel."""
        if self._into is not None:
            self._into(data)
            return
        self._early.append(data)
        if self._transport is not None and sum(map(len, self._early)) > MAX_EARLY:
            self._transport.pause_reading()

    def hold(self) -> None:
        """Read no more of the client's side of a tunnel for now."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def go_on(self) -> None:
        """Read on."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def eof_received(self) -> None:
        """The client has closed its side, which is how a client leaves: nothing that is still to be written may keep it."""
        source, self._source = self._source, None
        if source is not None:
            source.abort()
        if self._transport is not None:
            self._transport.abort()

    def pause_writing(self) -> None:
        """The client reads too slowly: so its source has to wait, but not for ever."""
        self._paused = True
        self._stall = asyncio.get_running_loop().call_later(STALLED, self.eof_received)
        if self._source is not None:
            self._source.pause()

    def resume_writing(self) -> None:
        """It has caught up."""
        self._paused = False
        self._stop_waiting()
        if self._owner.writing_paused:
            self._owner.resume_writing()
        if self._source is not None:
            self._source.resume()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        """The client has left: the work for it ends at once, and aiohttp is told, which ends the handler."""
        source, self._source = self._source, None
        if source is not None:
            source.abort()
        self._transport = None
        self._stop_waiting()
        self._wake()
        if self._taken:
            self._taken = False
            self._owner.connection_lost(error)

    def _stop_waiting(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _wake(self) -> None:
        if self._flowing is not None and not self._flowing.done():
            self._flowing.set_result(None)
        self._flowing = None


class _Streamed(Sent):
    """A stream that is whole."""

    def __init__(self, stream: Stream, *, keep_alive: bool) -> None:
        super().__init__(stream.status, keep_alive=keep_alive)
        self._stream = stream

    async def write_eof(self, data: bytes = b"") -> None:
        """The connection is aiohttp's again."""
        await self._stream.settle()


def json_answer(request: web.Request, own: bytes, body: bytes, status: int = 200) -> Whole:
    """A JSON body of our own making, for an answer that was put together here."""
    return Whole(request, status, (_JSON_TYPE,), own, body)


def whole_head(status: int, lines: bytes, own: bytes, size: int, end: bytes) -> bytes:
    """The head of an answer with a body of this size; `lines` are the engine's fields, `end` is what `connection_line` gives."""
    return b"%bContent-Length: %d\r\n%b" % (headers.response_start(status, lines, own), size, end)


def connection_line(request: Asked, *, keep_alive: bool) -> bytes:
    """How a head ends: with what becomes of the connection, where that is not what its version means anyway."""
    if not keep_alive:
        return b"Connection: close\r\n\r\n"
    return b"\r\n" if request.version >= (1, 1) else b"Connection: keep-alive\r\n\r\n"
