"""The byte path: one request on one leased instance, its answer passed on as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from offloadd.errors import RequestError, error_body
from offloadd.proxy import upstream
from offloadd.proxy.account import Account
from offloadd.proxy.dialects import sse
from offloadd.proxy.dialects.base import Change
from offloadd.proxy.leases import Lease
from offloadd.units import Seconds

T = TypeVar("T")

MAX_BUFFERED = 64 * 2**20
"""An answer that is not a stream is held whole up to this size, so that a backend's death gives a clean error."""
_LAST_BYTES = Seconds(0.2)
"""After a backend has ended, what it sent before is still in the socket: so long we go on reading."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request as it goes to a backend. `path` begins with a slash and may carry a query, already encoded."""

    method: str
    path: str
    headers: CIMultiDict[str]
    account: Account
    body: bytes | AsyncIterator[bytes] | None = None
    by_path: bool = False
    """Asked for under `/upstream/`: the answer goes back as it is, refusals too."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A backend's whole answer."""

    status: int
    headers: CIMultiDict[str]
    body: bytes


class BackendLostError(RequestError):
    """The backend ended or broke the connection before its answer was whole."""

    def __init__(self, lease: Lease, why: str) -> None:
        host = lease.host
        message = f"the backend {host.instance} ({host.backend}) was lost: {why}"
        super().__init__(502, "backend_lost", message, retry_after=Seconds(1))


async def until_revoked(lease: Lease, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, unless the lease is revoked; BackendLostError then, and also when the backend breaks the connection."""
    task = asyncio.ensure_future(work)
    try:
        either: set[asyncio.Future[Any]] = {task, lease.revoked}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            await asyncio.wait({task}, timeout=_LAST_BYTES)
        if not task.done():
            raise BackendLostError(lease, lease.revoked.result())
        return task.result()
    except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
        raise BackendLostError(lease, await _reason(lease, error)) from None
    except sse.BrokenStreamError as error:
        raise RequestError(502, "bad_answer", f"{lease.host.instance} sent what cannot be understood: {error}") from None
    finally:
        task.cancel()
        # Also when it is done: if we are cancelled in the moment in which it fails, nobody else asks for its error.
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def send(session: aiohttp.ClientSession, lease: Lease, call: Call) -> AsyncIterator[aiohttp.ClientResponse]:
    """Send the request; the connection is closed on leaving, which ends the backend's work on a stream."""
    url = lease.host.endpoint.url + call.path
    call.account.sent = True
    async with session.request(
        call.method, URL(url, encoded=True), data=call.body, headers=call.headers, allow_redirects=False
    ) as response:
        yield response


async def read_whole(lease: Lease, call: Call, response: aiohttp.ClientResponse) -> Answer:
    """The backend's whole answer, bounded."""
    parts: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        lease.host.sign()
        call.account.tap.feed(chunk)
        size = bounded(size + len(chunk))
        parts.append(chunk)
    return Answer(response.status, upstream.to_client(response.headers), b"".join(parts))


def bounded(size: int) -> int:
    """The size, as long as an answer of it may be held whole; RequestError 502 beyond."""
    if size > MAX_BUFFERED:
        raise RequestError(502, "answer_too_large", f"the backend's answer is larger than {MAX_BUFFERED} bytes")
    return size


class Stream:
    """An answer on its way to a client. Once it has begun, a failure is told in the stream itself."""

    def __init__(self, request: web.Request, origin: CIMultiDict[str], change: Change | None = None) -> None:
        self._request = request
        self._origin = origin
        self._change = change
        self._response: web.StreamResponse | None = None

    @property
    def response(self) -> web.StreamResponse:
        """The response that has begun."""
        assert self._response is not None  # noqa: S101  (asked for after `copy` only)
        return self._response

    async def copy(self, lease: Lease, call: Call, response: aiohttp.ClientResponse) -> None:
        """Pass the body on chunk by chunk, each as soon as it comes; a dialect may change it."""
        change, target = self._change, await self._begin(response)
        async for chunk in response.content.iter_any():
            lease.host.sign()
            call.account.tap.feed(chunk)
            passed = chunk if change is None else change.feed(chunk)
            if passed:
                await target.write(passed)
        if change is not None and (passed := change.end()):
            await target.write(passed)

    async def end(self) -> web.StreamResponse:
        """The answer is whole."""
        await self.response.write_eof()
        return self.response

    async def fail(self, error: RequestError, account: Account) -> web.StreamResponse:
        """Say in the stream that it broke off: an `error` event, and no `[DONE]`. Before its begin, the error is the answer."""
        if self._response is None:
            raise error
        account.broken, account.reason = True, error.message
        if self._change is not None:
            await self._response.write(self._change.fail(error))
            return await self.end()
        if "text/event-stream" not in self._response.headers.get("Content-Type", ""):
            # Only a connection that breaks tells the reader of anything else that it is not whole.
            if self._request.transport is not None:
                self._request.transport.abort()
            return self._response
        body = error_body(error.status, error.code, error.message)
        await self._response.write(b"\n\n" + sse.event(body))
        return await self.end()

    async def _begin(self, response: aiohttp.ClientResponse) -> web.StreamResponse:
        headers = upstream.to_client(response.headers)
        if self._change is not None:
            headers["Content-Type"] = self._change.media_type
        headers.extend(self._origin)
        self._response = web.StreamResponse(status=response.status, headers=headers)
        await self._response.prepare(self._request)
        return self._response


async def _reason(lease: Lease, error: BaseException) -> str:
    """A broken connection is seen a moment before the process's end is: wait that moment for the better reason."""
    await asyncio.wait({lease.revoked}, timeout=_LAST_BYTES)
    return lease.revoked.result() if lease.revoked.done() else str(error) or type(error).__name__
