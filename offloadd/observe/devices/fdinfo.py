"""What each process holds of the cards of kernel drivers that tell it per open descriptor (Linux: drm-usage-stats)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from offloadd.units import Bytes

Uses = Mapping[int, Bytes | None]
"""Bytes by pid; None where the driver says that the process uses the card and not how much of it."""

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_DEVICES = "/dev/dri/"
_KEYS = ("drm-resident-vram", "drm-memory-vram")
"""Newer and older name of the same figure."""


def read_uses(proc: Path, *, driver: str) -> dict[str, Uses]:
    """Uses of VRAM by PCI address. Processes that this one has no right to look into are not in it.

    Descriptors can be copied and shared, also between processes: each client counts once, for the lowest pid that has it.
    """
    found: dict[str, dict[int, Bytes | None]] = {}
    counted: set[tuple[str, str]] = set()
    for pid in sorted(int(entry) for entry in os.listdir(proc) if entry.isdigit()):  # noqa: PTH208  (as in processes.py)
        for facts in _clients(proc / str(pid)):
            address, client = facts.get("drm-pdev", ""), facts.get("drm-client-id", "")
            if facts.get("drm-driver") != driver or (address, client) in counted:
                continue
            counted.add((address, client))
            uses = found.setdefault(address, {})
            uses[pid] = _sum(uses.get(pid, Bytes(0)), _vram(facts))
    return dict(found)


def _clients(process: Path) -> Iterator[dict[str, str]]:
    """The facts of each descriptor of a graphics device; a process may end meanwhile."""
    try:
        numbers = os.listdir(process / "fd")  # noqa: PTH208
    except OSError:
        return
    for number in numbers:
        try:
            if os.readlink(f"{process}/fd/{number}").startswith(_DEVICES):  # noqa: PTH115
                yield _facts((process / "fdinfo" / number).read_text(errors="replace"))
        except OSError:
            continue


def _facts(text: str) -> dict[str, str]:
    rows = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, _, value in rows}


def _vram(facts: Mapping[str, str]) -> Bytes | None:
    for key in _KEYS:
        number, _, unit = facts.get(key, "").partition(" ")
        if number.isdecimal():
            return Bytes(int(number) * _UNITS.get(unit.strip(), 1))
    return None


def _sum(one: Bytes | None, other: Bytes | None) -> Bytes | None:
    """One part that isn't known leaves the whole unknown."""
    return None if one is None or other is None else Bytes(one + other)
