"""Connections to instances: kept alive where that is safe, their answers parsed and handed on as they come.

No coroutine wakes for a piece of an answer: the socket's callback parses it and calls whoever takes the answer.
"""

from __future__ import annotations

import asyncio
import functools
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import httptools

from offloadd.proxy.headers import BrokenAnswerError, Fields
from offloadd.state.launch import Endpoint

CONNECT_TIMEOUT = 5.0
IDLE_LIMIT = 4.0
"""llama-server and uvicorn close a connection that has been idle for 5 s, and say nothing."""
USES = 100
"""llama-server closes a connection after so many requests."""
MAX_IDLE = 256
"""Connections kept for one instance."""
MAX_HEAD = 64 * 1024
"""An answer's head, or its trailer, or any framing between two pieces of its body, is not longer."""
MAX_FIELDS = 256
LEAVING = 60.0
"""So long a backend is given to notice that its client has left, where it cannot be interrupted at once."""
SIGN_EVERY = 1.0
"""How often instances that have sent bytes are said to be alive."""
_LONGEST_SIZE = 7
"""Digits of a chunk's size in its plainest form."""
_CHUNK = re.compile(rb"([0-9a-fA-F]{1,%d})\r\n" % _LONGEST_SIZE)


class StaleError(ConnectionError):
    """A connection that had been kept was closed before a byte of the answer came: the request may be sent again on a new one."""


@dataclass(slots=True, kw_only=True)
class Head:
    """The head of an answer. `length` is None when its end is told otherwise."""

    status: int
    fields: Fields
    length: int | None


class Taker(Protocol):
    """Who takes one answer. `finish` or `lost` comes last, and once."""

    def begin(self, head: Head) -> None:
        """Its head is here."""
        ...

    def feed(self, piece: bytes) -> None:
        """A piece of its body."""
        ...

    def finish(self, trailer: Fields) -> None:
        """It is whole."""
        ...

    def lost(self, error: Exception) -> None:
        """It will not be."""
        ...

    def sign(self) -> None:
        """Bytes came lately."""
        ...

    def hold(self) -> None:
        """The backend takes no more for now."""
        ...

    def go_on(self) -> None:
        """It takes more again."""
        ...


class Connection(asyncio.Protocol):
    """One connection to an instance, with one request on it at a time."""

    __slots__ = (
        "_begun",
        "_between",
        "_bodiless",
        "_ended",
        "_fields",
        "_gone",
        "_head",
        "_interim",
        "_keep",
        "_parser",
        "_pieces",
        "_pool",
        "_seen",
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
    )

    def __init__(self, pool: Pool, key: str) -> None:
        self.key = key
        self.uses = 0
        self.since = 0.0
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
        self._reset(bodiless=False)

    def _reset(self, *, bodiless: bool) -> None:
        self._bodiless = bodiless
        self._begun = self._ended = self._interim = self._keep = self._until_close = self._tunnel = self.heard = False
        self._head: Head | None = None
        self._fields: list[tuple[bytes, bytes]] = []
        self._trailer: list[tuple[bytes, bytes]] = []
        self._silent = 0
        self._between = False
        self._through: Callable[[bytes], None] | None = None
        self._seen: Callable[[bytes], None] | None = None

    # --- what the owner does ---

    @property
    def closed(self) -> bool:
        """Whether nothing can be sent on it any more."""
        return self._transport is None or self._transport.is_closing()

    def send(self, taker: Taker, head: bytes, body: bytes | None, *, bodiless: bool) -> None:
        """Send one request. `bodiless`: its answer has no body, whatever its head says."""
        assert self._transport is not None  # noqa: S101  (asked of open connections only)
        self._taker = taker
        self.uses += 1
        self._reset(bodiless=bodiless)
        if body and len(body) > MAX_HEAD:
            self._transport.writelines((head, body))
        else:
            self._transport.write(head + body if body else head)

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

    def pass_through(self, seen: Callable[[bytes], None], write: Callable[[bytes], None]) -> None:
        """From now on whole chunks are not taken apart, but given to `seen` and to `write` as they came.

        The last chunk is still the taker's.
        """
        self._seen, self._through = seen, write

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
        self._taker = self._through = self._seen = None  # whatever still comes closes it at once
        loop = asyncio.get_running_loop()
        self._gone = loop.create_future()
        timer = loop.call_later(LEAVING, self.abort)
        self._gone.add_done_callback(lambda _: timer.cancel())
        transport.write_eof()
        return self._gone

    def abort(self) -> None:
        """Close it, whatever is under way: the backend sees its client leave."""
        self._taker = self._through = self._seen = None
        if self._transport is not None:
            self._transport.abort()

    # --- what the socket does ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are of another family

    def data_received(self, data: bytes) -> None:
        """Bytes of an answer; on an idle connection nobody has asked for any."""
        self.fresh = True
        seen, write = self._seen, self._through
        if self._between and write is not None and seen is not None:
            # Nearly always one whole chunk, which is all that a token costs: so that is looked at here, without another call.
            end = data.find(b"\r\n", 1, _LONGEST_SIZE + 2)
            one = end > 0 and _chunk_size(data[:end]) == len(data) - end - 4 and data.endswith(b"\r\n")
            if one or _are_whole_chunks(data):
                # Where the parser stands, between two chunks, it stands behind them as well: so it need not see them.
                seen(data)
                write(data)
                return
        taker, parser = self._taker, self._parser
        if taker is None or parser is None:
            self.abort()
            return
        self.heard = True
        if self._tunnel:
            taker.feed(data)
            return
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
        self._hand_on(taker, rest)
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
        elif not self.heard and self.uses > 1:
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
        chunked, length = _framing(self._fields)
        empty = self._bodiless or status in (204, 304)
        self._head = Head(status=status, fields=self._fields, length=length)
        self._tunnel = status == 101
        self._until_close = not (chunked or empty or self._tunnel or length is not None)
        # After a chunked answer llama-server's connection is at its end, though it does not say so.
        self._keep = not (chunked or self._until_close or self._tunnel or self._bodiless)
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


@functools.lru_cache(maxsize=4096)  # chunks of tokens have few sizes
def _chunk_size(digits: bytes) -> int | None:
    """The size that a chunk's first line says; None for the last chunk, and for anything but plain digits."""
    return int(digits, 16) or None if re.fullmatch(rb"[0-9a-fA-F]+", digits) else None


def _are_whole_chunks(data: bytes) -> bool:
    """Whether the bytes are whole chunks in their plainest form, and none of them the last one."""
    place, end = 0, len(data)
    while place < end:
        found = _CHUNK.match(data, place)
        if found is None:
            return False
        size = int(found[1], 16)
        place = found.end() + size + 2
        if size == 0 or place > end or data[place - 2 : place] != b"\r\n":
            return False
    return True


def _framing(fields: Fields) -> tuple[bool, int | None]:
    """Whether the body is chunked, and its length where one is given. What could be read in two ways is refused."""
    coded: list[bytes] = []
    sizes: set[bytes] = set()
    for name, value in fields:
        if len(name) == 14 and name.lower() == b"content-length":
            sizes.add(value.strip())
        elif len(name) == 17 and name.lower() == b"transfer-encoding":
            coded.append(value.strip().lower())
    if coded and (coded != [b"chunked"] or sizes):
        raise BrokenAnswerError("its transfer encoding is not plainly chunked")
    size = sizes.pop() if sizes else None
    if sizes or (size is not None and not size.isdigit()):
        raise BrokenAnswerError("its length is not one number")
    return bool(coded), None if size is None else int(size)


class Pool:
    """Kept connections, by instance."""

    def __init__(self) -> None:
        self._idle: dict[str, list[Connection]] = {}
        self._open: set[Connection] = set()
        self._sweep: asyncio.TimerHandle | None = None
        self._signing: asyncio.TimerHandle | None = None

    def idle(self, endpoint: Endpoint) -> Connection | None:
        """A kept connection that may still be open, the one used last."""
        kept = self._idle.get(_key(endpoint))
        oldest = asyncio.get_running_loop().time() - IDLE_LIMIT
        while kept:
            connection = kept.pop()
            if not connection.closed and connection.since > oldest:
                return connection
            connection.abort()
        return None

    async def connect(self, endpoint: Endpoint) -> Connection:
        """A new connection; OSError or TimeoutError when there is none to be had."""
        loop = asyncio.get_running_loop()
        key = _key(endpoint)
        connection = Connection(self, key)
        async with asyncio.timeout(CONNECT_TIMEOUT):
            if endpoint.host.startswith("/"):
                await loop.create_unix_connection(lambda: connection, endpoint.host)
            else:
                secure = _certified() if endpoint.tls else None
                await loop.create_connection(lambda: connection, endpoint.host, endpoint.port, ssl=secure)
        self._open.add(connection)
        if self._signing is None:
            self._signing = loop.call_later(SIGN_EVERY, self._sign)
        return connection

    def give_back(self, connection: Connection, *, keep: bool) -> None:
        """Its answer is whole: keep it for the next request, or close it."""
        kept = self._idle.setdefault(connection.key, [])
        if not keep or connection.uses >= USES or connection.closed or len(kept) >= MAX_IDLE:
            connection.abort()
            return
        loop = asyncio.get_running_loop()
        connection.since = loop.time()
        kept.append(connection)
        if self._sweep is None:
            self._sweep = loop.call_later(IDLE_LIMIT, self._close_old)

    def discard(self, connection: Connection) -> None:
        """It is closed."""
        self._open.discard(connection)
        kept = self._idle.get(connection.key)
        if kept and connection in kept:
            kept.remove(connection)

    def forget(self, endpoint: Endpoint) -> None:
        """Close what is kept for an instance that is to end: some servers wait for their clients to leave."""
        key = _key(endpoint)
        leaving = [connection for connection in self._open if connection.leaving and connection.key == key]
        for connection in [*self._idle.pop(key, []), *leaving]:
            connection.abort()

    def close(self) -> None:
        """Close every connection."""
        for timer in (self._sweep, self._signing):
            if timer is not None:
                timer.cancel()
        self._idle.clear()
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
        loop = asyncio.get_running_loop()
        oldest = loop.time() - IDLE_LIMIT
        for key, kept in list(self._idle.items()):
            fresh = [connection for connection in kept if connection.since > oldest]
            for connection in kept:
                if connection.since <= oldest:
                    connection.abort()
            self._idle[key] = fresh
            if not fresh:
                del self._idle[key]
        if self._idle:
            self._sweep = loop.call_later(IDLE_LIMIT, self._close_old)


def authority(endpoint: Endpoint) -> str:
    """What the `Host` header calls an instance."""
    return "localhost" if endpoint.host.startswith("/") else endpoint.authority


@functools.cache
def _certified() -> ssl.SSLContext:
    """What this machine trusts."""
    return ssl.create_default_context()


def _key(endpoint: Endpoint) -> str:
    return f"{endpoint.host}:{endpoint.port}"
