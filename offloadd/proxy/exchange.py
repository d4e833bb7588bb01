"""The byte path: one request on one leased instance, its answer handed on as it comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from offloadd.errors import RequestError
from offloadd.proxy import headers
from offloadd.proxy.answer_heads import Head
from offloadd.proxy.calls import BackendLostError, Call, origin
from offloadd.proxy.dialects import sse
from offloadd.proxy.dialects.refusals import engine_error
from offloadd.proxy.dialects.wires import Exchanged
from offloadd.proxy.headers import Fields
from offloadd.proxy.hedging import Hedge
from offloadd.proxy.lease import Lease
from offloadd.proxy.leases import LeaseBook
from offloadd.proxy.pool import Pool
from offloadd.proxy.taker import StaleError
from offloadd.proxy.upstream import Connection
from offloadd.state.launch import Endpoint
from offloadd.units import Seconds

MAX_BUFFERED = 64 * 2**20
"""An answer that is not a stream is held whole up to this size, so that a backend's death gives a clean error."""
_ELSEWHERE = frozenset({"backend_lost", "backend_busy"})
"""What another instance may do better."""
_AILING = _ELSEWHERE | {"bad_answer"}
"""What speaks against an instance. An engine's own 500 may be a request's fault."""
Over = Callable[[Exception | None], None]
LAST_BYTES = Seconds(0.2)
"""After a backend has ended, what it sent before is still in the socket: so long we go on reading."""


class Exchange:
    """Sends a call to the leased instance and takes its answer. Subclasses say what becomes of it.

    All of it happens in the sockets' callbacks; `run` only waits for the end.
    """

    def __init__(self, pool: Pool, book: LeaseBook, lease: Lease, call: Call) -> None:
        self._pool = pool
        self._book = book
        self._lease = lease
        self._call = call
        self.sign = lease.host.sign
        """Says that the instance is alive."""
        self._tap = call.account.tap
        self._connection: Connection | None = None
        self._parts: list[bytes] = []

    # What most requests never change is set once for all of them.
    _done: asyncio.Future[None] | None = None
    """For whoever waits in `run`."""
    _timer: asyncio.TimerHandle | None = None
    _refusal: Head | None = None
    _size = 0
    _sent = False
    _begun = False
    _exchanged: Exchanged | None = None
    """Turns an engine's own JSON into OpenAI's, where it has one."""
    _hedge: Hedge | None = None
    _over: Over | None = None

    def start(self, over: Over) -> bool:
        """Send at once, on a kept connection; False when there is none. `over` is called when the answer is whole, or is lost.

        In the first case `close` is called next. In the other the rest is `run`'s, which is given what `over` was.
        """
        kept = self._pool.idle(self._lease.host)
        if kept is None:
            return False
        self._over = over
        self._heed()
        self._put(kept, self._call)
        return True

    def adopt(self, connection: Connection | None, over: Over) -> None:
        """As `start`, where it has been sent already, on this connection; None where that has been given back."""
        self._over = over
        self._heed()
        self._connection = connection
        self._call.account.sent = self._sent = True

    def close(self) -> None:
        """The answer is whole."""
        self._heed_no_more()
        self._let_go()
        self._book.memory.well(self._lease.host.instance)

    def cancel(self) -> None:
        """The client of what was started has left, which ends the backend's work."""
        self._over = None
        self._leave()
        self._heed_no_more()
        self._let_go()

    async def run(self, lost: Exception | None = None) -> None:
        """Return when the answer is whole; RequestError says what went wrong. Whoever is cancelled here ends the backend's work.

        What fails before a byte of the answer is here may go to another instance, once. `lost` is how a `start` has failed.
        """
        self._done = asyncio.get_running_loop().create_future()
        try:
            await self._run(lost)
        except BaseException:
            # An error that it holds knows where it was raised, which is in here: a ring that would keep the request and its body.
            self._done = asyncio.get_running_loop().create_future()
            self._done.cancel()
            raise
        finally:
            lost = None
            self._end_hedge()

    async def _run(self, lost: Exception | None) -> None:
        while True:
            try:
                await self._once(lost)
            except RequestError as error:
                if error.code in _AILING:
                    self._book.memory.ill(self._lease.host.instance)
                if self._lease.died and self._call.body:
                    self._book.suspects.died(self._lease.host.instance.model, self._call.body)
                if isinstance(error, BackendLostError):
                    error.suspect = self._lease.died and self._sent and not self._lease.crowded
                if not self._may_move(error) or not self._move(error.message):
                    raise
                self._call.account.moved = True
                self._reset()
                lost = None
            else:
                self._book.memory.well(self._lease.host.instance)
                return

    def _move(self, why: str) -> bool:
        """To the instance that was asked too, if there is one, else to one that was not."""
        if self._hedge is not None and self._hedge.take_over(why):
            return True
        self._end_hedge()
        return self._book.move(self._lease, why)

    def _may_move(self, error: RequestError) -> bool:
        """Whether another instance may be asked. What was alone on one that died is the likeliest to have killed it."""
        if self._begun or self._call.account.moved or self._call.upload is not None or error.code not in _ELSEWHERE:
            return False
        return not self._sent or self._lease.crowded or error.code == "backend_busy"

    async def _once(self, lost: Exception | None) -> None:
        if lost is None:
            self._heed()
        try:
            await self._attempt(lost)
        except asyncio.CancelledError:
            self._leave()
            raise
        except (OSError, TimeoutError) as error:
            raise BackendLostError(self._lease, await _reason(self._lease, error)) from None
        except (sse.BrokenStreamError, headers.BrokenAnswerError) as error:
            message = f"{self._lease.host.instance} sent what cannot be understood: {error}"
            raise RequestError(502, "bad_answer", message) from None
        finally:
            self._heed_no_more()
            self._let_go()

    def _reset(self) -> None:
        self._done = asyncio.get_running_loop().create_future()
        self._timer = self._refusal = None
        self._sent = False
        self._parts, self._size = [], 0
        self.sign = self._lease.host.sign

    async def _attempt(self, lost: Exception | None) -> None:
        if lost is not None:
            await self._again(lost)
            return
        if self._hedge is not None and self._hedge.ahead:
            self._sent = True
            self._hedge.resume()
            await self._waited()
            return
        host = self._lease.host
        self._exchanged = _exchanged(self._lease, self._call)
        kept = self._pool.idle(host)
        if kept is not None:
            try:
                await self._send(kept)
            except StaleError as stale:
                await self._again(stale)
            return
        await self._send(await self._pool.connect(host))

    async def _again(self, lost: Exception) -> None:
        """On a new connection, if the kept one had been closed: what it was sent nobody had. Else what was lost is lost."""
        if not isinstance(lost, StaleError) or self._call.upload is not None:
            raise lost
        self._end_hedge()
        self._done = asyncio.get_running_loop().create_future()
        self._sent = False  # whoever is gone by now did not die of it
        await self._send(await self._pool.connect(self._lease.host))

    def _waited(self) -> asyncio.Future[None]:
        assert self._done is not None  # noqa: S101  (`run` makes it)
        return self._done

    def _put(self, connection: Connection, call: Call) -> None:
        self._connection = connection
        call.account.sent = self._sent = True
        host = self._lease.host
        connection.send(self, call.head(host.endpoint), call.body, bodiless=call.method == "HEAD", lasting=host.api.lasting)

    async def _send(self, connection: Connection) -> None:
        call, changed = self._call, self._exchanged
        if changed is not None:
            call = replace(call, path=changed.path, body=changed.body)
        self._put(connection, call)
        if call.upload is None:
            self._begin_hedge(call)
            await self._waited()
            return
        upload = asyncio.create_task(self._upload(connection, call.upload))
        try:
            await self._waited()
        finally:
            upload.cancel()
            await asyncio.gather(upload, return_exceptions=True)

    async def _upload(self, connection: Connection, pieces: AsyncIterator[bytes]) -> None:
        chunked = self._call.length is None
        try:
            async for piece in pieces:
                if piece:
                    await connection.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            if chunked:
                await connection.write(b"0\r\n\r\n")
        except ConnectionError:
            pass  # the backend wants no more: its answer says why, or its close does
        except Exception as error:  # noqa: BLE001  (for whoever waits in `run`)
            self._fail(error)

    def _begin_hedge(self, call: Call) -> None:
        """`call` is in the words of the engine, which is the other's too."""
        after = self._lease.hedge_after
        if after is None or call.by_path or call.body is None or call.account.moved or call.account.hedged:
            return

        def message(endpoint: Endpoint) -> tuple[bytes, bytes | None]:
            return call.head(endpoint), call.body

        self._hedge = Hedge(self._pool, self._book, self._lease, call.account, self, message, after)

    def _end_hedge(self) -> None:
        hedge, self._hedge = self._hedge, None
        if hedge is not None:
            hedge.close()

    def _heed(self) -> None:
        """Be told when the instance goes away."""
        self._lease.told = self._revoked
        if self._lease.is_revoked:
            self._revoked()

    def _heed_no_more(self) -> None:
        self._lease.told = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _revoked(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LAST_BYTES, self._give_up)

    def _give_up(self) -> None:
        self._fail(BackendLostError(self._lease, self._lease.revoked.result()))

    def _leave(self) -> None:
        """The client has left before the answer began: what the backend still does for it counts until it has stopped."""
        if self._sent and not self._begun and self._connection is not None:
            self._lease.over, self._connection = self._connection.leave(), None

    def _let_go(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()
        done = self._done
        if done is not None and done.done() and not done.cancelled():
            done.exception()  # nobody may be left to ask for it

    def _fail(self, error: Exception) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()
        self._break(error)

    def _break(self, error: Exception) -> None:
        if self._hedge is not None:
            self._hedge.wait()
        self._settle(error)

    def _settle(self, error: Exception | None) -> None:
        """Tell whoever waits, once."""
        over, self._over = self._over, None
        if over is not None:
            over(error)
        elif self._done is not None and not self._done.done():
            if error is None:
                self._done.set_result(None)
            else:
                self._done.set_exception(error)

    # --- what the connection tells ---

    takes_whole = False

    def whole(self, head: Head, body: bytes) -> None:
        """All of it at once."""
        self.begin(head)
        self.feed(body)
        self.finish(())

    def begin(self, head: Head) -> None:
        """The answer's head. What an engine refuses is read whole, to be said in our words."""
        self.sign()
        if head.status >= 400 and not self._call.by_path:
            self._refusal = head
            return
        try:
            if head.status == 101 and not self._call.upgrade:
                raise headers.BrokenAnswerError("it changes the protocol, which nobody asked for")
            self._begun = True
            if self._hedge is not None:
                self._hedge.settle()
            self._begin(head if self._exchanged is None else _announcing(head, self._exchanged))
        except Exception as error:  # noqa: BLE001  (for whoever waits in `run`)
            self._fail(error)

    def feed(self, piece: bytes) -> None:
        """A piece of its body."""
        if self._exchanged is not None:
            self._feed_changed(piece)
            return
        self._tap.feed(piece)
        try:
            if self._refusal is not None:
                self._keep(piece)
            else:
                self._feed(piece)
        except Exception as error:  # noqa: BLE001  (for whoever waits in `run`)
            self._fail(error)

    def finish(self, trailer: Fields) -> None:
        """It is whole."""
        self._connection = None
        try:
            if self._refusal is not None:
                raise self._refused(self._refusal)
            if self._exchanged is not None:
                self._take_changed(self._last_of(self._exchanged))
            self._end(trailer)
        except Exception as error:  # noqa: BLE001  (for whoever waits in `run`)
            self._fail(error)
            return
        self._settle(None)

    def _feed_changed(self, piece: bytes) -> None:
        """The same of an engine with JSON of its own. What is counted is what it becomes."""
        changed = self._exchanged
        assert changed is not None  # noqa: S101  (whoever calls has looked)
        try:
            if self._refusal is not None:
                self._keep(piece)
            else:
                self._take_changed(changed.feed(piece))
        except Exception as error:  # noqa: BLE001  (for whoever waits in `run`)
            self._fail(error)

    def _take_changed(self, piece: bytes) -> None:
        if piece:
            self._tap.feed(piece)
            self._feed(piece)

    def _last_of(self, changed: Exchanged) -> bytes:
        try:
            return changed.end()
        except RequestError as error:
            error.origin = origin(self._lease)
            raise

    def lost(self, error: Exception) -> None:
        """It will not be."""
        self._connection = None
        self._break(error)

    def follow(self, connection: Connection) -> asyncio.Future[None] | None:
        """The answer comes on this connection from now on, and from the instance that the lease has now."""
        first, self._connection = self._connection, connection
        self._refusal, self._parts, self._size = None, [], 0
        self.sign = self._lease.host.sign
        self._heed_no_more()
        self._heed()
        return first.leave() if first is not None else None

    def hold(self) -> None:
        """An upload waits by itself."""

    def go_on(self) -> None:
        """And goes on by itself."""

    # --- what subclasses do ---

    def _begin(self, head: Head) -> None:
        """Take the head of an answer that is no refusal."""
        raise NotImplementedError

    def _feed(self, piece: bytes) -> None:
        """Take a piece of its body."""
        raise NotImplementedError

    def _end(self, trailer: Fields) -> None:
        """Take its end."""
        raise NotImplementedError

    def _keep(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > MAX_BUFFERED:
            raise RequestError(502, "answer_too_large", f"the backend's answer is larger than {MAX_BUFFERED} bytes")
        self._parts.append(piece)

    def _refused(self, head: Head) -> RequestError:
        retry_after = headers.field(head.fields, b"retry-after").decode("latin-1")
        body = b"".join(self._parts)
        if self._exchanged is not None:
            body = self._exchanged.refusal(body)
        error = engine_error(head.status, body, self._call.path, retry_after)
        error.origin = origin(self._lease)
        return error


def _exchanged(lease: Lease, call: Call) -> Exchanged | None:
    """The call in the words of an engine with JSON of its own; None where none is needed, as for what is asked by path."""
    wire = lease.host.api.wire
    if wire is None or call.by_path or call.body is None:
        return None
    return Exchanged(wire, call.path, sse.decode(call.body), int(time.time()))


def _announcing(head: Head, changed: Exchanged) -> Head:
    """The head of an answer, with the type of what it becomes."""
    kept = tuple(pair for pair in head.fields if pair[0].lower() != b"content-type")
    return replace(head, fields=(*kept, (b"Content-Type", changed.media_type)), length=None)


async def _reason(lease: Lease, error: BaseException) -> str:
    """A broken connection is seen a moment before the process's end is: wait that moment for the better reason."""
    await asyncio.wait({lease.revoked}, timeout=LAST_BYTES)
    return lease.revoked.result() if lease.revoked.done() else str(error) or type(error).__name__
