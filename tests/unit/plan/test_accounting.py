"""The books of a device."""

from __future__ import annotations

import pytest

from offloadd.plan.accounting import Ledger, limit_of, open_accounts
from offloadd.state.actions import DeviceAccount
from offloadd.state.demand import Loan
from offloadd.state.desired import Budget, DeviceBudget
from offloadd.state.ids import HOST_RAM, LOCAL, DeviceId, DeviceKind
from offloadd.state.launch import Placement
from offloadd.state.observed import DeviceView, InstanceState, InstanceView
from offloadd.units import Share
from tests.unit.plan.build import NOW, gib, ram, view

GPU = DeviceView(id=DeviceId(LOCAL, "GPU-abc"), kind=DeviceKind.NVIDIA, name="T4", total=gib(16), free=gib(16), index=1)


def books(*views: InstanceView, free: float = 16.0) -> DeviceAccount:
    return open_accounts({HOST_RAM: ram(free)}, views, [], Budget(host=DeviceBudget(limit=gib(12))))[HOST_RAM]


def test_an_empty_device_has_room_up_to_its_limit() -> None:
    assert books().room == gib(12)


def test_room_is_no_more_than_what_is_free() -> None:
    assert books(free=3).room == gib(3)


def test_a_promise_lowers_the_room_by_the_limit_and_its_untaken_part_by_what_is_free() -> None:
    account = books(view("a-1", 4, measured={HOST_RAM: gib(1)}), free=10)
    assert (account.reserved, account.untaken, account.room) == (gib(4), gib(3), gib(7))


def test_memory_that_was_not_measured_counts_as_not_taken_yet() -> None:
    assert books(view("a-1", 4, measured={}), free=10).untaken == gib(4)


def test_an_instance_that_took_more_than_promised_owes_nothing() -> None:
    assert books(view("a-1", 4, measured={HOST_RAM: gib(6)}), free=10).untaken == 0


@pytest.mark.parametrize("state", [InstanceState.DRAINING, InstanceState.STOPPING, InstanceState.EXITED])
def test_a_leaving_instance_keeps_its_promise_on_the_books(state: InstanceState) -> None:
    account = books(view("a-1", 4, state))
    assert (account.reserved, account.releasing) == (gib(4), gib(4))
    assert account.room == gib(8)


def test_an_exited_instance_takes_no_more_memory() -> None:
    assert books(view("a-1", 4, InstanceState.EXITED, measured={})).untaken == 0


def test_a_device_that_was_not_read_has_no_books() -> None:
    assert open_accounts({}, [view("a-1", 4)], [], Budget()) == {}


def test_a_claim_lowers_the_room_for_the_next() -> None:
    ledger = Ledger({HOST_RAM: books()}, {HOST_RAM: ram()})
    ledger.claim({HOST_RAM: gib(5)})
    assert ledger.room == {HOST_RAM: gib(7)}


@pytest.mark.parametrize(
    ("budget", "limit"),
    [
        (Budget(gpu_default=DeviceBudget(limit=Share(50))), 8),
        (Budget(gpu_default=DeviceBudget(limit=gib(10), reserve=gib(1))), 9),
        (Budget(gpu_default=DeviceBudget(limit=gib(99))), 16),
        (Budget(gpu_default=DeviceBudget(limit=gib(1), reserve=gib(2))), 0),
        (Budget(gpus={"1": DeviceBudget(limit=gib(3))}), 3),
        (Budget(gpus={"1": DeviceBudget(limit=gib(3)), "GPU-abc": DeviceBudget(limit=gib(4))}), 4),
        (Budget(gpus={"0": DeviceBudget(limit=gib(3))}, gpu_default=DeviceBudget(limit=gib(5))), 5),
    ],
    ids=["share", "less reserve", "never above total", "never below zero", "by index", "UUID before index", "another GPU's"],
)
def test_the_limit_follows_the_budget(budget: Budget, limit: float) -> None:
    assert limit_of(GPU, budget) == gib(limit)


def test_a_gpu_without_memory_of_its_own_and_ram_are_one_memory() -> None:
    chip = DeviceId(LOCAL, "GPU-chip")
    devices = {
        HOST_RAM: ram(10),
        chip: DeviceView(id=chip, kind=DeviceKind.NVIDIA, name="chip", total=gib(16), free=gib(10), unified=True),
    }
    on_chip = view("a-1", 4, placement=Placement(reserved={chip: gib(4)}), measured={chip: gib(4)})
    on_host = view("b-1", 2)
    accounts = open_accounts(devices, [on_chip, on_host], [], Budget())
    assert {account.reserved for account in accounts.values()} == {gib(6)}
    ledger = Ledger(accounts, devices)
    ledger.claim({chip: gib(1)})
    assert {device: accounts[device].room - room for device, room in ledger.room.items()} == {HOST_RAM: gib(1), chip: gib(1)}


def test_what_is_lent_is_not_room() -> None:
    loan = Loan(id="1", size=gib(3), since=NOW, granted={HOST_RAM: gib(3)}, measured={HOST_RAM: gib(1)})
    account = open_accounts({HOST_RAM: ram(15)}, [], [loan], Budget(host=DeviceBudget(limit=gib(12))))[HOST_RAM]
    assert (account.reserved, account.lent, account.untaken, account.room) == (gib(3), gib(3), gib(2), gib(9))


def test_a_gpu_without_memory_of_its_own_counts_promises_on_ram_that_was_not_read() -> None:
    chip = DeviceId(LOCAL, "GPU-chip")
    device = DeviceView(id=chip, kind=DeviceKind.NVIDIA, name="chip", total=gib(16), free=gib(10), unified=True)
    accounts = open_accounts({chip: device}, [view("b-1", 2)], [], Budget())
    assert accounts[chip].reserved == gib(2)
    ledger = Ledger(accounts, {chip: device})
    ledger.claim({chip: gib(1)})
    assert ledger.room.keys() == {chip}
