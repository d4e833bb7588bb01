"""`POST /models/{name}/load` and `/unload`: what an operator wants now, by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from aiohttp import web

from offloadd.errors import RequestError
from offloadd.state.actions import Decision
from offloadd.state.desired import ModelSpec
from offloadd.state.ids import ModelName
from offloadd.units import Seconds, format_seconds, parse_seconds

LONGEST_WAIT = Seconds(3600)


class Wishes(Protocol):
    """The book of wishes."""

    def load(self, model: ModelName) -> None:
        """Load it now."""
        ...

    def unload(self, model: ModelName) -> None:
        """Unload it now."""
        ...

    async def until_loaded(self, model: ModelName) -> Decision:
        """Until it is ready; RequestError when it cannot be."""
        ...

    async def until_unloaded(self, model: ModelName) -> Decision:
        """Until nothing of it is left that ran when this was asked for."""
        ...


def by_hand_routes(
    wishes: Wishes, find: Callable[[str], ModelSpec], decision: Callable[[ModelName], Decision | None]
) -> list[web.RouteDef]:
    """The routes. Each answers 202 at once, or with `?wait=1` when it is done; `?timeout=30s` bounds that wait."""

    async def load(request: web.Request) -> web.Response:
        model, limit = find(request.match_info["name"]).name, _limit(request)
        wishes.load(model)
        return await _answer(model, limit, wishes.until_loaded, decision(model))

    async def unload(request: web.Request) -> web.Response:
        model, limit = find(request.match_info["name"]).name, _limit(request)
        wishes.unload(model)
        return await _answer(model, limit, wishes.until_unloaded, decision(model))

    return [web.post("/models/{name:.+}/load", load), web.post("/models/{name:.+}/unload", unload)]


async def _answer(
    model: ModelName, limit: Seconds | None, until: Callable[[ModelName], Awaitable[Decision]], now: Decision | None
) -> web.Response:
    if limit is None:
        return web.json_response(_shown(model, now, done=False), status=202)
    try:
        async with asyncio.timeout(limit):
            return web.json_response(_shown(model, await until(model), done=True))
    except TimeoutError:
        message = f"{model} is not there yet after {format_seconds(limit)}; it is still asked for, GET /explain/{model} says why"
        raise RequestError(504, "wait_timeout", message, retry_after=Seconds(5)) from None


def _limit(request: web.Request) -> Seconds | None:
    """How long to wait until it is done; None for not at all."""
    if request.query.get("wait") not in ("1", "true"):
        return None
    given = request.query.get("timeout")
    try:
        return LONGEST_WAIT if given is None else min(LONGEST_WAIT, parse_seconds(given))
    except ValueError as error:
        raise RequestError(400, "invalid_time", f"timeout: {error}", param="timeout") from None


def _shown(model: ModelName, decision: Decision | None, *, done: bool) -> dict[str, Any]:
    state = {"state": decision.state, "reason": decision.sentence} if decision else {"state": "off", "reason": "not planned yet"}
    return {"model": model, "done": done, **state}
