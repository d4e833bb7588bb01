"""`POST /borrow`: memory for a person's own program, for as long as the connection stays open. Answers one JSON object a line."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec
from aiohttp import web

from offloadd.errors import RequestError
from offloadd.state.ids import DeviceId
from offloadd.units import Bytes, Seconds, format_bytes, format_seconds, parse_bytes, parse_seconds

REPEAT = Seconds(2)
"""While it waits, the reason is told this often; that also shows that the borrower is still there."""
FIRST_WORD = Seconds(0.5)
"""An answer begins when the loan is granted or after this long, so that one which can never be had is refused by its status."""


class Borrow(msgspec.Struct, forbid_unknown_fields=True, rename={"limit": "for"}):
    """The body: how much, where (a GPU by index or UUID, `host`, or `auto`), for how long at most, what for, and who uses it."""

    size: str
    device: str = "auto"
    limit: str | None = None
    why: str = ""
    pid: int | None = None


class Book(Protocol):
    """The book of loans."""

    def ask(self, size: Bytes, device: str, why: str, pid: int | None) -> str:
        """Ask; the loan's id."""
        ...

    async def wait(self, name: str) -> Mapping[DeviceId, Bytes]:
        """Until it is granted; RequestError when it can never be."""
        ...

    def give_back(self, name: str) -> None:
        """End it."""
        ...


def borrow_route(book: Book, reason: Callable[[str], str]) -> web.RouteDef:
    """The route; `reason` gives the planner's sentence about a loan."""

    async def borrow(request: web.Request) -> web.StreamResponse:
        asked = _read(await request.read())
        size, limit = _size(asked), _limit(asked)
        name = book.ask(size, asked.device, asked.why[:200], asked.pid)

        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        waiting = asyncio.ensure_future(book.wait(name))
        try:
            await asyncio.wait({waiting}, timeout=FIRST_WORD)
            if waiting.done():
                waiting.result()  # refused before the answer has begun: it is refused as a whole
            await response.prepare(request)
            while not waiting.done():
                await _tell(response, {"state": "waiting", "loan": name, "reason": reason(name)})
                await asyncio.wait({waiting}, timeout=REPEAT)
            if refusal := waiting.exception():  # the config or the machine is another one now
                await _tell(response, {"state": "refused", "loan": name, "reason": str(refusal)})
                return response
            devices = {str(device): held for device, held in waiting.result().items()}
            await _tell(response, {"state": "granted", "loan": name, "devices": devices, "reason": reason(name)})
            await _stay(response, limit)
            await _tell(response, {"state": "ended", "loan": name, "reason": f"its time of {asked.limit} is over"})
        finally:
            waiting.cancel()
            book.give_back(name)
        return response

    return web.post("/borrow", borrow)


async def _stay(response: web.StreamResponse, limit: Seconds | None) -> None:
    """Until the time is over. A borrower that leaves cancels us; the empty lines find one whose machine has gone."""
    loop = asyncio.get_running_loop()
    end = None if limit is None else loop.time() + limit
    while end is None or loop.time() < end:
        await asyncio.sleep(REPEAT if end is None else max(0.0, min(REPEAT, end - loop.time())))
        await response.write(b"\n")


async def _tell(response: web.StreamResponse, line: dict[str, Any]) -> None:
    await response.write(msgspec.json.encode(line) + b"\n")


def _read(body: bytes) -> Borrow:
    try:
        return msgspec.json.decode(body, type=Borrow)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(400, "invalid_body", f"the request's body is not as expected: {error}") from None


def _size(asked: Borrow) -> Bytes:
    try:
        size = parse_bytes(asked.size)
    except ValueError as error:
        raise RequestError(400, "invalid_size", f"size: {error}", param="size") from None
    if not size:
        raise RequestError(400, "invalid_size", f"size: {format_bytes(0)} is nothing to borrow", param="size")
    return size


def _limit(asked: Borrow) -> Seconds | None:
    if asked.limit is None:
        return None
    try:
        limit = parse_seconds(asked.limit)
    except ValueError as error:
        raise RequestError(400, "invalid_time", f"for: {error}", param="for") from None
    if limit < 1:
        raise RequestError(400, "invalid_time", f"for: {format_seconds(limit)} is too short to be of use", param="for")
    return limit
