"""Handlers of the inference paths: find the model, get a lease, relay, give the lease back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

import msgspec
from aiohttp import web

from offloadd.errors import RequestError
from offloadd.proxy import bodies, calls, headers, relay, routing, speech
from offloadd.proxy.account import ACCOUNT, Account, Accounts
from offloadd.proxy.again import check_other
from offloadd.proxy.bodies import Body
from offloadd.proxy.dialects import openai, openai_streams, plain, sse
from offloadd.proxy.dialects.base import Change, Translation
from offloadd.proxy.downstream import Stream, Whole, json_answer
from offloadd.proxy.lease import Lease
from offloadd.proxy.leases import LeaseBook
from offloadd.proxy.media import check_media, may_point
from offloadd.proxy.pool import Pool
from offloadd.state.desired import DesiredState, ModelSpec
from offloadd.state.ids import BackendName, ModelName
from offloadd.units import Seconds

SMALL = 64 * 1024
"""A body up to this size is read before it is passed on."""
FORWARDED = (openai.CHAT, openai.COMPLETIONS, *openai.OTHERS)
"""POST paths that go to the model named in the body, as they are."""

FAILED: web.RequestKey[Exception] = web.RequestKey("failed", Exception)
"""How a first try has ended that was made before there was a `web.Request`."""
_NONE: Mapping[str, str] = {}


class Gateway:
    """Routes inference to instances. `desired` gives the config in force at each request."""

    def __init__(
        self,
        *,
        book: LeaseBook,
        desired: Callable[[], DesiredState],
        pool: Pool,
        request_id: Callable[[web.Request], str],
        bears: Callable[[web.Request], Mapping[str, str]],
        accounts: Accounts,
        may_use: Callable[[ModelSpec], bool],
        api_of: speech.ApiOf,
    ) -> None:
        """`bears` are headers that every answer to a request has; `may_use` says whether its caller is allowed a model;
        `api_of` what an engine speaks for one.
        """
        self._book = book
        self._desired = desired
        self._pool = pool
        self._request_id = request_id
        self._bears = bears
        self._accounts = accounts
        self._may_use = may_use
        self._api_of = api_of
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

    @property
    def names(self) -> routing.Names:
        """What names and aliases mean under the present config."""
        desired = self._desired()
        if self._names is None or self._names[0] is not desired:
            self._names = (desired, routing.Names.of(desired))
        return self._names[1]

    def find(self, name: str | None) -> ModelSpec:
        """The model that a name or alias means now, if the caller may use it."""
        spec = self.names.find(name)
        if not self._may_use(spec):
            raise RequestError(403, "model_not_allowed", f"this key may not use {spec.name}", param="model")
        return spec

    def engines(self, model: ModelName) -> tuple[BackendName, ...]:
        """Those that may serve a model now."""
        spec = self._desired().models.get(model)
        return spec.backends if spec else ()

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/…`: the body goes on as it is, save for the model's `request` rules."""
        if (failed := request.pop(FAILED, None)) is not None:
            try:
                raise failed
            finally:
                del failed  # which knows of this call: a ring that would keep the request
        posted = Body.read(await request.read(), request.headers.get("Content-Type", ""))
        head = posted.head
        spec = self.find(head.model)
        bodies.check(spec, self._api_of, posted, request.path)
        posted = posted.ruled(spec)
        patient = request if posted.head.stream and posted.form is None else None
        async with self.leased(spec, backend=head.backend, conversation=head.conversation(spec), patient=patient) as lease:
            as_json = posted.form is None
            path = speech.speaks(spec, lease.host.api, request.path)
            body = posted.for_engine(lease.host.api)
            if as_json and not posted.head.stream and (fields := self._collectable(lease, path, body)):
                return await self._collected(request, lease, path, fields)
            return await self._answer(request, lease, self._call(request, lease, path, body, as_json=as_json), posted.head)

    async def inference(self, request: web.Request) -> web.StreamResponse:
        """`POST /inference`: the plain shape, streaming or not."""
        raw = await request.read()
        head = routing.read_head(raw)
        spec = self.find(head.model)
        routing.check_backend(spec, head.backend)
        path, wanted = plain.translate(routing.read_object(routing.apply_rules(spec.request, raw)))
        async with self.leased(
            spec, backend=head.backend, conversation=head.conversation(spec), patient=request if head.stream else None
        ) as lease:
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
        call = self._call(request, lease, translation.path, msgspec.json.encode(translation.body), as_json=True)
        if stream:
            return await self._stream(request, lease, call, translation.change(), translation.headers)
        collecting = relay.Collecting(self._pool, self._book, lease, call, translation.gather(), translation.whole)
        await collecting.run()
        body = msgspec.json.encode(collecting.answer)
        return json_answer(request, self._named(request, lease, translation.headers), body)

    async def pass_on(
        self, request: web.Request, lease: Lease, path: str, body: bytes, change: Change | None
    ) -> web.StreamResponse:
        """A request for an engine that speaks the client's dialect: a stream where there is a change for it, else whole."""
        call = self._call(request, lease, path, body, as_json=True)
        if change is not None:
            return await self._stream(request, lease, call, change)
        answer = await self._read(lease, call)
        return Whole(request, answer.status, answer.fields, self._named(request, lease), answer.body)

    async def ask(self, request: web.Request, lease: Lease, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A small question that an engine answers at once; RequestError when it refuses."""
        call = self._call(request, lease, path, msgspec.json.encode(body), as_json=True)
        return sse.decode((await self._read(lease, call)).body)

    def tell_begun(self, request: web.Request, error: RequestError) -> web.StreamResponse | None:
        """Tell an error within an answer that has begun while its request still waited; None when it has not."""
        account: Account | None = request.get(ACCOUNT)
        if account is None or (stream := account.early) is None:
            return None
        account.turned_away, account.broken = True, account.sent
        stream.fail(error)
        return stream.release()

    def _comfort(self, request: web.Request) -> Callable[[Seconds], Awaitable[None]]:
        async def show(waited: Seconds) -> None:
            account = self._accounts.open(request)
            stream = account.early
            if stream is None:
                stream = account.early = Stream(request, lambda: headers.lines(self._bears(request).items()))
                stream.open()
            stream.comment(b"waiting for %.0f s" % waited)

        return show

    async def by_path(self, request: web.Request) -> web.StreamResponse:
        """`/upstream/{model}/{path}`: anything else that one model's server offers, WebSockets included."""
        spec = self.find(request.match_info["model"])
        lease = self._book.borrow(spec) if request.method in ("GET", "HEAD") else None
        async with self.leased(spec, lease) as held:
            target = routing.upstream_target(request.rel_url)
            routing.check_open(target, held.host.api)
            call = self._call(request, held, target, None)
            return await self._stream(request, held, await self._with_body(request, call))

    async def _with_body(self, request: web.Request, call: calls.Call) -> calls.Call:
        """The call with the body that comes with the request: a small one read first, a large one passed on as it comes."""
        upgrade = request.headers.get("Upgrade", "") if "upgrade" in request.headers.get("Connection", "").lower() else ""
        call = replace(call, by_path=True, upgrade=upgrade.encode("latin-1", "replace"))
        if not request.can_read_body:
            return call
        length = request.content_length
        if "json" in request.content_type or (length is not None and length <= SMALL and "Content-Encoding" not in request.headers):
            body = await request.read()
            check_media(body, self._desired().server.access.media_hosts)
            return replace(call, body=body)
        # Packed bodies arrive here unpacked, so that their length is another.
        known = None if "Content-Encoding" in request.headers else length
        return replace(call, upload=routing.bounded_body(request, request.client_max_size), length=known)

    async def _stream(
        self,
        request: web.Request,
        lease: Lease,
        call: calls.Call,
        change: Change | None = None,
        more: Mapping[str, str] | None = None,
    ) -> web.StreamResponse:
        stream = call.account.early
        if stream is None:
            stream = Stream(request, lambda: self._named(request, lease, more or {}), change)
        else:
            stream.change_by(change)
        try:
            await relay.Passing(self._pool, self._book, lease, call, stream).run()
        except RequestError as error:
            if not stream.status or error.code == "unsupported_capability":  # which a translation may still help
                raise
            call.account.broken, call.account.reason = True, error.message
            stream.fail(error)
        except BaseException:
            if stream.status:
                stream.abort()
            raise
        return stream.release()

    async def _answer(self, request: web.Request, lease: Lease, call: calls.Call, head: routing.Head) -> web.StreamResponse:
        """The engine's own answer, as a stream or whole, put right where the engine needs it."""
        model = lease.host.instance.model
        api = lease.host.api
        if head.stream:
            repair = openai_streams.repair(call.path, api, head.n, model, self._number(request))
            return await self._stream(request, lease, call, repair)
        answer = await self._read(lease, call)
        body = answer.body
        if not api.exact and b"json" in headers.field(answer.fields, b"content-type").lower():
            body = msgspec.json.encode(openai_streams.put_right(call.path, sse.decode(body), model, self._number(request)))
        return Whole(request, answer.status, answer.fields, self._named(request, lease), body)

    def _number(self, request: web.Request) -> str:
        """What an answer is called that we had to put right."""
        return f"chatcmpl-{self._request_id(request)}"

    def _collectable(self, lease: Lease, path: str, body: bytes) -> dict[str, Any] | None:
        """The request's fields, where its plain answer has to be fetched as a stream and can be. See `dialects/openai.py`."""
        if not lease.host.cancels_only_streams:
            return None
        fields: dict[str, Any] = routing.read_object(body)
        return fields if openai.can_collect(path, fields) else None

    async def _collected(self, request: web.Request, lease: Lease, path: str, fields: dict[str, Any]) -> web.StreamResponse:
        """A plain answer put together from a stream."""
        call = self._call(request, lease, path, msgspec.json.encode(openai.as_stream(fields)), as_json=True)
        collecting = relay.Collecting(self._pool, self._book, lease, call, openai.Collector(path, fields.get("n") or 1))
        await collecting.run()
        return json_answer(request, self._named(request, lease), msgspec.json.encode(collecting.answer))

    async def _read(self, lease: Lease, call: calls.Call) -> relay.Answer:
        reading = relay.Reading(self._pool, self._book, lease, call)
        if lease.host.cancels_only_streams:
            await self._to_the_end(lease, reading)
        else:
            await reading.run()
        return reading.answer

    async def _to_the_end(self, lease: Lease, reading: relay.Reading) -> None:
        """For a backend that works on after its client has left: the lease then lasts as long as the work does."""
        task = asyncio.create_task(reading.run())
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            self._linger(task, lease)
            raise

    def _linger(self, task: asyncio.Task[None], lease: Lease) -> None:
        lease.lingers = True

        async def wait() -> None:
            try:
                await asyncio.gather(task, return_exceptions=True)
            finally:
                self._book.release(lease)

        lingering = asyncio.create_task(wait())
        self._lingering.add(lingering)
        lingering.add_done_callback(self._lingering.discard)

    def _call(self, request: web.Request, lease: Lease, path: str, body: bytes | None, *, as_json: bool = False) -> calls.Call:
        """The call that a request becomes. `as_json`: its body is ours, and JSON, whatever the client said of its own."""
        account = self._accounts.open(request)
        check_other(account, lease.host.backend)
        if body:
            if may_point(body):
                check_media(body, self._desired().server.access.media_hosts)
            self._book.suspects.check(lease.host.instance.model, body)
        account.grant(lease, len(body or b""))
        own = headers.lines((("X-Request-Id", self._request_id(request)),))
        return calls.Call(
            method=request.method, path=path, fields=request.raw_headers, own=own, account=account, body=body, as_json=as_json
        )

    def leased(
        self,
        spec: ModelSpec,
        lease: Lease | None = None,
        *,
        backend: str | None = None,
        conversation: int | None = None,
        patient: web.Request | None = None,
    ) -> _Holding:
        """An instance of the model, held until the block ends.

        `patient` is a request whose client wants server-sent events: while it waits, it is shown that it is not forgotten.
        """

        comfort = None if patient is None else self._comfort(patient)
        if lease is not None:
            return _Holding(self._book, _given(lease), backend)
        waiting = self._book.acquire(spec, while_waiting=comfort, conversation=conversation, backend=backend)
        return _Holding(self._book, waiting, backend)

    def _named(self, request: web.Request, lease: Lease, more: Mapping[str, str] = _NONE) -> bytes:
        """Header lines of ours: whose answer it is, and to what."""
        origin = calls.origin(lease)
        if (lost := self._accounts.open(request).lost) is not None:
            origin["X-Offloadd-Reason"] += f"; before, {lost.message}"
        return headers.lines((*self._bears(request).items(), *origin.items(), *more.items()))


async def _given(lease: Lease) -> Lease:
    return lease


class _Holding:
    """Holds an instance while a block runs, and longer when its work outlives that."""

    __slots__ = ("_acquire", "_backend", "_book", "_lease")

    def __init__(self, book: LeaseBook, acquire: Awaitable[Lease], backend: str | None) -> None:
        self._book = book
        self._acquire = acquire
        self._backend = backend
        self._lease: Lease | None = None

    async def __aenter__(self) -> Lease:
        lease = await self._acquire
        try:
            routing.check_granted(lease.host.backend, self._backend)
        except RequestError:
            self._book.release(lease)
            raise
        self._lease = lease
        return lease

    async def __aexit__(self, *_: object) -> None:
        if self._lease is not None and not self._lease.lingers:
            self._book.release(self._lease)
