"""`GET /explain`, `/explain/{model}` and `/events`: what was decided, why, and what came of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from aiohttp import web

from offloadd.api import views
from offloadd.api.caller import caller
from offloadd.api.picture import Picture
from offloadd.api.recent import KEPT_EACH, Entry, Recent, shown
from offloadd.errors import RequestError
from offloadd.state.desired import ModelSpec
from offloadd.units import Seconds

HEARTBEAT = Seconds(15)
"""A follower to whom nothing happened is sent an empty comment this often, which finds one that has gone."""

Look = Callable[[], Picture]
Find = Callable[[str], ModelSpec]


def explain_routes(recent: Recent, look: Look, find: Find) -> list[web.RouteDef]:
    """The routes. `look` gives the picture as the caller may see it."""

    async def explain(request: web.Request) -> web.Response:
        picture, limit = look(), _limit(request)
        if (wanted := request.query.get("request")) is not None:
            return web.json_response(_of_request(recent, wanted, limit))
        if (wanted := request.query.get("instance")) is not None:
            return web.json_response({"instance": wanted, "history": _listed(recent.of_instance(wanted), limit)})
        answer = {
            "as_of": picture.wall,
            "decisions": [_decision(picture, spec) for spec in picture.desired.models.values()],
            "loans": dict(picture.plan.loans),
            "warm": _warm(picture),
            "history": _listed(recent.latest(), limit),
        }
        return web.json_response(answer)

    async def explain_model(request: web.Request) -> web.Response:
        picture, limit, spec = look(), _limit(request), find(request.match_info["model"])
        own = [view for view in picture.observed.instances.values() if view.model == spec.name]
        answer = {
            "as_of": picture.wall,
            **_decision(picture, spec),
            "instances": [views.instance(picture, view) for view in own],
            "history": _listed(recent.of_model(spec.name), limit),
            "requests": _listed(recent.requests_of(spec.name), limit),
        }
        return web.json_response(answer)

    async def events(request: web.Request) -> web.StreamResponse:
        model = request.query.get("model", "")
        name = find(model).name if model else ""
        return await _follow(request, recent, name)

    return [web.get("/explain", explain), web.get("/explain/{model:.+}", explain_model), web.get("/events", events)]


def _decision(picture: Picture, spec: ModelSpec) -> dict[str, Any]:
    """What is said of a model now, and the numbers beside it."""
    decision = picture.plan.decisions.get(spec.name)
    waiting = picture.demand.waiting.get(spec.name)
    held = [picture.demand.leases.get(key, 0) for key in picture.observed.instances if key.model == spec.name]
    return {
        "model": spec.name,
        "state": decision.state if decision else "off",
        "reason": decision.sentence if decision else "not planned yet",
        "hint": decision.hint if decision else "",
        "retry_at": views.retry_at(picture, decision),
        "ready_in_s": decision.ready_in if decision else None,
        "by_hand": views.by_hand(picture, decision),
        "engines": dict(decision.engines) if decision else {},
        "priority": spec.priority,
        "requests_running": sum(held),
        "requests_waiting": waiting.count if waiting else 0,
        "oldest_wait_s": round(picture.now - waiting.oldest, 3) if waiting else None,
    }


def _warm(picture: Picture) -> dict[str, Any] | None:
    """Whose files are read ahead, and why; None when nobody's are, or they are none of the caller's business."""
    warm = picture.plan.warm
    if warm is None or warm.model not in picture.desired.models:
        return None
    return {"model": warm.model, "reason": warm.sentence, "size_bytes": warm.size}


def _of_request(recent: Recent, name: str, limit: int) -> dict[str, Any]:
    """One request's way, and what was decided about its model from its arrival on."""
    entries = recent.of_request(name)
    if not entries:
        raise RequestError(404, "request_not_found", "no request of this id is remembered; ids are in X-Request-Id of each answer")
    model = next((entry.about.model for entry in entries if entry.about.model), "")
    if not caller().may_use(model):
        raise RequestError(404, "request_not_found", "no request of this id is remembered; ids are in X-Request-Id of each answer")
    took = entries[-1].about.data.get("duration_s", 0.0)
    begin = min(entries[0].at, entries[-1].at - (took if isinstance(took, int | float) else 0.0))
    meanwhile = [entry for entry in recent.of_model(model) if begin <= entry.at <= entries[-1].at]
    return {"request": name, "model": model, "history": _listed(entries, limit), "meanwhile": _listed(meanwhile, limit)}


def _listed(entries: Sequence[Entry], limit: int) -> list[Any]:
    return [shown(entry) for entry in _seen(entries)[-limit:]]


def _seen(entries: Sequence[Entry]) -> list[Entry]:
    """Those that the caller may know of."""
    present = caller()
    if "*" in present.models:
        return list(entries)
    return [entry for entry in entries if entry.about.model and present.may_use(entry.about.model)]


def _limit(request: web.Request) -> int:
    given = request.query.get("limit", str(KEPT_EACH))
    if not given.isascii() or not given.isdigit() or not 0 < int(given) <= 10_000:
        raise RequestError(400, "invalid_limit", "limit: expected a number from 1 to 10000", param="limit")
    return int(given)


async def _follow(request: web.Request, recent: Recent, model: str) -> web.StreamResponse:
    follower = recent.follow()
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
    try:
        await response.prepare(request)
        await response.write(b": what happens from now on\n\n")
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT):
                    entry = await follower.queue.get()
            except TimeoutError:
                await response.write(b":\n\n")
                continue
            if entry is None:
                await response.write(
                    b'event: lost\ndata: {"kind":"lost","message":"too slow: events were missed, follow again"}\n\n'
                )
                break
            if model in ("", entry.about.model) and _seen([entry]):
                await response.write(_as_sse(entry))
    finally:
        recent.leave(follower)
    return response


def _as_sse(entry: Entry) -> bytes:
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (entry.number, entry.about.kind.value.encode(), msgspec.json.encode(shown(entry)))
