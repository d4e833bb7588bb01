from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from offloadd.observe.devices.aside import aside


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
from offloadd.observe.devices.aside import aside

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
