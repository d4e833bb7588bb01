"""OpenAI's `/v1/responses`: passed on where the engine has it, else a chat completion."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

from aiohttp import web

from offloadd.errors import RequestError
from offloadd.proxy import routing, speech
from offloadd.proxy.account import Accounts
from offloadd.proxy.dialects import openai, responses, responses_answers, responses_requests, turns
from offloadd.proxy.dialects.base import Translation
from offloadd.proxy.endpoints.common import addressed, ruled
from offloadd.proxy.gateway import Gateway
from offloadd.proxy.lease import Lease
from offloadd.state.desired import ModelSpec
from offloadd.state.ids import BackendName

log = logging.getLogger(__name__)

Object = dict[str, Any]


class Responses:
    """Its handlers."""

    def __init__(self, gateway: Gateway, accounts: Accounts, api_of: speech.ApiOf) -> None:
        self._gateway = gateway
        self._accounts = accounts
        self._api_of = api_of
        self._lacking: set[BackendName] = set()
        """Engines that turned out not to have it, though they might have."""

    def routes(self) -> list[web.RouteDef]:
        """Making one; those that would be kept."""
        self._accounts.know("openai", responses.RESPONSES)
        return [web.post(responses.RESPONSES, self.create), web.route("*", "/v1/responses/{path:.+}", _no_store)]

    async def create(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/responses`."""
        raw = await request.read()
        head = routing.read_head(raw)
        spec = self._gateway.find(head.model)
        routing.check_backend(spec, head.backend)
        fields = routing.read_object(raw)
        responses_requests.check_stateless(fields)
        speech.check_spoken(spec, self._api_of, responses.RESPONSES, openai.CHAT)
        stream, conversation = bool(head.stream), head.conversation(spec)
        patient = request if stream else None
        async with self._gateway.leased(spec, backend=head.backend, conversation=conversation, patient=patient) as lease:
            backend = lease.host.backend
            if responses.RESPONSES in lease.host.api.paths and backend not in self._lacking:
                try:
                    return await self._gateway.converse(request, lease, _native(spec, lease, fields), stream=stream)
                except RequestError as error:
                    if error.code != "unsupported_capability" or openai.CHAT not in lease.host.api.paths:
                        raise
                log.info("%s has no %s: its responses are made of chat completions", backend, responses.RESPONSES)
                self._lacking.add(backend)
            return await self._gateway.converse(request, lease, _translated(spec, lease, fields), stream=stream)


def _native(spec: ModelSpec, lease: Lease, fields: Object) -> Translation:
    body = ruled({**addressed(fields, spec, lease), "stream": True}, spec)
    return _told(responses.RESPONSES, body, lambda: responses.ResponsesTurn(spec.name, fields))


def _translated(spec: ModelSpec, lease: Lease, fields: Object) -> Translation:
    path = speech.speaks(spec, lease.host.api, openai.CHAT)
    body = ruled(addressed(openai.as_stream(responses_requests.to_chat(fields)), spec, lease), spec)
    number, now = uuid.uuid4().hex, int(time.time())
    return _told(path, body, lambda: responses_answers.ChatResponseTurn(number, spec.name, now, fields))


def _told(path: str, body: Object, turn: Callable[[], turns.Turn]) -> Translation:
    return Translation(
        path=path,
        body=body,
        change=lambda: turns.TurnStream(turn(), turns.as_named_events, "text/event-stream"),
        gather=lambda: turns.TurnGathering(turn(), responses.ResponseMerge()),
    )


async def _no_store(_: web.Request) -> web.StreamResponse:
    """What is kept of responses, OpenAI keeps; engines here keep nothing."""
    message = "no responses are stored here: send the whole conversation each time, with store: false"
    raise RequestError(400, "unsupported_capability", message)
