"""Readers of devices' memory. A reader blocks, so it is called in a thread and under a deadline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from offloadd.state.observed import DeviceView


class DeviceReader(Protocol):
    """One source of device readings."""

    name: str

    def read(self) -> Sequence[DeviceView]:
        """Read every device of this kind now; raise OSError or TemporaryError when it cannot be done."""
        ...
