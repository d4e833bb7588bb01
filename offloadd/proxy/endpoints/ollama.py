"""Ollama's `/api/*`."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
from aiohttp import web

from offloadd import __version__
from offloadd.errors import RequestError
from offloadd.proxy import routing, speech
from offloadd.proxy.account import Accounts
from offloadd.proxy.dialects import ollama, ollama_answers, ollama_shelf, openai, turns
from offloadd.proxy.dialects.base import Translation
from offloadd.proxy.dialects.ollama_answers import Times
from offloadd.proxy.endpoints.common import addressed, ruled
from offloadd.proxy.gateway import Gateway
from offloadd.state.desired import ModelSpec
from offloadd.state.ids import ModelName
from offloadd.units import Seconds

Object = dict[str, Any]
Keep = Callable[[ModelName, Seconds], None]
"""The model is to stay loaded for so long after its last request: 0 is to leave now, infinite for ever."""

_LIKE_OLLAMA = "0.12.6"
"""The version of Ollama's API that this follows; clients switch abilities by it."""
_NOT_OURS = ("/api/push", "/api/create", "/api/copy")


class Ollama:
    """Its handlers."""

    def __init__(
        self,
        gateway: Gateway,
        accounts: Accounts,
        api_of: speech.ApiOf,
        look: Callable[[], ollama_shelf.Sight],
        keep: Keep,
    ) -> None:
        self._gateway = gateway
        self._accounts = accounts
        self._api_of = api_of
        self._look = look
        self._keep = keep

    def routes(self) -> list[web.RouteDef]:
        """What makes text or vectors, what tells of models, and what is refused."""
        self._accounts.know("ollama", "/api/chat", "/api/generate", "/api/embed", "/api/embeddings")
        return [
            web.post("/api/chat", self.chat),
            web.post("/api/generate", self.generate),
            web.post("/api/embed", self.embed),
            web.post("/api/embeddings", self.embed),
            web.post("/api/show", self.show),
            web.get("/api/tags", self.tags),
            web.get("/api/ps", self.running),
            web.get("/api/version", self.version),
            *(web.post(path, _not_ours) for path in _NOT_OURS),
            web.delete("/api/delete", _not_ours),
            web.get("/", self.greeting),
        ]

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """`POST /api/chat`."""
        asked, body = ollama.chat(routing.read_object(await request.read()))
        return await self._text(request, asked, openai.CHAT, body, empty=not asked.messages)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """`POST /api/generate`."""
        asked, path, body = ollama.generate(routing.read_object(await request.read()))
        return await self._text(request, asked, path, body, empty=not asked.prompt and not asked.images)

    async def _text(self, request: web.Request, asked: ollama.Asked, path: str, body: Object, *, empty: bool) -> web.StreamResponse:
        spec, stay = self._tagged(asked.model), ollama.keep_alive(asked.keep_alive)
        chat = isinstance(asked, ollama.ChatRequest)
        speech.check_spoken(spec, self._api_of, path)
        began = time.monotonic()
        if empty and stay is not None and not stay:
            self._keep(spec.name, Seconds(0))
            return web.json_response(ollama_answers.loaded(spec.name, _times(began), chat=chat, unloaded=True))
        conversation = routing.read_head(await request.read()).conversation(spec)
        async with self._gateway.leased(spec, conversation=conversation) as lease:
            if stay is not None:
                self._keep(spec.name, stay)
            times = _times(began, lease.waited)
            if empty:
                return web.json_response(ollama_answers.loaded(spec.name, times, chat=chat))

            def turn() -> turns.Turn:
                return ollama_answers.OllamaTurn(spec.name, times, chat)

            translation = Translation(
                path=speech.speaks(spec, lease.host.api, path),
                body=ruled(addressed(openai.as_stream(body), spec, lease), spec),
                change=lambda: turns.TurnStream(turn(), turns.as_lines, "application/x-ndjson"),
                gather=lambda: turns.TurnGathering(turn(), ollama_answers.LineMerge()),
                headers=_ignored(asked.options),
            )
            return await self._gateway.converse(request, lease, translation, stream=asked.streams)

    async def embed(self, request: web.Request) -> web.StreamResponse:
        """`POST /api/embed`, and the older `/api/embeddings` for one text."""
        asked, body = ollama.embed(routing.read_object(await request.read()))
        spec, stay = self._tagged(asked.model), ollama.keep_alive(asked.keep_alive)
        speech.check_spoken(spec, self._api_of, ollama.EMBEDDINGS)
        began = time.monotonic()
        async with self._gateway.leased(spec) as lease:
            if stay is not None:
                self._keep(spec.name, stay)
            path = speech.speaks(spec, lease.host.api, ollama.EMBEDDINGS)
            answer = await self._gateway.ask(request, lease, path, addressed(body, spec, lease))
            found = ollama_answers.embedded(answer, spec.name, _times(began, lease.waited))
        if request.path == "/api/embeddings":
            return web.json_response({"embedding": next(iter(found["embeddings"]), [])})
        return web.json_response(body=msgspec.json.encode(found))

    async def tags(self, _: web.Request) -> web.Response:
        """`GET /api/tags`: every model that the config serves."""
        return web.json_response(ollama_shelf.tags(self._look()))

    async def running(self, _: web.Request) -> web.Response:
        """`GET /api/ps`: those that are loaded."""
        return web.json_response(ollama_shelf.running(self._look()))

    async def show(self, request: web.Request) -> web.Response:
        """`POST /api/show`: one model."""
        asked = ollama.show(routing.read_object(await request.read()))
        spec = self._tagged(asked)
        return web.json_response(ollama_shelf.show(self._look(), spec, self._api_of))

    async def version(self, _: web.Request) -> web.Response:
        """`GET /api/version`: Ollama's whose API this is, and our own."""
        return web.json_response({"version": _LIKE_OLLAMA, "offloadd": __version__})

    async def greeting(self, _: web.Request) -> web.Response:
        """`GET /`: what Ollama's clients look for to see that somebody is there."""
        return web.Response(text=f"Ollama is running: offloadd {__version__} speaks its API\n")

    def _tagged(self, name: str) -> ModelSpec:
        """A model by its name; Ollama's clients may put a tag behind it, or the hub before it, that means no other."""
        try:
            return self._gateway.find(name)
        except RequestError:
            plain = name.removeprefix("hf.co/").removesuffix(":latest")
            if plain == name:
                raise
        return self._gateway.find(plain)


async def _not_ours(request: web.Request) -> web.StreamResponse:
    """Models are the operator's to bring and to remove."""
    verb = request.path.rpartition("/")[2]
    how = "offloadctl pull brings one from the hub, or put the file under storage.models_path, and name it in the config"
    message = f"offloadd does not {verb} models by this API: {how}"
    raise RequestError(501, "not_supported", message)


def _ignored(options: Object | None) -> dict[str, str]:
    """Says which options had no effect, because the config decides them."""
    ignored = ollama.not_heeded(options)
    return {"X-Offloadd-Ignored": ", ".join(ignored)} if ignored else {}


def _times(began: float, waited: float = 0.0) -> Times:
    return Times(
        created=lambda: datetime.now(UTC).isoformat().replace("+00:00", "Z"),
        spent=lambda: time.monotonic() - began,
        loading=waited,
    )
