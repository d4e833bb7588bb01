"""Signals on either event loop: they come at once, and never end a process that has ended its work."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys

import pytest

_SCRIPT = """\
import asyncio, signal, sys, time
given, real = [], signal.signal
def noted(number, handler):
    given.append((number, handler))
    return real(number, handler)
signal.signal = noted  # before the loops are imported, which keep what they find
from offloadd import eventloop
if sys.argv[1] == "asyncio":
    eventloop._factory = asyncio.new_event_loop
assert (eventloop._factory is asyncio.new_event_loop) == (sys.argv[1] == "asyncio")

async def main():
    told = asyncio.Event()
    eventloop.on_signal(signal.SIGTERM, told.set)
    print("ready", flush=True)
    await told.wait()
    print("told", flush=True)
    told.clear()
    await told.wait()
    eventloop.ignore(signal.SIGTERM)
    print("done", flush=True)

eventloop.run(main())
print("its own again" if (signal.SIGTERM, signal.SIG_DFL) in given else "closed", flush=True)
time.sleep(0.2)
"""


@pytest.fixture(params=["asyncio", "uvloop"])
def process(request: pytest.FixtureRequest) -> subprocess.Popen[str]:
    """One that waits for two SIGTERM."""
    if request.param == "uvloop":
        pytest.importorskip("uvloop")
    started = subprocess.Popen([sys.executable, "-c", _SCRIPT, request.param], stdout=subprocess.PIPE, text=True)
    assert said(started) == "ready"
    return started


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_loop_that_has_nothing_to_do_is_told_at_once(process: subprocess.Popen[str]) -> None:
    with process:
        try:
            process.send_signal(signal.SIGTERM)
            assert said(process) == "told"
            process.send_signal(signal.SIGTERM)
            assert [said(process), said(process)] == ["done", "closed"]  # at no time was the signal what would have ended it
            assert process.wait(20) == 0
        finally:
            process.kill()


def test_signals_without_end_do_not_end_one_that_is_done(process: subprocess.Popen[str]) -> None:
    with process:
        try:
            with contextlib.suppress(ProcessLookupError):
                while process.poll() is None:
                    process.send_signal(signal.SIGTERM)
            assert [said(process) for _ in range(3)] == ["told", "done", "closed"]
            assert process.wait(20) == 0
        finally:
            process.kill()
