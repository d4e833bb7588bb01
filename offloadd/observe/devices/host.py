"""The machine's RAM as a device: the only one on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from offloadd.observe.devices.ram import CGROUPS, MEMBERSHIP, Ram, read_ram, within_cgroups
from offloadd.state.ids import HOST_RAM, DeviceKind
from offloadd.state.observed import DeviceView
from offloadd.units import Bytes


class HostReader:
    """RAM through psutil, as far as the limits of this process's cgroups let it be used."""

    name = "host"

    def __init__(self, *, cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP, machine: Callable[[], Ram] = read_ram) -> None:
        self._cgroups = cgroups
        self._membership = membership
        self._machine = machine

    @property
    def problems(self) -> Mapping[str, str]:
        """None: RAM is read whole or not at all."""
        return {}

    def read(self) -> Sequence[DeviceView]:
        """One device, `host`; raise OSError where /proc cannot be read."""
        ram = within_cgroups(self._machine(), cgroups=self._cgroups, membership=self._membership)
        view = DeviceView(
            id=HOST_RAM,
            kind=DeviceKind.HOST,
            name="RAM",
            total=Bytes(ram.total),
            free=Bytes(ram.free),
            # Over no interval of its own: the share of CPU time since the reading before this one.
            utilization=psutil.cpu_percent(interval=None) / 100,
        )
        return (view,)
