"""Ollama's `POST /api/pull`: a download from the hub, told as Ollama tells its own."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web

from offloadd.api.pulls import MAX_BODY, MAX_FOLLOWERS, Pulls
from offloadd.errors import RequestError
from offloadd.units import Seconds

Line = dict[str, Any]

_HUB = re.compile(r"(?:https?://)?(?:hf\.co|huggingface\.co)/(.+?)(?::latest)?")
_STATUSES = {
    "waiting": "waiting for other downloads",
    "asking": "pulling manifest",
    "verifying": "verifying sha256 digest",
    "landed": "success",
}


class _Body(msgspec.Struct):
    model: str | None = None
    name: str | None = None
    stream: bool | None = None


def source_of(name: str) -> str:
    """The hub's `ORG/NAME[:QUANT]` that a name means; RequestError 400 for the names of Ollama's own library."""
    found = _HUB.fullmatch(name.strip())
    if found is None:
        how = "name a repository of the hub, as hf.co/ORG/NAME:QUANT, or put the file under storage.models_path"
        message = f'"{name[:100]}" is of Ollama\'s own library, which is not used here: {how}'
        raise RequestError(400, "not_supported", message, param="model")
    return found[1]


def line(shown: Mapping[str, Any]) -> Line:
    """A job's state as one line of progress; of one that has failed, its error."""
    state = str(shown["state"])
    if state in ("failed", "cancelled"):
        return {"error": ": ".join(part for part in (shown["message"], shown["hint"]) if part) or state}
    if state in _STATUSES:
        return {"status": _STATUSES[state]}
    counts = {"total": shown["total_bytes"], "completed": shown["done_bytes"]} if shown["total_bytes"] else {}
    return {"status": f"pulling {shown['file'] or shown['source']}", **counts}


def ollama_pull_route(pulls: Pulls) -> web.RouteDef:
    """The route. As with Ollama, a pull that was begun here ends when the last who follows it here leaves; its bytes are kept."""
    followers: Counter[str] = Counter()
    begun: set[str] = set()

    async def pull(request: web.Request) -> web.StreamResponse:
        body = _read(await request.read())
        source = source_of(body.model or body.name or "")
        if followers.total() >= MAX_FOLLOWERS:
            raise RequestError(429, "too_many_followers", f"{MAX_FOLLOWERS} clients follow pulls already", retry_after=Seconds(10))
        before = {str(job.shown()["id"]) for job in pulls.all()}
        key = str(pulls.start(source).shown()["id"])
        if key not in before:
            begun.add(key)
        followers[key] += 1
        try:
            return await (_whole(pulls, key) if body.stream is False else _told(request, pulls, key))
        finally:
            followers[key] -= 1
            if not followers[key]:
                del followers[key]
                if key in begun:
                    begun.discard(key)
                    pulls.cancel(key)  # of one that has ended, nothing

    return web.post("/api/pull", pull)


def _read(raw: bytes) -> _Body:
    try:
        return msgspec.json.decode(raw[:MAX_BODY], type=_Body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(400, "invalid_body", f'expected {{"model": "hf.co/ORG/NAME:QUANT"}}: {error}') from None


async def _whole(pulls: Pulls, key: str) -> web.Response:
    said: Line = {}
    async for job in pulls.follow(key):
        said = line(job.shown())
    if "error" in said:
        raise RequestError(502, "pull_failed", said["error"])
    return web.json_response(said)


async def _told(request: web.Request, pulls: Pulls, key: str) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"})
    await response.prepare(request)
    said: Line = {}
    async for job in pulls.follow(key):
        if line(job.shown()) != said:
            said = line(job.shown())
            await response.write(json.dumps(said).encode() + b"\n")
    return response
