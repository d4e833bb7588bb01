"""Every way in which a request and its answer can be framed, on their way through."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from offloadd.state.launch import EngineApi
from tests.wire.rig import ASK, ASK_STREAM, CHAT, STREAM, Peer, Script, chunked, rigged, sse, until, word

HELLO = sse(word("hel"), word("lo"), b"[DONE]")
WHOLE = b'{"object": "chat.completion", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}'


def says(*pieces: bytes, close: bool = False) -> Script:
    async def script(peer: Peer) -> None:
        for piece in pieces:
            peer.say(piece)
            await peer.flush()
        if close:
            peer.writer.close()

    return script


def plain(body: bytes = WHOLE, head: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body)


# --- streams ---


async def test_a_stream() -> None:
    async with rigged(says(STREAM + chunked(*HELLO))) as rig:
        status, head, body = await rig.ask(ASK_STREAM)
        assert (status, body) == (200, b"".join(HELLO))
        assert b"X-Offloadd-Instance: a-1\r\n" in head
        assert b"X-Request-Id: " in head
        assert head.lower().count(b"transfer-encoding") == 1
        await until(lambda: rig.served, "it is told of")
        (served,) = rig.served
        assert (served.fate, served.status, served.streamed, served.chunks) == ("answered", 200, True, 3)


async def test_every_piece_comes_as_soon_as_it_is_there() -> None:
    go_on = asyncio.Event()

    async def script(peer: Peer) -> None:
        peer.say(STREAM)
        for event in HELLO:
            peer.say(b"%x\r\n%b\r\n" % (len(event), event))
            await go_on.wait()
            go_on.clear()
        peer.say(b"0\r\n\r\n")

    async with rigged(script) as rig:
        client = await rig.connect()
        client.send(ASK_STREAM)
        await client.head()
        for event in HELLO:
            assert await client.chunk() == event
            go_on.set()
        assert await client.chunk() == b""
        client.close()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
async def test_cut_anywhere(size: int) -> None:
    """The bytes of the answer come in pieces of any size, and make the same answer."""
    raw = STREAM + chunked(*HELLO)

    async def script(peer: Peer) -> None:
        for start in range(0, len(raw), size):
            peer.say(raw[start : start + size])
            await peer.flush()
            await asyncio.sleep(0)

    async with rigged(script) as rig:
        assert (await rig.ask(ASK_STREAM))[2] == b"".join(HELLO)


async def test_chunk_extensions_end_here() -> None:
    raw = STREAM + b"3;name=value;other\r\nabc\r\n0;last\r\n\r\n"
    async with rigged(says(raw)) as rig:
        client = await rig.connect()
        client.send(ASK_STREAM)
        await client.head()
        assert (await client.chunk(), await client.chunk()) == (b"abc", b"")
        client.close()


@pytest.mark.parametrize("wanted", [True, False])
async def test_trailers_reach_those_who_ask(wanted: bool) -> None:
    raw = STREAM + b"3\r\nabc\r\n0\r\nX-Sum: 7\r\nSet-Cookie: x\r\nConnection: y\r\n\r\n"
    async with rigged(says(raw)) as rig:
        client = await rig.connect()
        client.send(ASK_STREAM, headers="TE: trailers\r\n" if wanted else "")
        _, head = await client.head()
        assert await client.body(head) == b"abc"
        assert client.trailer == (b"X-Sum: 7\r\n" if wanted else b"")
        client.close()


async def test_a_stream_that_ends_with_its_connection() -> None:
    raw = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + b"".join(HELLO)
    async with rigged(says(raw, close=True)) as rig:
        assert (await rig.ask(ASK_STREAM))[2] == b"".join(HELLO)


async def test_a_stream_of_http_1_0() -> None:
    """A client that knows no chunks reads to the end of the connection."""
    async with rigged(says(STREAM + chunked(*HELLO))) as rig:
        client = await rig.connect()
        body = b'{"model": "a", "messages": [], "stream": true}'
        client.raw(b"POST %b HTTP/1.0\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (CHAT.encode(), len(body), body))
        _, head = await client.head()
        assert b"transfer-encoding" not in head.lower()
        assert await client.rest() == b"".join(HELLO)
        client.close()


# --- whole answers ---


async def test_a_whole_answer() -> None:
    async with rigged(says(plain())) as rig:
        status, head, body = await rig.ask(ASK)
        assert (status, body) == (200, WHOLE)
        assert b"Content-Length: %d\r\n" % len(WHOLE) in head
        await until(lambda: rig.served, "it is told of")
        assert (rig.served[0].prompt_tokens, rig.served[0].completion_tokens, rig.served[0].chunks) == (3, 2, 0)


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(WHOLE[:10], WHOLE[10:]),
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + plain(),
        b"HTTP/1.1 200\r\nContent-Length: %d\r\n\r\n" % len(WHOLE) + WHOLE,
        b"HTTP/1.1 200 Fine\r\ncontent-LENGTH:%d\r\nX-Empty:\r\nX-Also:  spaced  \r\n\r\n" % len(WHOLE) + WHOLE,
    ],
)
async def test_a_whole_answer_however_framed(raw: bytes) -> None:
    async with rigged(says(raw)) as rig:
        status, head, body = await rig.ask(ASK)
        assert (status, body) == (200, WHOLE)
        assert b"Link" not in head
        assert b"Content-Length: %d\r\n" % len(WHOLE) in head


async def test_a_whole_answer_that_ends_with_its_connection() -> None:
    async with rigged(says(b"HTTP/1.0 200 OK\r\n\r\n" + WHOLE, close=True)) as rig:
        assert (await rig.ask(ASK))[2] == WHOLE


async def test_connections_are_kept_where_that_is_safe() -> None:
    async with rigged(says(plain())) as rig:
        for _ in range(5):
            assert (await rig.ask(ASK))[0] == 200
        assert rig.engine.connections == 1
        for head in (b"Connection: close\r\n", b"connection: Close\r\n"):
            rig.engine.script = says(plain(head=head))
            before = rig.engine.connections
            for _ in range(3):
                assert (await rig.ask(ASK))[0] == 200
            assert rig.engine.connections >= before + 2
        rig.engine.script = says(STREAM + chunked(*HELLO))
        before = rig.engine.connections
        for _ in range(3):
            assert (await rig.ask(ASK_STREAM))[0] == 200
        await until(lambda: rig.engine.connections == before + 4, "one for each, and one more for the next")


async def test_a_spare_connection_is_made_for_the_next_stream_and_for_no_more_than_there_are_slots() -> None:
    free = asyncio.Event()

    async def streams(peer: Peer) -> None:
        peer.say(STREAM + chunked(*HELLO)[: -len(b"0\r\n\r\n")])
        await free.wait()
        peer.say(b"0\r\n\r\n")

    async with rigged(streams, slots=2) as rig:
        first, second = await rig.connect(), await rig.connect()
        first.send(ASK_STREAM)
        await first.head()
        await until(lambda: rig.engine.connections == rig.pool.size == 2, "one is ready")
        second.send(ASK_STREAM)
        await second.head()
        free.set()
        await until(lambda: rig.load == 0, "both are over")
        assert rig.engine.connections == 2  # with both slots taken nobody could use another
        rig.pool.forget(rig.hosts[0].endpoint)


async def test_no_connection_waits_at_an_engine_that_may_mind() -> None:
    """Such as one that serves one connection after another."""
    async with rigged(says(STREAM + chunked(*HELLO))) as rig:
        rig.hosts[:] = [replace(host, api=EngineApi()) for host in rig.hosts]
        for _ in range(3):
            assert (await rig.ask(ASK_STREAM))[0] == 200
            await until(lambda: rig.pool.size == 0, "none is left")
        assert rig.engine.connections == 3


async def test_a_spare_connection_that_its_engine_closes_meanwhile_fails_nobody() -> None:
    async def streams(peer: Peer) -> None:
        if peer.number == 2:
            peer.writer.transport.abort()  # as when the request and the end of a kept connection cross
        else:
            peer.say(STREAM + chunked(*HELLO))

    async with rigged(streams) as rig:
        assert (await rig.ask(ASK_STREAM))[0] == 200
        await until(lambda: rig.engine.connections == rig.pool.size + 1 == 2, "the first is closed, and one is ready")
        status, _, body = await rig.ask(ASK_STREAM)
        assert (status, b"[DONE]" in body, len(rig.engine.heads)) == (200, True, 3)


async def test_a_connection_is_used_no_more_than_llama_server_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offloadd.proxy.pool.USES", 3)
    async with rigged(says(plain())) as rig:
        for _ in range(7):
            assert (await rig.ask(ASK))[0] == 200
        assert rig.engine.connections == 3


async def test_an_old_connection_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offloadd.proxy.pool.IDLE_LIMIT", 0.05)
    async with rigged(says(plain())) as rig:
        assert (await rig.ask(ASK))[0] == 200
        assert rig.pool.size == 1
        await until(lambda: rig.pool.size == 0, "it is closed by itself")
        assert (await rig.ask(ASK))[0] == 200
        assert rig.engine.connections == 2


async def test_a_kept_connection_that_was_closed_loses_no_request() -> None:
    """The engine closes in the very moment in which the next request is on its way."""

    async def script(peer: Peer) -> None:
        if peer.number % 2 and len(rig.engine.heads) % 2 == 0:
            peer.writer.transport.abort()
            return
        peer.say(plain())

    async with rigged(script) as rig:
        for _ in range(20):
            assert (await rig.ask(ASK))[0] == 200


async def test_a_fresh_connection_that_is_closed_is_a_lost_backend() -> None:
    async def script(peer: Peer) -> None:
        peer.writer.transport.abort()

    async with rigged(script) as rig:
        status, head, body = await rig.ask(ASK)
        assert (status, len(rig.engine.heads)) == (502, 1)
        assert b"backend_lost" in body
        assert b"Retry-After: 1\r\n" in head


# --- by path: what is asked of one server goes through as it is ---


@pytest.mark.parametrize("status", [204, 304])
async def test_answers_without_a_body(status: int) -> None:
    async with rigged(says(b"HTTP/1.1 %d X\r\nX-Mark: 1\r\n\r\n" % status)) as rig:
        client = await rig.connect()
        for _ in range(2):
            client.send(path="/upstream/a/thing", method="GET")
            found, head, body = await client.answer()
            assert (found, body) == (status, b"")
            assert b"transfer-encoding" not in head.lower()
        client.close()


async def test_head_has_a_length_and_no_body() -> None:
    async with rigged(says(b"HTTP/1.1 200 OK\r\nContent-Length: 123\r\n\r\n")) as rig:
        client = await rig.connect()
        for _ in range(2):
            client.send(path="/upstream/a/thing", method="HEAD")
            status, head, _ = await client.answer(bodiless=True)
            assert status == 200
            assert b"Content-Length: 123\r\n" in head
        client.close()


async def test_refusals_by_path_are_the_servers_own() -> None:
    async with rigged(says(b"HTTP/1.1 418 Teapot\r\nContent-Length: 3\r\nX-Mine: yes\r\n\r\nno!")) as rig:
        status, head, body = await rig.ask(b"{}", "/upstream/a/thing?x=%20y&z")
        assert (status, body) == (418, b"no!")
        assert b"X-Mine: yes\r\n" in head
        assert rig.engine.heads[0].startswith(b"POST /thing?x=%20y&z HTTP/1.1\r\n")


@pytest.mark.parametrize("framed", [True, False])
async def test_a_large_body_is_passed_on_as_it_comes(framed: bool) -> None:
    size = 3_000_000

    async def script(peer: Peer) -> None:
        peer.say(plain(str(len(peer.body)).encode()))

    async with rigged(script) as rig:
        client = await rig.connect()
        framing = f"Content-Length: {size}" if framed else "Transfer-Encoding: chunked"
        client.raw(f"PUT /upstream/a/thing HTTP/1.1\r\nHost: localhost\r\n{framing}\r\n\r\n".encode())
        piece = b"x" * 30_000
        for _ in range(size // len(piece)):
            client.raw(piece if framed else b"%x\r\n%b\r\n" % (len(piece), piece))
            await client.writer.drain()
        if not framed:
            client.raw(b"0\r\n\r\n")
        assert (await client.answer())[2] == str(size).encode()
        client.close()


async def test_a_body_that_is_refused_before_it_is_whole() -> None:
    async def script(peer: Peer) -> None:
        raise AssertionError("never whole")

    async def early(peer: Peer) -> None:
        peer.say(b"HTTP/1.1 413 Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await peer.flush()
        peer.writer.close()

    async with rigged(script) as rig:

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            await early(Peer(reader, writer, 0))

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        rig.aim(server.sockets[0].getsockname()[1])
        client = await rig.connect()
        client.raw(b"PUT /upstream/a/thing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n\r\n" + b"x" * 100_000)
        assert (await client.head())[0] == 413
        client.close()
        server.close()


async def test_an_expectation_is_met() -> None:
    async with rigged(says(plain())) as rig:
        client = await rig.connect()
        body = b'{"model": "a", "messages": []}'
        client.raw(b"POST %b HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 30\r\n\r\n" % CHAT.encode())
        assert (await client.head())[0] == 100
        client.raw(body)
        assert (await client.answer())[0] == 200
        assert b"expect" not in rig.engine.heads[0].lower()
        client.close()


async def test_a_unix_socket(tmp_path: Path) -> None:
    async with rigged(says(plain()), unix=str(tmp_path / "engine.sock")) as rig:
        assert (await rig.ask(ASK))[2] == WHOLE
        assert b"Host: localhost\r\n" in rig.engine.heads[0]


async def test_headers_that_belong_to_one_connection_stay_there() -> None:
    private = b"Connection: X-Private\r\nX-Private: 1\r\nKeep-Alive: timeout=5\r\nServer: s\r\nX-Kept: 1\r\n"
    async with rigged(says(plain(head=private))) as rig:
        asked = "Connection: keep-alive, X-Mine\r\nX-Mine: 1\r\nTE: trailers\r\nCookie: c\r\nAuthorization: Bearer x\r\n"
        asked += "X-Through: 1\r\n"
        _, head, _ = await rig.ask(ASK, headers=asked)
        assert b"X-Kept: 1\r\n" in head
        assert not any(name in head.lower() for name in (b"x-private", b"keep-alive", b"server:", b"connection:"))
        seen = rig.engine.heads[0].lower()
        assert b"x-through: 1\r\n" in seen
        assert not any(name in seen for name in (b"x-mine", b"cookie", b"authorization", b"trailers", b"connection:"))


# --- another protocol ---


async def test_a_websocket_goes_through_in_both_directions() -> None:
    switch = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: x\r\n\r\n"

    async def script(peer: Peer) -> None:
        peer.say(switch + b"first")
        while data := await peer.reader.read(65536):
            peer.say(data.upper())
        peer.writer.close()

    async with rigged(script) as rig:
        client = await rig.connect()
        client.send(
            path="/upstream/a/socket", method="GET", headers="Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k\r\n"
        )
        status, head = await client.head()
        assert status == 101
        assert b"Sec-WebSocket-Accept: x\r\n" in head
        assert b"Upgrade: websocket\r\n" in head
        assert b"Sec-WebSocket-Key: k\r\n" in rig.engine.heads[0]
        assert await client.reader.readexactly(5) == b"first"
        big = b"ping" * 500_000
        client.raw(big)
        assert await asyncio.wait_for(client.reader.readexactly(len(big)), 20) == big.upper()
        assert rig.load in (0, 1)
        client.close()


async def test_a_websocket_that_the_server_refuses_or_ends() -> None:
    async with rigged(says(b"HTTP/1.1 403 No\r\nContent-Length: 2\r\n\r\nno")) as rig:
        upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\n"
        assert (await rig.ask(path="/upstream/a/s", method="GET", headers=upgrade))[::2] == (403, b"no")
        rig.engine.script = says(b"HTTP/1.1 101 S\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nbye", close=True)
        client = await rig.connect()
        client.send(path="/upstream/a/s", method="GET", headers=upgrade)
        assert (await client.head())[0] == 101
        assert await client.rest() == b"bye"
        client.close()


async def test_a_protocol_that_nobody_asked_for() -> None:
    async with rigged(says(b"HTTP/1.1 101 S\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nbye")) as rig:
        status, _, body = await rig.ask(ASK)
        assert (status, b"bad_answer" in body) == (502, True)
