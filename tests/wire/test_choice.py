"""Several instances of one model: who gets a request, and who takes over when one fails before its first byte."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from offloadd.state.desired import Replicas
from offloadd.state.ids import LOCAL, InstanceId
from offloadd.state.launch import Endpoint
from tests.wire.rig import ASK, ASK_STREAM, HOST, NAME, STREAM, Engine, Peer, Rig, Script, chunked, rigged, sse, until, word

BODY = b'{"choices": []}'
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)


async def fine(peer: Peer) -> None:
    peer.say(PLAIN)


async def dies(peer: Peer) -> None:
    peer.writer.transport.abort()


async def busy(peer: Peer) -> None:
    peer.say(b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\n{}")


@contextlib.asynccontextmanager
async def pair(first: Script, second: Script, slots: int = 8, **spec_changes: Any) -> AsyncIterator[tuple[Rig, Engine]]:
    """Two instances, a-1 and a-2."""
    async with rigged(first, slots=slots, replicas=Replicas(min=2, max=2), **spec_changes) as rig:
        other = Engine(second)
        server = await asyncio.start_server(other.serve, HOST, 0)
        other.port = server.sockets[0].getsockname()[1]
        host = replace(rig.hosts[0], instance=InstanceId(LOCAL, NAME, 2), endpoint=Endpoint(host=HOST, port=other.port))
        rig.hosts.append(host)
        try:
            yield rig, other
        finally:
            rig.pool.close()
            server.close()
            for writer in list(other.open):
                writer.transport.abort()
            await until(lambda: not other.open, "it is closed")


def instance(head: bytes) -> bytes:
    return next(line for line in head.split(b"\r\n") if line.startswith(b"X-Offloadd-Instance: "))[21:]


async def test_requests_go_where_there_is_room() -> None:
    go_on = asyncio.Event()

    async def slow(peer: Peer) -> None:
        await go_on.wait()
        peer.say(PLAIN)

    async with pair(slow, slow) as (rig, other):
        asked = [asyncio.create_task(rig.ask({**ASK, "messages": [str(number)]})) for number in range(8)]
        await until(lambda: len(rig.engine.heads) == len(other.heads) == 4, "four each")
        go_on.set()
        assert {status for status, _, _ in await asyncio.gather(*asked)} == {200}


async def test_a_conversation_returns() -> None:
    async with pair(fine, fine) as (rig, _):
        for conversation in range(6):
            messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"talk {conversation}"}]
            homes = set()
            for _ in range(4):
                _, head, _ = await rig.ask({**ASK, "messages": messages})
                homes.add(instance(head))
                messages = [*messages, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "and?"}]
            assert len(homes) == 1
        assert b"knows the conversation" in head


async def test_a_conversation_does_not_queue_for_its_cache() -> None:
    go_on = asyncio.Event()

    async def slow(peer: Peer) -> None:
        await go_on.wait()
        peer.say(PLAIN)

    async with pair(slow, slow, slots=4) as (rig, other):
        asked = [asyncio.create_task(rig.ask({**ASK, "prompt_cache_key": "k"})) for _ in range(8)]
        await until(lambda: len(rig.engine.heads) == len(other.heads) == 4, "all of them run")
        go_on.set()
        await asyncio.gather(*asked)


async def test_another_takes_over_when_one_cannot_be_reached() -> None:
    async with pair(fine, fine) as (rig, _):
        rig.hosts[0] = replace(rig.hosts[0], endpoint=Endpoint(host=HOST, port=1))
        for body in (ASK, ASK_STREAM):
            status, head, _ = await rig.ask(body)
            assert (status, instance(head)) == (200, b"a-2")
        assert b"took over from a-1" in head


async def test_another_takes_over_from_one_that_is_busy() -> None:
    async with pair(busy, fine) as (rig, _):
        status, head, _ = await rig.ask(ASK)
        assert (status, instance(head), len(rig.engine.heads)) == (200, b"a-2", 1)


async def test_a_request_that_kills_is_not_sent_on() -> None:
    """It was alone on the instance that died of it."""
    async with pair(dies, fine) as (rig, other):
        status, head, body = await rig.ask(ASK)
        assert (status, instance(head) if b"Instance" in head else b"", other.heads) == (502, b"", [])
        assert b"backend_lost" in body


async def test_one_that_was_in_company_is_sent_on_once() -> None:
    """Whose fault it was cannot be told; nobody is answered twice, and nobody goes to a third."""
    together = asyncio.Event()

    async def die_together(peer: Peer) -> None:
        await together.wait()
        peer.writer.transport.abort()

    async with pair(die_together, fine) as (rig, other):
        rig.hosts.pop()
        asked = [asyncio.create_task(rig.ask(ASK)) for _ in range(3)]
        await until(lambda: len(rig.engine.heads) == 3, "all are there")
        rig.hosts.append(replace(rig.hosts[0], instance=InstanceId(LOCAL, NAME, 2), endpoint=Endpoint(host=HOST, port=other.port)))
        together.set()
        statuses = [status for status, _, _ in await asyncio.gather(*asked)]
        assert statuses == [200, 200, 200]
        assert (len(rig.engine.heads), len(other.heads)) == (3, 3)


async def test_nothing_is_sent_on_after_the_first_byte() -> None:
    async def breaks(peer: Peer) -> None:
        event = sse(word("x"))[0]
        peer.say(STREAM + b"%x\r\n%b\r\n" % (len(event), event))
        await peer.flush()
        peer.writer.close()

    async with pair(breaks, fine) as (rig, other):
        status, _, body = await rig.ask(ASK_STREAM)
        assert status == 200
        assert b"backend_lost" in body
        assert not other.heads


async def test_one_that_fails_again_and_again_is_left_alone() -> None:
    async with pair(busy, fine) as (rig, other):
        for number in range(12):
            assert (await rig.ask({**ASK, "messages": [str(number)]}))[0] == 200
        assert len(rig.engine.heads) == 3
        assert len(other.heads) == 12


async def test_one_alone_is_asked_though_it_fails() -> None:
    async with rigged(busy) as rig:
        for _ in range(6):
            assert (await rig.ask(ASK))[0] == 503
        rig.engine.script = fine
        assert (await rig.ask(ASK))[0] == 200


async def test_a_stream_goes_on_where_it_began() -> None:
    async def tokens(peer: Peer) -> None:
        peer.say(STREAM + chunked(*sse(*[word(str(number)) for number in range(50)], b"[DONE]")))

    async with pair(tokens, tokens) as (rig, _):
        bodies = [body for _, _, body in await asyncio.gather(*[rig.ask(ASK_STREAM) for _ in range(20)])]
        assert len(set(bodies)) == 1
