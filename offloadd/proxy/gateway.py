"""Handlers of the inference paths: find the model, get a lease, relay, give the lease back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import msgspec
from aiohttp import web
from multidict import CIMultiDict

from offloadd.errors import RequestError
from offloadd.proxy import relay, routing, upstream
from offloadd.proxy.account import Accounts
from offloadd.proxy.dialects import openai, plain, sse
from offloadd.proxy.dialects.base import Change, Gathering, Translation
from offloadd.proxy.dialects.refusals import engine_error, event_error
from offloadd.proxy.leases import Lease, LeaseBook
from offloadd.state.desired import DesiredState, ModelSpec
from offloadd.state.ids import BackendName

FORWARDED = (openai.CHAT, openai.COMPLETIONS, "/v1/embeddings")
"""POST paths that go to the model named in the body, as they are."""


class Gateway:
    """Routes inference to instances. `desired` gives the config in force at each request."""

    def __init__(
        self,
        *,
        book: LeaseBook,
        desired: Callable[[], DesiredState],
        session: aiohttp.ClientSession,
        cancels_only_streams: Callable[[BackendName], bool],
        request_id: Callable[[web.Request], str],
        accounts: Accounts,
        may_use: Callable[[ModelSpec], bool],
    ) -> None:
        """`may_use` says whether the caller of the present request is allowed a model."""
        self._book = book
        self._desired = desired
        self._session = session
        self._cancels_only_streams = cancels_only_streams
        self._request_id = request_id
        self._accounts = accounts
        self._may_use = may_use
        self._names: tuple[DesiredState, routing.Names] | None = None
        self._lingering: set[asyncio.Task[None]] = set()

    def routes(self) -> list[web.RouteDef]:
        """The paths of the data plane."""
        self._accounts.know("openai", *FORWARDED)
        self._accounts.know("plain", "/inference")
        self._accounts.know("upstream", "/upstream/{model}/{path}")
        return [
            *(web.post(path, self.forward) for path in FORWARDED),
            web.post("/inference", self.inference),
            web.route("*", "/upstream/{model}/{path:.*}", self.by_path),
        ]

    async def close(self) -> None:
        """Wait for nothing: drop what still runs for clients that have left."""
        for task in self._lingering:
            task.cancel()
        await asyncio.gather(*self._lingering, return_exceptions=True)

    def find(self, name: str | None) -> ModelSpec:
        """The model that a name or alias means now, if the caller may use it."""
        desired = self._desired()
        if self._names is None or self._names[0] is not desired:
            self._names = (desired, routing.Names.of(desired))
        spec = self._names[1].find(name)
        if not self._may_use(spec):
            raise RequestError(403, "model_not_allowed", f"this key may not use {spec.name}", param="model")
        return spec

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/…`: the body goes on as it is, save for the model's `request` rules."""
        raw = await request.read()
        head = routing.read_head(raw)
        spec = self.find(head.model)
        routing.check_backend(spec, head.backend)
        body = routing.apply_rules(spec.request, raw)
        async with self._leased(spec, backend=head.backend) as held:
            if routing.read_head(body).stream:
                return await self._stream(request, held.lease, self._call(request, held.lease, request.path, body))
            return await self._whole(request, held, request.path, body)

    async def inference(self, request: web.Request) -> web.StreamResponse:
        """`POST /inference`: the plain shape, streaming or not."""
        raw = await request.read()
        head = routing.read_head(raw)
        spec = self.find(head.model)
        routing.check_backend(spec, head.backend)
        path, wanted = plain.translate(routing.read_object(routing.apply_rules(spec.request, raw)))
        async with self.leased(spec, backend=head.backend) as lease:
            origin = {"model": spec.name, "backend": lease.host.backend, "instance": str(lease.host.instance)}
            translation = Translation(
                path=path,
                body=openai.as_stream(wanted),
                change=lambda: plain.PlainStream(origin),
                gather=lambda: openai.Collector(path),
                whole=lambda answer: plain.answer(answer, origin),
            )
            return await self.converse(request, lease, translation, stream=bool(head.stream))

    async def converse(self, request: web.Request, lease: Lease, translation: Translation, *, stream: bool) -> web.StreamResponse:
        """A translated request on a leased instance. Its answer is fetched as a stream, which ends when the client leaves."""
        call = _json(self._call(request, lease, translation.path, msgspec.json.encode(translation.body)))
        if stream:
            return await self._stream(request, lease, call, translation.change(), translation.headers)
        gathering = translation.gather()
        await relay.until_revoked(lease, self._gather(lease, call, gathering))
        answer = msgspec.json.encode(translation.whole(gathering.answer()))
        return web.json_response(body=answer, headers={**self._origin(lease), **translation.headers})

    async def ask(self, request: web.Request, lease: Lease, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A small question that an engine answers at once; RequestError when it refuses."""
        call = _json(self._call(request, lease, path, msgspec.json.encode(body)))
        return sse.decode((await relay.until_revoked(lease, self._read(lease, call))).body)

    @asynccontextmanager
    async def leased(self, spec: ModelSpec, *, backend: str | None = None) -> AsyncIterator[Lease]:
        """An instance of the model, held until the block ends."""
        async with self._leased(spec, backend=backend) as held:
            yield held.lease

    async def by_path(self, request: web.Request) -> web.StreamResponse:
        """`/upstream/{model}/{path}`: anything else that one model's server offers."""
        if request.headers.get("Upgrade"):
            raise RequestError(501, "upgrade_not_supported", "this version of offloadd does not relay WebSockets yet")
        raw_path = "/" + request.rel_url.raw_path.split("/", 3)[3]
        query = f"?{request.rel_url.raw_query_string}" if request.rel_url.raw_query_string else ""
        body = await request.read() if request.can_read_body else None
        spec = self.find(request.match_info["model"])
        lease = self._book.borrow(spec) if request.method in ("GET", "HEAD") else None
        async with self._leased(spec, lease) as held:
            call = replace(self._call(request, held.lease, raw_path + query, body), by_path=True)
            return await self._stream(request, held.lease, call)

    async def _stream(
        self,
        request: web.Request,
        lease: Lease,
        call: relay.Call,
        change: Change | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> web.StreamResponse:
        call.account.streamed = not call.by_path
        origin = self._origin(lease)
        origin.update(headers or {})
        stream = relay.Stream(request, origin, change)
        try:
            await relay.until_revoked(lease, self._copy(stream, lease, call))
        except RequestError as error:
            return await stream.fail(error, call.account)
        return await stream.end()

    async def _copy(self, stream: relay.Stream, lease: Lease, call: relay.Call) -> None:
        async with relay.send(self._session, lease, call) as response:
            await self._check(lease, response, call)
            await stream.copy(lease, call, response)

    async def _check(self, lease: Lease, response: aiohttp.ClientResponse, call: relay.Call) -> None:
        """Raise what the engine's refusal means. What was asked for by path is that server's own business."""
        if response.status >= 400 and not call.by_path:
            answer = await relay.read_whole(lease, call, response)
            error = engine_error(answer.status, answer.body, call.path, response.headers.get("Retry-After", ""))
            error.origin = self._origin(lease)
            raise error

    async def _whole(self, request: web.Request, held: _Held, path: str, body: bytes) -> web.StreamResponse:
        """An answer that is not a stream. See `dialects/openai.py` for why it may be fetched as one."""
        lease = held.lease
        if self._cancels_only_streams(lease.host.backend):
            fields = routing.read_object(body)
            if openai.can_collect(path, fields):
                call = self._call(request, lease, path, msgspec.json.encode(openai.as_stream(fields)))
                collector = openai.Collector(path)
                await relay.until_revoked(lease, self._gather(lease, call, collector))
                return web.json_response(body=msgspec.json.encode(collector.answer()), headers=self._origin(lease))
            answer = await self._to_the_end(held, self._call(request, lease, path, body))
        else:
            answer = await relay.until_revoked(lease, self._read(lease, self._call(request, lease, path, body)))
        return _respond(answer, self._origin(lease))

    async def _gather(self, lease: Lease, call: relay.Call, gathering: Gathering) -> None:
        """A whole answer, put together from a stream; RequestError when the engine refuses or fails."""
        reader = sse.EventReader()
        async with relay.send(self._session, lease, call) as response:
            await self._check(lease, response, call)
            size = 0
            async for chunk in response.content.iter_any():
                lease.host.sign()
                call.account.tap.feed(chunk)
                size = relay.bounded(size + len(chunk))
                for payload in reader.feed(chunk):
                    gathering.add(sse.decode(payload))
        if gathering.error is not None:
            error = event_error(gathering.error)
            error.origin = self._origin(lease)
            raise error
        if not gathering.complete:
            raise aiohttp.ClientPayloadError("its answer broke off")

    async def _read(self, lease: Lease, call: relay.Call) -> relay.Answer:
        async with relay.send(self._session, lease, call) as response:
            await self._check(lease, response, call)
            return await relay.read_whole(lease, call, response)

    async def _to_the_end(self, held: _Held, call: relay.Call) -> relay.Answer:
        """For a backend that works on after its client has left: the lease then lasts as long as the work does."""
        task = asyncio.create_task(relay.until_revoked(held.lease, self._read(held.lease, call)))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._linger(task, held)
            raise

    def _linger(self, task: asyncio.Task[relay.Answer], held: _Held) -> None:
        held.kept = True

        async def wait() -> None:
            try:
                await asyncio.gather(task, return_exceptions=True)
            finally:
                self._book.release(held.lease)

        lingering = asyncio.create_task(wait())
        self._lingering.add(lingering)
        lingering.add_done_callback(self._lingering.discard)

    def _call(self, request: web.Request, lease: Lease, path: str, body: bytes | None) -> relay.Call:
        account = self._accounts.open(request)
        account.grant(lease, len(body or b""))
        headers = upstream.to_backend(request.headers, self._request_id(request), lease.host.endpoint.headers)
        return relay.Call(method=request.method, path=path, headers=headers, account=account, body=body)

    @asynccontextmanager
    async def _leased(self, spec: ModelSpec, lease: Lease | None = None, backend: str | None = None) -> AsyncIterator[_Held]:
        held = _Held(lease or await self._book.acquire(spec))
        try:
            routing.check_granted(held.lease.host.backend, backend)
            yield held
        finally:
            if not held.kept:
                self._book.release(held.lease)

    def _origin(self, lease: Lease) -> CIMultiDict[str]:
        return CIMultiDict(
            {
                "X-Offloadd-Instance": str(lease.host.instance),
                "X-Offloadd-Backend": lease.host.backend,
                "X-Offloadd-Reason": lease.why,
            }
        )


class _Held:
    """A lease, and whether it outlives the handler."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.kept = False


def _json(call: relay.Call) -> relay.Call:
    """A call whose body is JSON, whatever the client said of its own: some engines refuse it by the wrong type."""
    call.headers["Content-Type"] = "application/json"
    return call


def _respond(answer: relay.Answer, origin: CIMultiDict[str]) -> web.Response:
    headers = answer.headers.copy()
    headers.extend(origin)
    return web.Response(status=answer.status, headers=headers, body=answer.body)
