"""The machine's RAM: the only device on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import psutil

from offloadd.state.ids import HOST_RAM
from offloadd.state.observed import DeviceKind, DeviceView
from offloadd.units import Bytes


class HostReader:
    """RAM through psutil: `free` is what can be had without swapping, page cache included."""

    name = "host"

    def read(self) -> Sequence[DeviceView]:
        """One device, `host`."""
        memory = psutil.virtual_memory()
        view = DeviceView(
            id=HOST_RAM,
            kind=DeviceKind.HOST,
            name="RAM",
            total=Bytes(memory.total),
            free=Bytes(memory.available),
            # Over no interval of its own: the share of CPU time since the reading before this one.
            utilization=psutil.cpu_percent(interval=None) / 100,
        )
        return (view,)
