"""A request that is over is gone at once, however it ended: none waits for the collector of cycles, which comes when it likes.

Each has its body, which may be many MiB, and those that wait are in no account of what bodies take.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from aiohttp import web

from offloadd.proxy import relay
from offloadd.proxy.account import Account
from offloadd.proxy.downstream import Stream
from offloadd.proxy.lease import Lease
from offloadd.state.desired import QueueLimits
from offloadd.units import Seconds
from tests.wire.rig import ASK, ASK_STREAM, CHAT, STREAM, Peer, Rig, chunked, rigged, sse, until, word

OF_A_REQUEST = (web.Request, Account, Lease, Stream, relay.Call, relay.Exchange)
LARGE = {"model": "a", "messages": [{"role": "user", "content": "x" * 200_000}]}
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # what was there before need not be looked through each time
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


def remains() -> Counter[str]:
    return Counter(type(each).__name__ for each in gc.get_objects() if isinstance(each, OF_A_REQUEST))


async def well(peer: Peer) -> None:
    peer.say(STREAM + chunked(*sse(word("hello"), b"[DONE]")) if b'"stream":true' in peer.body else ANSWER)


async def breaks_off(peer: Peer) -> None:
    peer.say(STREAM + chunked(*sse(word("hello")))[:-5])
    peer.writer.close()


async def is_nonsense(peer: Peer) -> None:
    peer.say(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}")


async def dies(peer: Peer) -> None:
    peer.writer.transport.abort()


async def never(peer: Peer) -> None:
    peer.say(STREAM + b"5\r\nhello\r\n" if b'"stream":true' in peer.body else b"")
    await peer.left()


async def asked(rig: Rig, body: Any) -> None:
    await rig.ask(body)


async def left(rig: Rig, body: Any) -> None:
    """The client leaves when its request is on its way, or waits."""
    client = await rig.connect()
    client.send(body)
    await until(lambda: rig.engine.heads or not rig.hosts, "the engine has it")
    await asyncio.sleep(0.05)
    client.close()
    await until(lambda: rig.served, "it is over")


async def refused(rig: Rig, body: Any) -> None:
    """It waits, and is told that there is no use."""
    client = await rig.connect()
    client.send(body)
    await until(lambda: rig.book.demand().waiting, "it waits")
    await asyncio.sleep(0.1)
    rig.book.close("we close")
    await client.answer()


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize(
    ("script", "body", "how"),
    [
        pytest.param(well, ASK, asked, id="answered"),
        pytest.param(well, ASK_STREAM, asked, id="streamed"),
        pytest.param(well, {**ASK, "model": "nobody"}, asked, id="unknown"),
        pytest.param(well, {**ASK, "backend": "other"}, asked, id="refused"),
        pytest.param(breaks_off, ASK, asked, id="broken off"),
        pytest.param(breaks_off, ASK_STREAM, asked, id="a stream broken off"),
        pytest.param(is_nonsense, ASK, asked, id="nonsense"),
        pytest.param(dies, ASK, asked, id="lost"),
        pytest.param(dies, ASK_STREAM, asked, id="a stream lost"),
        pytest.param(never, ASK, left, id="left"),
        pytest.param(never, ASK_STREAM, left, id="a stream left"),
    ],
)
async def test_nothing_remains(script: Any, body: dict[str, Any], how: Callable[[Rig, Any], Awaitable[None]], large: bool) -> None:
    whole = {**body, "messages": LARGE["messages"]} if large else body
    async with rigged(script) as rig:
        before = remains()
        await how(rig, whole)
        await gone(rig, before)


@pytest.mark.parametrize("body", [ASK, ASK_STREAM, LARGE], ids=["plain", "stream", "large"])
@pytest.mark.parametrize("how", [asked, left, refused])
async def test_nothing_remains_of_one_that_waited_in_vain(
    body: Any, how: Callable[[Rig, Any], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offloadd.proxy.leases.KEEPALIVE", 0.03)
    async with rigged(well, queue=QueueLimits(max_wait=Seconds(0.2 if how is asked else 20))) as rig:
        rig.hosts.clear()
        before = remains()
        await how(rig, body)
        await gone(rig, before)


@pytest.mark.parametrize("body", [ASK, ASK_STREAM, LARGE], ids=["plain", "stream", "large"])
async def test_nothing_remains_of_one_that_waited_and_was_answered(body: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offloadd.proxy.leases.KEEPALIVE", 0.03)
    async with rigged(well) as rig:
        hosts, rig.hosts[:] = list(rig.hosts), []
        before = remains()
        client = await rig.connect()
        client.send(body)
        await until(lambda: rig.book.demand().waiting, "it waits")
        await asyncio.sleep(0.1)
        rig.hosts[:] = hosts
        rig.book.serve_all()
        await client.answer()
        await gone(rig, before)


async def test_nothing_remains_of_what_is_no_request() -> None:
    async with rigged(well) as rig:
        before = remains()
        for junk in (b"GET / HT", b"\x16\x03\x01\x02", f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{{".encode()):
            client = await rig.connect()
            client.raw(junk)
            await asyncio.sleep(0.05)
            client.close()
        with contextlib.suppress(asyncio.IncompleteReadError):
            await rig.ask(ASK, headers="Transfer-Encoding: chunked\r\n")
        await rig.ask(None, path="/nothing", method="GET")
        await gone(rig, before)


async def gone(rig: Rig, before: Counter[str]) -> None:
    """Its connection is closed as well: that one's last request may be kept with it as long as it is open."""
    for client in rig.clients:
        client.close()
    rig.clients.clear()
    await rig.quiet()
    for _ in range(100):
        if not remains() - before:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"still there: {remains() - before}")
