"""Paths of the dialects that are translated, Anthropic's and Ollama's. The words themselves are for `dialects/` to say."""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
from aiohttp import web

from offloadd import __version__
from offloadd.errors import RequestError
from offloadd.proxy import routing, speech
from offloadd.proxy.account import Accounts
from offloadd.proxy.dialects import anthropic, anthropic_answers, ollama, ollama_answers, ollama_shelf, openai, responses, turns
from offloadd.proxy.dialects.base import Translation
from offloadd.proxy.dialects.ollama_answers import Times
from offloadd.proxy.gateway import Gateway
from offloadd.proxy.leases import Lease
from offloadd.state.desired import ModelSpec
from offloadd.state.ids import ModelName
from offloadd.units import Seconds

Object = dict[str, Any]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Keep = Callable[[ModelName, Seconds], None]
"""The model is to stay loaded for so long after its last request: 0 is to leave now, infinite for ever."""

_LIKE_OLLAMA = "0.12.6"
"""The version of Ollama's API that this follows; clients switch abilities by it."""
_NOT_OURS = ("/api/pull", "/api/push", "/api/create", "/api/copy")


class Endpoints:
    """Handlers of the translated dialects. `look` is one reading of everything, for the lists of models."""

    def __init__(
        self,
        gateway: Gateway,
        *,
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
        """Anthropic's and Ollama's paths."""
        self._accounts.know("openai", responses.RESPONSES)
        self._accounts.know("anthropic", anthropic.MESSAGES, anthropic.COUNT_TOKENS)
        self._accounts.know("ollama", "/api/chat", "/api/generate", "/api/embed", "/api/embeddings")
        return [
            web.post(responses.RESPONSES, self.responses),
            web.route("*", "/v1/responses/{path:.+}", _no_store),
            web.post(anthropic.MESSAGES, self.messages),
            web.post(anthropic.COUNT_TOKENS, self.count_tokens),
            web.post("/api/chat", self.ollama_chat),
            web.post("/api/generate", self.ollama_generate),
            web.post("/api/embed", self.ollama_embed),
            web.post("/api/embeddings", self.ollama_embed),
            web.post("/api/show", self.ollama_show),
            web.get("/api/tags", self.ollama_tags),
            web.get("/api/ps", self.ollama_ps),
            web.get("/api/version", self.ollama_version),
            *(web.post(path, _not_ours) for path in _NOT_OURS),
            web.delete("/api/delete", _not_ours),
            web.get("/", self.greeting),
        ]

    # --- OpenAI's responses ---

    async def responses(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/responses`, of engines that have it."""
        raw = await request.read()
        head = routing.read_head(raw)
        spec = self._gateway.find(head.model)
        routing.check_backend(spec, head.backend)
        fields = routing.read_object(raw)
        speech.check_spoken(spec, self._api_of, responses.RESPONSES)
        conversation, patient = head.conversation(spec), request if head.stream else None
        async with self._gateway.leased(spec, backend=head.backend, conversation=conversation, patient=patient) as lease:

            def turn() -> turns.Turn:
                return responses.ResponsesTurn(spec.name, fields)

            translation = Translation(
                path=speech.speaks(spec, lease.host.api, responses.RESPONSES),
                body=_ruled({**_addressed(fields, spec, lease), "stream": True}, spec),
                change=lambda: turns.TurnStream(turn(), turns.as_named_events, "text/event-stream"),
                gather=lambda: turns.TurnGathering(turn(), responses.ResponseMerge()),
            )
            return await self._gateway.converse(request, lease, translation, stream=bool(head.stream))

    # --- Anthropic ---

    async def messages(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/messages`: passed on where the engine has it, else a chat completion."""
        raw = await request.read()
        head = routing.read_head(raw)
        spec = self._gateway.find(head.model)
        routing.check_backend(spec, head.backend)
        fields = _with_messages(routing.read_object(raw))
        speech.check_spoken(spec, self._api_of, openai.CHAT, anthropic.MESSAGES)
        patient = request if head.stream else None
        conversation = head.conversation(spec)
        async with self._gateway.leased(spec, backend=head.backend, conversation=conversation, patient=patient) as lease:
            translation = self._messages_translation(spec, lease, fields)
            return await self._gateway.converse(request, lease, translation, stream=bool(head.stream))

    async def count_tokens(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/messages/count_tokens`, where the engine can count."""
        raw = await request.read()
        head = routing.read_head(raw)
        spec = self._gateway.find(head.model)
        fields = _with_messages(routing.read_object(raw))
        speech.check_spoken(spec, self._api_of, anthropic.COUNT_TOKENS, "/chat_tokenize")
        async with self._gateway.leased(spec, backend=head.backend) as lease:
            if anthropic.COUNT_TOKENS in lease.host.api.paths:
                body = _addressed(fields, spec, lease)
                answer = await self._gateway.ask(request, lease, anthropic.COUNT_TOKENS, body)
                return web.json_response({"input_tokens": answer.get("input_tokens", 0)})
            path = speech.speaks(spec, lease.host.api, "/chat_tokenize")
            answer = await self._gateway.ask(request, lease, path, _addressed(anthropic.to_chat(fields), spec, lease))
            return web.json_response({"input_tokens": len(answer.get("tokenize_response") or ())})

    def _messages_translation(self, spec: ModelSpec, lease: Lease, fields: Object) -> Translation:
        native = anthropic.MESSAGES in lease.host.api.paths
        kind = anthropic_answers.NativeTurn if native else anthropic_answers.ChatTurn
        number = f"msg_{uuid.uuid4().hex}"

        def turn() -> turns.Turn:
            return kind(number, spec.name)

        body = {**fields, "stream": True} if native else openai.as_stream(anthropic.to_chat(fields))
        return Translation(
            path=anthropic.MESSAGES if native else speech.speaks(spec, lease.host.api, openai.CHAT),
            body=_ruled(_addressed(body, spec, lease), spec),
            change=lambda: turns.TurnStream(turn(), turns.as_named_events, "text/event-stream"),
            gather=lambda: turns.TurnGathering(turn(), anthropic_answers.MessageMerge()),
        )

    # --- Ollama: text ---

    async def ollama_chat(self, request: web.Request) -> web.StreamResponse:
        """`POST /api/chat`."""
        asked, body = ollama.chat(routing.read_object(await request.read()))
        return await self._ollama_text(request, asked, openai.CHAT, body, empty=not asked.messages)

    async def ollama_generate(self, request: web.Request) -> web.StreamResponse:
        """`POST /api/generate`."""
        asked, path, body = ollama.generate(routing.read_object(await request.read()))
        return await self._ollama_text(request, asked, path, body, empty=not asked.prompt and not asked.images)

    async def _ollama_text(
        self, request: web.Request, asked: ollama.Asked, path: str, body: Object, *, empty: bool
    ) -> web.StreamResponse:
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
                body=_ruled(_addressed(openai.as_stream(body), spec, lease), spec),
                change=lambda: turns.TurnStream(turn(), turns.as_lines, "application/x-ndjson"),
                gather=lambda: turns.TurnGathering(turn(), ollama_answers.LineMerge()),
                headers=_ignored(asked.options),
            )
            return await self._gateway.converse(request, lease, translation, stream=asked.streams)

    async def ollama_embed(self, request: web.Request) -> web.StreamResponse:
        """`POST /api/embed`, and the older `/api/embeddings` for one text."""
        asked, body = ollama.embed(routing.read_object(await request.read()))
        spec, stay = self._tagged(asked.model), ollama.keep_alive(asked.keep_alive)
        speech.check_spoken(spec, self._api_of, ollama.EMBEDDINGS)
        began = time.monotonic()
        async with self._gateway.leased(spec) as lease:
            if stay is not None:
                self._keep(spec.name, stay)
            path = speech.speaks(spec, lease.host.api, ollama.EMBEDDINGS)
            answer = await self._gateway.ask(request, lease, path, _addressed(body, spec, lease))
            found = ollama_answers.embedded(answer, spec.name, _times(began, lease.waited))
        if request.path == "/api/embeddings":
            return web.json_response({"embedding": next(iter(found["embeddings"]), [])})
        return web.json_response(body=msgspec.json.encode(found))

    # --- Ollama: what there is ---

    async def ollama_tags(self, _: web.Request) -> web.Response:
        """`GET /api/tags`: every model that the config serves."""
        return web.json_response(ollama_shelf.tags(self._look()))

    async def ollama_ps(self, _: web.Request) -> web.Response:
        """`GET /api/ps`: those that are loaded."""
        return web.json_response(ollama_shelf.running(self._look()))

    async def ollama_show(self, request: web.Request) -> web.Response:
        """`POST /api/show`: one model."""
        asked = ollama.show(routing.read_object(await request.read()))
        spec = self._tagged(asked)
        return web.json_response(ollama_shelf.show(self._look(), spec, self._api_of))

    async def ollama_version(self, _: web.Request) -> web.Response:
        """`GET /api/version`: Ollama's whose API this is, and our own."""
        return web.json_response({"version": _LIKE_OLLAMA, "offloadd": __version__})

    async def greeting(self, _: web.Request) -> web.Response:
        """`GET /`: what Ollama's clients look for to see that somebody is there."""
        return web.Response(text=f"Ollama is running: offloadd {__version__} speaks its API\n")

    def _tagged(self, name: str) -> ModelSpec:
        """A model by its name; Ollama's clients may put a tag behind it that means no other."""
        try:
            return self._gateway.find(name)
        except RequestError:
            if not name.endswith(":latest"):
                raise
        return self._gateway.find(name.removesuffix(":latest"))


async def _no_store(_: web.Request) -> web.StreamResponse:
    """What is kept of responses, OpenAI keeps; engines here keep nothing."""
    message = "no responses are stored here: send the whole conversation each time, with store: false"
    raise RequestError(400, "unsupported_capability", message)


async def _not_ours(request: web.Request) -> web.StreamResponse:
    """Models are the operator's to bring and to remove."""
    verb = request.path.rpartition("/")[2]
    message = f"offloadd does not {verb} models by this API: put the file under storage.models_path and name it in the config"
    raise RequestError(501, "not_supported", message)


def _with_messages(fields: Object) -> Object:
    if not isinstance(fields.get("messages"), list) or not fields["messages"]:
        raise RequestError(400, "invalid_body", '"messages" must be a list with at least one message', param="messages")
    return fields


def _addressed(body: Object, spec: ModelSpec, lease: Lease) -> Object:
    """The body under the name that the engine knows the model by, without our own field."""
    return {**{name: value for name, value in body.items() if name != "backend"}, "model": speech.name_for(spec, lease.host.api)}


def _ruled(body: Object, spec: ModelSpec) -> Object:
    """The body with the model's `request` rules applied."""
    return routing.read_object(routing.apply_rules(spec.request, msgspec.json.encode(body))) if spec.request else body


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
