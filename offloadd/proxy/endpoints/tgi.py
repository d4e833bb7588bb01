"""TGI's own paths, for clients that know no others: passed on to TGI, translated for any other engine.

TGI serves one model, and its clients name none. Where there are several here, one is named in the address, `/tgi/{model}`, by
`?model=` or in the body.
"""

from __future__ import annotations

import msgspec
from aiohttp import web

from offloadd import __version__
from offloadd.proxy import routing, speech
from offloadd.proxy.account import Accounts
from offloadd.proxy.dialects import openai, tgi, turns
from offloadd.proxy.dialects.base import Translation
from offloadd.proxy.gateway import Gateway
from offloadd.proxy.lease import Lease
from offloadd.state.desired import ModelSpec

BY_NAME = "/tgi/{model}"


class Tgi:
    """Its handlers."""

    def __init__(self, gateway: Gateway, accounts: Accounts, api_of: speech.ApiOf) -> None:
        self._gateway = gateway
        self._accounts = accounts
        self._api_of = api_of

    def routes(self) -> list[web.RouteDef]:
        """Each path, with and without the model's name before it."""
        paths = (tgi.GENERATE, tgi.GENERATE_STREAM)
        self._accounts.know("tgi", "/", BY_NAME, *paths, *(BY_NAME + path for path in paths))
        return [
            web.post("/", self.compatible),
            web.post(BY_NAME, self.compatible),
            *(web.post(prefix + tgi.GENERATE, self.generate) for prefix in ("", BY_NAME)),
            *(web.post(prefix + tgi.GENERATE_STREAM, self.generate_stream) for prefix in ("", BY_NAME)),
            *(web.get(prefix + "/info", self.info) for prefix in ("", BY_NAME)),
        ]

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """`POST /generate`: one object."""
        return await self._serve(request, tgi.read(routing.read_object(await request.read())), tgi.GENERATE, stream=False)

    async def generate_stream(self, request: web.Request) -> web.StreamResponse:
        """`POST /generate_stream`: events."""
        return await self._serve(request, tgi.read(routing.read_object(await request.read())), tgi.GENERATE_STREAM, stream=True)

    async def compatible(self, request: web.Request) -> web.StreamResponse:
        """`POST /`: events with `"stream": true`, else a list with one object."""
        asked = tgi.read(routing.read_object(await request.read()))
        return await self._serve(request, asked, "/", stream=bool(asked.stream))

    async def info(self, request: web.Request) -> web.Response:
        """`GET /info`."""
        return web.json_response(tgi.info(self._find(request, None), __version__))

    async def _serve(self, request: web.Request, asked: tgi.Generate, path: str, *, stream: bool) -> web.StreamResponse:
        spec = self._find(request, asked.model)
        speech.check_spoken(spec, self._api_of, openai.COMPLETIONS, tgi.GENERATE)
        async with self._gateway.leased(spec, patient=request if stream else None) as lease:
            if tgi.GENERATE in lease.host.api.paths:
                body = {name: value for name, value in routing.read_object(await request.read()).items() if name != "model"}
                change = tgi.Untouched() if stream else None
                return await self._gateway.pass_on(request, lease, path, msgspec.json.encode(body), change)
            translation = self._translation(spec, lease, asked, listed=path == "/")
            return await self._gateway.converse(request, lease, translation, stream=stream)

    def _translation(self, spec: ModelSpec, lease: Lease, asked: tgi.Generate, *, listed: bool) -> Translation:
        asked_for = tgi.to_completion(asked, spec)
        if lease.host.api.wire is not None and not asked.given.top_n_tokens:
            del asked_for["logprobs"]  # wished for each token's own, which is told as unknown where it is not to be had
        body = openai.as_stream({**asked_for, "model": speech.name_for(spec, lease.host.api)})
        return Translation(
            path=speech.speaks(spec, lease.host.api, openai.COMPLETIONS),
            body=routing.read_object(routing.apply_rules(spec.request, msgspec.json.encode(body))) if spec.request else body,
            change=lambda: turns.TurnStream(tgi.GenerateTurn(asked), turns.as_events, "text/event-stream"),
            gather=lambda: turns.TurnGathering(tgi.GenerateTurn(asked), tgi.GenerateMerge(asked)),
            whole=lambda answer: [answer] if listed else answer,
        )

    def _find(self, request: web.Request, named: str | None) -> ModelSpec:
        return self._gateway.find(request.match_info.get("model") or request.query.get("model") or named)
