"""A streaming client that waits is shown that it is not forgotten; what is refused early keeps its status."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import msgspec
import pytest

from offloadd.state.desired import QueueLimits
from offloadd.state.launch import EngineApi
from offloadd.units import Seconds
from tests.wire.rig import ASK, ASK_STREAM, STREAM, Peer, chunked, rigged, sse, until, word

HELLO = sse(word("hello"), b"[DONE]")


async def hello(peer: Peer) -> None:
    peer.say(STREAM + chunked(*HELLO))


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offloadd.proxy.leases.KEEPALIVE", 0.05)


async def test_comments_come_first_and_the_answer_after_them() -> None:
    async with rigged(hello) as rig:
        hosts, rig.hosts[:] = list(rig.hosts), []
        client = await rig.connect()
        client.send(ASK_STREAM)
        status, head = await client.head()
        assert status == 200
        assert b"Content-Type: text/event-stream\r\n" in head
        assert b"X-Request-Id: " in head
        for _ in range(3):
            assert (await client.chunk()).startswith(b": waiting for ")
        rig.hosts[:] = hosts
        rig.book.serve_all()
        body = await client.body(b"Transfer-Encoding: chunked")
        assert body.endswith(b"".join(HELLO))
        # The connection serves the next request.
        client.send(ASK_STREAM)
        assert (await client.answer())[2] == b"".join(HELLO)
        assert [one.fate for one in rig.served] == ["answered", "answered"]


async def test_one_that_waits_in_vain_is_told_within_its_stream() -> None:
    async with rigged(hello, queue=QueueLimits(max_wait=Seconds(0.3))) as rig:
        rig.hosts.clear()
        status, _, body = await rig.ask(ASK_STREAM)
        assert status == 200
        error = msgspec.json.decode(body.rpartition(b"data: ")[2])["error"]
        assert error["code"] == "wait_timeout"
        assert b"[DONE]" not in body
        assert [one.fate for one in rig.served] == ["refused"]


async def test_one_that_waited_is_translated_when_its_engine_turns_out_to_lack_the_api() -> None:
    async def only_chat(peer: Peer) -> None:
        if b"POST /v1/responses " in peer.head:
            peer.say(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}")
        else:
            peer.say(STREAM + chunked(*sse(word("hello"), word("", finish_reason="stop"), b"[DONE]")))

    async with rigged(only_chat) as rig:
        api = EngineApi(paths=frozenset({"/v1/responses", "/v1/chat/completions"}))
        hosts, rig.hosts[:] = [replace(host, api=api) for host in rig.hosts], []
        client = await rig.connect()
        client.send({"model": "a", "input": "hi", "stream": True}, "/v1/responses")
        await client.head()
        assert (await client.chunk()).startswith(b": waiting for ")
        rig.hosts[:] = hosts
        rig.book.serve_all()
        body = await client.body(b"Transfer-Encoding: chunked")
        assert b'"delta":"hello"' in body
        assert b"event: response.completed\n" in body
        assert b"event: error" not in body
        assert [head.split(b" ")[1] for head in rig.engine.heads] == [b"/v1/responses", b"/v1/chat/completions"]
        await until(lambda: [one.fate for one in rig.served] == ["answered"], "it is told of")


async def test_an_engines_refusal_is_told_there_too() -> None:
    async def refuse(peer: Peer) -> None:
        peer.say(b'HTTP/1.1 400 Bad\r\nContent-Length: 29\r\n\r\n{"error": {"message": "hot"}}')

    async with rigged(refuse) as rig:
        hosts, rig.hosts[:] = list(rig.hosts), []
        client = await rig.connect()
        client.send(ASK_STREAM)
        await client.head()
        rig.hosts[:] = hosts
        rig.book.serve_all()
        body = await client.body(b"Transfer-Encoding: chunked")
        assert b'"message":"hot"' in body


async def test_a_plain_client_and_an_early_refusal_keep_their_status(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rigged(hello, queue=QueueLimits(max_wait=Seconds(0.2))) as rig:
        rig.hosts.clear()
        assert (await rig.ask(ASK))[0] == 504
        monkeypatch.setattr("offloadd.proxy.leases.KEEPALIVE", 5)
        assert (await rig.ask(ASK_STREAM))[0] == 504


async def test_one_that_leaves_while_it_waits() -> None:
    async with rigged(hello) as rig:
        hosts, rig.hosts[:] = list(rig.hosts), []
        client = await rig.connect()
        client.send(ASK_STREAM)
        await client.head()
        await client.chunk()
        client.close()
        await until(lambda: not rig.book.demand().waiting, "it has left the queue")
        await until(lambda: rig.served, "it is told of")
        assert rig.served[0].fate == "cancelled"
        rig.hosts[:] = hosts
        await asyncio.sleep(0)


async def test_all_queues_together_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offloadd.proxy.leases.MAX_WAITING", 2)
    async with rigged(hello, queue=QueueLimits(max_wait=Seconds(0.5))) as rig:
        rig.hosts.clear()
        waiting = [asyncio.create_task(rig.ask(ASK)) for _ in range(2)]
        await until(lambda: rig.book.demand().waiting, "they wait")
        await until(lambda: sum(one.count for one in rig.book.demand().waiting.values()) == 2, "both wait")
        status, head, body = await rig.ask(ASK)
        assert (status, b"too_many_waiting" in body, b"Retry-After" in head) == (503, True, True)
        assert [status for status, _, _ in await asyncio.gather(*waiting)] == [504, 504]
