"""Who serves a connection: plain calls for inference from our own front, all else the HTTP library, and no client can tell."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from offloadd.api.front import MAX_PLAIN, Front
from offloadd.api.patience import FIRST_REQUEST, IDLE, STALL
from tests.wire.rig import ASK, ASK_STREAM, CHAT, STREAM, Peer, Rig, chunked, rigged, sse, until, word

WHOLE = b'{"choices": [{"message": {"content": "hi"}}]}'
DATA = msgspec.json.encode(ASK)
PLAIN = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (CHAT.encode(), len(DATA), DATA)


async def whole(peer: Peer) -> None:
    peer.say(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(WHOLE), WHOLE))


def fronts(rig: Rig) -> int:
    """Connections that have not been given to the library."""
    return len(rig.fronts.open)


async def test_plain_requests_stay_whatever_they_are_answered() -> None:
    async with rigged(whole) as rig:
        client = await rig.connect()
        for body, status in ((ASK, 200), ({**ASK, "model": "nobody"}, 404), (b"{", 400), (ASK, 200)):
            client.send(body)
            answered, head, said = await client.answer()
            assert answered == status
            assert b"x-request-id: " in head.lower()
            assert (b"error" in said) is (status != 200)
        assert fronts(rig) == 1
        assert rig.fronts.server.requests_count == 0
    assert [served.status for served in rig.served] == [200, 404, 400, 200]


async def test_a_plain_request_may_be_cut_anywhere() -> None:
    async with rigged(whole) as rig:
        client = await rig.connect()
        for cut in range(1, len(PLAIN)):
            client.raw(PLAIN[:cut])
            await until(lambda size=cut: any(front._size == size for front in rig.fronts.open), "the first piece has been read")  # type: ignore[misc]
            client.raw(PLAIN[cut:])
            assert (await client.answer())[::2] == (200, WHOLE)
        assert fronts(rig) == 1


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /v1/models/a HTTP/1.1\r\nHost: localhost\r\n\r\n",
        PLAIN + PLAIN,
        PLAIN + PLAIN[:5],
        PLAIN.replace(b"HTTP/1.1", b"HTTP/1.0"),
        PLAIN.replace(CHAT.encode(), b"/v1/chat%2Fcompletions"),
        PLAIN.replace(CHAT.encode(), CHAT.encode() + b"?a=b"),
        PLAIN.replace(b"Content-Length", b"Transfer-Encoding: chunked\r\nContent-Length"),
        PLAIN.replace(b"Content-Length", b"Content-Length: 1\r\nContent-Length"),
        PLAIN.replace(b"Content-Length", b"Expect: 100-continue\r\nContent-Length"),
        PLAIN.replace(b"Content-Length", b"X-Long: " + b"x" * 9000 + b"\r\nContent-Length"),
        PLAIN.replace(b"Content-Length", b"".join(b"X-%d: y\r\n" % number for number in range(200)) + b"Content-Length"),
        PLAIN.replace(b"Content-Length", b"User-Agent: a\r\nUser-Agent: b\r\nContent-Length"),
        PLAIN.replace(b"Content-Length", b"Cookie: " + b"x" * 5000 + b"\r\nX-More: " + b"y" * 5000 + b"\r\nContent-Length"),
        PLAIN.replace(b"Content-Length: %d" % len(DATA), b"Content-Length: %d" % (1 << 40)),
        PLAIN.replace(b"Host: localhost\r\n", b""),
        PLAIN.replace(b"Host", b"Ho st"),
        b"POST " + b"x" * 2 * MAX_PLAIN,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
async def test_what_is_not_plain_is_judged_by_the_library_alone(raw: bytes) -> None:
    """The same bytes get the same answer, whether the connection was the front's until then or the library's from the start."""
    async with rigged(whole) as rig:
        client, other = await rig.connect(), await rig.connect()
        client.raw(PLAIN)
        await client.answer()
        other.raw(b"OPTIONS /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await other.answer()
        assert fronts(rig) == 1
        answers = []
        for each in (client, other):
            each.raw(raw)
            answers.append(await each.head())
            await until(lambda: fronts(rig) == 0, "it has been handed over")
        (status, head), (again, same) = answers
        assert status == again
        names = [sorted(line.split(b":")[0] for line in each.split(b"\r\n")[1:]) for each in (head, same)]
        assert names[0] == names[1]


async def test_requests_sent_one_behind_another_are_answered_in_order() -> None:
    go = asyncio.Event()

    async def script(peer: Peer) -> None:
        await go.wait()
        await whole(peer)

    async with rigged(script) as rig:
        client = await rig.connect()
        client.raw(PLAIN)
        await until(lambda: rig.load == 1, "the first is under way")
        client.raw(PLAIN)
        client.raw(PLAIN.replace(b'"hi"', b'"ho"') + b"GET /v1/nothing HTTP/1.1\r\nHost: localhost\r\n\r\n")
        (front,) = rig.fronts.open
        await until(lambda: front._early, "the others have come")
        go.set()
        assert [(await client.answer())[0] for _ in range(4)] == [200, 200, 200, 404]


async def test_a_client_that_leaves_a_plain_request_ends_it() -> None:
    left = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.left()
        left.set()

    async with rigged(script) as rig:
        client = await rig.connect()
        client.raw(PLAIN)
        await until(lambda: rig.engine.heads, "the engine has it")
        client.close()
        await asyncio.wait_for(left.wait(), 10)
        await until(lambda: rig.served, "it is accounted for")
    assert [served.status for served in rig.served] == [499]


async def test_a_stream_gives_the_connection_back_to_the_front() -> None:
    async def script(peer: Peer) -> None:
        peer.say(STREAM + chunked(*sse(word("a"), b"[DONE]")))

    async with rigged(script) as rig:
        client = await rig.connect()
        for _ in range(3):
            client.send(ASK_STREAM)
            assert (await client.answer())[0] == 200
        assert fronts(rig) == 1
        (front,) = rig.fronts.open
        assert isinstance(front, Front)
        assert front.task is None or front.task.done()


@pytest.mark.parametrize(("sent", "limit"), [(b"", IDLE), (PLAIN[:20], FIRST_REQUEST), (PLAIN[:-1], STALL)])
async def test_patience_with_who_was_served_before(sent: bytes, limit: float) -> None:
    async with rigged(whole) as rig:
        client = await rig.connect()
        client.raw(PLAIN)
        await client.answer()
        (front,) = rig.fronts.open
        client.raw(sent)
        await until(lambda: front._size == len(sent) and front.task is None, "it is read")
        known = front._known
        assert known is not None
        assert known.limit == limit
        known.since -= limit - 1
        rig.fronts.patience.sweep()
        assert fronts(rig) == 1
        known.since -= 2
        rig.fronts.patience.sweep()
        assert await client.rest() == b""
        await until(lambda: fronts(rig) == 0, "it is closed")


async def test_the_end_waits_for_what_is_under_way_and_no_longer() -> None:
    async def script(peer: Peer) -> None:
        await peer.left()

    async with rigged(script) as rig:
        busy, idle = await rig.connect(), await rig.connect()
        busy.raw(PLAIN)
        await until(lambda: rig.load == 1 and fronts(rig) == 2, "both are there")
        await rig.fronts.close(0.05)
        assert await idle.rest() == b""
        assert await busy.rest() == b""
