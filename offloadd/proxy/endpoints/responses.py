"""OpenAI's `/v1/responses`."""

from __future__ import annotations

from aiohttp import web

from offloadd.errors import RequestError
from offloadd.proxy import routing, speech
from offloadd.proxy.account import Accounts
from offloadd.proxy.dialects import responses, turns
from offloadd.proxy.dialects.base import Translation
from offloadd.proxy.endpoints.common import addressed, ruled
from offloadd.proxy.gateway import Gateway


class Responses:
    """Its handlers."""

    def __init__(self, gateway: Gateway, accounts: Accounts, api_of: speech.ApiOf) -> None:
        self._gateway = gateway
        self._accounts = accounts
        self._api_of = api_of

    def routes(self) -> list[web.RouteDef]:
        """Making one; those that would be kept."""
        self._accounts.know("openai", responses.RESPONSES)
        return [web.post(responses.RESPONSES, self.create), web.route("*", "/v1/responses/{path:.+}", _no_store)]

    async def create(self, request: web.Request) -> web.StreamResponse:
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
                body=ruled({**addressed(fields, spec, lease), "stream": True}, spec),
                change=lambda: turns.TurnStream(turn(), turns.as_named_events, "text/event-stream"),
                gather=lambda: turns.TurnGathering(turn(), responses.ResponseMerge()),
            )
            return await self._gateway.converse(request, lease, translation, stream=bool(head.stream))


async def _no_store(_: web.Request) -> web.StreamResponse:
    """What is kept of responses, OpenAI keeps; engines here keep nothing."""
    message = "no responses are stored here: send the whole conversation each time, with store: false"
    raise RequestError(400, "unsupported_capability", message)
