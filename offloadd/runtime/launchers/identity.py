"""Which process is which, by what the kernel tells in /proc. Everything here is quick, and nothing in it waits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from offloadd.state.life import ProcessId

_PROC = Path("/proc")
_DEAD = frozenset({"Z", "X", "x"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Stat:
    """What is used of /proc/PID/stat."""

    pid: int
    state: str
    parent: int
    session: int
    started: int

    @property
    def id(self) -> ProcessId:
        """Its identity."""
        return ProcessId(pid=self.pid, started=self.started)


def boot_id() -> str:
    """The machine's boot; empty where it cannot be read, and then no process of an earlier daemon is vouched for."""
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def stat(pid: int) -> Stat | None:
    """The process; None when it is gone or a zombie, which holds nothing and does nothing."""
    try:
        text = (_PROC / str(pid) / "stat").read_bytes()
        # The second field is the program's name in parentheses, which may hold anything.
        fields = text.rpartition(b")")[2].split()
        found = Stat(pid=pid, state=fields[0].decode(), parent=int(fields[1]), session=int(fields[3]), started=int(fields[19]))
    except (OSError, IndexError, ValueError):
        return None
    return None if found.state in _DEAD else found


def environment(pid: int, names: frozenset[str]) -> dict[str, str]:
    """These variables of the process, as far as we may look; a program that renames itself may have written over them."""
    try:
        raw = (_PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return {}
    found: dict[str, str] = {}
    for entry in raw.split(b"\0"):
        name, _, value = entry.partition(b"=")
        if (key := name.decode(errors="replace")) in names:
            found[key] = value.decode(errors="replace")
    return found


def all_pids() -> Iterator[int]:
    """Every process that can be seen, our own aside."""
    own = os.getpid()
    with suppress(OSError):
        for name in os.listdir(_PROC):  # noqa: PTH208  (a Path for each process would cost more than the reading)
            if name.isdigit() and int(name) != own:
                yield int(name)
