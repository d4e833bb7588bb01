"""The books of each device: what may be promised, what is promised, and the room that is left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from offloadd.state.actions import DeviceAccount
from offloadd.state.desired import Budget, DeviceBudget
from offloadd.state.ids import DeviceId
from offloadd.state.launch import Placement
from offloadd.state.observed import LEAVING, DeviceKind, DeviceView, InstanceState, InstanceView
from offloadd.units import Bytes, Share


def limit_of(device: DeviceView, budget: Budget) -> Bytes:
    """Bytes of `device` that may be promised in all; a GPU is looked up by UUID, then by index."""
    rule = _rule(device, budget)
    limit = rule.limit.of(device.total) if isinstance(rule.limit, Share) else min(rule.limit, device.total)
    return Bytes(max(0, limit - rule.reserve))


def open_accounts(
    devices: Mapping[DeviceId, DeviceView], instances: Iterable[InstanceView], budget: Budget
) -> dict[DeviceId, DeviceAccount]:
    """The books of every device that could be read; one that could not be read has none, and so takes nothing new.

    An instance's promise stays on the books until it is forgotten, so memory still being released is never promised twice.
    """
    held = list(instances)
    return {device.id: _account(device, held, limit_of(device, budget)) for device in devices.values()}


class Ledger:
    """Room per device while one plan is made: every claim of the plan lowers it for the claims after it."""

    def __init__(self, accounts: Mapping[DeviceId, DeviceAccount]) -> None:
        self.accounts = accounts
        self.room: dict[DeviceId, Bytes] = {device: account.room for device, account in accounts.items()}

    def claim(self, placement: Placement) -> None:
        """Take the placement's bytes out of the room, for a start or to hold them for a waiter."""
        for device, size in placement.reserved.items():
            self.room[device] = Bytes(self.room.get(device, 0) - size)


def _rule(device: DeviceView, budget: Budget) -> DeviceBudget:
    if device.kind is DeviceKind.HOST:
        return budget.host
    by_uuid = budget.gpus.get(device.id.name)
    return by_uuid or budget.gpus.get(str(device.index)) or budget.gpu_default


def _account(device: DeviceView, instances: Iterable[InstanceView], limit: Bytes) -> DeviceAccount:
    reserved = untaken = releasing = 0
    for instance in instances:
        promise = instance.placement.reserved.get(device.id, 0)
        reserved += promise
        if instance.state in LEAVING:
            releasing += promise
        if instance.state is not InstanceState.EXITED:
            untaken += max(0, promise - instance.measured.get(device.id, 0))
    return DeviceAccount(
        device=device.id,
        limit=limit,
        reserved=Bytes(reserved),
        untaken=Bytes(untaken),
        releasing=Bytes(releasing),
        free=device.free,
        room=Bytes(min(limit - reserved, device.free - untaken)),
    )
