from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import weakref

import pytest

from offloadd.observe.devices import aside as module
from offloadd.observe.devices.aside import KEPT, aside


async def test_what_it_returns():
    assert await aside(lambda: 42) == 42


async def test_what_it_raises():
    def read() -> int:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        await aside(read)


async def test_it_has_a_thread_of_its_own():
    name = await aside(lambda: threading.current_thread().name, name="nvidia")
    assert name == "nvidia"


async def test_what_comes_after_the_deadline_is_dropped():
    hold = threading.Event()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await aside(hold.wait)
    hold.set()
    await asyncio.sleep(0.02)


def test_a_program_ends_while_a_reading_hangs():
    script = """
import asyncio, time
from offloadd.observe.devices import aside as module
from offloadd.observe.devices.aside import KEPT, aside

async def main():
    try:
        async with asyncio.timeout(0.05):
            await aside(lambda: time.sleep(60))
    except TimeoutError:
        print("late")

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20)
    assert (done.stdout, done.stderr, done.returncode) == ("late\n", "", 0)


async def settled() -> None:
    """Until threads that have given their answer wait for the next job."""
    async with asyncio.timeout(10):
        while any(each.name == "a reading" for each in threading.enumerate()):
            await asyncio.sleep(0.001)


async def test_a_thread_that_is_done_takes_the_next_reading() -> None:
    first = await aside(threading.get_ident, name="a reading")
    await settled()
    before = threading.active_count()
    seen = set()
    for _ in range(20):
        seen.add(await aside(threading.get_ident, name="a reading"))
        await settled()
    assert threading.active_count() == before
    assert seen == {first}


async def test_one_that_hangs_holds_up_nobody_and_comes_back_later() -> None:
    release = threading.Event()
    hanging = asyncio.create_task(aside(release.wait, name="a reading"))
    await asyncio.sleep(0)
    assert await asyncio.wait_for(aside(lambda: 2, name="another"), 10) == 2
    hanging.cancel()
    await asyncio.gather(hanging, return_exceptions=True)
    assert await asyncio.wait_for(aside(lambda: 3, name="another"), 10) == 3
    release.set()
    await settled()


async def test_no_more_threads_wait_than_are_worth_keeping() -> None:
    release = threading.Event()
    many = [asyncio.create_task(aside(release.wait, name="a reading")) for _ in range(3 * KEPT)]
    await asyncio.sleep(0)
    release.set()
    await asyncio.gather(*many)
    await settled()
    # Two that look at the same moment may both stay.
    assert len(module._idle) <= 2 * KEPT
    async with asyncio.timeout(10):
        while sum(each.name == "idle" for each in threading.enumerate()) > len(module._idle):
            await asyncio.sleep(0.001)


async def test_nothing_of_a_reading_is_kept_until_the_next() -> None:
    class Big:
        def read(self) -> int:
            return 1

    big = Big()
    gone = weakref.ref(big)
    await aside(big.read, name="a reading")
    del big
    await settled()
    gc.collect()
    assert gone() is None
