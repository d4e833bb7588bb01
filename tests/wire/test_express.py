"""Requests whose heads are known: served without a task, by the rules in force, and like any other when something goes wrong."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from offloadd.api.express import REMEMBERED
from offloadd.state.access import EVERYTHING, Access, ApiKey, KeyLimits
from offloadd.state.launch import EngineApi
from offloadd.state.served import Fate
from tests.wire.rig import ASK, ASK_STREAM, CHAT, STREAM, Client, Peer, Rig, chunked, rigged, sse, until, word

WHOLE = b'{"choices": [{"message": {"content": "hi"}}], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}'
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(WHOLE), WHOLE)
KEYED = "Authorization: Bearer sesame\r\n"


async def whole(peer: Peer) -> None:
    peer.say(ANSWER)


def key(secret: str, **more: Any) -> ApiKey:
    return ApiKey(name=f"{secret}'s", digest=hashlib.sha256(secret.encode()).digest(), **more)


def without_task(rig: Rig) -> int:
    """Requests that are under way without a task of their own."""
    return sum(front._errand is not None for front in rig.fronts.open)


class Held:
    """An engine that answers when it is told to."""

    def __init__(self, answer: bytes = ANSWER) -> None:
        self.free = asyncio.Event()
        self.answer = answer

    async def __call__(self, peer: Peer) -> None:
        await self.free.wait()
        peer.say(self.answer)


async def answers(client: Client, *bodies: Any, headers: str = "") -> list[int]:
    """What each of the requests is answered, one after the other."""
    found = []
    for body in bodies:
        client.send(body, headers=headers)
        found.append((await client.answer())[0])
    return found


async def test_what_was_let_in_once_needs_no_task_the_next_time() -> None:
    engine = Held()
    async with rigged(engine) as rig:
        first, second = await rig.connect(), await rig.connect()
        engine.free.set()
        assert await answers(first, ASK, headers="X-Mine: 1\r\n") == [200]
        engine.free.clear()
        second.send({**ASK, "max_tokens": 1}, headers="X-Mine: 1\r\n")
        await until(lambda: without_task(rig) == 1, "it is under way")
        first.send(ASK, headers="X-Mine: 2\r\n")
        await until(lambda: rig.load == 2, "so is one that is seen for the first time")
        assert without_task(rig) == 1
        engine.free.set()
        assert [(await client.answer())[::2] for client in (first, second)] == [(200, WHOLE)] * 2
    assert [(served.fate, served.prompt_tokens, served.completion_tokens) for served in rig.served] == [(Fate.ANSWERED, 3, 2)] * 3
    assert len({served.request for served in rig.served}) == 3


async def test_the_head_that_goes_to_the_engine_is_the_same_either_way() -> None:
    async with rigged(whole) as rig:
        client = await rig.connect()
        more = "X-Mine: 1\r\nAuthorization: Bearer x\r\nCookie: c\r\nConnection: keep-alive\r\n"
        assert await answers(client, ASK, ASK, headers=more) == [200, 200]
        ordinary, known = ([line for line in head.split(b"\r\n") if b"X-Request-Id" not in line] for head in rig.engine.heads)
        assert sorted(ordinary) == sorted(known)
        assert b"X-Mine: 1" in known
        assert not any(b"Cookie" in line or b"Bearer" in line for line in known)


async def test_new_rules_hold_for_heads_that_were_let_in_by_old_ones() -> None:
    async with rigged(whole) as rig:
        client = await rig.connect()
        assert await answers(client, ASK, ASK) == [200, 200]
        rig.rules.access = Access(keys=(key("sesame"),))
        assert await answers(client, ASK, ASK) == [401, 401]
        assert await answers(client, ASK, ASK, headers=KEYED) == [200, 200]
        rig.rules.access = Access(keys=(key("other"),))
        assert await answers(client, ASK, headers=KEYED) == [401]
        rig.rules.access = Access(keys=(key("sesame", models=("b*",)),))
        assert await answers(client, ASK, ASK, headers=KEYED) == [403, 403]


async def test_limits_of_a_key_are_counted() -> None:
    async with rigged(whole) as rig:
        rig.rules.access = Access(keys=(key("sesame", limits=KeyLimits(requests_per_minute=3)),))
        assert await answers(await rig.connect(), *[ASK] * 4, headers=KEYED) == [200, 200, 200, 429]


@pytest.mark.parametrize(
    "headers",
    [
        "Origin: http://evil.example\r\n",
        "Host: evil.example\r\n",
        "Content-Length: 5\r\n",
        "Transfer-Encoding: chunked\r\n",
        "Sec-Fetch-Site: cross-site\r\n",
        "X-Api-Key: a\r\nX-Api-Key: b\r\n",
    ],
)
async def test_what_is_refused_is_refused_each_time(headers: str) -> None:
    async with rigged(whole) as rig:
        for _ in range(3):
            status, _, _ = await rig.ask(ASK, headers=headers)
            assert status == 200 if "Api-Key" in headers else status in (400, 403)
        assert without_task(rig) == 0


@pytest.mark.parametrize(
    "length", [b"Content-Length: %d\r\n 0", b"Content-Length: 0x%x", b"Content-Length: +%d", b"Content-Length:\t%d,1"]
)
async def test_a_length_is_one_number(length: bytes) -> None:
    async with rigged(whole) as rig:
        assert await answers(await rig.connect(), ASK, ASK) == [200, 200]
        body = msgspec.json.encode(ASK)
        client = await rig.connect()
        client.raw(b"POST %b HTTP/1.1\r\nHost: localhost\r\n%b\r\n\r\n%b" % (CHAT.encode(), length % len(body), body))
        status, _ = await client.head()
        assert status == 400


async def test_ids_are_the_client_s_own_where_it_gives_one() -> None:
    async with rigged(whole) as rig:
        client = await rig.connect()
        for number in ("one", "two", "two"):
            client.send(ASK, headers=f"X-Request-Id: {number}\r\n")
            _, head, _ = await client.answer()
            assert b"x-request-id: " + number.encode() in head.lower()
        assert [served.request for served in rig.served] == ["one", "two", "two"]


async def test_what_is_remembered_is_bounded() -> None:
    async with rigged(whole) as rig:
        client = await rig.connect()
        for number in range(REMEMBERED + 20):
            rig.lane.learn(b"%d" % number, CHAT, (), EVERYTHING, keep_alive=True)
        assert len(rig.lane._known) == REMEMBERED
        assert await answers(client, ASK, ASK) == [200, 200]


async def test_a_client_that_leaves_frees_its_slot() -> None:
    async def silent(peer: Peer) -> None:
        if b'"n"' in peer.body:
            peer.say(ANSWER)
        else:
            await peer.left()

    async with rigged(silent) as rig:
        assert await answers(await rig.connect(), {**ASK, "n": 1}) == [200]
        for body in (ASK, ASK_STREAM):
            client = await rig.connect()
            client.send(body)
            await until(lambda: without_task(rig) == 1, "it is under way")
            client.close()
            await rig.quiet()
    assert [served.fate for served in rig.served] == [Fate.ANSWERED, Fate.CANCELLED, Fate.CANCELLED]


async def test_an_engine_that_breaks_off_is_told_in_the_stream_and_before_it_as_ever() -> None:
    said = chunked(*sse(word("a")))[: -len(b"0\r\n\r\n")]

    async def breaks(peer: Peer) -> None:
        if b'"stream":true' in peer.body:
            peer.say(STREAM + said)
            await peer.flush()
        peer.writer.close()

    async with rigged(breaks) as rig:
        client = await rig.connect()
        for _ in range(2):
            client.send(ASK_STREAM)
            status, _, body = await client.answer()
            assert status == 200
            assert b"backend_lost" in body
            client.send(ASK)
            status, _, body = await client.answer()
            assert status == 502
            assert b"backend_lost" in body
    assert [(served.fate, served.status) for served in rig.served] == [(Fate.FAILED, 200), (Fate.FAILED, 502)] * 2


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/inference"])
async def test_only_what_is_merely_forwarded_takes_the_short_way(path: str) -> None:
    """Also where the engine has the path itself: its answers are put right, its requests are checked."""
    async with rigged(whole) as rig:
        rig.hosts[:] = [replace(host, api=EngineApi(paths=frozenset({CHAT, path}))) for host in rig.hosts]
        client = await rig.connect()
        assert await answers(client, ASK, ASK) == [200, 200]
        head = b"POST %b HTTP/1.1\r\nHost: localhost\r\n" % path.encode()
        data = msgspec.json.encode(ASK)
        raw = head + b"Content-Length: %d\r\n\r\n" % len(data) + data
        rig.lane.learn(rig.lane.mark(raw), path, ((b"Host", b"localhost"),), EVERYTHING, keep_alive=True)
        assert rig.lane.start(raw, client) is None
        rig.lane.learn(
            rig.lane.mark(raw), CHAT, ((b"Content-Type", b"multipart/form-data; boundary=x"),), EVERYTHING, keep_alive=True
        )
        assert rig.lane.start(raw, client) is None


async def test_an_answer_that_its_engine_gave_up_is_not_taken_for_one() -> None:
    """vLLM says `abort` and 200 when somebody else ends it. In a stream that reaches the client; a whole answer is lost."""
    part = b'{"choices": [{"message": {"content": "half a"}, "finish_reason":"abort"}]}'
    quoted = b'{"choices": [{"message": {"content": "\\"finish_reason\\":\\"abort\\""}, "finish_reason": "stop"}]}'

    async def gives_up(peer: Peer) -> None:
        if b'"stream":true' in peer.body:
            last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "abort"}]}
            peer.say(STREAM + chunked(*sse(word("half a"), last, b"[DONE]")))
        else:
            said = quoted if b'"n"' in peer.body else part
            peer.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(said), said))

    async with rigged(gives_up) as rig:
        client = await rig.connect()
        for _ in range(2):
            client.send(ASK)
            status, _, body = await client.answer()
            assert (status, b"finish_reason abort" in body) == (502, True)
            client.send(ASK_STREAM)
            assert (await client.answer())[0] == 200
            client.send({**ASK, "n": 1})
            assert (await client.answer())[::2] == (200, quoted)
    assert [served.fate for served in rig.served] == [Fate.FAILED, Fate.FAILED, Fate.ANSWERED] * 2
    assert all("gave the request up" in served.reason for served in rig.served if served.fate is Fate.FAILED)


async def test_requests_that_come_early_are_served_in_their_order() -> None:
    engine = Held()
    async with rigged(engine) as rig:
        client = await rig.connect()
        engine.free.set()
        assert await answers(client, ASK) == [200]
        engine.free.clear()
        client.send(ASK)
        await until(lambda: rig.load == 1, "the first is under way")
        client.send({**ASK, "model": "nobody"})
        client.send(ASK)
        engine.free.set()
        assert [(await client.answer())[0] for _ in range(3)] == [200, 404, 200]


@pytest.mark.parametrize("odd", [b'"\xff"', b"1e999"], ids=["no text", "no number"])
async def test_what_is_wrong_deep_in_a_body_is_said_though_its_head_is_known(odd: bytes) -> None:
    """Routing does not look there; putting an answer together from a stream does."""
    said = chunked(*sse(word("a", finish_reason="stop"), b"[DONE]"))

    async def streams(peer: Peer) -> None:
        peer.say(STREAM + said)

    async with rigged(streams, cancels_only_streams=True) as rig:
        client = await rig.connect()
        assert await answers(client, ASK, ASK, b'{"model": "a", "messages": [], "x": %b}' % odd, ASK) == [200, 200, 400, 200]
