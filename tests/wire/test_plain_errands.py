"""The request that most are, on a connection that is there and with a head that is known; and all that may become of one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from offloadd.api.front import Front
from offloadd.proxy import plain_errand
from offloadd.proxy.plain_errand import PlainErrand
from offloadd.state.served import Fate
from tests.wire.rig import ASK, Client, Peer, Rig, Script, chunked, rigged, until

WHOLE = b'{"choices": [{"message": {"content": "hi"}}], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}'


def answer(body: bytes, head: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body)


def echo_when(free: asyncio.Event) -> Script:
    """An engine that answers with what it was asked, when it is told to."""

    async def echoes(peer: Peer) -> None:
        await free.wait()
        peer.say(answer(peer.body))

    return echoes


def plain(rig: Rig) -> int:
    """Requests that are under way as this is about."""
    return sum(isinstance(front._errand, PlainErrand) for front in rig.fronts.open)


@asynccontextmanager
async def under_way(then: Script, body: Any = ASK, **options: Any) -> AsyncIterator[tuple[Rig, Client, asyncio.Event]]:
    """The world, with one such request under way, of which `then` becomes when the event is set."""
    free = asyncio.Event()

    async def script(peer: Peer) -> None:
        if len(rig.engine.heads) <= 2:
            peer.say(answer(WHOLE))
            return
        await free.wait()
        await then(peer)

    async with rigged(script, **options) as rig:
        client = await rig.connect()
        for _ in range(2):  # so that both heads are known, and a connection is kept
            client.send(ASK)
            assert (await client.answer())[0] == 200
        client.send(body)
        await until(lambda: plain(rig) == 1, "it is under way")
        yield rig, client, free


@pytest.mark.parametrize(
    "said",
    [
        [answer(WHOLE)],
        [answer(WHOLE, b"X-New: 1\r\n")],
        [answer(WHOLE)[:20], answer(WHOLE)[20:]],
        [answer(WHOLE)[:-5], answer(WHOLE)[-5:]],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", chunked(WHOLE[:9], WHOLE[9:])],
        [b"HTTP/1.1 103 Hints\r\n\r\n" + answer(WHOLE)],
    ],
    ids=["known", "new head", "head in two", "body in two", "chunked", "interim"],
)
async def test_the_answer_is_the_engine_s_however_it_comes(said: list[bytes]) -> None:
    async def then(peer: Peer) -> None:
        for piece in said:
            peer.say(piece)
            await peer.flush()
            await asyncio.sleep(0.01)  # so that it comes by itself

    async with under_way(then) as (rig, client, free):
        free.set()
        status, head, body = await client.answer()
        assert (status, body) == (200, WHOLE)
        assert (b"X-New: 1" in head) == (b"X-New" in said[0])
        for line in (b"X-Request-Id: ", b"X-Offloadd-Instance: a-1", b"Date: "):
            assert head.count(line) == 1
        client.send(ASK)
        assert (await client.answer())[::2] == (200, WHOLE)
        await rig.quiet()
        assert [(one.fate, one.status, one.prompt_tokens, one.completion_tokens) for one in rig.served] == [
            (Fate.ANSWERED, 200, 3, 2)
        ] * 4
        assert len({one.request for one in rig.served}) == 4
        assert all(one.bytes_out == len(WHOLE) and one.bytes_in for one in rig.served)


async def test_many_at_once_get_each_its_own() -> None:
    """They and their answers come in the same turns of the loop."""
    free = asyncio.Event()
    echoes = echo_when(free)

    async with rigged(echoes, slots=64) as rig:
        clients = [await rig.connect() for _ in range(40)]
        for turn in range(4):
            free.clear()
            for number, client in enumerate(clients):
                client.send({**ASK, "n": 1, "mark": f"{turn}-{number:03}"})
            await until(lambda: rig.load == 40, "all are under way")
            assert turn == 0 or plain(rig) == 40
            free.set()
            for number, client in enumerate(clients):
                status, _, body = await client.answer()
                assert (status, msgspec.json.decode(body)["mark"]) == (200, f"{turn}-{number:03}")
        assert rig.engine.connections == 40
        assert [one.fate for one in rig.served] == [Fate.ANSWERED] * 160


async def test_those_that_leave_while_others_are_answered_disturb_nobody() -> None:
    free = asyncio.Event()

    async def echoes(peer: Peer) -> None:
        if b'"leaves"' in peer.body:
            await peer.left()
            return
        await free.wait()
        peer.say(answer(peer.body))

    async with rigged(echoes, slots=64) as rig:
        free.set()
        clients = [await rig.connect() for _ in range(20)]
        for _ in range(2):
            for client in clients:
                client.send({**ASK, "n": 1})
            assert [(await client.answer())[0] for client in clients] == [200] * 20
        free.clear()
        for number, client in enumerate(clients):
            client.send({**ASK, "n": 1, "mark": f"{number:03}", **({"leaves": 1} if number % 2 else {})})
        await until(lambda: plain(rig) == 20, "all are under way")
        free.set()
        for client in clients[1::2]:
            client.close()
        for number, client in enumerate(clients):
            if number % 2 == 0:
                assert msgspec.json.decode((await client.answer())[2])["mark"] == f"{number:03}"
        await rig.quiet()
        fates = [one.fate for one in rig.served][40:]
        assert sorted(fates) == sorted([Fate.ANSWERED] * 10 + [Fate.CANCELLED] * 10)


async def test_an_engine_that_closes_a_kept_connection_is_asked_again() -> None:
    async def then(peer: Peer) -> None:
        if len(rig.engine.heads) == 3:
            peer.writer.transport.abort()
        else:
            peer.say(answer(WHOLE))

    async with under_way(then) as (rig, client, free):
        free.set()
        assert (await client.answer())[::2] == (200, WHOLE)
        assert len(rig.engine.heads) == 4


async def test_an_answer_that_breaks_off_is_an_error() -> None:
    async def then(peer: Peer) -> None:
        peer.say(answer(WHOLE)[:-5])
        await peer.flush()
        peer.writer.close()

    async with under_way(then) as (rig, client, free):
        free.set()
        status, _, body = await client.answer()
        assert (status, b"backend_lost" in body) == (502, True)
        await rig.quiet()
        assert [one.fate for one in rig.served] == [Fate.ANSWERED] * 2 + [Fate.FAILED]
        assert rig.served[-1].instance == rig.hosts[0].instance


async def test_what_the_engine_refuses_is_refused_in_our_words() -> None:
    async def then(peer: Peer) -> None:
        said = b'{"error": {"message": "not with me"}}'
        peer.say(b"HTTP/1.1 400 No\r\nContent-Length: %d\r\n\r\n%b" % (len(said), said))

    async with under_way(then) as (_, client, free):
        free.set()
        status, _, body = await client.answer()
        assert (status, msgspec.json.decode(body)["error"]["message"]) == (400, "not with me")


async def test_an_instance_that_is_told_to_end_ends_it_with_the_reason() -> None:
    async def then(peer: Peer) -> None:
        await peer.left()

    async with under_way(then) as (rig, client, free):
        free.set()
        rig.book.hang_up(rig.hosts[0].instance, "it was evicted")
        rig.hosts.clear()
        status, _, body = await client.answer()
        assert (status, b"it was evicted" in body) == (502, True)
        assert [one.fate for one in rig.served] == [Fate.ANSWERED] * 2 + [Fate.FAILED]


async def test_an_answer_in_the_last_moment_of_an_instance_is_one() -> None:
    async def then(peer: Peer) -> None:
        peer.say(answer(WHOLE))

    async with under_way(then) as (rig, client, free):
        rig.book.hang_up(rig.hosts[0].instance, "it was evicted")
        free.set()
        assert (await client.answer())[::2] == (200, WHOLE)


async def test_a_client_that_leaves_ends_the_work_for_it() -> None:
    async def then(peer: Peer) -> None:
        await peer.left()

    async with under_way(then) as (rig, client, free):
        client.close()
        await until(lambda: rig.engine.open == set() or rig.load == 0 or not rig.fronts.open, "its end has been seen")
        free.set()
        await rig.quiet()
        assert [one.fate for one in rig.served] == [Fate.ANSWERED] * 2 + [Fate.CANCELLED]


async def ask_until_full(rig: Rig, client: Client) -> int:
    """Ask on without taking the answers, until its connection takes no more. How many requests an engine has had by then."""
    for asked in range(3, 200):
        await until(lambda asked=asked: len(rig.engine.heads) == asked and rig.load == 0, "it is answered")  # type: ignore[misc]
        if any(front.writing_paused for front in rig.fronts.open):
            return asked
        client.send({**ASK, "max_tokens": asked})
    raise AssertionError("there is no end to what it takes")


async def test_an_engine_and_a_client_that_leave_at_once_leave_nothing_behind() -> None:
    """So that both are seen in one turn of the loop, the engine's end first."""

    async def then(peer: Peer) -> None:
        await peer.left()

    for order in (0, 1):
        async with under_way(then) as (rig, client, free):
            ends = [*rig.engine.open, client.writer]
            for writer in ends if order == 0 else reversed(ends):
                writer.transport.abort()
            free.set()
            await until(lambda rig=rig: not rig.fronts.open, "it is gone")  # type: ignore[misc]
            await rig.quiet()
            assert [one.fate for one in rig.served] == [Fate.ANSWERED] * 2 + [Fate.CANCELLED]


async def test_one_that_leaves_as_its_request_becomes_an_ordinary_one_is_accounted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ahead of the first step of the task that goes on with it."""
    resort = Front.resort

    def and_leaves(self: Front, *order: Any) -> asyncio.Task[None]:
        task = resort(self, *order)
        transport = self.transport
        self.connection_lost(None)
        assert transport is not None
        transport.abort()
        return task

    async def then(peer: Peer) -> None:
        peer.say(answer(WHOLE)[:-5])
        await peer.flush()
        peer.writer.close()

    async with under_way(then) as (rig, client, free):
        monkeypatch.setattr(Front, "resort", and_leaves)
        free.set()
        assert await client.reader.read() == b""
        await until(lambda: len(rig.served) == 3, "it is accounted for")
        assert rig.served[-1].fate is Fate.CANCELLED
        assert rig.load == 0


async def test_answers_that_come_while_the_end_is_near_reach_their_clients() -> None:
    """Several in one turn of the loop: what is written at its end is written before a connection is closed."""
    free = asyncio.Event()
    echoes = echo_when(free)

    async with rigged(echoes, slots=64) as rig:
        clients = [await rig.connect() for _ in range(12)]
        for turn in range(2):
            free.clear()
            for number, client in enumerate(clients):
                client.send({**ASK, "n": 1, "mark": f"{turn}-{number}"})
            await until(lambda: rig.load == 12, "all are under way")
            if turn == 1:
                rig.fronts.closed = True
            free.set()
            for number, client in enumerate(clients):
                status, _, body = await client.answer()
                assert (status, msgspec.json.decode(body)["mark"]) == (200, f"{turn}-{number}")
        assert [await client.reader.read() for client in clients] == [b""] * 12


async def test_one_that_takes_nothing_is_waited_for_before_its_next_request_is_looked_at() -> None:
    large = b'{"text": "' + b"x" * 200_000 + b'"}'

    async def then(peer: Peer) -> None:
        peer.say(answer(large))

    async with under_way(then) as (rig, client, free):
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        free.set()
        asked = await ask_until_full(rig, client)
        client.send(ASK)
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(rig.engine.heads) == asked
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        for _ in range(asked - 2):
            assert (await client.answer())[::2] == (200, large)
        assert (await client.answer())[::2] == (200, large)  # to the one that was looked at last


async def test_one_that_leaves_instead_of_reading_is_let_go() -> None:
    large = b'{"text": "' + b"x" * 200_000 + b'"}'

    async def then(peer: Peer) -> None:
        peer.say(answer(large))

    async with under_way(then) as (rig, client, free):
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        free.set()
        await ask_until_full(rig, client)
        client.writer.transport.abort()
        await until(lambda: not rig.fronts.open, "it is gone")
        await rig.quiet()


async def test_a_fault_of_ours_closes_the_connection_and_keeps_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def then(peer: Peer) -> None:
        peer.say(answer(WHOLE))

    def broken(*_: object) -> bytes:
        raise ValueError("it cannot be written")

    async with under_way(then) as (rig, client, free):
        monkeypatch.setattr(plain_errand.headers, "response_start", broken)
        with caplog.at_level(logging.ERROR):
            free.set()
            assert await client.reader.read() == b""
        monkeypatch.undo()
        await rig.quiet()
        assert "it cannot be written" in caplog.text
        assert (await rig.ask(ASK))[::2] == (200, WHOLE)
