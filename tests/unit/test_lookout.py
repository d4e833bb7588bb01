"""The lookout: who asks for news hears of what is new, and of nothing else."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from offloadd.lookout import Lookout, Pause
from offloadd.units import Seconds

LONG = Seconds(3600)


class World:
    """What is looked at: news are what `put` put there since the last look."""

    def __init__(self) -> None:
        self.found: list[int] = []
        self.looks = 0
        self.looked = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def look(self) -> int | None:
        self.looks += 1
        self.looked.set()
        self.gate.wait(10)
        found = self.found.pop() if self.found else None
        if found == 0:
            raise OSError("the disk is gone")
        return found


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.gate.set()


def lookout(world: World, least: float = 0, most: float = LONG) -> Lookout[int]:
    return Lookout(world.look, lambda: Pause(least=Seconds(least), most=Seconds(most)), name="lookout under test")


async def until_looked(world: World) -> None:
    await asyncio.to_thread(world.looked.wait, 10)
    world.looked.clear()


async def test_the_first_look_is_taken_at_once(world: World) -> None:
    world.found = [7]
    assert await asyncio.wait_for(lookout(world).news(), 5) == 7


async def test_what_is_not_new_wakes_nobody_and_the_poll_finds_what_comes(world: World) -> None:
    asked = asyncio.ensure_future(lookout(world, most=0.01).news())
    for _ in range(3):
        await until_looked(world)
    assert not asked.done()
    world.found = [7]
    assert await asyncio.wait_for(asked, 5) == 7


async def test_who_calls_for_a_look_need_not_wait_for_the_poll(world: World) -> None:
    subject = lookout(world)
    asked = asyncio.ensure_future(subject.news())
    await until_looked(world)
    world.found = [7]
    subject.soon()
    assert await asyncio.wait_for(asked, 5) == 7


async def test_a_call_during_a_look_brings_another_one(world: World) -> None:
    subject = lookout(world)
    world.gate.clear()
    asked = asyncio.ensure_future(subject.news())
    await until_looked(world)
    subject.soon()
    world.gate.set()
    await until_looked(world)
    world.found = [7]
    subject.soon()
    assert await asyncio.wait_for(asked, 5) == 7


async def test_a_call_while_nobody_asks_for_news_is_not_lost(world: World) -> None:
    subject = lookout(world)
    world.found = [8, 7]
    assert await subject.news() == 7
    subject.soon()
    assert await asyncio.wait_for(subject.news(), 5) == 8


async def test_between_two_looks_lies_the_least_however_often_it_is_called_for(world: World) -> None:
    subject = lookout(world, least=0.2)
    world.found = [8, 7]
    assert await subject.news() == 7
    begun = time.monotonic()
    asked = asyncio.ensure_future(subject.news())
    while not asked.done():
        subject.soon()
        await asyncio.sleep(0.01)
    assert await asked == 8
    assert world.looks == 2
    assert time.monotonic() - begun >= 0.19


async def test_what_a_look_raises_comes_to_who_asked_and_the_next_one_waits(world: World) -> None:
    subject = lookout(world)
    world.found = [7, 0]
    with pytest.raises(OSError, match="the disk is gone"):
        await subject.news()
    asked = asyncio.ensure_future(subject.news())
    await asyncio.sleep(0.05)
    assert world.looks == 1
    subject.soon()
    assert await asyncio.wait_for(asked, 5) == 7


async def test_how_long_a_look_lasts_is_told(world: World) -> None:
    subject = lookout(world)
    assert subject.lasts == 0
    world.gate.clear()
    world.found = [7]
    asked = asyncio.ensure_future(subject.news())
    await until_looked(world)
    await asyncio.sleep(0.02)
    assert subject.lasts >= 0.02
    world.gate.set()
    await asked
    assert subject.lasts == 0


async def test_who_is_cancelled_leaves_no_thread_behind(world: World) -> None:
    asked = asyncio.ensure_future(lookout(world).news())
    await until_looked(world)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    async with asyncio.timeout(5):
        while any(thread.name == "lookout under test" for thread in threading.enumerate()):
            await asyncio.sleep(0.01)
    assert world.looks == 1
