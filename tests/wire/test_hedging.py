"""A second instance is asked when the first is slow to begin: one answer, whole, and of one of them; nothing is left running."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from offloadd.state.desired import QueueLimits
from offloadd.units import Seconds
from tests.wire.rig import ASK, ASK_STREAM, CHAT, STREAM, Engine, Peer, Rig, Script, chunked, sse, until
from tests.wire.test_choice import instance, pair

AFTER = Seconds(0.05)
WORDS = 5


def told(who: str, mark: str = "") -> bytes:
    return chunked(*sse(*({"who": who, "mark": mark, "number": number} for number in range(WORDS)), b"[DONE]"))


def plain(who: str) -> bytes:
    body = msgspec.json.encode({"who": who})
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


class Side:
    """One instance: answers once it is told to, and notes who left before that."""

    def __init__(self, who: str) -> None:
        self.who = who
        self.go = asyncio.Event()
        self.left = 0

    async def __call__(self, peer: Peer) -> None:
        going = asyncio.create_task(self.go.wait())
        leaving = asyncio.create_task(peer.reader.read(1))
        await asyncio.wait({going, leaving}, return_when=asyncio.FIRST_COMPLETED)
        going.cancel()
        if leaving.done():
            self.left += 1
            peer.writer.close()
            return
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        peer.say(STREAM + told(self.who) if b'"stream"' in peer.body else plain(self.who))


@contextlib.asynccontextmanager
async def hedged(first: Script, second: Script, **more: Any) -> AsyncIterator[tuple[Rig, Engine]]:
    """Requests go to a-1 first, and after a moment to a-2 too."""
    async with pair(first, second, queue=QueueLimits(hedge_after=AFTER), **more) as (rig, other):
        yield rig, other


def outcome(rig: Rig) -> list[tuple[str, str]]:
    return [(served.fate.value, served.hedged) for served in rig.served]


@pytest.mark.parametrize("ask", [ASK, ASK_STREAM])
async def test_the_second_wins(ask: dict[str, Any]) -> None:
    one, two = Side("one"), Side("two")
    two.go.set()
    async with hedged(one, two) as (rig, other):
        status, head, body = await rig.ask(ask)
        assert (status, instance(head)) == (200, b"a-2")
        assert body.count(b'"two"') == (WORDS if ask is ASK_STREAM else 1)
        assert b"one" not in body
        assert b"X-Offloadd-Reason: a-2 began first: it was asked too when a-1 had not begun within 50 ms" in head
        await until(lambda: one.left == 1, "the first is left")
        assert other.heads[0].startswith(b"POST /v1/chat/completions ")
        await until(lambda: outcome(rig) == [("answered", "won")], "it is told of")
        assert str(rig.served[0].instance) == "a-2"


@pytest.mark.parametrize("ask", [ASK, ASK_STREAM])
async def test_the_first_wins(ask: dict[str, Any]) -> None:
    one, two = Side("one"), Side("two")
    async with hedged(one, two) as (rig, other):
        asking = asyncio.create_task(rig.ask(ask))
        await until(lambda: len(other.heads) == 1, "the second is asked too")
        assert rig.load == 2
        one.go.set()
        status, head, body = await asking
        assert (status, instance(head), b"two" in body) == (200, b"a-1", False)
        assert b"; a-2 was asked too after 50 ms and was slower" in head
        await until(lambda: two.left == 1, "the second is left")
        assert outcome(rig) == [("answered", "lost")]


async def test_one_that_begins_in_time_is_asked_alone() -> None:
    one, two = Side("one"), Side("two")
    one.go.set()

    async def slowly(peer: Peer) -> None:
        """Its first byte is there at once, its last one late."""
        peer.say(STREAM)
        await peer.flush()
        await asyncio.sleep(4 * AFTER)
        peer.say(told("one"))

    async with hedged(slowly, two) as (rig, other):
        status, head, body = await rig.ask(ASK_STREAM)
        assert (status, instance(head), body.count(b'"one"')) == (200, b"a-1", WORDS)
        assert not other.heads
        assert outcome(rig) == [("answered", "")]


async def test_the_losers_slot_counts_until_its_work_is_over() -> None:
    over = asyncio.Event()

    async def deaf(peer: Peer) -> None:
        """Reads on for a client that has left."""
        await over.wait()
        peer.writer.close()

    two = Side("two")
    two.go.set()
    async with hedged(deaf, two) as (rig, _):
        assert instance((await rig.ask(ASK))[1]) == b"a-2"
        await until(lambda: len(rig.served) == 1, "it is over for its client")
        assert {str(key): count for key, count in rig.book.demand().leases.items()} == {"a-1": 1}
        over.set()
        await until(lambda: rig.load == 0, "it is over for its instance")


async def test_the_second_takes_over_when_the_first_breaks_off() -> None:
    async def breaks(peer: Peer) -> None:
        await broken.wait()
        peer.writer.transport.abort()

    broken, two = asyncio.Event(), Side("two")
    async with hedged(breaks, two) as (rig, other):
        crowd = asyncio.create_task(rig.ask(ASK))  # who is alone on one that dies may have killed it, and goes nowhere
        asking = asyncio.create_task(rig.ask(ASK_STREAM))
        await until(lambda: len(rig.engine.heads) + len(other.heads) == 4, "both are asked of both")
        broken.set()
        await until(lambda: rig.load == 2, "the first has none any more")
        two.go.set()
        for one in (crowd, asking):
            status, head, body = await one
            assert (status, instance(head), b'"two"' in body) == (200, b"a-2", True)
        assert b"had been asked too, took over from a-1" in (await asking)[1]


async def test_what_may_have_killed_the_first_is_taken_from_the_second() -> None:
    async def breaks(peer: Peer) -> None:
        await broken.wait()
        rig.book.hang_up(rig.hosts[0].instance, "it died", died=True)
        peer.writer.transport.abort()

    broken, two = asyncio.Event(), Side("two")
    async with hedged(breaks, two) as (rig, other):
        asking = asyncio.create_task(rig.ask(ASK))
        await until(lambda: len(other.heads) == 1, "the second is asked too")
        broken.set()
        status, _, body = await asking
        assert (status, b"it died" in body) == (502, True)
        await until(lambda: two.left == 1, "the second is left")
        assert outcome(rig) == [("failed", "lost")]


async def test_a_refusal_of_the_second_is_no_answer() -> None:
    async def refuses(peer: Peer) -> None:
        peer.say(b"HTTP/1.1 400 Bad\r\nContent-Length: 2\r\n\r\n{}")

    one = Side("one")
    async with hedged(one, refuses) as (rig, other):
        asking = asyncio.create_task(rig.ask(ASK))
        await until(lambda: other.heads and rig.load == 1, "it has refused")
        one.go.set()
        status, head, _ = await asking
        assert (status, instance(head)) == (200, b"a-1")


async def test_both_die() -> None:
    both = asyncio.Event()

    async def dies(peer: Peer) -> None:
        await both.wait()
        peer.writer.transport.abort()

    async with hedged(dies, dies) as (rig, other):
        asking = asyncio.create_task(rig.ask(ASK))
        await until(lambda: len(other.heads) == len(rig.engine.heads) == 1, "both are asked")
        both.set()
        status, _, body = await asking
        assert (status, b"backend_lost" in body) == (502, True)
        assert outcome(rig) == [("failed", "lost")]
        assert len(rig.engine.heads) + len(other.heads) <= 3  # one more try at most, as for any request


async def test_the_client_leaves_both() -> None:
    one, two = Side("one"), Side("two")
    async with hedged(one, two) as (rig, other):
        client = await rig.connect()
        client.send(ASK_STREAM)
        await until(lambda: len(other.heads) == 1, "both are asked")
        client.close()
        await until(lambda: (one.left, two.left) == (1, 1), "both are left")
        await until(lambda: rig.load == 0, "no slot is held")
        await until(lambda: outcome(rig) == [("cancelled", "lost")], "it is told of")


async def test_nobody_is_asked_twice_where_no_slot_is_free() -> None:
    one, two = Side("one"), Side("two")
    async with hedged(one, two, slots=1) as (rig, other):
        asked = [asyncio.create_task(rig.ask({**ASK, "messages": [str(number)]})) for number in range(3)]
        await until(lambda: len(rig.engine.heads) == len(other.heads) == 1, "each has one")
        await asyncio.sleep(3 * AFTER)
        assert len(rig.engine.heads) == len(other.heads) == 1
        one.go.set()
        two.go.set()
        assert {status for status, _, _ in await asyncio.gather(*asked)} == {200}
        assert {hedge for _, hedge in outcome(rig)} == {""}


async def test_what_is_asked_for_by_path_or_comes_in_pieces_is_asked_once() -> None:
    one, two = Side("one"), Side("two")
    async with hedged(one, two) as (rig, other):
        asking = asyncio.create_task(rig.ask(ASK, path="/upstream/a/v1/chat/completions"))
        await until(lambda: len(rig.engine.heads) == 1, "it is asked")
        await asyncio.sleep(3 * AFTER)
        assert not other.heads
        one.go.set()
        assert (await asking)[0] == 200


async def test_no_answer_has_bytes_of_two() -> None:
    """Whatever of the two is faster, and however close they are: whole, in order, its own."""
    chance = random.Random(6)

    def side(who: str) -> Script:
        async def script(peer: Peer) -> None:
            mark = msgspec.json.decode(peer.body)["mark"]
            await asyncio.sleep(AFTER * chance.choice((0, 0.5, 1, 1, 1.1, 1.5, 20)))
            peer.say(STREAM)
            for piece in sse(*({"who": who, "mark": mark, "number": number} for number in range(WORDS)), b"[DONE]"):
                peer.say(b"%x\r\n%b\r\n" % (len(piece), piece))
                await asyncio.sleep(0)
            peer.say(b"0\r\n\r\n")

        return script

    async def one(rig: Rig, number: int) -> None:
        client = await rig.connect()
        for turn in range(4):
            mark = f"m{number}-{turn}"
            client.send({**ASK_STREAM, "mark": mark}, CHAT)
            if chance.random() < 0.1:
                break
            status, head, body = await client.answer()
            assert status == 200
            events = [msgspec.json.decode(line[6:]) for line in body.split(b"\n\n") if line and not line.endswith(b"[DONE]")]
            assert [(event["mark"], event["number"]) for event in events] == [(mark, number) for number in range(WORDS)]
            assert {event["who"] for event in events} == {"one" if instance(head) == b"a-1" else "two"}
        client.close()

    async with hedged(side("one"), side("two"), slots=1000) as (rig, _):
        await asyncio.gather(*[one(rig, number) for number in range(60)])
        await rig.quiet()
        assert {"won", "lost", ""} == {served.hedged for served in rig.served}
