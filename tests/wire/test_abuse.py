"""Clients and engines that misbehave: nothing hangs, nothing is left over, and no byte of one answer gets into another."""

from __future__ import annotations

import asyncio
import random
import re
from collections import Counter
from typing import cast

import msgspec
import pytest

from tests.wire.rig import ASK, ASK_STREAM, CHAT, LIMIT_S, STREAM, Peer, Rig, chunked, rigged, sse, until, word

BODY = b'{"choices": [], "mark": "whole"}'
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
EVENTS = sse(word("one"), word("two"), b"[DONE]")
STREAMED = STREAM + chunked(*EVENTS)


async def plain(peer: Peer) -> None:
    peer.say(PLAIN)


def marked(body: bytes) -> bytes:
    """An answer that tells whose it is."""
    mark = msgspec.json.decode(body)["mark"]
    answer = msgspec.json.encode({"mark": mark, "filler": "x" * (len(mark) * 37 % 900)})
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(answer), answer)


async def echo(peer: Peer) -> None:
    peer.say(marked(peer.body))


async def still_fine(rig: Rig) -> None:
    """An ordinary client is served as ever."""
    rig.engine.script = plain
    status, _, body = await rig.ask(ASK)
    assert (status, body) == (200, BODY)


# --- engines that misbehave ---


@pytest.mark.parametrize(("raw", "ask"), [(PLAIN, ASK), (STREAMED, ASK_STREAM)])
async def test_an_engine_that_dies_at_each_byte(raw: bytes, ask: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client has the whole answer, or an error, or a connection that breaks; never a part that passes for the whole."""
    monkeypatch.setattr("offloadd.proxy.exchange.LAST_BYTES", 0.001)
    cut = 0

    async def script(peer: Peer) -> None:
        peer.say(raw[:cut])
        await peer.flush()
        peer.writer.close()

    async with rigged(script) as rig:
        for cut in range(len(raw)):  # noqa: B007  (the script reads it)
            client = await rig.connect()
            client.send(ask)
            status, head = await client.head()
            body = await client.body(head)
            if status == 200:
                assert b"backend_lost" in body
                assert b"[DONE]" not in body.partition(b"backend_lost")[2]
            else:
                assert (status, b"backend_lost" in body) == (502, True)
            client.close()
            rig.book.memory.forget(rig.hosts[0].instance)
        await still_fine(rig)


@pytest.mark.parametrize(
    "raw",
    [
        b"junk\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\nabcde",
        b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length : 5\r\n\r\nabcde",
        b"HTTP/1.1 200 OK\nContent-Length: 5\n\nabcde",
        b"HTTP/1.1 200 OK\r\nX-Null: a\0b\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 300 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\nx\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\nx\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;" + b"e" * 200_000,
        b"HTTP/1.1 999999 OK\r\n\r\n",
        b"HTTP/3.7 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 3000,
    ],
)
async def test_an_answer_that_could_be_read_in_two_ways(raw: bytes) -> None:
    async def script(peer: Peer) -> None:
        peer.say(raw)
        await peer.flush()
        peer.writer.close()

    async with rigged(script) as rig:
        status, _, body = await rig.ask(ASK)
        assert status == 502, body
        await still_fine(rig)


async def test_bytes_behind_an_answer_are_nobodys() -> None:
    """A second answer that nobody asked for must not become the answer to the next request."""

    async def script(peer: Peer) -> None:
        forged = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged"
        peer.say(marked(peer.body) + (forged if peer.number % 2 else b""))

    async with rigged(script) as rig:
        for number in range(20):
            mark = f"m{number}"
            status, _, body = await rig.ask({**ASK, "mark": mark})
            assert (status, msgspec.json.decode(body)["mark"]) == (200, mark)


async def test_bytes_on_an_idle_connection_close_it() -> None:
    async def script(peer: Peer) -> None:
        peer.say(PLAIN)
        await peer.flush()
        await asyncio.sleep(0.02)
        peer.say(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged")

    async with rigged(script) as rig:
        for _ in range(3):
            assert (await rig.ask(ASK))[2] == BODY
            await until(lambda: rig.pool.size == 0, "it is closed")


async def test_an_answer_without_an_end_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offloadd.proxy.exchange.MAX_BUFFERED", 100_000)

    async def script(peer: Peer) -> None:
        peer.say(b"HTTP/1.1 200 OK\r\n\r\n")
        while not peer.writer.is_closing():
            peer.say(b"x" * 10_000)
            await peer.flush()

    async with rigged(script) as rig:
        status, _, body = await rig.ask(ASK)
        assert (status, b"answer_too_large" in body) == (502, True)
        await still_fine(rig)


# --- clients that misbehave ---


async def test_one_that_leaves_at_each_moment() -> None:
    """During its head, its body, before the answer and within it: the engine is left at once, and the lease given back."""
    begun = asyncio.Event()

    async def script(peer: Peer) -> None:
        peer.say(STREAM)
        begun.set()
        for _ in range(2000):
            peer.say(b"5\r\nabcde\r\n")
            await peer.flush()
            await asyncio.sleep(0.005)

    body = msgspec.json.encode(ASK_STREAM)
    raw = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (CHAT.encode(), len(body), body)
    async with rigged(script) as rig:
        for cut in range(1, len(raw), 7):
            client = await rig.connect()
            client.raw(raw[:cut])
            await client.writer.drain()
            client.close()
        await until(lambda: rig.load == 0, "no lease is left")
        assert not begun.is_set()
        for wait in (0, 1, 3):
            client = await rig.connect()
            client.raw(raw)
            await begun.wait()
            begun.clear()
            for _ in range(wait):
                await client.reader.readuntil(b"\r\n")
            client.close()
            await rig.quiet()
            rig.pool.forget(rig.hosts[0].endpoint)  # the spare one that waits for the next
            await until(lambda: not rig.engine.open, "the engine is left")


async def test_work_for_one_that_left_counts_until_it_is_over() -> None:
    """As llama-server reads a prompt to its end: it closes the connection when its slot is free."""
    noticed, go_on = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.left()
        noticed.set()
        await go_on.wait()
        peer.writer.close()

    for ask in (ASK, ASK_STREAM):
        async with rigged(script) as rig:
            client = await rig.connect()
            client.send(ask)
            await until(lambda: rig.engine.heads, "it is there")
            client.close()
            await noticed.wait()
            await until(lambda: rig.served, "it is told of")
            assert (rig.load, rig.served[0].fate) == (1, "cancelled")
            go_on.set()
            await rig.quiet()
            noticed.clear()
            go_on.clear()


async def test_one_that_left_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offloadd.proxy.upstream.LEAVING", 0.1)
    never = asyncio.Event()

    async def script(_: Peer) -> None:
        await never.wait()

    async with rigged(script) as rig:
        client = await rig.connect()
        client.send(ASK)
        await until(lambda: rig.engine.heads, "it is there")
        client.close()
        await rig.quiet()
        never.set()


async def test_one_that_left_does_not_keep_an_instance_from_ending() -> None:
    async def script(peer: Peer) -> None:
        await peer.left()
        await asyncio.sleep(60)

    async with rigged(script) as rig:
        client = await rig.connect()
        client.send(ASK)
        await until(lambda: rig.engine.heads, "it is there")
        client.close()
        await until(lambda: rig.served, "it is told of")
        assert rig.load == 1
        rig.pool.forget(rig.hosts[0].endpoint)
        await rig.quiet()
        for task in asyncio.all_tasks():
            if "Engine.serve" in str(task):
                task.cancel()


async def test_one_that_is_half_closed() -> None:
    """Who has closed its side has left: that is what a socket tells, and the engine's work must end."""

    async def script(peer: Peer) -> None:
        peer.say(STREAM)
        while not peer.writer.is_closing():
            peer.say(b"5\r\nabcde\r\n")
            await peer.flush()
            await asyncio.sleep(0.005)

    async with rigged(script) as rig:
        client = await rig.connect()
        client.send(ASK_STREAM)
        await client.head()
        client.writer.write_eof()
        await rig.quiet()


async def test_one_that_is_half_closed_and_does_not_read() -> None:
    async def script(peer: Peer) -> None:
        peer.say(STREAM)
        while not peer.writer.is_closing():
            peer.say(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
            await peer.flush()

    async with rigged(script) as rig:
        client = await rig.connect()
        client.send(ASK_STREAM)
        await client.head()
        client.writer.transport.pause_reading()
        await asyncio.sleep(0.3)
        client.writer.write_eof()
        await rig.quiet()


async def test_one_that_stopped_reading_is_left_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offloadd.proxy.downstream.STALLED", 0.2)

    async def script(peer: Peer) -> None:
        peer.say(STREAM)
        while not peer.writer.is_closing():
            peer.say(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
            await peer.flush()

    async with rigged(script) as rig:
        client = await rig.connect()
        client.send(ASK_STREAM)
        await client.head()
        client.writer.transport.pause_reading()
        await rig.quiet()
        await until(lambda: rig.served, "it is told of")
        assert rig.served[0].fate == "cancelled"


async def test_one_that_reads_slowly_holds_its_engine_back_and_little_memory() -> None:
    said = 0

    async def script(peer: Peer) -> None:
        nonlocal said
        peer.say(STREAM)
        piece = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
        for _ in range(4000):
            peer.say(piece)
            await peer.flush()
            said += len(piece)
        peer.say(b"0\r\n\r\n")

    async with rigged(script) as rig:
        client = await rig.connect()
        client.send(ASK_STREAM)
        await client.head()
        before = -1
        while said != before:
            before = said
            await asyncio.sleep(0.2)
        assert said < 32 * 2**20  # what lies in the sockets of both sides, and a little with us
        total = 0
        while piece := await client.chunk():
            total += len(piece)
        assert total == 4000 * 0x4000


async def test_requests_in_a_row_are_answered_in_their_order() -> None:
    """Pipelined, and cut at each byte."""
    bodies = [msgspec.json.encode({**ASK, "mark": f"mark{number}"}) for number in range(6)]
    raw = b"".join(
        b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (CHAT.encode(), len(b), b) for b in bodies
    )
    async with rigged(echo) as rig:
        for size in (len(raw), 1, 13, 64):
            client = await rig.connect()
            for start in range(0, len(raw), size):
                client.raw(raw[start : start + size])
                if size > 1 or start % 50 == 0:
                    await client.writer.drain()
            for number in range(6):
                status, _, body = await client.answer()
                assert (status, msgspec.json.decode(body)["mark"]) == (200, f"mark{number}")
            client.close()


async def test_requests_behind_a_stream_wait_for_its_end() -> None:
    async def script(peer: Peer) -> None:
        if b'"stream"' in peer.body:
            peer.say(STREAM)
            for event in EVENTS:
                await asyncio.sleep(0.02)
                peer.say(b"%x\r\n%b\r\n" % (len(event), event))
            peer.say(b"0\r\n\r\n")
        else:
            peer.say(PLAIN)

    async with rigged(script) as rig:
        client = await rig.connect()
        client.send(ASK_STREAM)
        await client.head()
        for _ in range(500):
            client.send(ASK)  # more than is kept: reading stops until the stream is over
        assert await client.body(b"transfer-encoding: chunked") == b"".join(EVENTS)
        for _ in range(500):
            assert (await client.answer())[2] == BODY
        client.close()


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 30\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 30",
        b"Content-Length: 30\r\nContent-Length: 31",
        b"Content-Length: +30",
        b"Content-Length: 3 0",
        b"Content-Length : 30",
        b"Content-Length: 0x1e",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding: chunked, identity",
        b"Transfer-Encoding:\x0bchunked",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        b" Content-Length: 30",
        b"Content-Length: 30\r\n X: folded",
        b"X: a\0b\r\nContent-Length: 30",
        b"X: a\rContent-Length: 30",
    ],
)
async def test_a_request_that_could_be_read_in_two_ways(head: bytes) -> None:
    """What hides behind it never becomes a request of its own at the engine."""
    hidden = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}"
    body = b'{"model":"a","messages":["x"]}'
    async with rigged(plain) as rig:
        client = await rig.connect()
        client.raw(b"POST %b HTTP/1.1\r\nHost: localhost\r\n%b\r\n\r\n%b" % (CHAT.encode(), head, body + hidden))
        client.writer.write_eof()
        answer = await client.rest()
        assert answer[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 200", b""), answer
        if answer.startswith(b"HTTP/1.1 400") or not answer:
            assert not rig.engine.heads
        for seen in rig.engine.heads:
            low = seen.lower()
            assert low.count(b"content-length:") + low.count(b"transfer-encoding:") == 1
            assert b"/v1/completions" not in seen
        client.close()
        await still_fine(rig)


MUTATIONS = 5000
"""Of request heads, on each of the two loops."""
AT_ONCE = 50
_ODD = (
    b"\r",
    b"\n",
    b"\0",
    b" ",
    b"\t",
    b":",
    b";",
    b",",
    b"\x7f",
    b"\xff",
    b"\r\n",
    b"\r\n\r\n",
    b"chunked",
    b"Content-Length: 1\r\n",
)
_BODY = msgspec.json.encode({**ASK, "mark": "m"})
_HEAD = (
    b"POST %b HTTP/1.1\r\nHost: localhost\r\nX-One: a, b\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\nConnection: keep-alive\r\n\r\n" % (CHAT.encode(), len(_BODY))
)


_LAST = b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3 + b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
"""What follows: wherever the reader of the head has come to, it is answered or refused, and the connection is closed."""


def mutated(chance: random.Random) -> bytes:
    """A head with a few bytes lost or put in somewhere."""
    head = bytearray(_HEAD)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(head))
        if chance.random() < 0.3:
            del head[at : at + chance.randint(1, 5)]
        else:
            head[at:at] = chance.choice(_ODD)
    return bytes(head)


class OneShot(asyncio.Protocol):
    """Sends some bytes, and gathers what comes until the other side closes."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.answer = b""
        self.over = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self.data)  # uvloop's are of another family

    def data_received(self, data: bytes) -> None:
        self.answer += data

    def connection_lost(self, error: Exception | None) -> None:
        if not self.over.done():
            self.over.set_result(None)


async def test_heads_mutated_at_random(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever is written, an engine sees one well-framed request or none, and the next client is served."""
    caplog.set_level("CRITICAL", "aiohttp.server")  # it tells of each, with a traceback
    chance = random.Random(20240611)
    loop = asyncio.get_running_loop()

    async def one(rig: Rig, data: bytes) -> bytes:
        transport, client = await loop.create_connection(lambda: OneShot(data), "127.0.0.1", rig.port)
        try:
            await asyncio.wait_for(client.over, LIMIT_S)
        except TimeoutError:
            raise AssertionError((data, client.answer)) from None
        finally:
            transport.abort()
        return client.answer

    statuses: Counter[bytes] = Counter()
    async with rigged(echo) as rig:
        for _ in range(MUTATIONS // AT_ONCE):
            for answer in await asyncio.gather(*[one(rig, mutated(chance) + _BODY + _LAST) for _ in range(AT_ONCE)]):
                assert answer.startswith(b"HTTP/"), answer
                statuses[answer.split(None, 2)[1]] += 1
        assert min(statuses[b"200"], statuses[b"400"]) > MUTATIONS / 20, statuses  # it is a test of both
        for seen in rig.engine.heads:
            low = seen.lower()
            assert seen.startswith(b"POST /v1/")
            assert len(re.findall(rb"^(?:content-length|transfer-encoding):", low, re.MULTILINE)) <= 1
            assert b"\0" not in seen
        rig.engine.problems.clear()
        rig.book.memory.forget(rig.hosts[0].instance)
        await still_fine(rig)


async def test_many_at_once_and_none_mixed_up() -> None:
    """Kept connections, streams, clients that leave: every answer is its own request's."""
    chance = random.Random(7)

    async def script(peer: Peer) -> None:
        fields = msgspec.json.decode(peer.body)
        mark = fields["mark"]
        if fields.get("stream"):
            peer.say(STREAM)
            for number in range(5):
                piece = sse({"mark": mark, "number": number})[0]
                peer.say(b"%x\r\n%b\r\n" % (len(piece), piece))
                await asyncio.sleep(0)
            peer.say(b"0\r\n\r\n")
        else:
            peer.say(marked(peer.body))

    async def one(rig: Rig, number: int) -> None:
        mark = f"m{number}"
        client = await rig.connect()
        for turn in range(4):
            streamed = chance.random() < 0.5
            client.send({**ASK, "mark": mark, **({"stream": True} if streamed else {})})
            if turn == 2 and number % 3 == 0:
                break
            _, _, body = await client.answer()
            assert body.count(mark.encode() + b'"') == (5 if streamed else 1)
            assert body.count(b'"mark"') == (5 if streamed else 1)
        client.close()

    async with rigged(script) as rig:
        await asyncio.gather(*[one(rig, number) for number in range(120)])


async def test_an_instance_that_is_told_to_end_ends_its_answers() -> None:
    """A stream is told so in itself, a whole answer is an error, and both soon."""

    async def script(peer: Peer) -> None:
        if b'"stream"' in peer.body:
            peer.say(STREAM + b"5\r\nabcde\r\n")
        await peer.flush()
        await peer.left()

    async with rigged(script) as rig:
        stream, whole = await rig.connect(), await rig.connect()
        stream.send(ASK_STREAM)
        whole.send(ASK)
        await stream.head()
        assert await stream.chunk() == b"abcde"
        await until(lambda: len(rig.engine.heads) == 2, "both run")
        rig.book.hang_up(rig.hosts[0].instance, "it was evicted")
        rig.hosts.clear()
        assert b"it was evicted" in await stream.body(b"transfer-encoding: chunked")
        status, _, body = await whole.answer()
        assert (status, b"it was evicted" in body) == (502, True)


async def test_an_expectation_of_too_much_is_refused_before_it_is_sent() -> None:
    async with rigged(plain) as rig:
        client = await rig.connect()
        client.raw(
            b"POST %b HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 99999999999\r\n\r\n" % CHAT.encode()
        )
        assert (await client.head())[0] == 413
        client.close()


async def test_five_hundred_streams_at_once_keep_every_token_in_its_place() -> None:
    async def script(peer: Peer) -> None:
        mark = msgspec.json.decode(peer.body)["mark"]
        peer.say(STREAM)
        for number in range(12):
            piece = sse({"mark": mark, "number": number})[0]
            peer.say(b"%x\r\n%b\r\n" % (len(piece), piece))
            await asyncio.sleep(0.01)
        peer.say(b"0\r\n\r\n")

    async def one(rig: Rig, mark: int) -> list[tuple[int, int]]:
        _, _, body = await rig.ask({**ASK_STREAM, "mark": mark})
        events = [msgspec.json.decode(line[6:]) for line in body.split(b"\n\n") if line]
        return [(event["mark"], event["number"]) for event in events]

    async with rigged(script) as rig:
        found = await asyncio.gather(*[one(rig, mark) for mark in range(500)])
        assert found == [[(mark, number) for number in range(12)] for mark in range(500)]
        await until(lambda: len(rig.served) == 500, "all are told of")
        assert {one.fate for one in rig.served} == {"answered"}
