"""Readers of devices' memory. A reader blocks, so it is called in a thread and under a deadline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from offloadd.state.observed import DeviceView
from offloadd.units import Bytes


class DeviceReader(Protocol):
    """One source of device readings. One thread reads at a time."""

    name: str

    @property
    def problems(self) -> Mapping[str, str]:
        """What the latest reading had to leave out and why, by the name of the device; empty when it is whole."""
        ...

    def read(self) -> Sequence[DeviceView]:
        """Read every device of this kind now, by index; raise OSError or TemporaryError when it cannot be done.

        A device that cannot be read is left out and stands in `problems`. Where there is no such hardware the result is empty.
        """
        ...


def held_by(view: DeviceView, pids: Iterable[int]) -> Bytes | None:
    """Device memory that these processes hold together; None when it isn't known of one of them."""
    if view.processes is None:
        return None
    total = 0
    for pid in set(pids) & view.processes.keys():
        size = view.processes[pid]
        if size is None:
            return None
        total += size
    return Bytes(total)
