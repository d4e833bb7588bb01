"""Connections to instances, their answers parsed and handed on as they come.

No coroutine wakes for a piece of an answer: the socket's callback parses it and calls whoever takes the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, cast

import httptools

from offloadd.proxy.answer_heads import AnswerHeads, Head
from offloadd.proxy.framing import CHUNK_STARTS, COMMON, are_whole_chunks, framing
from offloadd.proxy.headers import BrokenAnswerError
from offloadd.proxy.taker import StaleError, Taker
from offloadd.turn import Turn

MAX_HEAD = 64 * 1024
"""An answer's head, or its trailer, or any framing between two pieces of its body, is not longer."""
MAX_FIELDS = 256
LEAVING = 60.0
"""So long a backend is given to notice that its client has left, where it cannot be interrupted at once."""


class Owner(Protocol):
    """Who keeps connections."""

    heads: AnswerHeads
    turn: Turn

    def give_back(self, connection: Connection, *, keep: bool) -> None:
        """Its answer is whole."""
        ...

    def discard(self, connection: Connection) -> None:
        """It is closed."""
        ...


class Connection(asyncio.Protocol):
    """One connection to an instance, with one request on it at a time."""

    __slots__ = (
        "_begun",
        "_between",
        "_bodiless",
        "_come",
        "_ended",
        "_fields",
        "_gone",
        "_head",
        "_interim",
        "_keep",
        "_lasting",
        "_parsed",
        "_parser",
        "_pieces",
        "_pool",
        "_silent",
        "_taker",
        "_through",
        "_trailer",
        "_transport",
        "_tunnel",
        "_until_close",
        "_waiter",
        "_writing_paused",
        "fresh",
        "heard",
        "key",
        "since",
        "uses",
        "waited",
    )

    def __init__(self, pool: Owner, key: str) -> None:
        self.key = key
        self.uses = 0
        self.since = 0.0
        self.waited = False
        """Whether it was kept open unused, so that the other side may have closed it before it was sent anything."""
        self.heard = False
        """Whether any byte came since the request was sent."""
        self.fresh = False
        """Whether any came since that was last told to the taker."""
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        self._taker: Taker | None = None
        self._writing_paused = False
        self._waiter: asyncio.Future[None] | None = None
        self._gone: asyncio.Future[None] | None = None
        self._pieces: list[bytes] = []
        self._come = b""
        """What has come and waits for its turn."""
        self._lasting = False
        self._reset(bodiless=False)

    def _reset(self, *, bodiless: bool) -> None:
        self._bodiless = self._parsed = bodiless
        self._begun = self._ended = self._interim = self._keep = self._until_close = self._tunnel = self.heard = False
        self._head: Head | None = None
        self._fields: list[tuple[bytes, bytes]] = []
        self._trailer: list[tuple[bytes, bytes]] = []
        self._silent = 0
        self._between = False
        self._through: Callable[[bytes], None] | None = None

    # --- what the owner does ---

    @property
    def closed(self) -> bool:
        """Whether nothing can be sent on it any more."""
        return self._transport is None or self._transport.is_closing()

    def send(self, taker: Taker, head: bytes, body: bytes | None, *, bodiless: bool, lasting: bool = False) -> None:
        """Send one request. `bodiless`: its answer has no body, whatever its head says. `lasting`: kept after a stream too."""
        assert self._transport is not None  # noqa: S101  (asked of open connections only)
        self._taker = taker
        self.uses += 1
        self.heard = False
        if self._parsed or bodiless:
            self._reset(bodiless=bodiless)
        self._lasting = lasting
        if body and len(body) > MAX_HEAD:
            self._transport.writelines((head, body))
        else:
            self._pool.turn.write(self._transport, head + body if body else head)

    async def write(self, data: bytes) -> None:
        """Send more of the request's body, as fast as the backend takes it."""
        if self.closed or self._taker is None:
            raise ConnectionResetError("the backend has closed the connection")
        self.put(data)
        if self._writing_paused:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def put(self, data: bytes) -> None:
        """The same at once."""
        if self._transport is not None:
            self._transport.write(data)

    def pause(self) -> None:
        """Read no more of the answer for now."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def pass_through(self, through: Callable[[bytes], None]) -> None:
        """From now on whole chunks are not taken apart, but given to `through` as they came. The last one is still the taker's."""
        self._through = through

    def sign(self) -> None:
        """Tell the taker, if bytes came since the last time."""
        if self.fresh and self._taker is not None:
            self.fresh = False
            self._taker.sign()

    @property
    def leaving(self) -> bool:
        """Whether our side is closed and the backend's not yet."""
        return self._gone is not None

    def leave(self) -> asyncio.Future[None] | None:
        """Close our side, as a client does that leaves. The future is done when the backend has closed its own: its work is over.

        llama-server reads a prompt to its end for a client that has left. None where it cannot be known.
        """
        transport = self._transport
        if transport is None or transport.is_closing() or not transport.can_write_eof():
            self.abort()
            return None
        self._pool.turn.flush()
        self._taker = self._through = None  # whatever still comes closes it at once
        loop = asyncio.get_running_loop()
        self._gone = loop.create_future()
        timer = loop.call_later(LEAVING, self.abort)
        self._gone.add_done_callback(lambda _: timer.cancel())
        transport.write_eof()
        return self._gone

    def abort(self) -> None:
        """Close it, whatever is under way: the backend sees its client leave."""
        self._taker = self._through = None
        if self._transport is not None:
            self._transport.abort()

    # --- what the socket does ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are of another family

    def data_received(self, data: bytes) -> None:
        """Bytes of an answer; on an idle connection nobody has asked for any."""
        self.fresh = True
        through = self._through
        if through is not None and self._between:
            size = len(data)
            # Nearly always one whole chunk, which is all that a token costs: so that is looked at here, without another call.
            one = size < COMMON and data.startswith(CHUNK_STARTS[size]) and data.endswith(b"\r\n")
            if one or are_whole_chunks(data):
                # Where the parser stands, between two chunks, it stands behind them as well: so it need not see them.
                through(data)
                return
        if self._taker is None or not self._taker.takes_whole:
            self._read(data)
        elif self._come:
            self._come += data
        else:
            self._come = data
            self._pool.turn.answer(self)

    def received(self) -> None:
        """Its turn has come."""
        data, self._come = self._come, b""
        if data:
            self._read(data)

    def broken(self, error: Exception) -> None:
        """Close it, and tell whoever waits for its answer: that failed."""
        self._fail(error if isinstance(error, OSError) else ConnectionError(str(error) or type(error).__name__))

    def _read(self, data: bytes) -> None:
        taker, parser = self._taker, self._parser
        if taker is None or parser is None:
            self.abort()
            return
        first = not self.heard and taker.takes_whole
        self.heard = True
        if first and (known := self._pool.heads.split(data)) is not None:
            self._taker = None
            self._pool.give_back(self, keep=not self._writing_paused)
            taker.whole(*known)
            return
        if self._tunnel:
            taker.feed(data)
            return
        self._parsed = True
        self._silent += len(data)
        problem = ""
        rest = b""
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            rest = data[upgrade.args[0] :]
        except httptools.HttpParserError as error:
            problem = str(error.__context__ or error) or type(error).__name__
            self._keep = False
        self._between = self._between and data.endswith(b"\r\n")
        head = self._head if first and self._ended and self._keep and not problem else None
        self._hand_on(taker, rest)
        if head is not None:
            self._pool.heads.learn(data, head)
        if problem and self._taker is taker:
            self._fail(BrokenAnswerError(problem))

    def _hand_on(self, taker: Taker, rest: bytes) -> None:
        if self._head is not None and not self._begun:
            self._begun = True
            taker.begin(self._head)
        pieces = self._pieces
        if pieces:
            piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            pieces.clear()
            self._silent = 0
            if self._taker is taker:
                taker.feed(piece)
        elif self._silent > MAX_HEAD and self._taker is taker and not self._tunnel:
            self._fail(BrokenAnswerError(f"more than {MAX_HEAD} bytes of head or framing"))
        if rest and self._taker is taker:
            taker.feed(rest)
        if self._ended and self._taker is taker:
            self._finish()

    def pause_writing(self) -> None:
        """The backend takes no more for now."""
        self._writing_paused = True
        if self._taker is not None:
            self._taker.hold()

    def resume_writing(self) -> None:
        """It takes more."""
        self._writing_paused = False
        self._wake()
        if self._taker is not None:
            self._taker.go_on()

    def connection_lost(self, error: Exception | None) -> None:
        """It is closed. That ends an answer without a length, and breaks any other."""
        self.received()
        self._transport = None
        self._parser = None  # it holds our methods: a ring that would wait for the collector
        self._pool.discard(self)
        self._wake()
        if self._gone is not None and not self._gone.done():
            self._gone.set_result(None)
        taker, self._taker = self._taker, None
        if taker is None:
            return
        if error is None and (self._until_close or self._tunnel):
            taker.finish(())
        elif not self.heard and (self.uses > 1 or self.waited):
            taker.lost(StaleError("the kept connection was closed"))
        else:
            taker.lost(error or ConnectionResetError("it closed the connection before its answer was whole"))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        self._waiter = None

    def _finish(self) -> None:
        taker, self._taker = self._taker, None
        assert taker is not None  # noqa: S101  (asked with one only)
        self._pool.give_back(self, keep=self._keep and not self._writing_paused)
        taker.finish(self._trailer)

    def _fail(self, error: Exception) -> None:
        taker = self._taker
        self.abort()
        if taker is not None:
            taker.lost(error)

    # --- what the parser finds ---

    def on_message_begin(self) -> None:
        """An answer, or one more that nobody has asked for."""
        if self._ended:
            raise BrokenAnswerError("more than one answer to one request")

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, or one line of the trailer."""
        kept = self._trailer if self._head is not None else self._fields
        kept.append((name, value))
        if len(kept) > MAX_FIELDS:
            raise BrokenAnswerError(f"more than {MAX_FIELDS} headers")

    def on_headers_complete(self) -> None:
        """The head is whole: what follows it depends on it."""
        assert self._parser is not None  # noqa: S101
        status = self._parser.get_status_code()
        if status < 200 and status != 101:
            self._interim, self._fields = True, []
            return
        chunked, length = framing(self._fields)
        empty = self._bodiless or status in (204, 304)
        self._head = Head(status=status, fields=self._fields, length=length)
        self._tunnel = status == 101
        self._until_close = not (chunked or empty or self._tunnel or length is not None)
        # After a chunked answer llama-server's connection is at its end, though it does not say so.
        self._keep = not ((chunked and not self._lasting) or self._until_close or self._tunnel or self._bodiless)
        self._ended = self._bodiless
        self._between = chunked

    def on_chunk_header(self) -> None:
        """A chunk has begun."""
        self._between = False

    def on_chunk_complete(self) -> None:
        """It is whole."""
        self._between = True

    def on_body(self, piece: bytes) -> None:
        """A piece of the body."""
        if self._interim:
            raise BrokenAnswerError("an interim answer with a body")
        if not self._ended:
            self._pieces.append(piece)

    def on_message_complete(self) -> None:
        """The answer is whole, or only an interim one was."""
        if self._interim:
            self._interim = False
            return
        assert self._parser is not None  # noqa: S101
        self._keep = self._keep and self._parser.should_keep_alive()
        self._ended = not self._tunnel
