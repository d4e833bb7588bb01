"""The books of each device: what may be promised, what is promised, and the room that is left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from offloadd.state.actions import DeviceAccount
from offloadd.state.demand import Loan
from offloadd.state.desired import Budget, DeviceBudget
from offloadd.state.ids import HOST_RAM, DeviceId
from offloadd.state.observed import LEAVING, DeviceKind, DeviceView, InstanceState, InstanceView
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
    held = [*map(_promise_of, instances), *(_Promise(loan.granted, loan.measured, lent=True) for loan in loans if loan.granted)]
    return {
        device.id: _account(device, _pooled(held, pool(device.id, devices)), limit_of(device, budget))
        for device in devices.values()
    }


def pool(device: DeviceId, devices: Mapping[DeviceId, DeviceView]) -> tuple[DeviceId, ...]:
    """Devices that are one memory: RAM, and the GPUs that have none but it. What is promised on one is promised on all."""
    shared = (HOST_RAM, *(view.id for view in devices.values() if view.unified))
    return shared if device in shared else (device,)


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
                self.room[each] = Bytes(self.room.get(each, 0) - size)


@dataclass(frozen=True, slots=True)
class _Promise:
    """Bytes by device that are promised to somebody, and what of them is taken."""

    reserved: Mapping[DeviceId, Bytes]
    measured: Mapping[DeviceId, Bytes]
    leaving: bool = False
    gone: bool = False
    lent: bool = False


def _promise_of(view: InstanceView) -> _Promise:
    gone = view.state is InstanceState.EXITED
    return _Promise(view.placement.reserved, view.measured, leaving=view.state in LEAVING, gone=gone)


def _pooled(promises: Iterable[_Promise], devices: Sequence[DeviceId]) -> Iterator[tuple[int, int, _Promise]]:
    """Promised and taken bytes on a memory that may go by several names."""
    for promise in promises:
        reserved = sum(promise.reserved.get(device, 0) for device in devices)
        # A memory under several names is measured under each: the same pages.
        taken = max(promise.measured.get(device, 0) for device in devices)
        yield reserved, taken, promise


def _rule(device: DeviceView, budget: Budget) -> DeviceBudget:
    if device.kind is DeviceKind.HOST:
        return budget.host
    by_uuid = budget.gpus.get(device.id.name)
    return by_uuid or budget.gpus.get(str(device.index)) or budget.gpu_default


def _account(device: DeviceView, promises: Iterable[tuple[int, int, _Promise]], limit: Bytes) -> DeviceAccount:
    reserved = untaken = releasing = lent = 0
    for promised, taken, promise in promises:
        reserved += promised
        releasing += promised if promise.leaving else 0
        lent += promised if promise.lent else 0
        untaken += 0 if promise.gone else max(0, promised - taken)
    return DeviceAccount(
        device=device.id,
        limit=limit,
        reserved=Bytes(reserved),
        untaken=Bytes(untaken),
        releasing=Bytes(releasing),
        lent=Bytes(lent),
        free=device.free,
        room=Bytes(min(limit - reserved, device.free - untaken)),
    )
