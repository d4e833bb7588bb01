"""Where a model fits, and the arithmetic when it does not."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from offloadd.plan.placement import NoRoom, Site, _share_out, place
from offloadd.state.actions import DeviceAccount
from offloadd.state.desired import ModelSpec
from offloadd.state.ids import HOST_RAM, LOCAL, DeviceId, DeviceKind
from offloadd.state.launch import Placement, VramEstimate
from offloadd.state.observed import DeviceView
from offloadd.units import Bytes
from tests.unit.plan.build import gib, spec

ONE, TWO, THREE = (DeviceId(LOCAL, f"GPU-{letter}") for letter in "abc")
ZERO = Bytes(0)


def site(rooms: dict[DeviceId, float], limit: float = 12.0, blind: str = "") -> Site:
    devices = {}
    accounts = {}
    for index, (device, room) in enumerate(rooms.items()):
        kind = DeviceKind.HOST if device == HOST_RAM else DeviceKind.NVIDIA
        devices[device] = DeviceView(id=device, kind=kind, name=device.name, index=index, total=gib(limit), free=gib(room))
        accounts[device] = DeviceAccount(
            device=device, limit=gib(limit), reserved=ZERO, untaken=ZERO, releasing=ZERO, free=gib(room), room=gib(room)
        )
    return Site(devices=devices, accounts=accounts, blind=blind)


def layered(layers: int, each: float, fixed: float = 0.5, host: float = 0.0) -> VramEstimate:
    total = layers * gib(each) + gib(fixed)
    return VramEstimate(total=Bytes(total), basis="given", layers=(gib(each),) * layers, fixed=gib(fixed), host=gib(host))


def place_in(
    need: VramEstimate | float, rooms: dict[DeviceId, float], one: ModelSpec | None = None, limit: float = 12.0, blind: str = ""
) -> Placement | NoRoom:
    estimate = need if isinstance(need, VramEstimate) else VramEstimate(total=gib(need), basis="given")
    return place(estimate, one or spec("m"), {device: gib(room) for device, room in rooms.items()}, site(rooms, limit, blind))


def sentence(answer: Placement | NoRoom) -> str:
    assert isinstance(answer, NoRoom)
    return answer.sentence


def test_it_goes_where_the_least_room_is_left() -> None:
    assert place_in(3, {ONE: 8, TWO: 4}) == Placement(reserved={TWO: gib(3)}, gpus=(TWO,))


def test_equal_devices_go_by_name() -> None:
    assert place_in(3, {TWO: 4, ONE: 4}) == Placement(reserved={ONE: gib(3)}, gpus=(ONE,))


def test_where_there_is_a_gpu_the_cpu_is_not_taken() -> None:
    assert sentence(place_in(3, {ONE: 2, HOST_RAM: 60})) == "needs 3.0 GiB on gpu0, 2.0 GiB free"


def test_the_cpu_is_taken_where_the_config_asks_for_it() -> None:
    for one in (spec("m", devices="cpu"), spec("m", gpu_layers=0)):
        assert place_in(3, {ONE: 8, HOST_RAM: 60}, one) == Placement(reserved={HOST_RAM: gib(3)})


def test_on_the_cpu_the_need_may_be_another_one() -> None:
    need = replace(layered(4, 1), on_host=gib(4))
    assert place_in(need, {HOST_RAM: 4.2}) == Placement(reserved={HOST_RAM: gib(4)})


def test_it_may_fill_the_room_to_the_last_byte() -> None:
    assert place_in(4, {HOST_RAM: 4}) == Placement(reserved={HOST_RAM: gib(4)})


def test_ram_beside_the_gpu_is_reserved_too() -> None:
    need = layered(4, 1, host=2)
    assert place_in(need, {ONE: 8, HOST_RAM: 3}) == Placement(reserved={ONE: gib(4.5), HOST_RAM: gib(2)}, gpus=(ONE,))
    assert isinstance(place_in(need, {ONE: 8, HOST_RAM: 1}), NoRoom)


def test_a_model_too_large_for_one_is_divided_over_as_few_as_will_do() -> None:
    answer = place_in(layered(16, 1), {ONE: 11, TWO: 11, THREE: 11})
    assert answer == Placement(reserved={ONE: gib(8.5), TWO: gib(8.5)}, gpus=(ONE, TWO), split=(8, 8))


def test_a_division_follows_the_room_of_each() -> None:
    answer = place_in(layered(12, 1), {ONE: 10.5, TWO: 4.5})
    assert isinstance(answer, Placement)
    assert sum(answer.split) == 12
    assert answer.reserved[TWO] <= gib(4.5)
    assert answer.split[0] > answer.split[1]


def test_a_division_pays_the_fixed_cost_on_every_device() -> None:
    assert isinstance(place_in(layered(16, 1, fixed=3), {ONE: 11, TWO: 10.5}), NoRoom)


def test_devices_named_by_the_config_are_all_used() -> None:
    answer = place_in(layered(4, 1), {ONE: 11, TWO: 11, THREE: 11}, spec("m", devices=("2", "GPU-a")))
    assert answer == Placement(reserved={THREE: gib(2.5), ONE: gib(2.5)}, gpus=(THREE, ONE), split=(2, 2))


def test_a_device_that_is_not_there_is_named() -> None:
    assert sentence(place_in(1, {ONE: 8}, spec("m", devices=("7",)))) == "needs 1.0 GiB, and there is no device 7"


def test_partial_offload_takes_as_many_layers_as_fit_and_the_cpu_the_rest() -> None:
    answer = place_in(layered(10, 1), {ONE: 4, HOST_RAM: 20}, spec("m", partial=True))
    assert answer == Placement(reserved={ONE: gib(3.5), HOST_RAM: gib(7)}, gpus=(ONE,), split=(3,))


def test_without_leave_for_it_nothing_is_left_on_the_cpu() -> None:
    assert isinstance(place_in(layered(10, 1), {ONE: 4, HOST_RAM: 20}), NoRoom)


def test_a_number_of_layers_given_by_the_config_is_kept() -> None:
    answer = place_in(layered(10, 1), {ONE: 11, HOST_RAM: 20}, spec("m", gpu_layers=4))
    assert answer == Placement(reserved={ONE: gib(4.5), HOST_RAM: gib(6)}, gpus=(ONE,), split=(4,))


def test_what_is_short_is_said_with_numbers() -> None:
    answer = place_in(9.1, {HOST_RAM: 6})
    assert sentence(answer) == "needs 9.1 GiB on host, 6.0 GiB free"
    assert isinstance(answer, NoRoom)
    assert not answer.never


def test_overdrawn_room_reads_as_none() -> None:
    assert sentence(place_in(9.1, {HOST_RAM: -2})) == "needs 9.1 GiB on host, 0 B free"


@pytest.mark.parametrize(("device", "label"), [(HOST_RAM, "host"), (ONE, "gpu0")])
def test_what_exceeds_the_limit_never_fits(device: DeviceId, label: str) -> None:
    answer = place_in(13, {device: 12})
    assert isinstance(answer, NoRoom)
    assert answer.never
    assert answer.sentence == f"needs 13.0 GiB on {label}, more than its limit of 12.0 GiB"


def test_what_two_could_hold_together_is_not_never() -> None:
    answer = place_in(layered(16, 1), {ONE: 2, TWO: 2})
    assert isinstance(answer, NoRoom)
    assert not answer.never


def test_without_a_reading_nothing_is_known_to_be_short() -> None:
    answer = place_in(1, {})
    assert isinstance(answer, NoRoom)
    assert not answer.never
    assert answer.sentence == "needs 1.0 GiB, and no device could be read"


def test_a_gpu_that_cannot_be_read_sends_nobody_to_the_cpu() -> None:
    answer = place_in(1, {HOST_RAM: 60}, blind="the NVIDIA driver does not answer")
    assert sentence(answer) == "needs 1.0 GiB, and the NVIDIA driver does not answer"


def test_an_engine_that_cannot_use_the_gpu_goes_to_the_cpu() -> None:
    rooms = {ONE: 8.0, HOST_RAM: 60.0}
    need = VramEstimate(total=gib(3), basis="given")
    room = {device: gib(size) for device, size in rooms.items()}
    assert place(need, spec("m"), room, site(rooms), frozenset()) == Placement(reserved={HOST_RAM: gib(3)})
    assert place(need, spec("m"), room, site(rooms), frozenset({DeviceKind.AMD})) == Placement(reserved={HOST_RAM: gib(3)})
    assert place(need, spec("m"), room, site(rooms), frozenset({DeviceKind.NVIDIA})) == Placement(
        reserved={ONE: gib(3)}, gpus=(ONE,)
    )


def test_a_processors_own_graphics_is_taken_only_when_named() -> None:
    rooms = {ONE: 8.0, TWO: 4.0, HOST_RAM: 60.0}
    there = site(rooms)
    graphics = replace(there.devices[TWO], kind=DeviceKind.AMD, unified=True, index=0)
    there = replace(there, devices={**there.devices, TWO: graphics})
    need = VramEstimate(total=gib(3), basis="given")
    room = {device: gib(size) for device, size in rooms.items()}
    assert place(need, spec("m"), room, there) == Placement(reserved={ONE: gib(3)}, gpus=(ONE,))
    assert place(need, spec("m", devices=("GPU-b",)), room, there) == Placement(reserved={TWO: gib(3)}, gpus=(TWO,))


def test_one_card_named_twice_is_one_card() -> None:
    answer = place_in(layered(4, 1), {ONE: 11, TWO: 11}, spec("m", devices=("0", "GPU-a")))
    assert answer == Placement(reserved={ONE: gib(4.5)}, gpus=(ONE,))


def sliced(rooms: dict[DeviceId, float], *slices: DeviceId) -> Site:
    there = site(rooms)
    return replace(there, devices={key: replace(v, slice_of="GPU-z" if key in slices else "") for key, v in there.devices.items()})


def test_slices_share_nothing() -> None:
    rooms = {ONE: 11.0, TWO: 11.0, THREE: 11.0}
    room = {device: gib(size) for device, size in rooms.items()}
    need = layered(16, 1)
    assert isinstance(place(need, spec("m"), room, sliced(rooms, ONE, TWO)), NoRoom)
    answer = place(need, spec("m"), room, sliced(rooms, ONE))
    assert isinstance(answer, Placement)
    assert answer.gpus == (TWO, THREE)
    named = spec("m", devices=("0", "1", "2"))
    assert isinstance(place(need, named, room, sliced(rooms, ONE)), NoRoom)


def test_a_small_room_gets_a_layer_where_all_named_devices_are_to_be_used() -> None:
    answer = place_in(layered(4, 0.5, fixed=0.2), {ONE: 9.4, TWO: 1.4}, spec("m", devices=("0", "1")))
    assert isinstance(answer, Placement)
    assert answer.split == (3, 1)


def test_a_division_is_found_whenever_there_is_one() -> None:
    """Compared with trying every way to cut a row of equal layers with another output layer."""
    chance = random.Random(3)
    for _ in range(2000):
        layers = [Bytes(2)] * chance.randint(1, 7) + [Bytes(chance.randint(1, 6))]
        capacity = [chance.randint(0, 14) for _ in range(chance.randint(2, 4))]
        cuts = [(0, *cut, len(layers)) for cut in combinations(range(1, len(layers)), len(capacity) - 1)]
        sizes = [[sum(layers[a:b]) for a, b in pairwise(cut)] for cut in cuts]
        possible = any(all(size <= most for size, most in zip(row, capacity, strict=True)) for row in sizes)
        answer = _share_out(layers, capacity)
        assert (answer is not None) == possible, (layers, capacity)
        if answer:
            assert sum(answer) == len(layers)


def unified(room: float, limit: float = 12.0, ram: float | None = None) -> tuple[dict[DeviceId, Bytes], Site]:
    """A GPU without memory of its own."""
    there = site({ONE: room, HOST_RAM: room if ram is None else ram}, limit)
    return {device: Bytes(view.free) for device, view in there.devices.items()}, replace(
        there, devices={**there.devices, ONE: replace(there.devices[ONE], unified=True)}
    )


def test_a_unified_gpu_and_the_ram_beside_it_fit_together_or_not_at_all() -> None:
    need = layered(4, 1, host=2)
    assert place(need, spec("m"), *unified(6.5)) == Placement(reserved={ONE: gib(4.5), HOST_RAM: gib(2)}, gpus=(ONE,))
    assert isinstance(place(need, spec("m"), *unified(6.4)), NoRoom)
    partial = place(layered(10, 1), spec("m", partial=True), *unified(8))
    assert isinstance(partial, NoRoom)  # what is not on the GPU is in the same memory


def test_the_tighter_limit_of_one_memory_under_two_names_counts() -> None:
    need = VramEstimate(total=gib(5), basis="given")
    answer = place(need, spec("m"), *unified(8, ram=4))
    assert sentence(answer) == "needs 5.0 GiB on gpu0, 4.0 GiB free"


def test_ram_that_is_short_beside_a_gpu_is_named() -> None:
    answer = place_in(layered(4, 1, host=2), {ONE: 8, HOST_RAM: 1})
    assert sentence(answer) == "needs 2.0 GiB on host, 1.0 GiB free"


def test_ram_that_was_not_read_is_not_said_to_be_too_small() -> None:
    answer = place_in(layered(4, 1, host=2), {ONE: 8})
    assert isinstance(answer, NoRoom)
    assert not answer.never
    assert answer.sentence == "needs 2.0 GiB, and RAM, of which it needs a part beside the GPU, could not be read"


def test_on_the_cpu_without_a_reading_of_ram() -> None:
    answer = place_in(3, {ONE: 8}, spec("m", devices="cpu"))
    assert isinstance(answer, NoRoom)
    assert answer.device is None


# --- engines that divide evenly, that size themselves, and that run elsewhere ---


def even(total: float, *, host: float = 0.0, **parts: float) -> VramEstimate:
    """`n2=3` is 3 GiB on each of two."""
    sizes = {int(name.removeprefix("n")): gib(size) for name, size in parts.items()}
    return VramEstimate(total=gib(total), basis="given", host=gib(host), even=sizes, elastic=True)


def test_equal_parts_go_to_as_few_gpus_as_will_do() -> None:
    need = even(6, n2=3.5, n3=2.5)
    found = place_in(need, {ONE: 8, TWO: 4, THREE: 4})
    assert isinstance(found, Placement)
    assert (found.gpus, found.reserved) == ((ONE,), {ONE: gib(6)})
    found = place_in(need, {ONE: 4, TWO: 4, THREE: 3})
    assert isinstance(found, Placement)
    assert found.reserved == {ONE: gib(3.5), TWO: gib(3.5)}
    assert found.split == ()
    found = place_in(need, {ONE: 3, TWO: 4, THREE: 3})
    assert isinstance(found, Placement)
    assert found.reserved == dict.fromkeys((ONE, TWO, THREE), gib(2.5))
    assert isinstance(place_in(need, {ONE: 2, TWO: 4, THREE: 3}), NoRoom)


def test_named_devices_take_equal_parts_all_of_them() -> None:
    need = even(6, n2=3.5, n3=2.5)
    two = spec("m", devices=("0", "1"))
    found = place_in(need, {ONE: 8, TWO: 4, THREE: 8}, two)
    assert isinstance(found, Placement)
    assert found.reserved == {ONE: gib(3.5), TWO: gib(3.5)}


def test_an_engine_that_sizes_itself_is_told_of_its_cards() -> None:
    found = place_in(even(6), {ONE: 8, HOST_RAM: 8})
    assert isinstance(found, Placement)
    assert (found.elastic, found.whole, found.used) == (True, {ONE: gib(12)}, {ONE: gib(4)})
    assert place_in(6, {ONE: 8}) == Placement(reserved={ONE: gib(6)}, gpus=(ONE,))


def test_what_runs_elsewhere_needs_no_device_at_all() -> None:
    elsewhere = VramEstimate(total=ZERO, on_host=ZERO, basis="elsewhere")
    assert place_in(elsewhere, {}) == Placement(reserved={})
    assert place_in(elsewhere, {ONE: 0}, blind="lost") == Placement(reserved={})
