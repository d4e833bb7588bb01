"""Anthropic's `/v1/messages`: passed on where the engine has it, else a chat completion."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from typing import Any

from aiohttp import web

from offloadd.errors import RequestError
from offloadd.proxy import routing, speech
from offloadd.proxy.account import Accounts
from offloadd.proxy.dialects import anthropic, anthropic_answers, openai, turns
from offloadd.proxy.dialects.base import Translation
from offloadd.proxy.endpoints.common import addressed, ruled
from offloadd.proxy.gateway import Gateway
from offloadd.proxy.lease import Lease
from offloadd.state.desired import ModelSpec
from offloadd.state.ids import BackendName

log = logging.getLogger(__name__)

Object = dict[str, Any]

_CHAT_TOKENIZE = "/chat_tokenize"


class Messages:
    """Its handlers."""

    def __init__(self, gateway: Gateway, accounts: Accounts, api_of: speech.ApiOf) -> None:
        self._gateway = gateway
        self._accounts = accounts
        self._api_of = api_of
        self._lacking: set[BackendName] = set()
        """Engines whose server turned out to be too old to have it."""

    def routes(self) -> list[web.RouteDef]:
        """Both paths."""
        self._accounts.know("anthropic", anthropic.MESSAGES, anthropic.COUNT_TOKENS)
        return [web.post(anthropic.MESSAGES, self.create), web.post(anthropic.COUNT_TOKENS, self.count)]

    async def create(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/messages`."""
        raw = await request.read()
        head = routing.read_head(raw)
        spec = self._gateway.find(head.model)
        routing.check_backend(spec, head.backend)
        fields = _with_messages(routing.read_object(raw))
        speech.check_spoken(spec, self._api_of, openai.CHAT, anthropic.MESSAGES)
        stream, conversation = bool(head.stream), head.conversation(spec)
        patient = request if stream else None
        async with self._gateway.leased(spec, backend=head.backend, conversation=conversation, patient=patient) as lease:
            backend = lease.host.backend
            if anthropic.MESSAGES in lease.host.api.paths and backend not in self._lacking:
                try:
                    return await self._gateway.converse(request, lease, _native(spec, lease, fields), stream=stream)
                except RequestError as error:
                    if error.code != "unsupported_capability" or openai.CHAT not in lease.host.api.paths:
                        raise
                log.info("%s has no %s: its messages are translated", backend, anthropic.MESSAGES)
                self._lacking.add(backend)
            return await self._gateway.converse(request, lease, _translated(spec, lease, fields), stream=stream)

    async def count(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/messages/count_tokens`, where the engine can count."""
        raw = await request.read()
        head = routing.read_head(raw)
        spec = self._gateway.find(head.model)
        fields = _with_messages(routing.read_object(raw))
        speech.check_spoken(spec, self._api_of, anthropic.COUNT_TOKENS, _CHAT_TOKENIZE)
        async with self._gateway.leased(spec, backend=head.backend) as lease:
            if anthropic.COUNT_TOKENS in lease.host.api.paths:
                answer = await self._gateway.ask(request, lease, anthropic.COUNT_TOKENS, addressed(fields, spec, lease))
                return web.json_response({"input_tokens": answer.get("input_tokens", 0)})
            path = speech.speaks(spec, lease.host.api, _CHAT_TOKENIZE)
            answer = await self._gateway.ask(request, lease, path, addressed(anthropic.to_chat(fields), spec, lease))
            return web.json_response({"input_tokens": len(answer.get("tokenize_response") or ())})


def _native(spec: ModelSpec, lease: Lease, fields: Object) -> Translation:
    body = ruled(addressed({**fields, "stream": True}, spec, lease), spec)
    number = _new_id()
    return _told(anthropic.MESSAGES, body, lambda: anthropic_answers.NativeTurn(number, spec.name))


def _translated(spec: ModelSpec, lease: Lease, fields: Object) -> Translation:
    body = ruled(addressed(openai.as_stream(anthropic.to_chat(fields)), spec, lease), spec)
    number = _new_id()
    path = speech.speaks(spec, lease.host.api, openai.CHAT)
    return _told(path, body, lambda: anthropic_answers.ChatTurn(number, spec.name))


def _told(path: str, body: Object, turn: Callable[[], turns.Turn]) -> Translation:
    return Translation(
        path=path,
        body=body,
        change=lambda: turns.TurnStream(turn(), turns.as_named_events, "text/event-stream"),
        gather=lambda: turns.TurnGathering(turn(), anthropic_answers.MessageMerge()),
    )


def _new_id() -> str:
    return f"msg_{uuid.uuid4().hex}"


def _with_messages(fields: Object) -> Object:
    if not isinstance(fields.get("messages"), list) or not fields["messages"]:
        raise RequestError(400, "invalid_body", '"messages" must be a list with at least one message', param="messages")
    return fields
