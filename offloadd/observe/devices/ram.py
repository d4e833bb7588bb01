"""The machine's RAM, and what the cgroups around this process leave of it. Everything here blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


class Ram(NamedTuple):
    """Bytes; `free` is what can be had without swapping, page cache that can be dropped included."""

    total: int
    free: int


class _Names(NamedTuple):
    limits: tuple[str, ...]
    usage: str
    cache: tuple[str, ...]
    """Keys of memory.stat whose sum is page cache, children included."""


_V2 = _Names(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))
# memory.high counts as a limit: past it nothing is killed, but everything in the group is slowed to a crawl.
_V1 = _Names(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))

_DIGITS = 20
_DEEP = 64
"""Groups above one another, counted from the root, of which the limits are looked at."""


def read_ram() -> Ram:
    """MemTotal and MemAvailable."""
    memory = psutil.virtual_memory()
    return Ram(memory.total, memory.available)


def within_cgroups(ram: Ram, *, cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> Ram:
    """The tightest of `ram` and every limit between this process's group and the root; groups that can't be read don't limit."""
    for folder, names in _groups(cgroups, membership):
        limit = _limit(folder, names)
        usage = _number(folder / names.usage)
        if limit is None or usage is None:
            continue
        # The kernel charges cached file pages to the group and drops them before it refuses memory, as MemAvailable assumes.
        room = limit - max(0, usage - _cache(folder, names))
        ram = Ram(min(ram.total, limit), min(ram.free, max(0, room)))
    return Ram(ram.total, min(ram.free, ram.total))


def _groups(cgroups: Path, membership: Path) -> Iterator[tuple[Path, _Names]]:
    """The group of this process and its parents up to the mount, for each of the two hierarchies that manage memory."""
    try:
        lines = membership.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    groups: dict[_Names, tuple[Path, str]] = {}
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            groups.setdefault(_V2, (cgroups, path))
        elif "memory" in controllers.split(","):
            groups.setdefault(_V1, (cgroups / "memory", path))
    for names, (mount, path) in groups.items():
        yield from ((folder, names) for folder in _upwards(mount, path))


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """From the group to the mount. A path as seen outside a container has no folder inside; the mount then is the group."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    for length in range(min(len(parts), _DEEP), -1, -1):
        yield mount.joinpath(*parts[:length])


def _limit(folder: Path, names: _Names) -> int | None:
    found = [value for name in names.limits if (value := _number(folder / name)) is not None]
    return min(found, default=None)


def _number(file: Path) -> int | None:
    """The file's number; None for `max`, and for a file that isn't there."""
    try:
        text = file.read_text().strip()
    except (OSError, ValueError):
        return None
    return int(text) if text.isdecimal() and len(text) <= _DIGITS else None


def _cache(folder: Path, names: _Names) -> int:
    try:
        rows = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
        return sum(int(row[1]) for row in rows if len(row) == 2 and row[0] in names.cache)
    except (OSError, ValueError):
        return 0
