"""Whose memory is whose, and when what the dead held is back."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator

import pytest

from offloadd.observe.holdings import MAX_FOREIGN, Holdings, measure
from offloadd.observe.processes import read_children, tree
from offloadd.state.ids import HOST_RAM, LOCAL, DeviceId, DeviceKind
from offloadd.state.launch import Placement
from offloadd.state.observed import DeviceView, InstanceState, InstanceView
from tests.unit.plan.build import gib, ram, view

GPU = DeviceId(LOCAL, "GPU-0")
GONE = 4_000_000
"""A pid that nobody has."""


def gpu(free: float, processes: dict[int, float | None] | None = None, *, unified: bool = False) -> DeviceView:
    """A card of 24 GiB of which so many are free, and what processes hold of it."""
    sizes = {pid: None if size is None else gib(size) for pid, size in (processes or {}).items()}
    return DeviceView(
        id=GPU,
        kind=DeviceKind.NVIDIA,
        name="card",
        total=gib(24),
        free=gib(free),
        processes=None if processes is None else sizes,
        unified=unified,
    )


def devices(*views: DeviceView) -> dict[DeviceId, DeviceView]:
    return {each.id: each for each in (ram(), *views)}


def exited(name: str = "a-1", size: float = 10) -> InstanceView:
    return view(name, size, InstanceState.EXITED, placement=Placement(reserved={GPU: gib(size)}, gpus=(GPU,)))


@pytest.fixture
def family() -> Iterator[list[int]]:
    """A process and its child."""
    parent = subprocess.Popen(["sh", "-c", "sleep 1000 & wait"], start_new_session=True)
    deadline = time.monotonic() + 5
    while len(found := tree(parent.pid, read_children())) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    yield found
    os.killpg(parent.pid, 9)
    parent.wait()


def test_a_whole_tree_is_measured_and_others_are_foreign(family: list[int]) -> None:
    holdings = Holdings()
    leader, child = family
    seen = gpu(9.5, {leader: 3, child: 7, os.getpid(): 1, GONE: 3})
    holdings.keep(measure({"mine": leader}, devices(seen)))
    assert holdings.of("mine")[GPU] == gib(10)
    assert 0 < holdings.of("mine")[HOST_RAM] < gib(1)
    assert [(each.pid, each.size) for each in holdings.foreign[GPU]] == [(GONE, gib(3)), (os.getpid(), gib(1))]
    assert holdings.foreign[GPU][0].name == ""
    assert holdings.foreign[GPU][1].name
    assert HOST_RAM not in holdings.foreign


def test_the_peak_outlasts_the_use_and_goes_with_its_owner(family: list[int]) -> None:
    holdings = Holdings()
    for size in (4, 9, 2):
        holdings.keep(measure({"mine": family[0]}, devices(gpu(24 - size, {family[0]: size}))))
    assert holdings.of("mine")[GPU] == gib(2)
    assert holdings.peak_of("mine")[GPU] == gib(9)
    holdings.keep(measure({}, devices(gpu(24, {}))))
    assert holdings.of("mine") == {}
    assert holdings.peak_of("mine")[GPU] == gib(9)
    holdings.forget(())
    assert holdings.peak_of("mine") == {}


@pytest.mark.parametrize("processes", [None, {"leader": None}])
def test_what_the_driver_does_not_tell_is_not_measured(family: list[int], processes: dict[str, None] | None) -> None:
    holdings = Holdings()
    seen = gpu(14, None if processes is None else {family[0]: None})
    holdings.keep(measure({"mine": family[0]}, devices(seen)))
    assert GPU not in holdings.of("mine")


def test_only_the_largest_foreign_processes_are_listed(family: list[int]) -> None:
    holdings = Holdings()
    holdings.keep(
        measure({"mine": family[0]}, devices(gpu(1, {GONE + n: n / 10 for n in range(MAX_FOREIGN + 5)} | {GONE - 1: None})))
    )
    sizes = [each.size for each in holdings.foreign[GPU]]
    assert len(sizes) == MAX_FOREIGN
    assert sizes[0] == gib((MAX_FOREIGN + 4) / 10)


def measured(holdings: Holdings, family: list[int], size: float, others: dict[int, float] | None = None) -> InstanceView:
    """An instance that held `size` and has ended since."""
    taken = 0.5 + size + sum((others or {}).values())
    holdings.keep(measure({exited().id: family[0]}, devices(gpu(24 - taken, {family[0]: size, **(others or {})}))))
    return exited(size=size)


def test_memory_that_is_not_back_is_missing_until_it_is(family: list[int]) -> None:
    holdings = Holdings()
    gone = measured(holdings, family, 10)
    assert holdings.unreleased(view("a-1", 10, InstanceState.STOPPING)) == {}
    assert holdings.unreleased(gone) == {GPU: gib(10)}  # nobody has looked since
    holdings.keep(measure({}, devices(gpu(13.5, {}))))
    assert holdings.unreleased(gone) == {GPU: gib(10)}
    holdings.keep(measure({}, devices(gpu(17.5, {}))))
    assert holdings.unreleased(gone) == {GPU: gib(6)}
    holdings.keep(measure({}, devices(gpu(22.5, {}))))
    assert holdings.unreleased(gone) == {}  # the driver may keep a little


def test_another_that_starts_meanwhile_is_not_taken_for_it(family: list[int]) -> None:
    holdings = Holdings()
    gone = measured(holdings, family, 10, {GONE: 1})
    holdings.keep(measure({}, devices(gpu(11.5, {GONE: 12}))))  # 12 + 0.5, and all of ours is back
    assert holdings.unreleased(gone) == {}


def test_another_that_ends_meanwhile_does_not_hide_it(family: list[int]) -> None:
    holdings = Holdings()
    gone = measured(holdings, family, 10, {GONE: 10})
    holdings.keep(measure({}, devices(gpu(13.5, {}))))
    assert holdings.unreleased(gone) == {GPU: gib(10)}


def test_the_dead_that_are_still_listed_hold_what_they_are_listed_with(family: list[int]) -> None:
    holdings = Holdings()
    gone = measured(holdings, family, 10)
    holdings.keep(measure({}, devices(gpu(13.5, {family[0]: 10}))))
    assert holdings.unreleased(gone) == {GPU: gib(10)}


def test_a_last_look_at_the_dying_does_not_count(family: list[int]) -> None:
    holdings = Holdings()
    gone = measured(holdings, family, 10)
    holdings.keep(measure({gone.id: family[0]}, devices(gpu(13.5, {}))))
    assert holdings.of(gone.id)[GPU] == 0
    holdings.keep(measure({}, devices(gpu(13.5, {}))))
    assert holdings.unreleased(gone) == {GPU: gib(10)}


def test_where_sizes_are_not_told_what_is_free_must_tell(family: list[int]) -> None:
    holdings = Holdings()
    gone = measured(holdings, family, 10)
    holdings.keep(measure({}, devices(gpu(13.5, {GONE: None}))))
    assert holdings.unreleased(gone) == {GPU: gib(10)}
    holdings.keep(measure({}, devices(gpu(23.5, {GONE: None}))))
    assert holdings.unreleased(gone) == {}


def test_a_device_that_cannot_be_read_keeps_all_of_it(family: list[int]) -> None:
    holdings = Holdings()
    gone = measured(holdings, family, 10)
    holdings.keep(measure({}, devices()))
    assert holdings.unreleased(gone) == {GPU: gib(10)}
