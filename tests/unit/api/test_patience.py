"""Connections that take a place and give nothing for it, on a real server with a clock that is turned by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from offloadd.api import patience as subject
from offloadd.api.patience import FIRST_REQUEST, STALL, Patience
from offloadd.units import Instant

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Hand:
    """A clock that is turned by hand."""

    def __init__(self) -> None:
        self.at = 100.0

    def now(self) -> Instant:
        return Instant(self.at)

    def wall(self) -> float:
        return self.at


class Rig:
    """A server under a guard, and clients of it."""

    def __init__(self, files: int = 4096) -> None:
        self.clock = Hand()
        self.patience = Patience(self.clock, files)
        self.began = asyncio.Event()
        self.port = 0

    async def connect(self, sent: bytes = b"") -> Streams:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(sent)
        await writer.drain()
        return reader, writer

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.005)

    def more_has_come(self) -> bool:
        (body,) = self.patience._bodies.values()
        return body.request.content.total_bytes > body.size

    @property
    def open(self) -> int:
        return len(self.patience._connections)

    async def echo(self, request: web.Request) -> web.Response:
        with self.patience.of(request):
            self.began.set()
            return web.Response(body=await request.read())


@asynccontextmanager
async def running(files: int = 4096) -> AsyncIterator[Rig]:
    rig = Rig(files)
    app = web.Application()
    app.add_routes([web.route("*", "/", rig.echo)])
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    assert runner.server is not None
    rig.patience.guard(runner.server)
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    rig.port = runner.addresses[0][1]
    try:
        yield rig
    finally:
        await runner.cleanup()


async def ends(reader: asyncio.StreamReader) -> bytes:
    """All that still comes, once the other side has closed."""
    async with asyncio.timeout(10):
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: "])
async def test_one_that_never_asks_is_closed(sent: bytes) -> None:
    async with running() as rig:
        reader, writer = await rig.connect(sent)
        await rig.until(lambda: rig.open == 1)
        rig.clock.at += FIRST_REQUEST - 1
        rig.patience.sweep()
        assert rig.open == 1
        rig.clock.at += 2
        rig.patience.sweep()
        assert await ends(reader) == b""
        writer.close()
        assert rig.open == 0


async def test_a_body_that_stops_coming_is_not_waited_for() -> None:
    async with running() as rig:
        reader, writer = await rig.connect(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
        await asyncio.wait_for(rig.began.wait(), 10)
        for _ in range(3):  # slowly, but it comes
            rig.clock.at += STALL - 1
            rig.patience.sweep()
            writer.write(b"d")
            await writer.drain()
            await rig.until(rig.more_has_come)
            rig.patience.sweep()
        rig.clock.at += STALL + 1
        rig.patience.sweep()
        assert await ends(reader) == b""
        writer.close()


async def test_one_whose_answer_takes_long_is_left_alone() -> None:
    async with running() as rig:
        reader, writer = await rig.connect(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc")
        assert (await asyncio.wait_for(reader.readuntil(b"abc"), 10)).startswith(b"HTTP/1.1 200")
        rig.clock.at += 10 * (FIRST_REQUEST + STALL)
        rig.patience.sweep()
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nxyz")
        assert (await asyncio.wait_for(reader.readuntil(b"xyz"), 10)).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_more_than_there_are_descriptors_for_are_told_to_come_again() -> None:
    async with running(files=0) as rig:  # 16 at the least
        held = [await rig.connect() for _ in range(16)]
        await rig.until(lambda: rig.open == 16)
        reader, writer = await rig.connect(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        said = await ends(reader)
        assert said.startswith(b"HTTP/1.1 503")
        assert b"Retry-After: 1" in said
        writer.close()
        assert rig.patience.refused == 1
        held[0][1].close()
        await rig.until(lambda: rig.open == 15)
        reader, writer = await rig.connect(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert (await ends(reader)).startswith(b"HTTP/1.1 200")
        for _, each in (*held[1:], (reader, writer)):
            each.close()
        await rig.until(lambda: rig.open == 0)


async def test_connections_of_one_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "PER_PEER", 2)
    monkeypatch.setattr(subject, "_peer", lambda _: "192.0.2.7")
    async with running() as rig:
        held = [await rig.connect() for _ in range(2)]
        await rig.until(lambda: rig.open == 2)
        reader, writer = await rig.connect()
        assert (await ends(reader)).startswith(b"HTTP/1.1 503")
        for _, each in (*held, (reader, writer)):
            each.close()
        await rig.until(lambda: rig.open == 0)
        assert not rig.patience._peers


def test_this_machines_own_are_not_counted() -> None:
    class Transport:
        def __init__(self, name: object) -> None:
            self.name = name

        def get_extra_info(self, _: str) -> object:
            return self.name

    found = [
        subject._peer(Transport(name)) for name in (("127.0.0.1", 1), ("::1", 1, 0, 0), ("::ffff:127.0.0.1", 1, 0, 0), "", None)
    ]  # type: ignore[arg-type]
    assert found == [""] * 5
    assert subject._peer(Transport(("::ffff:192.0.2.1", 1, 0, 0))) == "192.0.2.1"  # type: ignore[arg-type]
