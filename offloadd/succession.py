"""A newer program takes the place of this one in the same process: sockets and children stay, since they belong to the process.

The new program is what a start by the same command line gives now, so an upgrade is: install, then SIGUSR2.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from offloadd.systemd import FIRST_FD
from offloadd.units import Seconds

log = logging.getLogger(__name__)

REHEARSAL = Seconds(30)
"""How long the new program may take to look at the config."""
_MAX_OUTPUT = 2000
_HIGH = 200
"""Descriptors are moved up there first, so that none is overwritten while they are put in their places."""
HELD = frozenset({signal.SIGTERM, signal.SIGINT})
"""Kept waiting from the exec until the new program can answer them."""


@dataclass(frozen=True, slots=True)
class Heirloom:
    """A listening socket that goes to the new program, under the name that systemd would give it."""

    name: str
    fd: int


def command_line() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What starts this program, and the arguments that it was given."""
    given = tuple(sys.argv[1:])
    whole = tuple(sys.orig_argv)
    return (sys.executable, *whole[1 : len(whole) - len(given)]), given


async def rehearse(config: Path) -> str:
    """Have the new program check the config, in a process of its own; why it could not take over, or empty."""
    program, _ = command_line()
    try:
        child = await asyncio.create_subprocess_exec(
            *program,
            *("check", str(config)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError as error:
        return f"it cannot be started: {error}"
    try:
        async with asyncio.timeout(REHEARSAL):
            said, _ = await child.communicate()
    except TimeoutError:
        with suppress(ProcessLookupError):
            child.kill()
        await child.wait()
        return f"it does not answer within {REHEARSAL:g} s"
    return "" if child.returncode == 0 else said[-_MAX_OUTPUT:].decode(errors="replace").strip() or f"exit code {child.returncode}"


def take_place(sockets: Sequence[Heirloom], environment: Mapping[str, str], *, told_to_end: bool) -> NoReturn:
    """Become the new program, which is told to end at once if we were, or are until the last moment."""
    program, given = command_line()
    told = [told_to_end]
    for number in HELD:
        signal.signal(number, lambda *_: told.append(True))
    passed = {
        **os.environ,
        **environment,
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDS": str(len(sockets)),
        "LISTEN_FDNAMES": ":".join(heirloom.name for heirloom in sockets),
    }
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    high = [fcntl.fcntl(heirloom.fd, fcntl.F_DUPFD_CLOEXEC, _HIGH) for heirloom in sockets]
    for place, fd in enumerate(high, FIRST_FD):
        os.dup2(fd, place, inheritable=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    if any(told):
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # blocked, so it waits for the new program
    os.execve(program[0], [*program, *given], passed)  # noqa: S606  # nosec B606  (the same program again, no shell)


def ready_for_signals() -> None:
    """Let signals through that waited while one program followed another."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
