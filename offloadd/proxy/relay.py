"""What becomes of an engine's answer: it is read whole, put together from a stream, or passed on as it comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from offloadd.errors import RequestError
from offloadd.proxy import headers
from offloadd.proxy.answer_heads import Head
from offloadd.proxy.calls import Call, origin
from offloadd.proxy.dialects import sse
from offloadd.proxy.dialects.base import Gathering, Object
from offloadd.proxy.dialects.refusals import event_error
from offloadd.proxy.downstream import Stream
from offloadd.proxy.exchange import MAX_BUFFERED, Exchange
from offloadd.proxy.headers import Fields
from offloadd.proxy.lease import Lease
from offloadd.proxy.leases import LeaseBook
from offloadd.proxy.pool import Pool
from offloadd.proxy.taps import given_up

_GIVEN_UP = (
    "the engine gave the request up before its answer was whole (finish_reason abort), as one does that is ended by somebody else"
)


@dataclass(slots=True)
class Answer:
    """A backend's whole answer."""

    status: int
    fields: Fields
    body: bytes


class Reading(Exchange):
    """Reads an answer whole."""

    takes_whole = True
    answer: Answer
    _head: Head
    lines: bytes
    """The head's fields, as a client gets them."""

    def whole(self, head: Head, body: bytes) -> None:
        """All of it at once."""
        if self._exchanged is not None:
            super().whole(head, body)
            return
        self._connection, self._begun = None, True
        self.sign()
        if self._hedge is not None:
            self._hedge.settle()
        self._tap.whole(body)
        self.lines, self.answer = head.onward, Answer(head.status, head.fields, body)
        if given_up(body):
            self._break(ConnectionResetError(_GIVEN_UP))
        else:
            self._settle(None)

    def _begin(self, head: Head) -> None:
        self._head = head
        self.lines = head.onward

    def _feed(self, piece: bytes) -> None:
        self._keep(piece)

    def _end(self, trailer: Fields) -> None:
        body = b"".join(self._parts)
        if given_up(body):
            raise ConnectionResetError(_GIVEN_UP)
        self.answer = Answer(self._head.status, self._head.fields, body)


class Collecting(Exchange):
    """Puts a whole answer together from a stream; `whole` says it in the client's words."""

    answer: Object | list[Object]

    def __init__(
        self,
        pool: Pool,
        book: LeaseBook,
        lease: Lease,
        call: Call,
        gathering: Gathering,
        whole: Callable[[Object], Object | list[Object]] = lambda answer: answer,
    ) -> None:
        super().__init__(pool, book, lease, call)
        self._gathering = gathering
        self._whole = whole
        self._reader = sse.EventReader()

    def _begin(self, head: Head) -> None:
        """Its events say all there is to say."""

    def _feed(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > MAX_BUFFERED:
            raise RequestError(502, "answer_too_large", f"the backend's answer is larger than {MAX_BUFFERED} bytes")
        with sse.understanding():
            for payload in self._reader.feed(piece):
                self._gathering.add(sse.decode(payload))

    def _end(self, trailer: Fields) -> None:
        if self._gathering.error is not None:
            error = event_error(self._gathering.error)
            error.origin = origin(self._lease)
            raise error
        if not self._gathering.complete:
            raise ConnectionResetError("its answer broke off")
        with sse.understanding():
            self.answer = self._whole(self._gathering.answer())


class Passing(Exchange):
    """Passes an answer on to a client as it comes; where the connection is to change its protocol, in both directions."""

    def __init__(self, pool: Pool, book: LeaseBook, lease: Lease, call: Call, stream: Stream) -> None:
        super().__init__(pool, book, lease, call)
        self._stream = stream

    def _begin(self, head: Head) -> None:
        connection = self._connection
        if connection is None:
            return
        if head.status == 101:
            self._stream.tunnel(head.fields, self._call.upgrade, connection, connection.put)
            return
        streamed = headers.field(head.fields, b"content-type").lower().startswith((b"text/event-stream", b"application/x-ndjson"))
        self._call.account.streamed = streamed
        self._stream.begin(head.status, head.fields, head.length, connection)
        write = self._stream.raw
        if write is not None and self._exchanged is None:
            connection.pass_through(self._tap.into(write))
        if streamed and not self._lease.is_revoked:
            self._pool.spare(self._lease.host)

    def _feed(self, piece: bytes) -> None:
        self._stream.feed(piece)

    def _end(self, trailer: Fields) -> None:
        if self._tap.given_up:  # its client has been told so by the same words
            self._call.account.broken, self._call.account.reason = True, _GIVEN_UP
        self._stream.finish(trailer)

    def hold(self) -> None:
        """The backend's side of a tunnel is full."""
        if self._stream.status == 101:
            self._stream.hold()

    def go_on(self) -> None:
        """It has room again."""
        if self._stream.status == 101:
            self._stream.go_on()
