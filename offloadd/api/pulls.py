"""`POST /models/pull` and `/pulls`: downloads from the hub as jobs, with their progress by GET and by events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import msgspec
from aiohttp import web

from offloadd.errors import RequestError
from offloadd.units import Seconds

MAX_BODY = 64 * 1024
MAX_FOLLOWERS = 64


class Job(Protocol):
    """One pull."""

    def shown(self) -> dict[str, Any]:
        """As JSON."""
        ...


class Pulls(Protocol):
    """All pulls of this daemon."""

    def start(self, source: str) -> Job:
        """Begin one."""
        ...

    def all(self) -> Sequence[Job]:
        """Those that run, wait, or ended lately."""
        ...

    def get(self, key: str) -> Job:
        """One of them."""
        ...

    def cancel(self, key: str) -> Job:
        """End it."""
        ...

    def follow(self, key: str) -> AsyncIterator[Job]:
        """It now, and after each change, until it has ended."""
        ...


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    source: str


def pull_routes(pulls: Pulls) -> list[web.RouteDef]:
    """The routes; none of them is for inference keys."""
    followers = 0

    async def start(request: web.Request) -> web.Response:
        try:
            body = msgspec.json.decode((await request.read())[:MAX_BODY], type=_Body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise RequestError(400, "invalid_body", f'expected {{"source": "ORG/NAME:QUANT"}}: {error}') from None
        job = pulls.start(body.source).shown()
        return web.json_response(job, status=202, headers={"Location": f"/pulls/{job['id']}"})

    async def show_all(_: web.Request) -> web.Response:
        return web.json_response({"pulls": [job.shown() for job in pulls.all()]})

    async def show(request: web.Request) -> web.Response:
        return web.json_response(pulls.get(request.match_info["id"]).shown())

    async def cancel(request: web.Request) -> web.Response:
        return web.json_response(pulls.cancel(request.match_info["id"]).shown(), status=202)

    async def events(request: web.Request) -> web.StreamResponse:
        nonlocal followers
        pulls.get(request.match_info["id"])
        if followers >= MAX_FOLLOWERS:
            raise RequestError(429, "too_many_followers", f"{MAX_FOLLOWERS} clients follow pulls already", retry_after=Seconds(10))
        followers += 1
        try:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
            await response.prepare(request)
            async for job in pulls.follow(request.match_info["id"]):
                await response.write(f"data: {json.dumps(job.shown())}\n\n".encode())
            return response
        finally:
            followers -= 1

    return [
        web.post("/models/pull", start),
        web.get("/pulls", show_all),
        web.get("/pulls/{id}", show),
        web.delete("/pulls/{id}", cancel),
        web.get("/pulls/{id}/events", events),
    ]
