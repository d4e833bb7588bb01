"""What an instance is promised asleep is what is written down of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from offloadd.backends.vllm import BACKEND
from offloadd.runtime.instances.naps import Sleep, Sleeper
from offloadd.runtime.instances.standing import Standing
from offloadd.state.ids import HOST_RAM
from offloadd.state.launch import Naps, Probe
from offloadd.state.observed import InstanceState
from offloadd.units import Bytes
from tests.unit.runtime.test_diary import LIFE, SlowBook
from tests.unit.runtime.test_instance import ACTION, answers, tools_of

NAPS = Naps(level=1, sleep=(), wake=(), asks=Probe(path="/is_sleeping"))


async def never_ready() -> None:
    await asyncio.Event().wait()


async def test_a_figure_that_comes_while_another_is_written_down_is_not_promised(tmp_path: Path) -> None:
    book = SlowBook()
    diary, standing = book.diary(), Standing(ACTION, tools_of(book, tmp_path))
    sleep = Sleep(standing, diary, Sleeper(BACKEND, NAPS, LIFE.endpoint, answers), never_ready)
    standing.enter(InstanceState.FALLING_ASLEEP)
    standing.keeps = {HOST_RAM: Bytes(3)}
    napping = asyncio.create_task(sleep.nap())
    await asyncio.to_thread(book.begun.wait, 10)
    standing.keeps = {HOST_RAM: Bytes(2)}
    book.may_go.set()
    async with asyncio.timeout(10):
        while standing.state is not InstanceState.SLEEPING:
            await asyncio.sleep(0)
    assert standing.placement.reserved == book.pages[-1].asleep == {HOST_RAM: Bytes(3)}
    napping.cancel()
    await asyncio.gather(napping, return_exceptions=True)
