"""The books of each device: what may be promised, what is promised, and the room that is left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from offloadd.state.actions import DeviceAccount
from offloadd.state.demand import Loan
from offloadd.state.desired import Budget, DeviceBudget
from offloadd.state.ids import HOST_RAM, DeviceId, DeviceKind
from offloadd.state.observed import DeviceView, InstanceState, InstanceView
from offloadd.units import Bytes, Share


def limit_of(device: DeviceView, budget: Budget) -> Bytes:
    """Bytes of `device` that may be promised in all; a GPU is looked up by UUID, then by index."""
    rule = _rule(device, budget)
    limit = rule.limit.of(device.total) if isinstance(rule.limit, Share) else min(rule.limit, device.total)
    return Bytes(max(0, limit - rule.reserve))


def open_accounts(
    devices: Mapping[DeviceId, DeviceView], instances: Iterable[InstanceView], loans: Iterable[Loan], budget: Budget
) -> dict[DeviceId, DeviceAccount]:
    """The books of every device that could be read; one that could not be read has none, and so takes nothing new.

    An instance's promise stays on the books until it is forgotten, so memory still being released is never promised twice.
    """
    sums = {device: _Sums() for device in devices}
    for view in instances:
        gone = view.state is InstanceState.EXITED
        _add(sums, devices, view.placement.reserved, view.measured, returning=view.returning, gone=gone)
    for loan in loans:
        _add(sums, devices, loan.granted or {}, loan.measured, lent=True)
    return {device: sums[device].account(view, limit_of(view, budget)) for device, view in devices.items()}


def pool(device: DeviceId, devices: Mapping[DeviceId, DeviceView]) -> tuple[DeviceId, ...]:
    """Devices that are one memory: RAM, and the GPUs that have none but it. What is promised on one is promised on all."""
    view = devices.get(device)
    if device != HOST_RAM and not (view and view.unified):  # RAM is what it is also while it cannot be read
        return (device,)
    return (HOST_RAM, *(other.id for other in devices.values() if other.unified))


class Ledger:
    """Room per device while one plan is made: every claim of the plan lowers it for the claims after it."""

    def __init__(self, accounts: Mapping[DeviceId, DeviceAccount], devices: Mapping[DeviceId, DeviceView]) -> None:
        self.accounts = accounts
        self._devices = devices
        self.room: dict[DeviceId, Bytes] = {device: account.room for device, account in accounts.items()}

    def claim(self, reserved: Mapping[DeviceId, Bytes]) -> None:
        """Take these bytes out of the room, for a start or to hold them for a waiter."""
        for device, size in reserved.items():
            for each in pool(device, self._devices):
                if each in self.room:
                    self.room[each] = Bytes(self.room[each] - size)


@dataclass(slots=True)
class _Sums:
    """One device's sums while its books are opened."""

    reserved: int = 0
    untaken: int = 0
    releasing: int = 0
    lent: int = 0

    def account(self, device: DeviceView, limit: Bytes) -> DeviceAccount:
        """The books."""
        return DeviceAccount(
            device=device.id,
            limit=limit,
            reserved=Bytes(self.reserved),
            untaken=Bytes(self.untaken),
            releasing=Bytes(self.releasing),
            lent=Bytes(self.lent),
            free=device.free,
            room=Bytes(min(limit - self.reserved, device.free - self.untaken)),
        )


def _add(
    sums: Mapping[DeviceId, _Sums],
    devices: Mapping[DeviceId, DeviceView],
    reserved: Mapping[DeviceId, Bytes],
    measured: Mapping[DeviceId, Bytes],
    *,
    returning: Mapping[DeviceId, Bytes] | None = None,
    gone: bool = False,
    lent: bool = False,
) -> None:
    """Enter one promise. What of it is taken already shows in `free`; a memory under several names has it measured under each."""
    for device, promised in reserved.items():
        for each in pool(device, devices):
            if each in sums:
                entry = sums[each]
                entry.reserved += promised
                entry.releasing += (returning or {}).get(device, 0)
                entry.lent += promised if lent else 0
                entry.untaken += 0 if gone else max(0, promised - measured.get(device, 0))


def _rule(device: DeviceView, budget: Budget) -> DeviceBudget:
    if device.kind is DeviceKind.HOST:
        return budget.host
    by_uuid = budget.gpus.get(device.id.name)
    return by_uuid or budget.gpus.get(str(device.index)) or budget.gpu_default
