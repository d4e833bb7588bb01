"""`GET /logs/{instance}`: what an instance wrote, from its file; with `follow=1` also what it writes from now on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from aiohttp import web

from offloadd.errors import RequestError
from offloadd.state.desired import ModelSpec
from offloadd.state.ids import InstanceId, ModelName
from offloadd.units import Seconds

POLL = Seconds(0.25)
"""How often the file is looked at while it is followed: it is written by the engine itself, so nobody tells us."""
MAX_FOLLOWERS = 64
MAX_LINES = 100_000
_PIECE = 256 * 1024
_LINE_LENGTH = 4096


class Folder(Protocol):
    """The folder of the instances' logs; its methods block."""

    def find(self, name: str) -> InstanceId | None:
        """The instance of this name, if it left a log."""
        ...

    def newest(self, model: ModelName) -> InstanceId | None:
        """The model's latest launch that left a log."""
        ...

    def begin(self, instance: InstanceId) -> int:
        """Where what is kept of it begins."""
        ...

    def before_end(self, instance: InstanceId, lines: int) -> int:
        """Where the last so many of its lines begin."""
        ...

    def read(self, instance: InstanceId, position: int, limit: int) -> tuple[bytes, int]:
        """What it wrote from there on, and the position behind it."""
        ...


def logs_route(
    folder: Folder, runs: Callable[[InstanceId], bool], find: Callable[[str], ModelSpec], printable: Callable[[str, int], str]
) -> web.RouteDef:
    """The route. `runs` tells whether an instance may still write; `printable` makes a line of a program safe to show."""
    followers = 0

    async def logs(request: web.Request) -> web.StreamResponse:
        nonlocal followers
        instance = await _instance(folder, find, request.match_info["instance"])
        count, follow = _lines(request), request.query.get("follow") == "1"
        if follow and followers >= MAX_FOLLOWERS:
            raise RequestError(429, "too_many_followers", f"{MAX_FOLLOWERS} logs are followed already", retry_after=Seconds(10))
        start = folder.begin if count is None else lambda instance: folder.before_end(instance, count)
        position = await asyncio.to_thread(start, instance)
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/plain; charset=utf-8",
                "X-Content-Type-Options": "nosniff",
                "X-Offloadd-Instance": str(instance),
            }
        )
        followers += follow
        try:
            await response.prepare(request)
            await _copy(_Lines(printable), response, folder, instance, position, lambda: follow and runs(instance))
        finally:
            followers -= follow
        return response

    return web.get("/logs/{instance:.+}", logs)


class _Lines:
    """Whole lines out of pieces, each made safe to show."""

    def __init__(self, printable: Callable[[str, int], str]) -> None:
        self._printable = printable
        self._rest = b""

    def feed(self, piece: bytes, *, last: bool = False) -> bytes:
        """Lines that are whole with this piece; a line without an end is cut where it grows too long."""
        *whole, self._rest = (self._rest + piece).split(b"\n")
        if len(self._rest) > _LINE_LENGTH or (last and self._rest):
            whole.append(self._rest)
            self._rest = b""
        return b"".join(self._printable(line.decode(errors="replace"), _LINE_LENGTH).encode() + b"\n" for line in whole)


async def _copy(
    lines: _Lines, response: web.StreamResponse, folder: Folder, instance: InstanceId, position: int, goes_on: Callable[[], bool]
) -> None:
    """Write what there is, and what comes, until nothing more can come."""
    while True:
        more = goes_on()  # before the look: what it wrote last is still read
        piece, position = await asyncio.to_thread(folder.read, instance, position, _PIECE)
        if piece:
            await response.write(lines.feed(piece))
        elif more:
            await asyncio.sleep(POLL)
        else:
            await response.write(lines.feed(b"", last=True))
            return


async def _instance(folder: Folder, find: Callable[[str], ModelSpec], name: str) -> InstanceId:
    """The instance of this name, or the latest launch of the model of this name."""
    found = await asyncio.to_thread(folder.find, name)
    if found is None:
        model = find(name).name
        found = await asyncio.to_thread(folder.newest, model)
    if found is None:
        raise RequestError(404, "no_log", f"{name[:128]} was never started, so there is no output of it yet")
    return found


def _lines(request: web.Request) -> int | None:
    text = request.query.get("lines")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 7 and int(text) <= MAX_LINES):
        raise RequestError(400, "invalid_lines", f"lines: expected a number up to {MAX_LINES}", param="lines")
    return int(text)
