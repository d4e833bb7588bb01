"""Where a model fits, and the arithmetic when it does not."""

from __future__ import annotations

from offloadd.plan.placement import NoRoom, place
from offloadd.state.actions import DeviceAccount
from offloadd.state.ids import HOST_RAM, LOCAL, DeviceId
from offloadd.state.launch import Placement, VramEstimate
from offloadd.units import Bytes
from tests.unit.plan.build import gib

ONE, TWO = DeviceId(LOCAL, "gpu0"), DeviceId(LOCAL, "gpu1")
ZERO = Bytes(0)


def place_in(size: float, rooms: dict[DeviceId, float], limit: float = 12.0) -> Placement | NoRoom:
    accounts = {
        device: DeviceAccount(
            device=device, limit=gib(limit), reserved=ZERO, untaken=ZERO, releasing=ZERO, free=gib(room), room=gib(room)
        )
        for device, room in rooms.items()
    }
    return place(VramEstimate(total=gib(size), basis="given"), {device: gib(room) for device, room in rooms.items()}, accounts)


def sentence(answer: Placement | NoRoom) -> str:
    assert isinstance(answer, NoRoom)
    return answer.sentence


def test_it_goes_where_the_least_room_is_left() -> None:
    assert place_in(3, {ONE: 8, TWO: 4}) == Placement(reserved={TWO: gib(3)})


def test_equal_devices_go_by_name() -> None:
    assert place_in(3, {TWO: 4, ONE: 4}) == Placement(reserved={ONE: gib(3)})


def test_it_may_fill_the_room_to_the_last_byte() -> None:
    assert place_in(4, {HOST_RAM: 4}) == Placement(reserved={HOST_RAM: gib(4)})


def test_what_is_short_is_said_with_numbers() -> None:
    answer = place_in(9.1, {HOST_RAM: 6})
    assert sentence(answer) == "needs 9.1 GiB on host, 6.0 GiB free"
    assert isinstance(answer, NoRoom)
    assert not answer.never
    assert answer.missing == gib(9.1) - gib(6)


def test_overdrawn_room_reads_as_none() -> None:
    assert sentence(place_in(9.1, {HOST_RAM: -2})) == "needs 9.1 GiB on host, 0 B free"


def test_what_exceeds_the_limit_never_fits() -> None:
    answer = place_in(13, {HOST_RAM: 12})
    assert isinstance(answer, NoRoom)
    assert answer.never
    assert answer.sentence == "needs 13.0 GiB on host, more than its limit of 12.0 GiB"


def test_without_a_reading_nothing_is_known_to_be_short() -> None:
    answer = place_in(1, {})
    assert isinstance(answer, NoRoom)
    assert not answer.never
    assert answer.sentence == "needs 1.0 GiB, and no device's memory could be read"
