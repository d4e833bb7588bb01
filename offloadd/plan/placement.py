"""Where a model fits. Host RAM is the only device so far, so a placement is one device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from offloadd.state.actions import DeviceAccount
from offloadd.state.ids import DeviceId
from offloadd.state.launch import Placement, VramEstimate
from offloadd.units import Bytes, format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class NoRoom:
    """Why it does not fit: the need, and the device that came nearest with its books. `device` is None when none could be read."""

    need: Bytes
    device: DeviceId | None = None
    room: Bytes = Bytes(0)
    limit: Bytes = Bytes(0)

    @property
    def never(self) -> bool:
        """True when it would not fit on an empty machine either."""
        return self.device is not None and self.need > self.limit

    @property
    def missing(self) -> Bytes:
        """Bytes that are short now."""
        return Bytes(max(0, self.need - self.room))

    @property
    def sentence(self) -> str:
        """The arithmetic, as an operator would say it."""
        if self.device is None:
            return f"needs {format_bytes(self.need)}, and no device's memory could be read"
        if self.never:
            return f"needs {format_bytes(self.need)} on {self.device}, more than its limit of {format_bytes(self.limit)}"
        return f"needs {format_bytes(self.need)} on {self.device}, {format_bytes(max(0, self.room))} free"


def place(need: VramEstimate, room: Mapping[DeviceId, Bytes], accounts: Mapping[DeviceId, DeviceAccount]) -> Placement | NoRoom:
    """Best fit: the device that is left with the least room. Equal ones go by name, so that the answer is always the same."""
    fitting = [(size, device) for device, size in room.items() if size >= need.total]
    if fitting:
        return Placement(reserved={min(fitting)[1]: need.total})
    if not room:
        return NoRoom(need=need.total)
    nearest = max(room, key=lambda device: (accounts[device].limit, room[device], device))
    return NoRoom(need=need.total, device=nearest, room=room[nearest], limit=accounts[nearest].limit)
